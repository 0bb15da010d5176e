"""Which samples of a group are trained on: those whose rewards differ most."""

import torch
from torch import Tensor

from trl_flow.functional._checks import check_finite, check_shapes
from trl_flow.functional._tensors import in_groups, with_group_means


def max_variance_subset(rewards: Tensor, num_generations: int, num_kept: int) -> Tensor:
    """The `num_kept` samples of each group whose rewards have the largest variance (PODS, arXiv:2504.13818, Algorithm
    2): the `k` lowest and the `num_kept - k` highest, for some `k`. Of several such `k` the nearest to half of them is
    taken.

    Args:
        rewards: `(N,)`, the `num_generations` samples of a prompt contiguous. NaN, where no reward applies, counts as
            the group's mean, and so is among the first to be left out.
        num_generations: samples per prompt, `G`.
        num_kept: of these, at least 1.

    Returns:
        Indices of the samples, ascending, int64, `(N / G * num_kept,)`.

    Raises:
        ValueError: `rewards` is not `(N,)`, does not split into groups, or holds infinity (this check waits for an
            accelerator); `num_kept` is not from 1 to `num_generations`.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import max_variance_subset
    >>> max_variance_subset(torch.tensor([0.5, 0.9, 0.1, 0.4]), num_generations=4, num_kept=2)
    tensor([1, 2])
    ```
    """
    check_shapes("(N,)", rewards=rewards)
    check_finite("rewards", rewards, allow_nan=True)
    if not 1 <= num_kept <= num_generations:
        raise ValueError(f"num_kept is {num_kept}, but must be from 1 to num_generations, {num_generations}.")
    filled = with_group_means(in_groups("rewards", rewards.double(), num_generations))
    values, order = filled.sort(dim=1, stable=True)
    best = torch.full((len(values),), -1.0, dtype=values.dtype, device=values.device)
    kept = order[:, :num_kept]
    for lowest in sorted(range(num_kept + 1), key=lambda k: abs(2 * k - num_kept)):
        places = [*range(lowest), *range(num_generations - num_kept + lowest, num_generations)]
        variance = values[:, places].var(dim=1, correction=0)
        # More than rounding: equal rewards give equal choices everywhere
        better = variance > best + 1e-9 * best.abs()
        best = torch.where(better, variance, best)
        kept = torch.where(better[:, None], order[:, places], kept)
    first = torch.arange(len(values), device=values.device)[:, None] * num_generations
    return (kept + first).sort(dim=1).values.flatten()
