"""The Qwen-Image backbone computes what the stock pipeline computes."""

import pytest
import torch
from family_checks import (
    STEPS,
    initial_noise,
    ode_latents,
)
from tiny_qwen import tiny_qwen_image_pipeline

from trl_flow.backbones import QwenImageBackbone, get_backbone
from trl_flow.evaluation.drawing import draw


# 25 and 16 tokens with the end of the template
PROMPTS = ["a red circle", "two"]
TOKENS = 40


@pytest.fixture(autouse=True)
def no_grad():
    # as the trainer calls a backbone
    with torch.no_grad():
        yield


def make_backbone(pipeline=None, **size) -> QwenImageBackbone:
    pipeline = tiny_qwen_image_pipeline() if pipeline is None else pipeline
    return get_backbone(pipeline, **{"height": 16, "width": 16, "max_sequence_length": TOKENS} | size)


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
        latents=initial_noise(backbone, len(prompts)),
        output_type=output_type,
        **guided,
    ).images


def test_a_single_step_has_no_noise_levels():
    pipeline = tiny_qwen_image_pipeline()
    with pytest.raises(ValueError, match="1 step.s. are not finite.*take two or more"):
        draw(pipeline, PROMPTS, seed=0, height=16, width=16, num_inference_steps=1)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_filling_up_a_prompt_changes_nothing(prompt):
    # One prompt: the pipeline neither fills it up nor masks it
    backbone = make_backbone()
    embeds, mask = backbone.pipeline.encode_prompt(prompt, max_sequence_length=TOKENS)
    assert mask is None and embeds.shape[1] < TOKENS
    condition = backbone.encode_prompt(prompt)
    own = condition["encoder_hidden_states_mask"]
    torch.testing.assert_close(condition["encoder_hidden_states"][own], embeds[0])
    assert condition["encoder_hidden_states"].shape[1] == own.shape[1] == TOKENS
    final = ode_latents(backbone, 2.5, [prompt])
    expected = drawn_by_the_pipeline(backbone, 2.5, "latent", prompts=[prompt])
    torch.testing.assert_close(final, expected, rtol=0, atol=1e-5)
    # What fills it up is not seen at all, not only zero
    condition["encoder_hidden_states"][~own] = 7.0
    latents, timestep = initial_noise(backbone, 1), torch.tensor(500.0)
    torch.testing.assert_close(
        backbone.predict(backbone.model, latents, timestep, condition),
        backbone.predict(backbone.model, latents, timestep, backbone.encode_prompt(prompt)),
        rtol=0,
        atol=1e-5,
    )


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


def test_a_size_that_the_pipeline_would_round_is_refused():
    with pytest.raises(ValueError, match="18 x 16, but this model draws multiples of 4 pixels"):
        make_backbone(height=18)


def test_a_guidance_distilled_transformer_is_refused_as_diffusers_cannot_run_it():
    pipeline = tiny_qwen_image_pipeline(guidance_embeds=True)
    with pytest.raises(TypeError, match="positional arguments"):
        pipeline("a cat", height=16, width=16, num_inference_steps=STEPS, guidance_scale=2.0)
    with pytest.raises(ValueError, match="guidance_embeds"):
        make_backbone(pipeline)
