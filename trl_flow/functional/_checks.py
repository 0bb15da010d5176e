"""What the functions here share: the dtype they compute in, and the refusal of shapes and values that do not fit."""

import math

import torch


def promote(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Casts all to one dtype: float64 if any of them is float64, float32 otherwise."""
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return tuple(tensor.to(dtype) for tensor in tensors)


def check_same_shape(first: str, a: torch.Tensor, second: str, b: torch.Tensor) -> None:
    """Raises `ValueError` unless `a` and `b` have the same shape: broadcasting between them would hide a mistake."""
    if a.shape != b.shape:
        raise ValueError(
            f"{first} has shape {tuple(a.shape)} and {second} has shape {tuple(b.shape)}: they must be the same."
        )


def check_latents(name: str, latents: torch.Tensor) -> None:
    """Raises `ValueError` unless `latents` has a batch dimension and at least one other."""
    if latents.ndim < 2:
        raise ValueError(
            f"{name} has shape {tuple(latents.shape)}: a batch dimension and at least one more are needed, (B, ...)."
        )


def check_vector(name: str, value: torch.Tensor) -> None:
    """Raises `ValueError` unless `value` has one dimension, one number per sample."""
    if value.ndim != 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: one number per sample is needed, shape (B,).")


def check_number(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises `ValueError` unless the Python number `value` is finite and in `[low, high]`."""
    if not (math.isfinite(value) and low <= value <= high):
        bound = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} is {value!r}: it must be a finite number, {bound}.")


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises `ValueError` if a value is NaN or infinite. Waits for an accelerator: fit for once a batch."""
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        index = tuple((~finite).nonzero()[0].tolist())
        raise ValueError(
            f"{name} holds {int((~finite).sum())} value(s) that are NaN or infinite, the first, "
            f"{tensor[index].item()}, at index {index}. Leave such samples out, or give them a number, before calling."
        )


def check_groups(name: str, values: torch.Tensor, num_generations: int) -> None:
    """Raises `ValueError` unless the first dimension of `values` splits into groups of `num_generations`."""
    if num_generations < 1:
        raise ValueError(f"num_generations is {num_generations}: a group has at least one sample.")
    if values.shape[0] == 0 or values.shape[0] % num_generations != 0:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}: its {values.shape[0]} samples do not split into whole groups of "
            f"num_generations={num_generations}. Pass all samples of every prompt, the groups one after the other."
        )


def per_sample(name: str, value: float | torch.Tensor, latents: torch.Tensor, reference: str) -> torch.Tensor:
    """Gives `value`, a Python number or a tensor of shape `()` or `(B,)`, as `(B,)` in the dtype of `latents`.

    `latents` is any tensor whose first dimension is B, and `reference` what the message calls it.
    """
    batch = latents.shape[0]
    if not isinstance(value, torch.Tensor):
        return torch.full((batch,), float(value), dtype=latents.dtype, device=latents.device)
    if value.shape not in ((), (batch,)):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, which does not fit {reference} of shape {tuple(latents.shape)}: "
            f"it must be one number per sample, shape ({batch},), or a scalar."
        )
    return value.to(device=latents.device, dtype=latents.dtype).expand(batch)


def over_latent(value: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Reshapes `(B,)` to `(B, 1, ..., 1)`, so that it multiplies `(B, ...)` sample by sample."""
    return value.view(-1, *[1] * (latents.ndim - 1))


def latent_mean(latents: torch.Tensor) -> torch.Tensor:
    """Mean over all dimensions but the first: `(B, ...)` to `(B,)`."""
    return latents.flatten(1).mean(dim=1)


def is_free_to_read(tensor: torch.Tensor) -> bool:
    """Whether the tensor's values can be looked at without making an accelerator wait."""
    return tensor.device.type == "cpu"
