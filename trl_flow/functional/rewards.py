"""Several rewards: their weighted sum, their advantages one by one (GDPO), and what to do where one does not apply."""

import torch
from torch import Tensor

from trl_flow.functional._checks import check_finite, check_shapes
from trl_flow.functional._tensors import STD_EPSILON, deviations, in_groups, promote, spread, with_group_means


def combine_rewards(rewards_per_func: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum over the rewards that apply to a sample, `sum_k w_k R_k`, as TRL's `GRPOTrainer` has it.

    Args:
        rewards_per_func: `(..., K)`, NaN where a reward does not apply.
        weights: `(K,)`. A reward with weight 0 is only watched: it gives a sample no reward.

    Returns:
        `(...)`; NaN where no reward with a weight applies.

    Raises:
        ValueError: `weights` is not `(K,)`.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import combine_rewards
    >>> rewards = torch.tensor([[1.0, 0.5], [2.0, float("nan")]])  # NaN: does not apply
    >>> combine_rewards(rewards, weights=torch.tensor([1.0, 2.0]))
    tensor([2., 2.])
    ```
    """
    rewards, factors = _rewards_and_weights(rewards_per_func, weights)
    return (rewards * factors).nansum(dim=-1).masked_fill((rewards.isnan() | (factors == 0)).all(dim=-1), torch.nan)


def normalize_then_sum(rewards: Tensor, weights: Tensor, num_generations: int) -> Tensor:
    """Advantages from several rewards, each of which is normalized by itself before they are added (GDPO,
    arXiv:2601.05242; TRL's `multi_objective_aggregation="normalize_then_sum"`).

        Z_k = (R_k - mean_group(R_k)) / (std_group(R_k) + 1e-4)
        S   = sum_k w_k Z_k
        A   = S / (std_batch(S) + 1e-4)

    A reward's unit and spread do not count then, only its weight. Samples that differ in their rewards but not in the
    sum of these have different advantages where the spreads differ, and one reward that is constant in a group leaves
    the others their signal. Each `Z_k` adds up to 0 in its group, so that `S` has no mean that would be subtracted. A
    group in which no reward differs has advantages of exactly 0. Standard deviations are unbiased.

    Args:
        rewards: `(N, K)` of all processes, the `num_generations` samples of a prompt contiguous; NaN where a reward
            does not apply to a sample. Such a sample is left out of that reward's mean and standard deviation.
        weights: `(K,)`. A reward with weight 0 has no part in anything.
        num_generations: samples per prompt.

    Returns:
        `(N,)`; 0 for samples to which no reward applies, which are also left out of the batch's standard deviation.

    Raises:
        ValueError: `rewards` is not `(N, K)`, does not split into groups, or holds infinity (this check waits for an
            accelerator); `weights` is not `(K,)`.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import normalize_then_sum
    >>> rewards = torch.tensor([[0.0, 100.0], [1.0, 300.0]])  # one group; the units differ
    >>> normalize_then_sum(rewards, torch.tensor([1.0, 1.0]), num_generations=2)
    tensor([-0.7071,  0.7071])
    ```
    """
    check_shapes("(N, K)", rewards=rewards)
    values, factors = _rewards_and_weights(rewards, weights)
    grouped = in_groups("rewards", values, num_generations)[:, :, factors != 0]
    check_finite("rewards", rewards, allow_nan=True)
    centered = deviations(grouped)
    normalized = centered / (spread(centered) + STD_EPSILON)
    total = (normalized * factors[factors != 0]).nansum(dim=2).masked_fill(normalized.isnan().all(dim=2), torch.nan)
    return (total / (spread(total.view(1, -1)) + STD_EPSILON)).nan_to_num(nan=0.0).view(-1)


def fill_missing(rewards: Tensor, num_generations: int) -> Tensor:
    """Puts the group's mean in place of a NaN, for `cumulative_values`, which needs a number at every step.

    At its group's mean a sample has no relative advantage and leaves the others' means as they are. One without a
    reward at any step stays NaN: `dual_advantages` gives it 0.

    Args:
        rewards: `(N, ...)`, such as instant rewards `(N, T)`; the `num_generations` samples of a prompt contiguous.
        num_generations: samples per prompt.

    Returns:
        `(N, ...)`; 0 where the whole group is NaN, but for samples without any reward.

    Raises:
        ValueError: `rewards` does not split into groups.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import fill_missing
    >>> fill_missing(torch.tensor([[1.0, 3.0], [2.0, float("nan")]]), num_generations=2)
    tensor([[1., 3.],
            [2., 3.]])
    ```
    """
    filled = with_group_means(in_groups("rewards", rewards, num_generations)).flatten(0, 1)
    return filled.masked_fill(rewards.isnan().flatten(1).all(dim=1).view(-1, *[1] * (rewards.ndim - 1)), torch.nan)


def frac_zero_std(rewards: Tensor, num_generations: int) -> Tensor:
    """The share of groups that teach nothing, because in none of their rewards two samples differ.

    Args:
        rewards: `(N,)`, or `(N, K)` of several rewards with an advantage each, as for `normalize_then_sum`; NaN, where
            a reward does not apply, differs from nothing.
        num_generations: samples per prompt.

    Returns:
        A scalar tensor.

    Raises:
        ValueError: `rewards` does not split into groups.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import frac_zero_std
    >>> frac_zero_std(torch.tensor([1.0, 1.0, 0.0, 2.0]), num_generations=2)
    tensor(0.5000)
    ```
    """
    grouped = in_groups("rewards", rewards[:, None].flatten(1), num_generations)
    highest, lowest = grouped.nan_to_num(nan=-torch.inf).amax(dim=1), grouped.nan_to_num(nan=torch.inf).amin(dim=1)
    return (highest <= lowest).all(dim=1).to(grouped.dtype).mean()


def _rewards_and_weights(rewards: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    if weights.shape != rewards.shape[-1:]:
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)} and weights {tuple(weights.shape)}: expected one column and "
            "one weight for each reward, (..., K) and (K,)."
        )
    return promote(rewards, weights.to(rewards.device))
