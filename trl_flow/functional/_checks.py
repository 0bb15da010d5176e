"""What the functions here refuse: shapes that do not fit, and values that are free to look at."""

import math

from torch import Tensor


def check_shapes(form: str, **tensors: Tensor | None) -> None:
    """Raises `ValueError` unless all `tensors` (None aside) have one shape of the form `"(B,)"`, `"(B, ...)"`, ..."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    dimensions, (shape, *others) = form.strip("(),").split(", "), set(shapes.values())
    fits = len(shape) >= len(dimensions) if "..." in dimensions else len(shape) == len(dimensions)
    if others or not fits:
        listed = " and ".join(f"{name} has shape {shape}" for name, shape in shapes.items())
        more = ", a batch dimension and at least one more" if "..." in dimensions else ""
        raise ValueError(f"{listed}: expected {'one shape for all, ' if others else ''}{form}{more}.")


def check_number(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises `ValueError` unless the Python number `value` is finite and in `[low, high]`."""
    if not (math.isfinite(value) and low <= value <= high):
        bound = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} is {value!r}: it must be a finite number, {bound}.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(map(repr, choices))}.")


def check_on_cpu(holds: Tensor, rule: str, **values: Tensor) -> None:
    """Raises `ValueError` where `holds` is False on the CPU; an accelerator is not made to wait for such a check."""
    if holds.device.type == "cpu" and not bool(holds.all()):
        listed = " and ".join(f"{name} is {value.tolist()}" for name, value in values.items())
        raise ValueError(f"{listed}: {rule}")


def check_finite(name: str, tensor: Tensor, *, allow_nan: bool = False) -> None:
    """Raises `ValueError` if a value is infinite, or NaN. Waits for an accelerator: fit for once a batch."""
    faulty = tensor.isinf() if allow_nan else ~tensor.isfinite()
    if bool(faulty.any()):
        index = tuple(faulty.nonzero()[0].tolist())
        raise ValueError(
            f"{name} holds {int(faulty.sum())} value(s) that are {'' if allow_nan else 'NaN or '}infinite, the first, "
            f"{tensor[index].item()}, at index {index}. Leave such samples out, or give them a number, before calling."
        )
