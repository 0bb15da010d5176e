"""ImageReward is the head's number, standardized as its authors do."""

import pytest
import torch
from tiny_reward_models import (
    ImageRewardReference,
    bert_tokenizer,
    clip_tokenizer,
    cropped_pixels,
    picture,
)

from trl_flow.rewards import ImageReward
from trl_flow.rewards.base import CheckpointError


MEAN, STD = 0.16717362830052426, 1.0333394966054072


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    bert_tokenizer().save_pretrained(path)
    return str(path)


def save(model, path):
    torch.save(model.state_dict(), path)
    return str(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_is_the_standardized_output_of_the_head(tmp_path, tokenizer_path, dtype):
    model = ImageRewardReference()
    # The text encoder's last norm gives (2, 0, 0, ...) whatever it reads; the head 3 * 2 + 0.25 of it
    last = model.blip.text_encoder.encoder["layer"][-1].output["LayerNorm"]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    last.bias.data[0] = 2.0
    for parameter in model.mlp.parameters():
        torch.nn.init.zeros_(parameter)
    linears = [module for module in model.mlp["layers"] if isinstance(module, torch.nn.Linear)]
    for linear in linears:
        linear.weight.data[0, 0] = 1.0
    linears[0].weight.data[0, 0] = 3.0
    linears[-1].bias.data[0] = 0.25
    path = save(model, tmp_path / "weights.pt")
    reward = ImageReward(path, tokenizer_path, dtype=dtype, device="cpu")
    assert reward(["a b"], [picture(0)]) == pytest.approx([(6.25 - MEAN) / STD], rel=1e-6)


def test_values_are_those_of_the_original_model(tmp_path, tokenizer_path):
    model = ImageRewardReference(seed=2)
    prompts = ["a cat", "", "a b c d", " ".join("abcdefghij" * 5)]
    # In 48 x 29 and 29 x 52 one margin is wider than the other
    images = [picture(0), picture(1, 48, 29), picture(2, 29, 52), picture(3, 500, 300)]
    tokens = bert_tokenizer()(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    with torch.no_grad():
        pixels = torch.stack([centre_cropped(image) for image in images])
        expected = (model(pixels, tokens.input_ids, tokens.attention_mask) - MEAN) / STD
    reward = ImageReward(save(model, tmp_path / "weights.pt"), tokenizer_path, device="cpu")
    assert reward(prompts, images) == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)


def centre_cropped(image):
    """`cropped_pixels`, with the margins rounded as torchvision does: 1.5 to 2, 2.5 to 2."""
    short = min(image.size)
    width, height = (28 * side // short for side in image.size)
    if (width - 28) % 4 == 3 or (height - 28) % 4 == 3:
        resized = image.resize((width, height), resample=3)
        left, top = ((side - 28 + 1) // 2 for side in (width, height))
        return cropped_pixels(resized.crop((left, top, left + 28, top + 28)))
    return cropped_pixels(image)


def test_blips_two_tokens_are_read_as_such(tmp_path, tokenizer_path):
    model = ImageRewardReference()
    size = len(bert_tokenizer())
    embeddings = model.blip.text_encoder.embeddings["word_embeddings"].weight.data
    reward = ImageReward(save(model, tmp_path / "weights.pt"), tokenizer_path, device="cpu")
    reward.load()
    _, read = reward._loaded
    assert read("a [DEC] [ENC]").input_ids[2:4] == [size, size + 1]
    assert len(embeddings) == size + 2


def test_tokenizer_of_another_model_is_refused(tmp_path):
    path = save(ImageRewardReference(), tmp_path / "weights.pt")
    tokens = [*bert_tokenizer().get_vocab(), "more"]
    type(bert_tokenizer())(vocab={token: index for index, token in enumerate(tokens)}).save_pretrained(tmp_path)
    reward = ImageReward(path, str(tmp_path), device="cpu")
    with pytest.raises(CheckpointError, match="has 60 tokens with BLIP's two, the model 59. Give the tokenizer"):
        reward(["a"], [picture(0)])


def test_clips_tokenizer_is_not_taken_for_berts(tmp_path):
    path = save(ImageRewardReference(), tmp_path / "weights.pt")
    clip_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="imagereward"):
        ImageReward(path, str(tmp_path), device="cpu")(["a"], [picture(0)])


def test_defaults_are_the_published_repositories():
    reward = ImageReward()
    assert (reward.model, reward.tokenizer) == ("zai-org/ImageReward", "google-bert/bert-base-uncased")
