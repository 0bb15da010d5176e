"""The Stable Diffusion 3 backbone computes what the stock pipeline computes."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from tiny_models import CLIP_TOKENS, tiny_sd3_pipeline

from trl_flow.backbones import StableDiffusion3Backbone, get_backbone
from trl_flow.rollout import Dynamics, draw_noise, rollout, sample_generator


PROMPTS = ["a red circle", "two blue squares"]
STEPS = 3


@pytest.fixture(autouse=True)
def no_grad():
    # as the trainer calls a backbone
    with torch.no_grad():
        yield


def make_backbone(pipeline: StableDiffusion3Pipeline, **size) -> StableDiffusion3Backbone:
    return get_backbone(pipeline, **{"height": 16, "width": 16, "max_sequence_length": CLIP_TOKENS} | size)


def conditions(backbone, prompts):
    encoded = [backbone.encode_prompt(prompt) for prompt in prompts]
    return {key: torch.cat([condition[key] for condition in encoded]) for key in encoded[0]}


def noise(backbone, number: int = len(PROMPTS)) -> torch.Tensor:
    generators = [sample_generator(1, i) for i in range(number)]
    return draw_noise(backbone.latent_shape(), generators, torch.device("cpu"))


def ode_rollout(backbone, guidance_scale: float, negative_prompt: str = ""):
    """The rollout without noise, as evaluation runs it."""
    guided = backbone.uses_guidance(guidance_scale)
    return rollout(
        backbone,
        backbone.model,
        Dynamics(backbone.schedule(STEPS), sde_type="flow", noise_level=0.7),
        conditions(backbone, PROMPTS),
        conditions(backbone, [negative_prompt] * len(PROMPTS)) if guided else None,
        guidance_scale=guidance_scale,
        initial_noise=noise(backbone),
        generators=[sample_generator(2, i) for i in range(len(PROMPTS))],
        stochastic_steps=[],
        trained_steps=[],
    )


def drawn_by_the_pipeline(backbone, guidance_scale: float, output_type: str, negative_prompt: str | None = None):
    return backbone.pipeline(
        PROMPTS,
        negative_prompt=None if negative_prompt is None else [negative_prompt] * len(PROMPTS),
        height=backbone.height,
        width=backbone.width,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        max_sequence_length=backbone.max_sequence_length,
        latents=noise(backbone),
        output_type=output_type,
    ).images


@pytest.mark.parametrize("size", [{}, {"height": 24, "width": 8}, {"height": 32, "width": 32}], ids=str)
@pytest.mark.parametrize("guidance_scale", [0.5, 1.0, 2.5])
def test_a_rollout_without_noise_draws_the_pipelines_own_images(size, guidance_scale):
    backbone = make_backbone(tiny_sd3_pipeline(), **size)
    final = ode_rollout(backbone, guidance_scale).final
    # To the last digits only: prompts are encoded one by one here, and guidance is computed in another order
    torch.testing.assert_close(final, drawn_by_the_pipeline(backbone, guidance_scale, "latent"), rtol=0, atol=2e-6)
    images, expected = backbone.decode(final), drawn_by_the_pipeline(backbone, guidance_scale, "pil")
    for image, other in zip(images, expected, strict=True):
        assert image.size == (backbone.width, backbone.height)
        difference = np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int))
        assert difference.max() <= 1  # a value that falls on the other side of 1/2
        assert (difference > 0).mean() < 0.01


def test_the_pipelines_images_come_from_the_same_latents_to_the_last_bit():
    backbone = make_backbone(tiny_sd3_pipeline())
    latents = drawn_by_the_pipeline(backbone, 2.5, "latent")
    images, expected = backbone.decode(latents), drawn_by_the_pipeline(backbone, 2.5, "pil")
    for image, other in zip(images, expected, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(other))


def test_a_negative_prompt_is_the_pipelines():
    backbone = make_backbone(tiny_sd3_pipeline())
    final = ode_rollout(backbone, 2.5, negative_prompt="blurred").final
    expected = drawn_by_the_pipeline(backbone, 2.5, "latent", negative_prompt="blurred")
    torch.testing.assert_close(final, expected, rtol=0, atol=2e-6)
    assert (final - ode_rollout(backbone, 2.5).final).abs().max() > 1e-3


def test_without_a_t5_encoder():
    pipeline = tiny_sd3_pipeline()
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    backbone = make_backbone(pipeline)
    final = ode_rollout(backbone, 2.5).final
    torch.testing.assert_close(final, drawn_by_the_pipeline(backbone, 2.5, "latent"), rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [{}, {"height": 32, "width": 8}], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        {"shift": 1.0},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 256, "max_shift": 2.0},
        {"use_karras_sigmas": True},
        {"shift_terminal": 0.1, "use_dynamic_shifting": True},
    ],
    ids=str,
)
def test_every_scheduler_of_the_pipeline_keeps_its_noise_levels(config, size):
    pipeline = tiny_sd3_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**config)
    backbone = make_backbone(pipeline, **size)
    final = ode_rollout(backbone, 2.5).final
    expected = drawn_by_the_pipeline(backbone, 2.5, "latent")
    torch.testing.assert_close(final, expected, rtol=0, atol=5e-6)
    schedule = backbone.schedule(STEPS)
    assert torch.equal(schedule.sigmas, pipeline.scheduler.sigmas)
    assert torch.equal(schedule.timesteps, pipeline.scheduler.timesteps)
    assert schedule.num_steps == STEPS
    assert schedule.sigmas[-1] == 0
    assert (schedule.sigmas.diff() < 0).all()


def test_a_schedule_is_not_changed_by_another():
    backbone = make_backbone(tiny_sd3_pipeline())
    first = backbone.schedule(3)
    before = first.sigmas.clone()
    backbone.schedule(7)
    assert torch.equal(first.sigmas, before)


def test_guidance_by_hand():
    backbone = make_backbone(tiny_sd3_pipeline())
    condition, negative = conditions(backbone, PROMPTS), conditions(backbone, ["", ""])
    latents, timestep = noise(backbone), torch.tensor(500.0)
    towards = backbone.velocity(backbone.model, latents, timestep, condition)
    away = backbone.velocity(backbone.model, latents, timestep, negative)
    guided = backbone.velocity(backbone.model, latents, timestep, condition, negative, 3.0)
    torch.testing.assert_close(guided, 3 * towards - 2 * away, rtol=0, atol=1e-5)
    assert (guided - towards).abs().max() > 1e-3


@pytest.mark.parametrize(("scale", "uses"), [(0.0, False), (1.0, False), (1.01, True), (4.5, True)])
def test_guidance_is_used_where_the_pipeline_uses_it(scale, uses):
    backbone = make_backbone(tiny_sd3_pipeline())
    backbone.pipeline._guidance_scale = scale
    assert backbone.pipeline.do_classifier_free_guidance is uses
    assert backbone.uses_guidance(scale) is uses


def test_a_prompts_condition_is_the_pipelines():
    pipeline = tiny_sd3_pipeline()
    condition = make_backbone(pipeline).encode_prompt("a red circle")
    embeds, _, pooled, _ = pipeline.encode_prompt(
        "a red circle", None, None, do_classifier_free_guidance=False, max_sequence_length=CLIP_TOKENS
    )
    assert torch.equal(condition["encoder_hidden_states"], embeds)
    assert torch.equal(condition["pooled_projections"], pooled)
    assert embeds.shape[1] == 2 * CLIP_TOKENS  # CLIP's tokens and T5's


def test_a_subclass_of_a_supported_pipeline_is_supported():
    class MyPipeline(StableDiffusion3Pipeline):
        pass

    pipeline = MyPipeline(**tiny_sd3_pipeline().components)
    assert type(make_backbone(pipeline)) is StableDiffusion3Backbone
