"""The Z-Image backbone computes what the stock pipeline computes."""

import pytest
import torch
from family_checks import (
    conditions,
    initial_noise,
)
from tiny_qwen import tiny_z_image_pipeline

from trl_flow.backbones import ZImageBackbone, get_backbone


# With the template 31 and 42 tokens; the transformer fills them up to 32 and 64
PROMPTS = ["two", "three red fish"]
TOKENS = 48


@pytest.fixture(autouse=True)
def no_grad():
    # as the trainer calls a backbone
    with torch.no_grad():
        yield


def make_backbone(pipeline=None, **size) -> ZImageBackbone:
    pipeline = tiny_z_image_pipeline() if pipeline is None else pipeline
    return get_backbone(pipeline, **{"height": 16, "width": 16, "max_sequence_length": TOKENS} | size)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_condition_holds_the_pipelines_embeddings(prompt):
    backbone = make_backbone()
    (embeds,), _ = backbone.pipeline.encode_prompt(
        prompt, do_classifier_free_guidance=False, max_sequence_length=TOKENS
    )
    condition = backbone.encode_prompt(prompt)
    torch.testing.assert_close(condition["embeds"][condition["mask"]], embeds)
    assert condition["embeds"].shape[1] == TOKENS > len(embeds)


def test_prompts_that_the_transformer_fills_up_to_different_lengths():
    backbone = make_backbone()
    lengths = conditions(backbone, PROMPTS)["mask"].sum(dim=1).tolist()
    assert [-(-length // 32) for length in lengths] == [1, 2]
    condition = conditions(backbone, PROMPTS)
    latents, timestep = initial_noise(backbone, len(PROMPTS)), torch.tensor(500.0)
    together = backbone.predict(backbone.model, latents, timestep, condition)
    for i in range(len(PROMPTS)):
        own = {key: value[i : i + 1] for key, value in condition.items()}
        alone = backbone.predict(backbone.model, latents[i : i + 1], timestep, own)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)


def test_the_velocity_points_from_the_data_to_the_noise():
    # The transformer's time is 0 at the noise and 1 at the data, and its velocity that of this time
    backbone = make_backbone()
    latents, condition = initial_noise(backbone, len(PROMPTS)), conditions(backbone, PROMPTS)
    embeds = [own[mask] for own, mask in zip(condition["embeds"], condition["mask"], strict=True)]
    towards_data = backbone.model(list(latents.unsqueeze(2)), torch.tensor([0.25, 0.25]), embeds).sample
    velocity = backbone.guided_prediction(backbone.model, latents, torch.tensor(750.0), condition)
    torch.testing.assert_close(velocity, -torch.cat([own.transpose(0, 1) for own in towards_data]))


def test_guidance_by_hand():
    # 3 + 2 (3 - 1), not the 1 + 2 (3 - 1) of other pipelines
    guided = make_backbone().guide(torch.tensor([3.0]), torch.tensor([1.0]), 2.0)
    assert torch.equal(guided, torch.tensor([7.0]))


@pytest.mark.parametrize(("scale", "uses"), [(0.0, False), (0.01, True), (1.0, True), (4.5, True)])
def test_guidance_is_used_where_the_pipeline_uses_it(scale, uses):
    backbone = make_backbone()
    backbone.pipeline._guidance_scale = scale
    assert backbone.pipeline.do_classifier_free_guidance is uses
    assert backbone.uses_guidance(scale) is uses


@pytest.mark.parametrize("size", [{"height": 18}, {"width": 68}], ids=str)
def test_a_size_that_the_model_cannot_draw_is_refused(size):
    # 16 positions of 4 pixels each way
    with pytest.raises(ValueError, match="multiples of 4 pixels up to 64 x 64"):
        make_backbone(**size)
