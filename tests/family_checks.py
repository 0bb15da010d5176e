"""What every family must show, on a tiny pipeline of its own: each check is one claim, called by a family's test."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_training import PROMPTS, distance, prompts, tiny_trainer, trained_weights

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer
from trl_flow.backbones import Backbone, get_backbone
from trl_flow.dynamics import make_dynamics
from trl_flow.images import Sample, frames_of
from trl_flow.rollout import StepPlan, draw_noise, rollout, sample_generator
from trl_flow.sharing import create_model_card, save_lora


STEPS = 3
Size = tuple[int, int]  # height and width in pixels


def _plain(backbone: Backbone, noise: torch.Tensor) -> torch.Tensor:
    return noise


@dataclass(frozen=True)
class Family:
    """
    One family of pipelines.

    Attributes:
        make_pipeline (`Callable`): makes its tiny pipeline, with the same random weights at each call.
        size, other_size (`tuple[int, int]`): height and width for training, and others that it can draw.
        max_sequence_length (`int`): prompt tokens.
        guidance_scale, unguided (`float`): for training; with which the pipeline does not guide.
        latents (`Callable`): `latents(backbone, noise)` is the noise in the form that the pipeline's call takes.
        atol (`float`): how far final latents may be from the pipeline's own. Prompts are encoded one by one here, and
            guidance is computed in another order.
        in_batches (`bool`): whether the pipeline takes several prompts at once, with their images.
        settings (`dict`): further ones of the backbone, by the names of the config's fields.
    """

    make_pipeline: Callable[[], DiffusionPipeline]
    size: Size = (16, 16)
    other_size: Size = (24, 8)
    max_sequence_length: int = 16
    guidance_scale: float = 2.5
    unguided: float = 1.0
    latents: Callable[[Backbone, torch.Tensor], torch.Tensor] = _plain
    atol: float = 1e-5
    in_batches: bool = True
    settings: dict = field(default_factory=dict)

    def backbone(self, size: Size | None = None, pipeline: DiffusionPipeline | None = None) -> Backbone:
        height, width = self.size if size is None else size
        return get_backbone(
            self.make_pipeline() if pipeline is None else pipeline,
            height=height,
            width=width,
            max_sequence_length=self.max_sequence_length,
            **self.settings,
        )


def images_to_edit(number: int, size: Size) -> list[Image.Image]:
    """Images of random pixels, of twice the size in each direction."""
    rng = np.random.default_rng(0)
    height, width = size
    return [Image.fromarray(rng.integers(0, 256, (2 * height, 2 * width, 3), dtype=np.uint8)) for _ in range(number)]


def conditions(
    backbone: Backbone, texts: list[str], images: list[Image.Image] | None = None
) -> dict[str, torch.Tensor]:
    """Conditions of `texts`, each encoded by itself, with as many images where the backbone takes them; by default
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
    """Final latents of the rollout without noise, as evaluation runs it."""
    guided = backbone.uses_guidance(guidance_scale)
    condition = conditions(backbone, texts, images)
    negative = conditions(backbone, [negative_prompt] * len(texts), images) if guided else None

    def predict(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return backbone.guided_prediction(backbone.model, latents, timestep, condition, negative, guidance_scale)

    dynamics = make_dynamics(backbone.schedule(STEPS), sde_type="flow", noise_level=0.7)
    return rollout(predict, dynamics, initial_noise(backbone, len(texts)), StepPlan()).final


@torch.no_grad()
def drawn_by_the_pipeline(
    family: Family, backbone: Backbone, guidance_scale: float, texts: list[str], **settings
) -> tuple[torch.Tensor, list[Image.Image]]:
    """Final latents and images of the stock pipeline's own call, from the same noise (and images to edit)."""
    pipeline, final, drawn = backbone.pipeline, [], []
    exec(backbone.scheduler_code or "", {"pipeline": pipeline})
    settings = {
        "height": backbone.height,
        "width": backbone.width,
        "num_inference_steps": STEPS,
        "max_sequence_length": backbone.max_sequence_length,
        "guidance_scale": guidance_scale,
        **family.settings,
    } | settings
    call = backbone.call_arguments(settings)

    def keep(pipeline, step, timestep, tensors):
        if step == STEPS - 1:
            final.append(tensors["latents"])
        return {}

    images = images_to_edit(len(texts), (backbone.height, backbone.width))
    number = len(texts) if family.in_batches else 1
    for first in range(0, len(texts), number):
        part = slice(first, first + number)
        own = {"prompt": texts[part], "latents": family.latents(backbone, initial_noise(backbone, len(texts))[part])}
        own |= {"image": images[part]} if backbone.takes_image else {}
        if not family.in_batches:
            own |= {"prompt": texts[first], **({"image": images[first]} if backbone.takes_image else {})}
        elif "negative_prompt" in call:
            own["negative_prompt"] = [call["negative_prompt"]] * number
        drawn += pipeline(**call | own, callback_on_step_end=keep, output_type="pil")[0]
    return torch.cat(final), drawn


def assert_same_images(images: Iterable[Sample], expected: Iterable[Sample], size: Size) -> None:
    """
    Images, or frames of videos, of `size` (height, width) that are the same to rounding: no value differs by more than
    two levels of 255, and they differ by less than 0.05 on average. Another prompt, seed or adapter moves them by
    whole levels.
    """
    images, expected = ([frame for sample in samples for frame in frames_of(sample)] for samples in (images, expected))
    for image, other in zip(images, expected, strict=True):
        assert image.size == size[::-1]
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int)).max() <= 2
        assert image_distance(image, other) < 0.05


def image_distance(image: Sample, other: Sample) -> float:
    """Mean absolute difference of all values, in levels of 255."""
    one, two = (np.stack([np.asarray(frame, dtype=float) for frame in frames_of(sample)]) for sample in (image, other))
    return float(np.abs(one - two).mean())


def assert_schedule_of_the_pipeline(backbone: Backbone) -> None:
    """After the pipeline's own call with `STEPS` steps: the backbone's noise levels are those, from noise to data."""
    scheduler = backbone.pipeline.scheduler
    # The backbone sets the same scheduler
    sigmas, timesteps = scheduler.sigmas, scheduler.timesteps
    schedule = backbone.schedule(STEPS)
    torch.testing.assert_close(schedule.sigmas, sigmas, rtol=0, atol=1e-7)
    torch.testing.assert_close(schedule.timesteps, timesteps, rtol=1e-7, atol=0)
    assert schedule.num_steps == STEPS
    assert schedule.sigmas[-1] == 0
    assert (schedule.sigmas.diff() < 0).all()


def check_own_images(family: Family, size: Size, guidance_scale: float) -> None:
    """Without noise the rollout draws the stock pipeline's own images: schedule, guidance and scaling are the same."""
    backbone = family.backbone(size)
    final = ode_latents(backbone, guidance_scale, PROMPTS[:2])
    latents, expected = drawn_by_the_pipeline(family, backbone, guidance_scale, PROMPTS[:2])
    torch.testing.assert_close(final, latents, rtol=0, atol=family.atol)
    with torch.no_grad():
        images = backbone.decode(final)
    assert_same_images(images, expected, size)
    assert image_distance(*images) > 0.5


def check_negative_prompt(family: Family) -> None:
    """A negative prompt is the pipeline's, and has an effect."""
    backbone = family.backbone()
    own, empty = (ode_latents(backbone, family.guidance_scale, PROMPTS[:2], text) for text in ("blurred", ""))
    latents, _ = drawn_by_the_pipeline(family, backbone, family.guidance_scale, PROMPTS[:2], negative_prompt="blurred")
    torch.testing.assert_close(own, latents, rtol=0, atol=family.atol)
    assert (own - empty).abs().max() > 1e-3


@torch.no_grad()
def check_batches(family: Family) -> None:
    """A sample's prediction does not depend on the others in its batch, but for rounding."""
    backbone = family.backbone()
    condition, negative = conditions(backbone, PROMPTS), conditions(backbone, [""] * len(PROMPTS))
    latents = initial_noise(backbone, len(PROMPTS))

    def predicted(rows: slice) -> torch.Tensor:
        own, others = ({key: value[rows] for key, value in each.items()} for each in (condition, negative))
        timestep, scale = backbone.schedule(STEPS).timesteps[1], family.guidance_scale
        others = others if backbone.uses_guidance(scale) else None
        return backbone.guided_prediction(backbone.model, latents[rows], timestep, own, others, scale)

    together = predicted(slice(None))
    for row in range(len(PROMPTS)):
        own = predicted(slice(row, row + 1))
        torch.testing.assert_close(together[row : row + 1], own, rtol=1e-5, atol=1e-5)


def family_trainer(family: Family, output_dir: Path, **fields) -> FlowGRPOTrainer:
    """`tiny_trainer` on the family's pipeline, two micro-batches of four for each update."""
    height, width = family.size
    pipeline = fields.pop("pipeline", None) or family.make_pipeline()
    backbone = family.backbone(pipeline=pipeline)
    columns = {"image": images_to_edit(len(PROMPTS), family.size)} if backbone.takes_image else {}
    fields = {
        "height": height,
        "width": width,
        "max_sequence_length": family.max_sequence_length,
        "guidance_scale": family.guidance_scale if backbone.takes_guidance else family.unguided,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        **family.settings,
    } | fields
    return tiny_trainer(output_dir, pipeline=pipeline, train_dataset=prompts(**columns), **fields)


def check_training(
    family: Family, cls: type[FlowGRPOConfig], dtype: torch.dtype, output_dir: Path, **fields
) -> dict[str, torch.Tensor]:
    """
    A config trains the family: the ratio is 1 before the first update, and weights and KL move with it.

    Returns:
        `dict[str, torch.Tensor]`: the trained weights.
    """
    pipeline = family.make_pipeline()
    component = family.backbone(pipeline=pipeline).component
    getattr(pipeline, component).to(dtype)
    trainer = family_trainer(
        family,
        output_dir,
        pipeline=pipeline,
        cls=cls,
        bf16=dtype == torch.bfloat16,
        beta=0.04,
        gradient_checkpointing=True,  # as by default
        **fields,
    )
    before = trained_weights(trainer)
    trainer.train()
    after = trained_weights(trainer)
    assert distance(after, before) > 1e-4
    assert all(value.isfinite().all() for value in after.values())
    first, second = trainer.state.log_history[:2]
    # Both phases run the same forward: another guidance, schedule or dtype would be seen in the first digits
    assert first["ratio/first_update_deviation"] < 1e-5
    assert first["kl"] < 1e-8 and second["kl"] > first["kl"] + 2e-9
    return after


def random_lora(backbone: Backbone, **config) -> torch.nn.Module:
    """The backbone's model with an adapter on its default layers, each of whose weights is random."""
    config = {"r": 4, "lora_alpha": 16, "target_modules": backbone.lora_target_modules} | config
    model = get_peft_model(backbone.model, LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def check_card(family: Family, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model card's code loads a saved adapter into the stock pipeline, and draws what is drawn in evaluation."""
    pipeline_class = type(family.make_pipeline())
    monkeypatch.setattr(pipeline_class, "from_pretrained", lambda path, **kwargs: family.make_pipeline())
    backbone, run = family.backbone(), folder / "run"
    with torch.no_grad():
        (untrained,) = backbone.decode(ode_latents(backbone, family.guidance_scale, PROMPTS[:1]))
    model = random_lora(backbone)
    save_lora(pipeline_class, model, run, component=backbone.component)
    settings = {
        "num_inference_steps": STEPS,
        "guidance_scale": family.guidance_scale,
        "height": backbone.height,
        "width": backbone.width,
        "max_sequence_length": backbone.max_sequence_length,
        "learning_rate": 1e-4,
        **family.settings,
    }
    path = create_model_card(run, backbone=backbone, base_model=None, settings=settings, is_lora=True)
    code = path.read_text().split("```python\n")[1].split("```")[0]
    images_to_edit(1, family.size)[0].save(folder / "image.png")
    scope = {"latents": family.latents(backbone, initial_noise(backbone, 1))}
    code = code.replace("path/to", str(folder)).replace(
        '"a prompt"', f'"{PROMPTS[0]}", latents=latents, output_type="pil"'
    )
    code = code.replace("export_to_video(", "(lambda *args, **kwargs: None)(")
    exec(code, scope)
    with torch.no_grad():
        images = backbone.decode(ode_latents(backbone, family.guidance_scale, PROMPTS[:1]))
    drawn = scope["image" if backbone.frames_per_second is None else "video"]
    assert_same_images([drawn], images, family.size)
    assert image_distance(images[0], untrained) > 0.25
    loaded = getattr(scope["pipeline"], backbone.component)
    assert all(config.lora_alpha == 16 for config in loaded.peft_config.values())
