"""What a backbone's methods must return: a mistake in one of your own is named, before it fails somewhere inside."""

from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from trl_flow.backbones.schedules import DDIMSchedule, Schedule
from trl_flow.images import Sample


if TYPE_CHECKING:
    from trl_flow.backbones.base import Backbone


def _refused(backbone: "Backbone", method: str, returned: Any, expected: str) -> TypeError:
    kind = type(returned).__name__
    if isinstance(returned, torch.Tensor):
        kind += f" of shape {tuple(returned.shape)}"
    elif isinstance(returned, list | tuple):
        kind += f" of {len(returned)} ({', '.join(dict.fromkeys(map(_kind, returned)))})"
    elif isinstance(returned, dict):
        shown = {name: getattr(value, "shape", type(value).__name__) for name, value in returned.items()}
        kind += f" of { {name: tuple(v) if isinstance(v, torch.Size) else v for name, v in shown.items()} }"
    return TypeError(f"{type(backbone).__name__}.{method} returned a {kind}, but must return {expected}.")


def _kind(value: Any) -> str:
    inside = f" of {', '.join(dict.fromkeys(type(v).__name__ for v in value))}" if isinstance(value, list) else ""
    return type(value).__name__ + inside


def encoded(backbone: "Backbone", prompt: str, *image: Image.Image) -> dict[str, torch.Tensor]:
    """The condition of one prompt, and of the image to be edited. Raises `TypeError` if it is none, and
    `FloatingPointError` if it has NaN. (A mask may be infinite.)"""
    condition = backbone.encode_prompt(prompt, *image)
    values = condition.values() if isinstance(condition, dict) else [None]
    if not all(isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == 1 for value in values):
        expected = "a dictionary of tensors whose first dimension is the batch, of size 1"
        raise _refused(backbone, "encode_prompt", condition, expected)
    for name, value in condition.items():
        if value.isnan().any():
            raise FloatingPointError(
                f"The condition {name!r} of the prompt {prompt!r} has NaN: what encodes it overflows in "
                f"{value.dtype}. Load the text encoders in bfloat16 or float32 (of an image to be edited "
                "the VAE, in float32)."
            )
    return condition


def _is_sample(value: Any, *, video: bool) -> bool:
    frames = value if video else [value]
    return isinstance(frames, list) and len(frames) > 0 and all(isinstance(frame, Image.Image) for frame in frames)


def decoded(backbone: "Backbone", latents: torch.Tensor) -> list[Sample]:
    """Images of final latents `(B, ...)`, or videos as lists of their frames, as the backbone's `frames_per_second`
    says. Raises `TypeError` if they are none, and `FloatingPointError` if the latents are not finite."""
    if not latents.isfinite().all():
        raise FloatingPointError(
            f"The {backbone.component}, in {backbone.dtype}, gave NaN or infinite latents. Use bfloat16 or float32. "
            "If it has been trained, it has diverged: take an earlier checkpoint."
        )
    samples, video = backbone.decode(latents), backbone.frames_per_second is not None
    is_list = isinstance(samples, list) and len(samples) == len(latents)
    if not is_list or not all(_is_sample(sample, video=video) for sample in samples):
        expected = f"a list of PIL images, one for each of {len(latents)} latents"
        expected += " (of videos lists of them; its frames_per_second, which is None, then says how fast they play)"
        if video:
            expected = f"a list of videos, each a list of PIL images, one for each of {len(latents)} latents"
        raise _refused(backbone, "decode", samples, expected)
    return samples


def check_prediction(backbone: "Backbone", prediction: Any, latents: torch.Tensor) -> None:
    """Raises `TypeError` unless `prediction` is a tensor of the latents' shape."""
    if not isinstance(prediction, torch.Tensor) or prediction.shape != latents.shape:
        expected = f"one tensor of the latents' shape, here {tuple(latents.shape)}"
        raise _refused(backbone, "predict", prediction, expected)


def latent_shape(backbone: "Backbone") -> tuple[int, ...]:
    """The shape of one image's latents. Raises `TypeError` if it is none."""
    shape = backbone.latent_shape()
    if not isinstance(shape, tuple) or not all(isinstance(size, int) for size in shape):
        expected = "the shape of one image's latents, a tuple of whole numbers without the batch"
        raise _refused(backbone, "latent_shape", shape, expected)
    return shape


def scheduled(backbone: "Backbone", num_inference_steps: int) -> Schedule | DDIMSchedule:
    """The noise levels of so many steps. Raises `TypeError` if they are none."""
    schedule = backbone.schedule(num_inference_steps)
    if not isinstance(schedule, Schedule | DDIMSchedule):
        expected = "a Schedule (a DDIMSchedule if it predicts noise), as Schedule.of(scheduler, device) makes one"
        raise _refused(backbone, "schedule", schedule, f"{expected} after scheduler.set_timesteps")
    return schedule
