"""Motion is the mean absolute difference of consecutive frames."""

import numpy as np
import pytest
from PIL import Image
from tiny_videos import gray, moving_square

from trl_flow.rewards import MotionReward


def motion(*videos):
    return MotionReward()(["a video"] * len(videos), [video[0] for video in videos], list(videos))


def test_it_is_the_mean_over_pixels_channels_and_pairs_of_frames():
    red = [Image.new("RGB", (2, 2), color) for color in [(0, 0, 0), (51, 0, 0), (51, 102, 0)]]
    # (51 / 255 / 3 + 102 / 255 / 3) / 2
    assert motion(red) == pytest.approx([0.1])
    assert motion(gray(0, 255, 255)) == pytest.approx([0.5])


def test_a_still_has_none_and_so_has_a_single_frame():
    assert motion(gray(90, 90, 90), gray(5), moving_square(step=0)) == [0.0, 0.0, 0.0]


def test_faster_is_more():
    slow, fast = motion(moving_square(step=1), moving_square(step=5))
    assert 0 < slow < fast < 0.1


def test_its_hack_is_flicker():
    """What the documentation warns of: no video has more than one that is black and white in turn."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    flicker, static = motion(gray(*[0, 255] * 4), [Image.fromarray(frame) for frame in noise])
    assert flicker == 1.0 and static == pytest.approx(1 / 3, abs=0.01)
