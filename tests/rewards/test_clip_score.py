"""CLIPScore is 100 times the cosine, and never negative."""

import pytest
import torch
import torch.nn.functional as F
from tiny_reward_models import clip_model, clip_tokenizer, cropped_pixels, picture, save_clip, with_features

from trl_flow.rewards import CLIPScoreReward
from trl_flow.rewards.named import named_reward


@pytest.mark.parametrize("text, expected", [([2.0, 0.0], 60.0), ([0.0, 1.0], 80.0), ([-2.0, 0.0], 0.0)])
def test_value_is_a_hundred_cosines_cut_at_zero(tmp_path, text, expected):
    # The learned factor, 100 in this model, must not be taken for the metric's
    model = with_features(clip_model(), image=[3.0, 4.0], text=text)
    model.logit_scale.data.fill_(1.0)
    reward = CLIPScoreReward(save_clip(tmp_path, model), device="cpu")
    assert reward(["a cat"], [picture(0)]) == pytest.approx([expected], rel=1e-5)


def test_values_are_those_of_the_models_features(tmp_path):
    model = clip_model(seed=4)
    prompts, images = ["a cat", "hill"], [picture(0), picture(1, 56, 28)]
    with torch.no_grad():
        texts = model.get_text_features(**clip_tokenizer()(prompts, padding=True, return_tensors="pt")).pooler_output
        pixels = torch.stack([cropped_pixels(image) for image in images])
        features = model.get_image_features(pixel_values=pixels).pooler_output
    expected = (100 * F.cosine_similarity(texts, features)).tolist()
    assert min(expected) > 0
    reward = CLIPScoreReward(save_clip(tmp_path, model), device="cpu")
    assert reward(prompts, images) == pytest.approx(expected, rel=1e-4)


def test_processor_is_the_models_own_unless_told_otherwise():
    own = CLIPScoreReward("some/clip", revision="abc")
    assert (own.processor, own.processor_revision) == ("some/clip", "abc")
    other = CLIPScoreReward("some/clip", "other/clip", revision="abc")
    assert (other.processor, other.processor_revision) == ("other/clip", None)
    assert CLIPScoreReward().model == "openai/clip-vit-large-patch14"


def test_a_word_chooses_the_model_that_dancegrpo_and_slas_train_on():
    """Its score can stand beside that of OpenAI's model in one run."""
    other, openai = named_reward("clipscore_dfn5b"), named_reward("clipscore")
    assert other.model == other.processor == "apple/DFN5B-CLIP-ViT-H-14-378"
    assert (other.__name__, openai.__name__) == ("clipscore_dfn5b", "clipscore")
