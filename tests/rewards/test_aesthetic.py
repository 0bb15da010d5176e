"""The aesthetic score is linear in CLIP's normalized image features."""

import pytest
import torch
import torch.nn.functional as F
from tiny_reward_models import aesthetic_layers, clip_model, cropped_pixels, picture, save_clip, with_features

from trl_flow.rewards import AestheticReward
from trl_flow.rewards.base import CheckpointError


def save(layers, path):
    torch.save(layers.state_dict(), path)
    return str(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_is_the_heads_of_features_of_length_one(tmp_path, dtype):
    # Features (3, 4, 0, ...) of every picture become (0.6, 0.8, 0, ...); 5 * 0.6 + 2.5 * 0.8 + 0.5 = 5.5
    clip = save_clip(tmp_path / "clip", with_features(clip_model(), image=[3.0, 4.0], text=[1.0]))
    layers = aesthetic_layers()
    for parameter in layers.parameters():
        torch.nn.init.zeros_(parameter)
    linears = [module for module in layers["layers"] if isinstance(module, torch.nn.Linear)]
    for linear in linears[1:]:
        linear.weight.data[0, 0] = 1.0
    linears[0].weight.data[0, :2] = torch.tensor([5.0, 2.5])
    linears[-1].bias.data[0] = 0.5
    reward = AestheticReward(save(layers, tmp_path / "head.pth"), clip, dtype=dtype, device="cpu")
    assert reward(["a cat", "a dog"], [picture(0), picture(1)]) == pytest.approx([5.5] * 2, rel=1e-6)


def test_values_are_those_of_the_original_layers(tmp_path):
    model, layers = clip_model(seed=6), aesthetic_layers(seed=6)
    images = [picture(0), picture(1, 28, 56), picture(2, 300, 200)]
    with torch.no_grad():
        pixels = torch.stack([cropped_pixels(image) for image in images])
        features = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        expected = layers["layers"](features).squeeze(-1)
    clip = save_clip(tmp_path / "clip", model)
    reward = AestheticReward(save(layers, tmp_path / "aesthetic-model.pth"), clip, device="cpu")
    scores = reward([""] * 3, images)
    assert scores == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
    # The folder will do as well as the file
    again = AestheticReward(str(tmp_path), clip, device="cpu")([""] * 3, images)
    assert again == pytest.approx(scores, rel=1e-4, abs=1e-5)


def test_head_for_another_encoder_is_refused(tmp_path):
    clip = save_clip(tmp_path / "clip", clip_model())
    layers = aesthetic_layers()
    layers["layers"][0] = torch.nn.Linear(512, 1024)
    reward = AestheticReward(save(layers, tmp_path / "head.pth"), clip, device="cpu")
    with pytest.raises(CheckpointError, match=r"layers\.0\.weight \(1024, 512\) instead of \(1024, 8\)"):
        reward([""], [picture(0)])


def test_defaults_are_the_published_repositories():
    reward = AestheticReward()
    assert (reward.model, reward.clip) == ("trl-lib/ddpo-aesthetic-predictor", "openai/clip-vit-large-patch14")
