"""PickScore is the tuned CLIP's logit."""

import math

import pytest
import torch
from tiny_reward_models import CONTEXT, clip_model, clip_tokenizer, cropped_pixels, picture, save_clip, with_features
from tiny_training import warnings_of

from trl_flow.rewards import PickScoreReward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [100.0, 50.0])
def test_value_is_the_cosine_times_the_learned_factor(tmp_path, dtype, factor):
    # (3, 4) . (2, 0) / (5 * 2) = 0.6. In bfloat16 the logarithm of 100 would round to that of 98.9
    model = with_features(clip_model(), image=[3.0, 4.0], text=[2.0, 0.0])
    model.logit_scale.data.fill_(math.log(factor))
    path = save_clip(tmp_path, model)
    reward = PickScoreReward(path, path, dtype=dtype, device="cpu")
    assert reward(["a cat", "a dog"], [picture(0), picture(1)]) == pytest.approx([0.6 * factor] * 2, rel=1e-5)


def test_value_is_negative_for_features_that_point_apart(tmp_path):
    path = save_clip(tmp_path, with_features(clip_model(), image=[3.0, 4.0], text=[-2.0, 0.0]))
    assert PickScoreReward(path, path, device="cpu")(["a cat"], [picture(0)]) == pytest.approx([-60.0], rel=1e-5)


def test_values_are_the_models_own_logits(tmp_path):
    model = clip_model(seed=3)
    path = save_clip(tmp_path, model)
    prompts = ["a cat", "", "a", "a cat", "longer than twelve tokens"]
    images = [picture(number, 40 + number, 50) for number in range(5)]
    tokens = clip_tokenizer()(prompts, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")
    with torch.no_grad():
        pixels = torch.stack([cropped_pixels(image) for image in images])
        logits = model(**tokens, pixel_values=pixels).logits_per_image.diagonal()
    scores = PickScoreReward(path, path, device="cpu")(prompts, images)
    assert scores == pytest.approx(logits.tolist(), rel=1e-4)
    assert max(scores) - min(scores) > 1


def test_a_prompt_that_is_cut_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_flow.rewards.text_length._said", set())
    path = save_clip(tmp_path, clip_model())
    reward, images = PickScoreReward(path, path, device="cpu"), [picture(0), picture(1)]
    with warnings_of("trl_flow") as said:
        fits = "x " * (CONTEXT - 2)  # each word is a token, with one before and one behind
        reward([fits, "a cat"], images)
        assert said == []
        for _ in range(2):
            cut = reward([fits + "y", fits + "z"], images[:1] * 2)
            assert cut == pytest.approx(reward([fits] * 2, images[:1] * 2), rel=1e-5)
    (message,) = said
    assert f"pickscore reads {CONTEXT} tokens of a prompt: 2 of 2" in message and f"up to {CONTEXT + 1}" in message


def test_model_and_processor_come_from_different_places(tmp_path):
    both, only_model = save_clip(tmp_path / "both", clip_model()), tmp_path / "model"
    clip_model().save_pretrained(only_model)
    expected = PickScoreReward(both, both, device="cpu")(["a cat"], [picture(0)])
    apart = PickScoreReward(str(only_model), both, device="cpu")(["a cat"], [picture(0)])
    assert apart == pytest.approx(expected, rel=1e-4)


def test_defaults_are_the_published_repositories():
    reward = PickScoreReward()
    assert (reward.model, reward.processor) == (
        "yuvalkirstain/PickScore_v1",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    )
