"""VGPO: a value for every step instead of one reward at the end, and advantages that keep its absolute size."""

import torch
from torch import Tensor

from trl_flow.functional._checks import check_finite, check_number, check_shapes
from trl_flow.functional._tensors import STD_EPSILON, Number, deviations, in_groups, promote, spread


def cumulative_values(instant_rewards: Tensor, discount: float) -> Tensor:
    """The discounted sum of the rewards from each step on to the end (VGPO Eq. 11).

        Q_i = R_i + gamma Q_{i+1},  Q_{T-1} = R_{T-1}

    Args:
        instant_rewards: `(B, T)`, the reward of the image projected from after each step; column 0 is the first,
            noisiest step. A NaN makes the values up to its step NaN, see `fill_missing`.
        discount: `gamma`, at least 0 and below 1; 0 gives the instant rewards.

    Returns:
        `(B, T)`.

    Raises:
        ValueError: `instant_rewards` is not `(B, T)`; `discount` is out of its domain.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import cumulative_values
    >>> instant_rewards = torch.tensor([[0.2, 0.4, 1.0]])
    >>> cumulative_values(instant_rewards, discount=0.5)
    tensor([[0.6500, 0.9000, 1.0000]])
    ```
    """
    check_shapes("(B, T)", instant_rewards=instant_rewards)
    check_number("discount", discount, 0)
    if discount >= 1:
        raise ValueError(f"discount is {discount!r}: it must be below 1.")
    (rewards,) = promote(instant_rewards)
    columns = [rewards[:, -1]]
    for step in range(rewards.shape[1] - 2, -1, -1):
        columns.append(rewards[:, step] + discount * columns[-1])
    return torch.stack(columns[::-1], dim=1)


def value_weights(values: Tensor) -> Tensor:
    """How much each step of a sample counts, `omega_t = Q_t / mean_t(Q_t)` (VGPO Eq. 12).

    The weights of a sample average to 1 and lie in `[0, T]`. A sample whose values are all 0 has weights of 1: none of
    its steps is worth more than another.

    Args:
        values: `(B, T)`, from `cumulative_values`, never negative.

    Returns:
        `(B, T)`.

    Raises:
        ValueError: `values` is not `(B, T)`, or holds NaN, infinity or a negative value (these checks wait for an
            accelerator).

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import value_weights
    >>> value_weights(torch.tensor([[0.65, 0.90, 1.0], [0.0, 0.0, 0.0]]))
    tensor([[0.7647, 1.0588, 1.1765],
            [1.0000, 1.0000, 1.0000]])
    ```
    """
    check_shapes("(B, T)", values=values)
    check_finite("values", values)
    (q,) = promote(values)
    if bool((q < 0).any()):
        sample, step = divmod(int(q.argmin()), q.shape[1])
        raise ValueError(
            f"values go down to {q.min().item():g} (sample {sample}, step {step}): a step's weight is its share of "
            "the sample's values, which has no meaning when they are negative or differ in sign. Add an offset to "
            "the reward function, so that no reward is below 0."
        )
    # Scaling by the row's largest value first keeps the mean from overflowing or underflowing.
    largest = q.amax(dim=1, keepdim=True)
    shares = torch.where(largest > 0, q / largest, torch.ones_like(q))
    return shares / shares.mean(dim=1, keepdim=True)


def dual_advantages(values: Tensor, num_generations: int, *, scale: Number) -> Tensor:
    """Adaptive dual advantages (VGPO Eq. 14), the step weights of Eq. 12 included.

        A_t = omega_t [(1 + alpha) Q_t - mean_group(Q_t)] / std_group(Q_t),  alpha = k std_group(Q_t)

    computed as `omega_t [(Q_t - mean) / (std + 1e-4) + k Q_t]`: with a standard deviation of 0 the printed form is
    `0 / 0`, while its limit, `omega_t k Q_t`, is what the paper is after. Group statistics are per step; the standard
    deviation is unbiased and the 1e-4 is TRL's, as in `group_advantages`.

    Args:
        values: `(B, T)`, from `cumulative_values`, never negative; the `num_generations` samples of a prompt are
            contiguous. A sample with NaN among its values is left out of all means and standard deviations.
        num_generations: samples per prompt.
        scale: `k`, at least 0, a number or a tensor `(T,)` with one for each step; 0 leaves the relative part alone.

    Returns:
        `(B, T)`; 0 for samples with NaN, whatever `k`.

    Raises:
        ValueError: `values` is not `(B, T)`, does not split into groups, or holds infinity or a negative value (these
            checks wait for an accelerator); `scale` is negative or has another shape.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import dual_advantages
    >>> values = torch.tensor([[1.0, 1.0], [1.0, 1.0]])  # a group in which no image is better
    >>> dual_advantages(values, num_generations=2, scale=0.0)
    tensor([[0., 0.],
            [0., 0.]])
    >>> dual_advantages(values, num_generations=2, scale=0.1)  # the absolute part is left
    tensor([[0.1000, 0.1000],
            [0.1000, 0.1000]])
    ```
    """
    relative, absolute = _dual_parts(values, num_generations, scale)
    return relative + absolute


def value_share(values: Tensor, num_generations: int, *, scale: Number) -> Tensor:
    """The share of the absolute part in `dual_advantages`; it rises towards 1 as the samples of a group become alike.

        share = sum |omega k Q| / (sum |omega k Q| + sum |omega (Q - mean) / (std + 1e-4)|)

    Args:
        values, num_generations, scale: as for `dual_advantages`.

    Returns:
        A scalar tensor; 0 where both parts are 0.

    Raises:
        ValueError: as `dual_advantages`.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import value_share
    >>> value_share(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), num_generations=2, scale=0.1)
    tensor(1.)
    ```
    """
    relative, absolute = (part.abs().sum() for part in _dual_parts(values, num_generations, scale))
    return absolute / (absolute + relative).clamp(min=torch.finfo(relative.dtype).tiny)


def _dual_parts(values: Tensor, num_generations: int, scale: Number) -> tuple[Tensor, Tensor]:
    """`omega (Q - mean) / (std + 1e-4)` and `omega k Q`, both `(B, T)` and 0 for samples with NaN."""
    check_shapes("(B, T)", values=values)
    scale = torch.as_tensor(scale, dtype=promote(values)[0].dtype, device=values.device)
    if scale.shape not in ((), values.shape[1:]):
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}: it must be a number, or have one for each of the "
            f"{values.shape[1]} steps."
        )
    check_number("scale", scale.min().item(), 0)
    missing = values.isnan().any(dim=1, keepdim=True)
    weights = value_weights(values.masked_fill(missing, 0.0))
    centered = deviations(in_groups("values", values.masked_fill(missing, torch.nan), num_generations))
    relative = (centered / (spread(centered) + STD_EPSILON)).flatten(0, 1)
    return tuple((weights * part).masked_fill(missing, 0.0) for part in (relative, scale * promote(values)[0]))
