"""A judge of videos is shown evenly spaced frames in one message."""

import asyncio
import copy

import numpy as np
import pytest
from judge_server import JudgeServer
from tiny_videos import gray, moving_square

from trl_flow.rewards import FrameReward, UnifiedReward, VideoJudgeReward, VLMJudgeReward
from trl_flow.rewards.checks import check_reward_func, is_async, takes_videos
from trl_flow.rewards.judge_prompts import VIDEO, final_score
from trl_flow.rewards.named import named_reward
from trl_flow.rewards.scorer import RewardScorer


@pytest.fixture(autouse=True)
def no_certificates(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))


def reds(request):
    return [image.getpixel((0, 0))[0] for image in request.images]


def score(reward, videos):
    return RewardScorer([reward]).score(["a {square} moves"] * len(videos), videos, {}).values[0]


def test_frames_are_sent_in_their_order_without_loss_and_then_the_question():
    video = moving_square(frames=9)
    with JudgeServer(lambda request: "It moves.\nFinal Score: 4.5") as server:
        assert score(VideoJudgeReward(num_frames=3, base_url=server.base_url), [video]) == [4.5]
    (request,) = server.requests
    assert request.kinds == ["image_url"] * 3 + ["text"]
    assert request.text == VIDEO.replace("{prompt}", "a {square} moves")
    for sent, frame in zip(request.images, [video[0], video[4], video[8]], strict=True):
        assert np.array_equal(np.asarray(sent), np.asarray(frame))


def test_each_video_is_judged_by_its_own_frames():
    with JudgeServer(lambda request: f"Final Score: {sum(reds(request)) / 100}") as server:
        reward = VideoJudgeReward(base_url=server.base_url)
        assert score(reward, [gray(100, 200), gray(*[50] * 20)]) == [3.0, 4.0]
    assert {len(request.images) for request in server.requests} == {2, 8}


def test_a_judge_of_images_is_shown_one_frame_and_any_judge_may_be_shown_several():
    with JudgeServer(lambda request: f"Final Score: {sum(reds(request))}") as server:
        one = VLMJudgeReward("{prompt}?", final_score, base_url=server.base_url)
        two = VLMJudgeReward("{prompt}?", final_score, num_frames=2, base_url=server.base_url)
        assert score(one, [gray(1, 2, 4)]) == [2.0]
        assert score(two, [gray(1, 2, 4)]) == [5.0]
        assert score(two, gray(7)) == [7.0]  # of an image, itself
        each = FrameReward(copy.copy(one), every=1)
        assert is_async(each) and score(each, [gray(1, 2, 6)]) == [3.0]
    assert not takes_videos(one) and takes_videos(two) and takes_videos(each)


def test_what_cannot_be_read_or_is_out_of_range_has_no_score(caplog):
    with JudgeServer(lambda request: "Final Score: 9" if reds(request)[0] else "Final Score: 2") as server:
        assert np.isnan(score(VideoJudgeReward(base_url=server.base_url), [gray(1, 1), gray(0, 0)])).tolist() == [
            True,
            False,
        ]


def test_by_name(monkeypatch):
    reward = named_reward("video_judge@http://localhost:8000/v1#my-model")
    assert isinstance(reward, VideoJudgeReward) and (reward.num_frames, reward.chat.model) == (8, "my-model")
    check_reward_func(reward, ["prompt"], videos=True)
    each = named_reward("frames:unifiedreward@http://localhost:8000/v1")
    assert isinstance(each, FrameReward) and isinstance(each.reward, UnifiedReward)
    with pytest.raises(ValueError, match="num_frames is 0"):
        VideoJudgeReward(num_frames=0, base_url="http://localhost:8000/v1")


def test_calls_by_hand():
    with JudgeServer(lambda request: "Final Score: 3") as server:
        reward = VideoJudgeReward(base_url=server.base_url)
        video = gray(1, 2)
        assert asyncio.run(reward(prompts=["a"], images=[video[1]], videos=[video])) == [3.0]
