"""What every family must show, on a tiny pipeline of its own: each check is one claim, called by a family's test."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open
from tiny_training import PROMPTS, distance, prompts, tiny_lora, tiny_trainer, trained_weights

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer
from trl_flow.backbones import Backbone, get_backbone
from trl_flow.rollout import Dynamics, draw_noise, rollout, sample_generator


STEPS = 3
Size = tuple[int, int]  # height and width in pixels


def _plain_call(backbone: Backbone, noise: torch.Tensor, guidance_scale: float) -> dict:
    return {"latents": noise, "guidance_scale": guidance_scale}


@dataclass(frozen=True)
class Family:
    """
    One family of pipelines.

    Attributes:
        make_pipeline (`Callable`): makes its tiny pipeline, with the same random weights at each call.
        size (`tuple[int, int]`): height and width for training.
        max_sequence_length (`int`): prompt tokens.
        call (`Callable`): `call(backbone, noise, guidance_scale)` are the arguments of the pipeline's own call for
            that noise, in the backbone's form, and that guidance.
        guidance_scale (`float`): for training.
    """

    make_pipeline: Callable[[], DiffusionPipeline]
    size: Size = (16, 16)
    max_sequence_length: int = 16
    call: Callable[[Backbone, torch.Tensor, float], dict] = _plain_call
    guidance_scale: float = 2.0

    def backbone(self, size: Size | None = None, pipeline: DiffusionPipeline | None = None) -> Backbone:
        height, width = self.size if size is None else size
        return get_backbone(
            self.make_pipeline() if pipeline is None else pipeline,
            height=height,
            width=width,
            max_sequence_length=self.max_sequence_length,
        )


def images_to_edit(number: int, size: Size) -> list[Image.Image]:
    """Pictures of random pixels, of twice the size in each direction."""
    rng = np.random.default_rng(0)
    height, width = size
    return [Image.fromarray(rng.integers(0, 256, (2 * height, 2 * width, 3), dtype=np.uint8)) for _ in range(number)]


def conditions(
    backbone: Backbone, texts: list[str], images: list[Image.Image] | None = None
) -> dict[str, torch.Tensor]:
    """Conditions of `texts`, each encoded by itself, with as many pictures where the backbone takes them; by default
    those of `images_to_edit`."""
    images = images_to_edit(len(texts), (backbone.height, backbone.width)) if images is None else images
    encoded = [
        backbone.encode_prompt(text, *([image] if backbone.takes_image else []))
        for text, image in zip(texts, images, strict=True)
    ]
    return {key: torch.cat([condition[key] for condition in encoded]) for key in encoded[0]}


def initial_noise(backbone: Backbone, number: int) -> torch.Tensor:
    generators = [sample_generator(1, i) for i in range(number)]
    return draw_noise(backbone.latent_shape(), generators, torch.device("cpu"))


@torch.no_grad()
def ode_latents(
    backbone: Backbone,
    guidance_scale: float,
    texts: list[str],
    negative_prompt: str = "",
    images: list[Image.Image] | None = None,
) -> torch.Tensor:
    """Final latents of the rollout at noise level 0, as evaluation runs it."""
    guided = backbone.uses_guidance(guidance_scale)
    return rollout(
        backbone,
        backbone.model,
        Dynamics(backbone.schedule(STEPS), sde_type="flow", noise_level=0.7),
        conditions(backbone, texts, images),
        conditions(backbone, [negative_prompt] * len(texts), images) if guided else None,
        guidance_scale=guidance_scale,
        initial_noise=initial_noise(backbone, len(texts)),
        generators=[],
        stochastic_steps=[],
        trained_steps=[],
    ).final


@torch.no_grad()
def drawn_by_the_pipeline(
    family: Family, backbone: Backbone, guidance_scale: float, texts: list[str]
) -> tuple[torch.Tensor, list[Image.Image]]:
    """Final latents and images of the stock pipeline's own call, from the same noise (and pictures)."""
    last = {}

    def keep(pipeline, step, timestep, tensors):
        last["latents"] = tensors["latents"]
        return {}

    edited = {"image": images_to_edit(len(texts), (backbone.height, backbone.width))} if backbone.takes_image else {}
    images = backbone.pipeline(
        prompt=texts,
        height=backbone.height,
        width=backbone.width,
        num_inference_steps=STEPS,
        max_sequence_length=backbone.max_sequence_length,
        output_type="pil",
        callback_on_step_end=keep,
        **edited,
        **family.call(backbone, initial_noise(backbone, len(texts)), guidance_scale),
    ).images
    return last["latents"], images


def assert_same_images(images: Iterable[Image.Image], expected: Iterable[Image.Image], size: Size) -> None:
    """Images of `size` that are equal but for the rounding of a hundredth of their values."""
    for image, other in zip(images, expected, strict=True):
        assert image.size == size[::-1]
        difference = np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int))
        assert difference.max() <= 1  # a value that falls on the other side of 1/2
        assert (difference > 0).mean() < 0.01


def assert_equal_images(images: Iterable[Image.Image], expected: Iterable[Image.Image]) -> None:
    """The same images, to the last bit."""
    for image, other in zip(images, expected, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(other))


def assert_schedule_of_the_pipeline(backbone: Backbone) -> None:
    """After the pipeline's own call with `STEPS` steps: the backbone's noise levels are those, from noise to data."""
    scheduler = backbone.pipeline.scheduler
    # The backbone sets the same scheduler
    sigmas, timesteps = scheduler.sigmas, scheduler.timesteps
    schedule = backbone.schedule(STEPS)
    assert torch.equal(schedule.sigmas, sigmas)
    assert torch.equal(schedule.timesteps, timesteps)
    assert schedule.num_steps == STEPS
    assert schedule.sigmas[-1] == 0
    assert (schedule.sigmas.diff() < 0).all()


def check_noise_level_0(family: Family, size: Size, guidance_scale: float, *, atol: float) -> torch.Tensor:
    """
    Without noise the rollout draws the stock pipeline's own images: the same schedule, guidance, packing and scaling.

    Returns:
        `torch.Tensor`: the final latents, for what a family claims further.
    """
    backbone = family.backbone(size)
    final = ode_latents(backbone, guidance_scale, PROMPTS[:2])
    latents, expected = drawn_by_the_pipeline(family, backbone, guidance_scale, PROMPTS[:2])
    torch.testing.assert_close(final, latents, rtol=0, atol=atol)
    with torch.no_grad():
        images = backbone.decode(final)
    assert_same_images(images, expected, size)
    assert np.abs(np.asarray(images[0], dtype=int) - np.asarray(images[1], dtype=int)).max() > 1
    return final


def family_trainer(family: Family, output_dir: Path, **fields) -> FlowGRPOTrainer:
    """`tiny_trainer` on the family's pipeline, two micro-batches of four for each update."""
    height, width = family.size
    pipeline = fields.pop("pipeline", None) or family.make_pipeline()
    takes_image = family.backbone(pipeline=pipeline).takes_image
    columns = {"image": images_to_edit(len(PROMPTS), family.size)} if takes_image else {}
    fields = {
        "height": height,
        "width": width,
        "max_sequence_length": family.max_sequence_length,
        "guidance_scale": family.guidance_scale,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    } | fields
    return tiny_trainer(output_dir, pipeline=pipeline, train_dataset=prompts(**columns), **fields)


def check_training(family: Family, cls: type[FlowGRPOConfig], dtype: torch.dtype, output_dir: Path) -> None:
    """A config trains the family: the ratio is exactly 1 before the first update, and weights and KL move with it."""
    pipeline = family.make_pipeline()
    pipeline.transformer.to(dtype)
    trainer = family_trainer(
        family,
        output_dir,
        pipeline=pipeline,
        cls=cls,
        bf16=dtype == torch.bfloat16,
        beta=0.04,
        gradient_checkpointing=True,  # as by default
    )
    before = trained_weights(trainer)
    trainer.train()
    after = trained_weights(trainer)
    assert distance(after, before) > 1e-4
    assert all(value.isfinite().all() for value in after.values())
    first, second = trainer.state.log_history[:2]
    assert first["ratio/first_update_deviation"] == 0
    assert first["kl"] == 0 < second["kl"]


@torch.no_grad()
def ratio_deviation(family: Family, dtype: torch.dtype) -> float:
    """
    How far the importance ratio is from 1 where samples are drawn four at a time and trained one at a time: the
    largest `abs(ratio - 1)` of any sample and step, with the weights and the forward in `dtype`.
    """
    pipeline = family.make_pipeline()
    pipeline.transformer.to(dtype)
    backbone = family.backbone(pipeline=pipeline)
    dynamics = Dynamics(backbone.schedule(STEPS), sde_type="flow", noise_level=0.7)
    steps = dynamics.stochastic_steps
    condition, negative = conditions(backbone, PROMPTS), None
    if backbone.uses_guidance(family.guidance_scale):
        negative = conditions(backbone, [""] * len(PROMPTS))
    trajectory = rollout(
        backbone,
        backbone.model,
        dynamics,
        condition,
        negative,
        guidance_scale=family.guidance_scale,
        initial_noise=initial_noise(backbone, len(PROMPTS)),
        generators=[sample_generator(2, i) for i in range(len(PROMPTS))],
        stochastic_steps=steps,
        trained_steps=steps,
    )
    largest = 0.0
    for row in range(len(PROMPTS)):
        own = slice(row, row + 1)
        for index, step in enumerate(steps):
            latents = trajectory.latents[own, index]
            velocity = backbone.guided_prediction(
                backbone.model,
                latents,
                dynamics.schedule.timesteps[step],
                {key: value[own] for key, value in condition.items()},
                None if negative is None else {key: value[own] for key, value in negative.items()},
                family.guidance_scale,
            )
            transition = dynamics.transition(velocity, latents, step)
            log_prob = dynamics.log_prob(trajectory.next_latents[own, index], transition)
            largest = max(largest, abs(math.expm1((log_prob - trajectory.log_probs[own, index]).item())))
    return largest


def check_adapter(family: Family, output_dir: Path) -> set[str]:
    """
    A trained LoRA with the family's default targets draws the same images, to the last bit, in a stock pipeline that
    loads the saved file, whose alpha is the one of the training.

    Returns:
        `set[str]`: names of the adapted layers.
    """
    trainer = family_trainer(family, output_dir, lora=tiny_lora(lora_alpha=16), save_strategy="steps")

    def images_of(pipeline: DiffusionPipeline) -> list[np.ndarray]:
        backbone = family.backbone(pipeline=pipeline)
        images = drawn_by_the_pipeline(family, backbone, family.guidance_scale, PROMPTS[:2])[1]
        return [np.asarray(image) for image in images]

    trainer.train()
    file = output_dir / "pytorch_lora_weights.safetensors"
    with safe_open(file, framework="pt") as adapter:
        component = trainer.backbone.component
        metadata = json.loads(adapter.metadata()["lora_adapter_metadata"])
        assert metadata[f"{component}.lora_alpha"] == 16
        names = {name.partition(".lora_A")[0] for name in adapter.keys() if ".lora_A" in name}
    loaded = family.make_pipeline()
    loaded.load_lora_weights(output_dir)
    own, stock, untrained = (images_of(p) for p in (trainer.pipeline, loaded, family.make_pipeline()))
    for image, other, before in zip(own, stock, untrained, strict=True):
        assert np.array_equal(image, other)
        assert not np.array_equal(image, before)
    return {name.removeprefix(f"{component}.") for name in names}
