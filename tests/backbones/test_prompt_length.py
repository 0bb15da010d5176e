"""Prompts that are longer than the text encoder reads."""

import pytest
import torch
from families import FAMILIES
from family_checks import images_to_edit
from tiny_training import warnings_of

from trl_flow.backbones.prompt_length import warn_of_long_prompts


# Tokens that each family needs for `n` letters: special ones, and what a chat template puts around them
AROUND = {
    **{"sd3": 2, "sd": 2, "sdxl": 2, "flux-dev": 2, "kontext": 2, "wan21": 2},
    # user's turn, then the assistant's: a letter is a token here, as is each word of Qwen's own beginning
    **{"klein-base": 19, "z-image": 19, "qwen-image": 13, "qwen-image-edit": 0, "qwen-image-edit-plus": 0},
}
TEMPLATED = [name for name in AROUND if AROUND[name] > 2]

pytestmark = pytest.mark.usefixtures("small_input_images")


def encoded(backbone, prompt: str) -> dict[str, torch.Tensor]:
    edited = images_to_edit(1, (backbone.height, backbone.width)) if backbone.takes_image else []
    with torch.no_grad():
        return backbone.encode_prompt(prompt, *edited)


def is_same(found: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(found[key].float(), other[key].float(), atol=1e-6) for key in found)


@pytest.mark.parametrize("name", AROUND)
def test_one_warning_says_how_many_are_cut_and_what_they_need(name):
    backbone = FAMILIES[name].backbone()
    fits = backbone.token_limit - AROUND[name]
    prompts = ["x" * fits, "x" * (fits + 1), "x" * (fits + 7), "x" * (fits + 7), ""]
    with warnings_of("trl_flow") as said:
        warn_of_long_prompts(backbone, [prompts[0], ""], "train_dataset")
        assert said == []
        warn_of_long_prompts(backbone, prompts, "train_dataset")
    (message,) = said
    assert f"2 of 3 different prompts of train_dataset are longer than the {backbone.token_limit} tokens" in message
    assert f"needs {backbone.token_limit + 7}" in message
    remedy = "Shorten them" if name in ("sd", "sdxl") else f"Set max_sequence_length={backbone.token_limit + 7}"
    assert remedy in message


def test_prompts_that_are_short_in_any_tokenizer_are_not_counted(monkeypatch):
    backbone, counted = FAMILIES["z-image"].backbone(), []
    count = backbone.prompt_tokens
    monkeypatch.setattr(backbone, "prompt_tokens", lambda prompts: counted.extend(prompts) or count(prompts))
    fits = backbone.token_limit - AROUND["z-image"]
    with warnings_of("trl_flow") as said:
        warn_of_long_prompts(backbone, ["x", "x" * (fits - 1), "x" * (fits + 1)], "train_dataset")
    assert counted == ["", "x" * (fits + 1)] and "1 of 3" in said[0]


@pytest.mark.parametrize("name", AROUND)
def test_what_is_counted_is_what_is_read(name):
    backbone = FAMILIES[name].backbone()
    fits = backbone.token_limit - AROUND[name]
    whole, longer, other = (encoded(backbone, "x" * fits + more) for more in ("", "yz", "zy"))
    shorter = encoded(backbone, "x" * (fits - 1) + "y")
    assert is_same(longer, other) and not is_same(whole, shorter)
    # What stands behind the prompt stays: a chat template is left whole. (To CLIP a word's last letter is another)
    assert is_same(longer, whole) or name not in TEMPLATED


@pytest.mark.parametrize("name", TEMPLATED)
def test_a_length_that_the_template_alone_fills_is_refused(name):
    backbone = FAMILIES[name].backbone()
    backbone.max_sequence_length = AROUND[name] - 1
    with pytest.raises(ValueError, match=f"puts {AROUND[name]} tokens around every prompt. Raise it"):
        encoded(backbone, "a cat")


def test_a_letter_of_several_tokens_is_kept_or_dropped_whole():
    backbone = FAMILIES["qwen-image"].backbone()
    fits = backbone.token_limit - AROUND["qwen-image"]
    letters = "猫"  # three bytes, three tokens
    assert backbone.prompt_tokens([letters])[0] == 3 + AROUND["qwen-image"]
    number = fits // 3
    assert is_same(encoded(backbone, letters * (number + 1)), encoded(backbone, letters * number))


def test_without_t5_the_prompt_is_clips():
    family = FAMILIES["sd3"]
    pipeline = family.make_pipeline()
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    backbone = family.backbone(pipeline=pipeline)
    backbone.max_sequence_length = 200
    assert backbone.token_limit == pipeline.tokenizer.model_max_length
    assert backbone.prompt_tokens(["x" * 30]) == [32]
