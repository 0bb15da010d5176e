"""The Stable Diffusion 3 backbone computes what the stock pipeline computes."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from family_checks import (
    STEPS,
    assert_schedule_of_the_pipeline,
    conditions,
    initial_noise,
    ode_latents,
)
from tiny_models import CLIP_TOKENS, tiny_sd3_pipeline

from trl_flow.backbones import StableDiffusion3Backbone, get_backbone


PROMPTS = ["a red circle", "two blue squares"]


@pytest.fixture(autouse=True)
def no_grad():
    # as the trainer calls a backbone
    with torch.no_grad():
        yield


def make_backbone(pipeline: StableDiffusion3Pipeline, **size) -> StableDiffusion3Backbone:
    return get_backbone(pipeline, **{"height": 16, "width": 16, "max_sequence_length": CLIP_TOKENS} | size)


def drawn_by_the_pipeline(backbone, guidance_scale: float, output_type: str, negative_prompt: str | None = None):
    return backbone.pipeline(
        PROMPTS,
        negative_prompt=None if negative_prompt is None else [negative_prompt] * len(PROMPTS),
        height=backbone.height,
        width=backbone.width,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        max_sequence_length=backbone.max_sequence_length,
        latents=initial_noise(backbone, len(PROMPTS)),
        output_type=output_type,
    ).images


def test_without_a_t5_encoder():
    pipeline = tiny_sd3_pipeline()
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    backbone = make_backbone(pipeline)
    final = ode_latents(backbone, 2.5, PROMPTS)
    torch.testing.assert_close(final, drawn_by_the_pipeline(backbone, 2.5, "latent"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [{}, {"height": 32, "width": 8}], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        {"use_karras_sigmas": True},
        {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 256, "max_shift": 2.0},
    ],
    ids=str,
)
def test_every_scheduler_of_the_pipeline_keeps_its_noise_levels(config, size):
    pipeline = tiny_sd3_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**config)
    backbone = make_backbone(pipeline, **size)
    final = ode_latents(backbone, 2.5, PROMPTS)
    expected = drawn_by_the_pipeline(backbone, 2.5, "latent")
    torch.testing.assert_close(final, expected, rtol=0, atol=1e-5)
    assert_schedule_of_the_pipeline(backbone)


def test_a_schedule_is_not_changed_by_another():
    backbone = make_backbone(tiny_sd3_pipeline())
    first = backbone.schedule(3)
    before = first.sigmas.clone()
    backbone.schedule(7)
    assert torch.equal(first.sigmas, before)  # the same tensor


def test_guidance_by_hand():
    backbone = make_backbone(tiny_sd3_pipeline())
    condition, negative = conditions(backbone, PROMPTS), conditions(backbone, ["", ""])
    latents, timestep = initial_noise(backbone, len(PROMPTS)), torch.tensor(500.0)
    towards = backbone.guided_prediction(backbone.model, latents, timestep, condition)
    away = backbone.guided_prediction(backbone.model, latents, timestep, negative)
    guided = backbone.guided_prediction(backbone.model, latents, timestep, condition, negative, 3.0)
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
    torch.testing.assert_close(condition["encoder_hidden_states"], embeds)
    torch.testing.assert_close(condition["pooled_projections"], pooled)
    assert embeds.shape[1] == 2 * CLIP_TOKENS  # CLIP's tokens and T5's


def test_a_subclass_of_a_supported_pipeline_is_supported():
    class MyPipeline(StableDiffusion3Pipeline):
        pass

    pipeline = MyPipeline(**tiny_sd3_pipeline().components)
    assert type(make_backbone(pipeline)) is StableDiffusion3Backbone
