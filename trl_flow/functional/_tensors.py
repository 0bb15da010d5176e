"""What the functions here share: the dtype they compute in, numbers per sample, and statistics of groups."""

import torch
from torch import Tensor

from trl_flow.functional._checks import check_on_cpu


Number = float | Tensor  # a Python number, a scalar tensor or one number per sample, `(B,)`

# Added to every standard deviation that divides an advantage. TRL's GRPOTrainer has the same 1e-4.
STD_EPSILON = 1e-4


def promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts all to one dtype: float64 if any of them is float64, float32 otherwise."""
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return tuple(tensor.to(dtype) for tensor in tensors)


def per_sample(name: str, value: Number, like: Tensor) -> Tensor:
    """Gives `value`, a number or a tensor of shape `()` or `(B,)`, as `(B,)` in the dtype of `like`, `(B, ...)`.

    Raises:
        ValueError: `value` has another shape.
    """
    value = value.to(like) if isinstance(value, Tensor) else like.new_full((), value)
    if value.shape not in ((), like.shape[:1]):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}: expected one number per sample of the shape {tuple(like.shape)}, "
            f"({like.shape[0]},), or a scalar."
        )
    return value.expand(like.shape[0])


def noise_scale(std: Number, like: Tensor) -> Tensor:
    """`per_sample` for the standard deviation of a step; one on the CPU must be above 0."""
    scale = per_sample("std", std, like)
    check_on_cpu(
        scale > 0,
        "it must be above 0. A deterministic step (an ODE step, noise_level 0, the last step of CPS) has no "
        "log-probability, ratio or KL: leave it out of the trained steps, or sample it with noise.",
        std=scale,
    )
    return scale


def over_latent(value: Tensor, latents: Tensor) -> Tensor:
    """Reshapes `(B,)` to `(B, 1, ..., 1)`, so that it multiplies `(B, ...)` sample by sample."""
    return value.view(-1, *[1] * (latents.ndim - 1))


def latent_mean(latents: Tensor) -> Tensor:
    """Mean over all dimensions but the first: `(B, ...)` to `(B,)`."""
    return latents.flatten(1).mean(dim=1)


def in_groups(name: str, values: Tensor, num_generations: int) -> Tensor:
    """Splits `(N, ...)` into groups, `(P, G, ...)`, in float32 or float64.

    Raises:
        ValueError: the samples do not split into whole groups of `num_generations`.
    """
    number = values.shape[0]
    if num_generations < 1 or number == 0 or number % num_generations != 0:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}: its {number} samples do not split into whole groups of "
            f"num_generations={num_generations}. Pass all samples of every prompt, the groups one after the other."
        )
    return promote(values)[0].unflatten(0, (-1, num_generations))


def with_group_means(grouped: Tensor) -> Tensor:
    """The group's mean in place of each NaN, `(P, G, ...)`; 0 where a whole group is NaN."""
    mean = grouped.nanmean(dim=1, keepdim=True).nan_to_num(nan=0.0)
    return torch.where(grouped.isnan(), mean, grouped)


def deviations(grouped: Tensor) -> Tensor:
    """Subtracts each group's mean over what is not NaN, `(P, G, ...)`; exactly 0 where a group's values are equal."""
    # Relative to one of them first: the mean of equal numbers may differ from them in the last digit, and division by
    # 1e-4 would make that a signal.
    shifted = grouped - grouped.nan_to_num(nan=-torch.inf).amax(dim=1, keepdim=True)
    return shifted - shifted.nanmean(dim=1, keepdim=True)


def spread(deviations: Tensor) -> Tensor:
    """Each group's unbiased standard deviation, `(P, G, ...)` to `(P, 1, ...)`, NaN left out; 0 for groups of one."""
    number = (~deviations.isnan()).sum(dim=1, keepdim=True)
    return (deviations.square().nansum(dim=1, keepdim=True) / (number - 1).clamp(min=1)).sqrt()
