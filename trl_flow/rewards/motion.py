"""How much moves in a video."""

from itertools import pairwise

import numpy as np
from PIL import Image

from trl_flow.images import to_rgb
from trl_flow.rewards.base import RewardInfo


class MotionReward:
    """
    How much moves in a video, in `[0, 1]`: the mean absolute difference of the pixels of consecutive frames, of values
    from 0 to 1. A still has 0, and so has a video of one frame.

    Rewards of single frames and of their prompts are often best for a video in which nothing moves: this one shows it.
    It is no measure of good motion. Optimized alone it is hacked by flicker: frames that are black and white in turn
    have 1, and noise has 1/3. Watch it, give it a small weight, or reward it beside a score of frames.

    Example:

    ```pycon
    >>> from PIL import Image
    >>> from trl_flow.rewards import MotionReward
    >>> white, black = (Image.new("RGB", (8, 8), color) for color in ("white", "black"))
    >>> still, flicker = [white] * 3, [white, black, white]
    >>> MotionReward()(prompts=["a lamp"] * 2, images=[white, black], videos=[still, flicker])
    [0.0, 1.0]
    ```
    """

    info = RewardInfo.of("MotionReward")
    dense = True

    def __init__(self):
        self.__name__ = "motion"

    def __call__(
        self, prompts: list[str], images: list[Image.Image], videos: list[list[Image.Image]], **kwargs
    ) -> list[float]:
        """`N` scores for `N` videos of at least one frame, of one size within each."""
        return [_motion(video) for video in videos]


def _motion(video: list[Image.Image]) -> float:
    frames = (np.asarray(to_rgb(frame), dtype=np.float32) / 255 for frame in video)
    differences = [np.abs(after - before).mean() for before, after in pairwise(frames)]
    return float(np.mean(differences)) if differences else 0.0
