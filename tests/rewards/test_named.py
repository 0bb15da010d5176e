"""Names stand for reward functions wherever these are given."""

import pytest
from PIL import Image
from tiny_training import brightness, prompts, tiny_trainer

from trl_flow.evaluation.scoring import score_images
from trl_flow.rewards import JPEGCompressibilityReward, ShapesReward
from trl_flow.rewards.named import as_rewards
from trl_flow.serving.app import create_app


def test_names_and_functions_may_be_mixed():
    named, own = as_rewards(["shapes_soft", brightness])
    assert isinstance(named, ShapesReward) and named.score == "soft" and own is brightness
    assert as_rewards(None) == as_rewards([]) == []
    assert as_rewards(brightness) == as_rewards((brightness,)) == [brightness]
    assert isinstance(as_rewards("jpeg_compressibility")[0], JPEGCompressibilityReward)


def test_the_trainer_and_evaluations_take_names(tmp_path):
    gold = {"eval_reward_funcs": "jpeg_incompressibility", "eval_dataset": prompts(2)}
    trainer = tiny_trainer(tmp_path, reward_funcs=["jpeg_compressibility", brightness], **gold)
    assert trainer.scorer.names == ["jpeg_compressibility", "brightness"]
    assert trainer.gold_scorer.names == ["jpeg_incompressibility"]
    assert score_images([Image.new("RGB", (8, 8))], prompts(1), "jpeg_incompressibility").keys() == {
        "jpeg_incompressibility"
    }
    assert create_app(["shapes_soft"]) is not None


def test_a_name_that_is_none_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="no reward function 'shape_soft'. Did you mean shapes_soft?"):
        tiny_trainer(tmp_path, reward_funcs="shape_soft")
