"""VGPO: a value for every step in place of one reward at the end, and advantages that keep its absolute size."""

import torch

from trl_flow.functional._checks import check_finite, check_groups, check_number, promote
from trl_flow.functional.grpo import STD_EPSILON, centre, unbiased_std


def cumulative_values(instant_rewards: torch.Tensor, discount: float) -> torch.Tensor:
    """The discounted sum of the rewards from each step on to the end (VGPO Eq. 11).

        Q_i = R_i + gamma Q_{i+1},  Q_{T-1} = R_{T-1}

    Args:
        instant_rewards: `(B, T)`, the reward of the image projected from after each step; column 0 is the first,
            noisiest step.
        discount: `gamma`, at least 0 and below 1; 0 gives the instant rewards.

    Returns:
        `(B, T)`.

    Raises:
        ValueError: `instant_rewards` is not `(B, T)`; `discount` is out of its domain.
    """
    _check_steps("instant_rewards", instant_rewards)
    check_number("discount", discount, 0)
    if discount >= 1:
        raise ValueError(f"discount is {discount!r}: it must be below 1.")
    (rewards,) = promote(instant_rewards)
    columns = [rewards[:, -1]]
    for step in range(rewards.shape[1] - 2, -1, -1):
        columns.append(rewards[:, step] + discount * columns[-1])
    return torch.stack(columns[::-1], dim=1)


def value_weights(values: torch.Tensor) -> torch.Tensor:
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
    """
    _check_steps("values", values)
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


def dual_advantages(values: torch.Tensor, num_generations: int, *, scale: float) -> torch.Tensor:
    """Adaptive dual advantages (VGPO Eq. 14), the step weights of Eq. 12 included.

        A_t = omega_t [(1 + alpha) Q_t - mean_group(Q_t)] / std_group(Q_t),  alpha = k std_group(Q_t)

    computed as `omega_t [(Q_t - mean) / (std + 1e-4) + k Q_t]`: with a standard deviation of 0 the printed form is
    `0 / 0`, while its limit, `omega_t k Q_t`, is what the paper is after. Group statistics are per step; the standard
    deviation is unbiased and the 1e-4 is TRL's, as in `group_advantages`.

    Args:
        values: `(B, T)`, from `cumulative_values`, never negative; the `num_generations` samples of a prompt are
            contiguous.
        num_generations: samples per prompt.
        scale: `k`, at least 0; 0 leaves the relative part alone.

    Returns:
        `(B, T)`.

    Raises:
        ValueError: as `value_weights`; `values` does not split into groups; `scale` is negative.
    """
    check_number("scale", scale, 0)
    _check_steps("values", values)
    check_groups("values", values, num_generations)
    weights = value_weights(values)
    (q,) = promote(values)
    grouped = q.view(-1, num_generations, q.shape[1])
    relative = (centre(grouped) / (unbiased_std(grouped) + STD_EPSILON)).view_as(q)
    return weights * (relative + scale * q)


def _check_steps(name: str, values: torch.Tensor) -> None:
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}: one row per sample and one column per step, (B, T)."
        )
