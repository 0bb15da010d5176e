"""Rewards of images become rewards of videos by their mean over frames."""

import asyncio
import copy
import functools
import weakref

import numpy as np
import pytest
import torch
from tiny_reward_models import NAMES, make_reward, picture, save_reward_models
from tiny_training import brightness
from tiny_videos import gray, moving_square

from trl_flow.images import spread
from trl_flow.rewards import FrameReward, MotionReward, OCRReward, PickScoreReward, WinRateReward
from trl_flow.rewards.checks import RewardError, check_reward_func, is_async, is_dense, reward_name
from trl_flow.rewards.named import named_reward
from trl_flow.rewards.scorer import RewardScorer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_reward_models(tmp_path_factory.mktemp("rewards"))


def first_pixel(prompts, images, **kwargs):
    return [float(image.getpixel((0, 0))[0]) for image in images]


def called(reward, prompts, videos, **kwargs):
    return reward(prompts=prompts, images=[video[0] for video in videos], videos=videos, **kwargs)


def test_the_mean_is_over_every_fourth_frame_or_so_many_evenly_spaced():
    videos = [gray(*range(0, 90, 10)), gray(7)]  # frames 0, 4 and 8 are 0, 40 and 80
    assert called(FrameReward(first_pixel), ["a", "b"], videos) == [40.0, 7.0]
    assert called(FrameReward(first_pixel, every=2), ["a", "b"], videos) == [40.0, 7.0]
    assert called(FrameReward(first_pixel, every=8), ["a", "b"], videos) == [40.0, 7.0]
    assert called(FrameReward(first_pixel, every=5), ["a", "b"], videos) == [25.0, 7.0]
    assert called(FrameReward(first_pixel, num_frames=2), ["a", "b"], videos) == [40.0, 7.0]
    assert called(FrameReward(first_pixel, num_frames=1), ["a", "b"], [gray(0, 90, 0), gray(0, 8)]) == [90.0, 8.0]


@pytest.mark.parametrize(
    "total, number, expected",
    [(9, 4, [0, 3, 5, 8]), (9, 3, [0, 4, 8]), (5, 1, [2]), (4, 1, [2]), (3, 8, [0, 1, 2]), (1, 4, [0])],
)
def test_frames_are_spread_from_the_first_to_the_last(total, number, expected):
    frames = gray(*range(total))
    assert [frames.index(frame) for frame in spread(frames, number)] == expected


def test_prompts_and_columns_are_repeated_for_each_frame_and_the_rest_is_passed_on():
    seen = {}

    def reward(prompts, images, target, trainer_state, log_metric, log_extra, **kwargs):
        seen.update(prompts=prompts, target=target, state=trainer_state, others=kwargs)
        log_metric("looked", 1.0)
        log_extra("own", list(range(len(images))))
        return [target[i] for i in range(len(images))]

    scorer = RewardScorer([FrameReward(reward, every=1)])
    logged = {}
    arguments = {"trainer_state": "state", "log_metric": logged.__setitem__, "log_extra": logged.__setitem__}
    videos = [gray(1, 2), gray(3, 4, 5)]
    assert called(scorer.reward_funcs[0], ["a", "b"], videos, target=[1.0, 2.0], **arguments) == [1.0, 2.0]
    assert seen["prompts"] == ["a", "a", "b", "b", "b"] and seen["target"] == [1.0, 1.0, 2.0, 2.0, 2.0]
    assert seen["state"] == "state" and "videos" not in seen["others"]
    assert logged == {"looked": 1.0}


def test_frames_to_which_the_reward_does_not_apply_are_left_out():
    def bright(prompts, images, **kwargs):
        return [value if value > 10 else None for value in first_pixel(prompts, images)]

    reward = FrameReward(bright, every=1)
    assert called(reward, ["a", "b"], [gray(0, 20, 40), gray(1, 2)]) == [30.0, None]


def test_an_async_reward_stays_async():
    async def slow(prompts, images, **kwargs):
        await asyncio.sleep(0)
        return first_pixel(prompts, images)

    reward = FrameReward(slow, every=1)
    assert is_async(reward) and not is_async(FrameReward(first_pixel))
    assert asyncio.run(called(reward, ["a"], [gray(10, 20)])) == [15.0]


def test_columns_that_the_reward_needs_are_still_asked_for():
    def close(prompts, images, target, **kwargs):
        return target

    with pytest.raises(ValueError, match="'close_frames' needs a column 'target'"):
        check_reward_func(FrameReward(close), ["prompt"])
    check_reward_func(FrameReward(close), ["prompt", "target"])
    with pytest.raises(TypeError, match="'strict_frames' does not accept"):
        check_reward_func(FrameReward(functools.partial(strict)), ["prompt"])


def strict(prompts, images):
    return [0.0] * len(images)


def test_what_is_no_reward_of_single_images_is_refused():
    with pytest.raises(ValueError, match="'motion' takes videos itself"):
        FrameReward(MotionReward())
    with pytest.raises(ValueError, match="compares the images of a group"):
        FrameReward(WinRateReward(lambda prompt, a, b: "tie"))
    with pytest.raises(TypeError, match="reward is 'pickscore', but must be a function"):
        FrameReward("pickscore")
    with pytest.raises(ValueError, match="every is 0"):
        FrameReward(first_pixel, every=0)
    with pytest.raises(ValueError, match="num_frames is 0"):
        FrameReward(first_pixel, num_frames=0)


def test_a_wrong_number_of_values_names_the_reward():
    with pytest.raises(RewardError, match="'one' returned 1 rewards for 3 images"):
        called(FrameReward(one, every=1), ["a"], [gray(1, 2, 3)])


def one(prompts, images, **kwargs):
    return [1.0]


@pytest.mark.parametrize("name", NAMES)
def test_the_package_s_models_score_frames(name, folder):
    """Each frame has the score that it has as an image; the model is loaded and freed by the scorer."""
    model = make_reward(name, folder)
    reward = FrameReward(model, every=2)
    videos = [[picture(seed) for seed in range(4)], [picture(seed) for seed in range(4, 7)]]
    prompts = ["a cat", "two dogs"]
    frames = [videos[0][0], videos[0][2], videos[1][0], videos[1][2]]
    alone = model(["a cat", "a cat", "two dogs", "two dogs"], frames)
    expected = [np.mean(alone[:2]), np.mean(alone[2:])]
    assert called(reward, prompts, videos) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert reward_name(reward) == f"{name}_frames" and reward.info == model.info and is_dense(reward)
    scorer = RewardScorer([reward])
    scorer.load()
    loaded = weakref.ref(model._loaded[0]) if isinstance(model._loaded, tuple) else None
    scorer.close()
    assert model._loaded is None and (loaded is None or loaded() is None)


def test_text_is_read_in_frames():
    from PIL import Image, ImageDraw

    from trl_flow.evaluation.fonts import font_for

    page, empty = Image.new("RGB", (320, 96), "white"), Image.new("RGB", (320, 96), "white")
    ImageDraw.Draw(page).text((20, 20), "HELLO", fill="black", font=font_for("HELLO", 48))
    reward = FrameReward(OCRReward(num_threads=1), every=1)
    assert called(reward, ['the word "HELLO"'], [[page, empty]]) == [0.5]


def test_names_on_the_command_line():
    reward = named_reward("frames:jpeg_compressibility")
    assert isinstance(reward, FrameReward) and reward_name(reward) == "jpeg_compressibility_frames"
    assert isinstance(named_reward("frames:pickscore").reward, PickScoreReward)
    assert named_reward("frames:tiny_training.brightness").reward is brightness
    with pytest.raises(ValueError, match="Did you mean pickscore"):
        named_reward("frames:pickscor")


def test_options_of_the_model_are_its_own():
    reward = FrameReward(PickScoreReward(dtype=torch.bfloat16, batch_size=3))
    assert (reward.dtype, reward.batch_size) == (torch.bfloat16, 3)
    assert copy.copy(reward).reward is reward.reward


def test_a_scorer_gives_the_frames(monkeypatch):
    scores = RewardScorer([FrameReward(brightness), MotionReward()]).score(["a"] * 2, [moving_square(), gray(0)], {})
    assert scores.rewards.shape == (2, 2) and scores.rewards[1].tolist() == [0.0, 0.0]
    assert 0.5 < scores.rewards[0, 0] < 1 and 0 < scores.rewards[0, 1] < 0.1
