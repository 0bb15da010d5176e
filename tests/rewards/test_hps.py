"""HPSv2 is the cosine in an open_clip model, with that program's own way to read pictures and prompts."""

import pytest
import torch
import torch.nn.functional as F
from tiny_reward_models import (
    MEAN,
    STD,
    OpenCLIP,
    clip_tokenizer,
    open_clip_tokens,
    picture,
)

from trl_flow.rewards import HPSv2Reward


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    clip_tokenizer().save_pretrained(path)
    return str(path)


def save(model, path):
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, path)
    return str(path)


def open_clip_pixels(image):
    """For pictures whose longer side has 28 pixels: nothing but black bands around them."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    square = torch.zeros(3, 28, 28)
    top, left = (28 - image.height) // 2, (28 - image.width) // 2
    square[:, top : top + image.height, left : left + image.width] = pixels.permute(2, 0, 1) / 255
    return (square - MEAN) / STD


@pytest.mark.parametrize("text, expected", [([2.0, 0.0], 0.6), ([-2.0, 0.0], -0.6), ([3.0, 4.0], 1.0)])
def test_value_is_the_cosine(tmp_path, tokenizer_path, text, expected):
    model = OpenCLIP()
    for norm, projection, features in (
        (model.visual.ln_post, model.visual.proj, [3.0, 4.0]),
        (model.ln_final, model.text_projection, text),
    ):
        torch.nn.init.zeros_(norm.weight)
        torch.nn.init.zeros_(norm.bias)
        norm.bias.data[:2] = torch.tensor(features)
        torch.nn.init.eye_(projection)
    reward = HPSv2Reward(model=save(model, tmp_path / "weights.pt"), tokenizer=tokenizer_path, device="cpu")
    assert reward(["a cat"], [picture(0)]) == pytest.approx([expected], rel=1e-5)


def test_values_are_those_of_the_original_model(tmp_path, tokenizer_path):
    model = OpenCLIP(seed=5)
    prompts = ["a cat", "", "a cat", "far too long for the context"]
    images = [picture(0, 28, 28), picture(1, 28, 17), picture(2, 10, 28), picture(3, 28, 28)]
    with torch.no_grad():
        features = model.visual(torch.stack([open_clip_pixels(image) for image in images]))
        expected = F.cosine_similarity(features, model.encode_text(open_clip_tokens(prompts)))
    reward = HPSv2Reward(model=save(model, tmp_path / "weights.pt"), tokenizer=tokenizer_path, device="cpu")
    assert reward(prompts, images) == pytest.approx(expected.tolist(), abs=1e-5)
    assert expected.std() > 0.05


@pytest.mark.parametrize(
    "written, read", [("a &amp;amp; b", "a & b"), ("it\u2019s", "it's"), ("\u201ca\u201d", '"a"')]
)
def test_entities_and_curly_quotes_in_prompts_are_resolved(tmp_path, tokenizer_path, written, read):
    reward = HPSv2Reward(model=save(OpenCLIP(), tmp_path / "weights.pt"), tokenizer=tokenizer_path, device="cpu")
    scores = reward([written, read, "another"], [picture(0)] * 3)
    assert scores[0] == pytest.approx(scores[1], abs=1e-5) and abs(scores[0] - scores[2]) > 1e-3


def test_versions_are_two_files_of_one_repository(tmp_path, tokenizer_path):
    scores = {}
    for seed, (version, file) in enumerate({"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}.items()):
        path = save(OpenCLIP(seed), tmp_path / file)
        scores[version] = HPSv2Reward(model=path, tokenizer=tokenizer_path, device="cpu")(["a cat"], [picture(0)])
    assert abs(scores["v2.0"][0] - scores["v2.1"][0]) > 1e-3
    for version, expected in scores.items():
        reward = HPSv2Reward(version, model=str(tmp_path), tokenizer=tokenizer_path, device="cpu")
        assert reward(["a cat"], [picture(0)]) == pytest.approx(expected, abs=1e-5)
    assert HPSv2Reward().model == "xswu/HPSv2"
    assert [HPSv2Reward(version).__name__ for version in ("v2.0", "v2.1")] == ["hpsv2", "hpsv2.1"]


def test_other_versions_are_refused():
    with pytest.raises(ValueError, match="version='v3' is not a version of HPSv2: give one of .*v2.0.*v2.1"):
        HPSv2Reward("v3")
