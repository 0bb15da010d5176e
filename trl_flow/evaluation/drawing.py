"""Images of prompts as the trainer evaluates them: fixed seeds, no noise on the way, one code for every family."""

import functools
from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from trl_flow.backbones import Backbone, get_backbone
from trl_flow.backbones.contract import encoded, latent_shape, scheduled
from trl_flow.backbones.passed_in import check_weights
from trl_flow.backbones.prompt_length import warn_of_long_prompts
from trl_flow.backbones.settings import check_settings, with_own_settings
from trl_flow.dynamics import make_dynamics
from trl_flow.images import Sample, to_rgb
from trl_flow.quiet import shows_bars
from trl_flow.rollout import RandomStream, StepPlan, decode, draw_noise, rollout, sample_generator


Condition = dict[str, torch.Tensor]


def draw_batch(
    backbone: Backbone,
    model: torch.nn.Module,
    condition: Condition,
    negative_condition: Condition | None,
    *,
    seed: int,
    indices: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    on_step: Callable[[int], None] | None = None,
    predictions: list[torch.Tensor] | None = None,
) -> list[Sample]:
    """
    Draws one batch along the ODE (for U-Nets by deterministic DDIM): the one way in which evaluations draw.

    `model` is the backbone's trained module, possibly wrapped; the conditions are of `B` prompts, on its device
    (without a negative one there is no guidance by one). `indices` are those of the `B` images in the whole set: an
    image's noise depends on `seed`, which is non-negative, and its index alone. `on_step` is called with the index of
    each step before it is taken. `predictions` gets the clean latents `(B, ...)` that are predicted before each step.
    """
    generators = [sample_generator(seed, RandomStream.EVALUATION, index) for index in indices]
    # No step is stochastic, so the kind and the level of the noise have no effect
    dynamics = make_dynamics(scheduled(backbone, num_inference_steps), sde_type="flow", noise_level=0.0)

    def predict(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        conditions = (condition, negative_condition)
        prediction = backbone.guided_prediction(model, latents, timestep, *conditions, guidance_scale)
        if predictions is not None:
            predictions.append(dynamics.pred_original_sample(prediction, latents, len(predictions)))
        return prediction

    noise = draw_noise(latent_shape(backbone), generators, backbone.device)
    latents = rollout(predict, dynamics, noise, StepPlan(), on_step=on_step).final
    return decode(backbone, latents)


def draw(
    pipeline: DiffusionPipeline | Backbone,
    prompts: Sequence[str],
    *,
    seed: int,
    num_images_per_prompt: int = 1,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_scale_2: float | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    max_sequence_length: int | None = None,
    images: Sequence[Image.Image] | None = None,
    batch_size: int = 16,
    first_index: int = 0,
    progress: str | None = None,
) -> list[Sample]:
    """
    Draws images as the trainer's `evaluate` does with the same settings.

    Each image has a generator of its own, which depends on `seed` and on the image's index alone. The images are thus
    the same for every `batch_size`, up to the rounding of floating point, which differs between batch shapes and can
    change a pixel by one level of 255: compare runs of the same `batch_size`.

    Args:
        pipeline: one of a supported family, or a backbone, which has its own height, width, `num_frames`,
            `max_sequence_length` and `guidance_scale_2`.
        prompts: each is encoded once, by itself.
        seed: non-negative.
        num_images_per_prompt: `K`.
        num_inference_steps, guidance_scale, guidance_scale_2, negative_prompt, height, width, num_frames,
            max_sequence_length: as in the trainer's config; `None` is the pipeline's own default. Whether guidance
            runs the negative prompt is the family's rule.
        images: one for each prompt, for pipelines that edit images.
        batch_size: images at a time.
        first_index: index of the first image, where these are a part of a larger set.
        progress: what the progress bar is called; `None` shows none.

    Returns:
        `list[Sample]`: `len(prompts) * K` images (or videos, as lists of frames), those of one prompt next to each
            other.

    Raises:
        ValueError: if the family is not supported, `images` do not fit, a backbone is given with a size, or a setting
            has no effect.
    """
    sizes = {"height": height, "width": width, "max_sequence_length": max_sequence_length}
    own = sizes | {"num_frames": num_frames, "guidance_scale_2": guidance_scale_2}
    if isinstance(pipeline, Backbone) and any(value is not None for value in own.values()):
        raise ValueError(f"{', '.join(own)} are the backbone's own. Leave them out.")
    backbone = pipeline if isinstance(pipeline, Backbone) else get_backbone(pipeline, **own)
    check_weights(backbone.pipeline)
    if backbone.takes_image and images is None:
        raise ValueError(f"{type(backbone.pipeline).__name__} draws from an image. Give one for each prompt.")
    if images is not None and not backbone.takes_image:
        raise ValueError(f"{type(backbone.pipeline).__name__} draws from no image here. Leave `images` out.")
    if images is not None and len(images) != len(prompts):
        raise ValueError(f"There are {len(images)} images for {len(prompts)} prompts. Give one image for each prompt.")
    given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    sampling = with_own_settings(backbone, given)
    given |= {"negative_prompt": negative_prompt, "guidance_scale_2": guidance_scale_2, **sizes}
    check_settings(backbone, given, [sampling["guidance_scale"]])
    warn_of_long_prompts(backbone, [*prompts, negative_prompt or ""], "those to draw")
    number, options = num_images_per_prompt, {"batch_size": batch_size, "first_index": first_index}
    options |= {"negative_prompt": negative_prompt, "images": images, "progress": progress, **sampling}
    return draw_images(backbone, prompts, seed=seed, num_images_per_prompt=number, **options)


def draw_images(
    backbone: Backbone,
    prompts: Sequence[str],
    *,
    seed: int,
    num_images_per_prompt: int,
    num_inference_steps: int,
    guidance_scale: float,
    negative_prompt: str | None,
    images: Sequence[Image.Image] | None,
    batch_size: int,
    first_index: int,
    progress: str | None = None,
) -> list[Sample]:
    """[`draw`] of what has been checked."""

    # Holds the conditions of two batches: rows are drawn in order, and the negative prompt is in every batch
    @functools.lru_cache(maxsize=2 * batch_size + 1)
    @torch.no_grad()
    def encode(prompt: str, row: int | None) -> Condition:
        return encoded(backbone, prompt, *([] if row is None else [to_rgb(images[row])]))

    def conditions(texts: Sequence[str], rows: Sequence[int]) -> Condition:
        each = [encode(text, None if images is None else row) for text, row in zip(texts, rows, strict=True)]
        return {name: torch.cat([condition[name] for condition in each]) for name in each[0]}

    drawn: list[Sample] = []
    guided = backbone.uses_guidance(guidance_scale)
    total = len(prompts) * num_images_per_prompt
    with tqdm(total=total, desc=progress, unit="image", disable=progress is None or not shows_bars()) as bar:
        for first in range(0, total, batch_size):
            batch = range(total)[first : first + batch_size]
            rows = [i // num_images_per_prompt for i in batch]
            drawn += draw_batch(
                backbone,
                backbone.model,
                conditions([prompts[row] for row in rows], rows),
                conditions([negative_prompt or ""] * len(rows), rows) if guided else None,
                seed=seed,
                indices=[first_index + i for i in batch],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
            )
            bar.update(len(batch))
    return drawn
