"""The Qwen-Image backbone computes what the stock pipeline computes."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_qwen import tiny_qwen_image_pipeline

from trl_flow.backbones import QwenImageBackbone, get_backbone
from trl_flow.rollout import Dynamics, draw_noise, rollout, sample_generator


# 25 and 16 tokens with the end of the template
PROMPTS = ["a red circle", "two"]
TOKENS = 40
STEPS = 3


@pytest.fixture(autouse=True)
def no_grad():
    # as the trainer calls a backbone
    with torch.no_grad():
        yield


def make_backbone(pipeline=None, **size) -> QwenImageBackbone:
    pipeline = tiny_qwen_image_pipeline() if pipeline is None else pipeline
    return get_backbone(pipeline, **{"height": 16, "width": 16, "max_sequence_length": TOKENS} | size)


def conditions(backbone, prompts):
    encoded = [backbone.encode_prompt(prompt) for prompt in prompts]
    return {key: torch.cat([condition[key] for condition in encoded]) for key in encoded[0]}


def noise(backbone, number: int = len(PROMPTS)) -> torch.Tensor:
    generators = [sample_generator(1, i) for i in range(number)]
    return draw_noise(backbone.latent_shape(), generators, torch.device("cpu"))


def ode_rollout(backbone, guidance_scale: float, negative_prompt: str = "", prompts=PROMPTS) -> torch.Tensor:
    """Latents of the rollout without noise, as evaluation runs it."""
    guided = backbone.uses_guidance(guidance_scale)
    return rollout(
        backbone,
        backbone.model,
        Dynamics(backbone.schedule(STEPS), sde_type="flow", noise_level=0.7),
        conditions(backbone, prompts),
        conditions(backbone, [negative_prompt] * len(prompts)) if guided else None,
        guidance_scale=guidance_scale,
        initial_noise=noise(backbone, len(prompts)),
        generators=[],
        stochastic_steps=[],
        trained_steps=[],
    ).final


def drawn_by_the_pipeline(backbone, guidance_scale: float, output_type: str, negative_prompt="", prompts=PROMPTS):
    # "" for the trainer's missing negative prompt; the pipeline's own None would leave guidance out
    guided = {"negative_prompt": [negative_prompt] * len(prompts)} if guidance_scale > 1 else {}
    return backbone.pipeline(
        prompts,
        height=backbone.height,
        width=backbone.width,
        num_inference_steps=STEPS,
        true_cfg_scale=guidance_scale,
        max_sequence_length=backbone.max_sequence_length,
        latents=noise(backbone, len(prompts)),
        output_type=output_type,
        **guided,
    ).images


@pytest.mark.parametrize("size", [{}, {"height": 24, "width": 8}, {"height": 32, "width": 32}], ids=str)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_a_rollout_without_noise_draws_the_pipelines_own_images(size, guidance_scale):
    backbone = make_backbone(**size)
    final = ode_rollout(backbone, guidance_scale)
    # Prompts are encoded one by one here and filled up to another length
    torch.testing.assert_close(final, drawn_by_the_pipeline(backbone, guidance_scale, "latent"), rtol=0, atol=3e-6)
    images, expected = backbone.decode(final), drawn_by_the_pipeline(backbone, guidance_scale, "pil")
    for image, other in zip(images, expected, strict=True):
        assert image.size == (backbone.width, backbone.height)
        difference = np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int))
        assert difference.max() <= 1  # a value that falls on the other side of 1/2
        assert (difference > 0).mean() < 0.01


def test_the_pipelines_images_come_from_the_same_latents_to_the_last_bit():
    backbone = make_backbone()
    latents = drawn_by_the_pipeline(backbone, 2.5, "latent")
    images, expected = backbone.decode(latents), drawn_by_the_pipeline(backbone, 2.5, "pil")
    for image, other in zip(images, expected, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(other))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_filling_up_a_prompt_changes_nothing(prompt):
    # One prompt: the pipeline neither fills it up nor masks it
    backbone = make_backbone()
    embeds, mask = backbone.pipeline.encode_prompt(prompt, max_sequence_length=TOKENS)
    assert mask is None and embeds.shape[1] < TOKENS
    condition = backbone.encode_prompt(prompt)
    own = condition["encoder_hidden_states_mask"]
    assert torch.equal(condition["encoder_hidden_states"][own], embeds[0])
    assert condition["encoder_hidden_states"].shape[1] == own.shape[1] == TOKENS
    final = ode_rollout(backbone, 2.5, prompts=[prompt])
    expected = drawn_by_the_pipeline(backbone, 2.5, "latent", prompts=[prompt])
    torch.testing.assert_close(final, expected, rtol=0, atol=3e-6)
    # What fills it up is not seen at all, not only zero
    condition["encoder_hidden_states"][~own] = 7.0
    latents, timestep = noise(backbone, 1), torch.tensor(500.0)
    torch.testing.assert_close(
        backbone.predict(backbone.model, latents, timestep, condition),
        backbone.predict(backbone.model, latents, timestep, backbone.encode_prompt(prompt)),
        rtol=0,
        atol=1e-6,
    )


def test_a_long_prompt_is_cut_as_the_pipeline_cuts_it():
    backbone = make_backbone(max_sequence_length=8)
    final = ode_rollout(backbone, 1.0)
    torch.testing.assert_close(final, drawn_by_the_pipeline(backbone, 1.0, "latent"), rtol=0, atol=3e-6)
    assert (final - ode_rollout(make_backbone(), 1.0)).abs().max() > 1e-3


def test_a_negative_prompt_is_the_pipelines():
    backbone = make_backbone()
    final = ode_rollout(backbone, 2.5, negative_prompt="blurred")
    expected = drawn_by_the_pipeline(backbone, 2.5, "latent", negative_prompt="blurred")
    torch.testing.assert_close(final, expected, rtol=0, atol=3e-6)
    assert (final - ode_rollout(backbone, 2.5)).abs().max() > 1e-3


def test_guidance_turns_each_token_and_keeps_its_length():
    backbone = make_backbone()
    # c = (3, 4) and u = (3, 0): u + 2 (c - u) = (3, 8), of length sqrt(73), brought back to c's 5
    conditional, unconditional = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.tensor([[[3.0, 0.0], [1.0, 0.0]]])
    guided = backbone.guide(conditional, unconditional, 2.0)
    expected = torch.tensor([[[15 / 73**0.5, 40 / 73**0.5], [1.0, 0.0]]])
    torch.testing.assert_close(guided, expected)


@pytest.mark.parametrize(("scale", "uses"), [(0.0, False), (1.0, False), (1.01, True), (4.5, True)])
def test_guidance_is_used_where_the_pipeline_uses_it(scale, uses):
    assert make_backbone().uses_guidance(scale) is uses


@pytest.mark.parametrize("size", [{}, {"height": 32, "width": 8}], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        {"shift": 3.0},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64, "shift_terminal": 0.02},
    ],
    ids=str,
)
def test_every_scheduler_of_the_pipeline_keeps_its_noise_levels(config, size):
    pipeline = tiny_qwen_image_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**config)
    backbone = make_backbone(pipeline, **size)
    drawn_by_the_pipeline(backbone, 1.0, "latent")
    sigmas, timesteps = pipeline.scheduler.sigmas, pipeline.scheduler.timesteps
    schedule = backbone.schedule(STEPS)
    assert torch.equal(schedule.sigmas, sigmas)
    assert torch.equal(schedule.timesteps, timesteps)
    assert schedule.num_steps == STEPS
    assert schedule.sigmas[-1] == 0
    assert (schedule.sigmas.diff() < 0).all()


def test_the_size_of_the_image_moves_the_schedule():
    sizes = [{}, {"height": 32, "width": 32}]
    small, large = (make_backbone(**size).schedule(STEPS).sigmas for size in sizes)
    assert (large[1:-2] > small[1:-2]).all()


def test_a_size_that_the_pipeline_would_round_is_refused():
    with pytest.raises(ValueError, match="18 x 16, but this model draws multiples of 4 pixels"):
        make_backbone(height=18)


def test_a_guidance_distilled_transformer_is_refused_as_diffusers_can_not_run_it():
    pipeline = tiny_qwen_image_pipeline(guidance_embeds=True)
    with pytest.raises(TypeError, match="positional arguments"):
        pipeline("a cat", height=16, width=16, num_inference_steps=STEPS, guidance_scale=2.0)
    with pytest.raises(ValueError, match="guidance_embeds"):
        make_backbone(pipeline)
