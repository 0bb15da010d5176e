"""A reward of images as one of videos: the mean over frames."""

import inspect
import math
from collections.abc import Callable
from typing import Any

from PIL import Image

from trl_flow.images import spread
from trl_flow.rewards.base import check_callable, check_whole_number
from trl_flow.rewards.checks import (
    RewardFunc,
    check_rewards,
    is_async,
    is_dense,
    needs_group,
    reward_name,
    takes_videos,
)


class FrameReward:
    """
    The mean of a reward of images over frames of a video.

    By default over every fourth frame from the first on, as Flow-GRPO reads text in videos: Wan's VAE makes four
    frames of one latent. Frames to which the reward does not apply are left out; if it applies to none the mean is
    `None`. All frames of a call are scored in one call of the reward, with the columns that it needs. What it would
    log for each image by `log_extra` is not logged. Everything else (`load`, `close`, `device`, `info`, ...) is the
    reward's own; it is asynchronous if that is. In metrics it is called `{name}_frames`.

    Args:
        reward (`Callable`): any reward function of images, sync or async.
        every (`int`, defaults to 4): distance of the frames.
        num_frames (`int`, *optional*): so many frames instead, evenly spaced, the first and the last among them.

    Raises:
        TypeError: if `reward` cannot be called.
        ValueError: if it takes videos itself or compares the images of a group, or a number is below 1.

    Example:

    ```pycon
    >>> from PIL import Image
    >>> from trl_flow.rewards import FrameReward
    >>> def redness(prompts, images, **kwargs):
    ...     return [image.getpixel((0, 0))[0] / 255 for image in images]
    ...
    >>> video = [Image.new("RGB", (8, 8), color) for color in ("red", "black", "red", "red")]
    >>> FrameReward(redness, every=1)(prompts=["a red wall"], images=[video[2]], videos=[video])
    [0.75]
    ```
    """

    def __init__(self, reward: RewardFunc, *, every: int = 4, num_frames: int | None = None):
        check_callable("reward", reward, " of prompts and images")
        for name, value in (("every", every), ("num_frames", num_frames)):
            if value is not None:
                check_whole_number(name, value, 1)
        name = reward_name(reward)
        if needs_group(reward):
            raise ValueError(f"{name!r} compares the images of a group: it would compare frames with each other.")
        if takes_videos(reward):
            raise ValueError(f"{name!r} takes videos itself. Give it as it is.")
        self.__signature__ = _signature(reward)
        self.reward, self.every, self.num_frames = reward, every, num_frames
        self.dense, self.takes_videos = is_dense(reward), True
        self.__name__ = f"{name}_frames"
        if is_async(reward):  # which is seen by the class's __call__
            self.__class__ = _AsyncFrameReward

    def __getattr__(self, name: str) -> Any:
        if name == "reward":  # not there yet, as in a copy
            raise AttributeError(name)
        return getattr(self.reward, name)

    def __call__(
        self, prompts: list[str], images: list[Image.Image], videos: list[list[Image.Image]], **kwargs: Any
    ) -> list[float | None]:
        """`N` means for `N` prompts and videos; `images` are not looked at."""
        numbers, arguments = self._of_frames(prompts, videos, kwargs)
        return self._means(numbers, self.reward(**arguments), arguments["prompts"])

    def _of_frames(
        self, prompts: list[str], videos: list[list[Image.Image]], others: dict[str, Any]
    ) -> tuple[list[int], dict[str, Any]]:
        """How many frames are taken of each video, and what the reward is asked about all of them."""
        chosen = [spread(v, self.num_frames) if self.num_frames else v[:: self.every] for v in videos]
        numbers = [len(frames) for frames in chosen]
        columns = {name: value for name, value in others.items() if isinstance(value, list | tuple)}
        repeated = {
            name: [value for value, number in zip(values, numbers, strict=True) for _ in range(number)]
            for name, values in {"prompts": prompts, **columns}.items()
        }
        if "log_extra" in others:
            repeated["log_extra"] = _ignore
        return numbers, {**others, **repeated, "images": [frame for frames in chosen for frame in frames]}

    def _means(self, numbers: list[int], result: Any, prompts: list[str]) -> list[float | None]:
        scores = iter(check_rewards(result, reward_name(self.reward), prompts))
        means: list[float | None] = []
        for number in numbers:
            known = [score for score in (next(scores) for _ in range(number)) if not math.isnan(score)]
            means.append(sum(known) / len(known) if known else None)
        return means


class _AsyncFrameReward(FrameReward):
    async def __call__(
        self, prompts: list[str], images: list[Image.Image], videos: list[list[Image.Image]], **kwargs: Any
    ) -> list[float | None]:
        numbers, arguments = self._of_frames(prompts, videos, kwargs)
        return self._means(numbers, await self.reward(**arguments), arguments["prompts"])


def _ignore(column: str, values: list) -> None:
    """In place of `log_extra`, whose values would be one for each frame."""


def _signature(reward: Callable) -> inspect.Signature:
    """What can be passed: the reward's own parameters, so that missing columns are found, and videos."""
    try:
        parameters = dict(inspect.signature(reward).parameters)
    except (TypeError, ValueError):  # some functions that are built in
        parameters = {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    own = {key: inspect.Parameter(key, kind) for key in ("prompts", "images", "videos")}
    others = [
        p if p.kind is p.VAR_KEYWORD else p.replace(kind=p.KEYWORD_ONLY)
        for key, p in parameters.items()
        if key not in own and p.kind is not p.VAR_POSITIONAL
    ]
    return inspect.Signature([*own.values(), *others])
