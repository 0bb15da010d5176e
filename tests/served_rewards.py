"""Reward functions that tests give to reward servers, good ones and others."""

import asyncio
import os
import sys
import time
from pathlib import Path

import numpy as np

from trl_flow.rewards.base import ModelReward


def brightness(prompts, images, **kwargs):
    """Mean of the pixels, in [0, 1]."""
    return [float(np.asarray(image, dtype=np.float32).mean() / 255) for image in images]


def other_brightness(prompts, images, **kwargs):
    """Goes by the name of `brightness`."""
    return [-1.0] * len(images)


other_brightness.__name__ = "brightness"
other_brightness.needs_group = True


def thirds(prompts, images, trainer_state, log_metric, log_extra, **kwargs):
    """A third of the width: no float32 number. None for pictures higher than wide."""
    log_metric("calls", 1)
    log_extra("width", [image.width for image in images])
    return [image.width / 3 if image.width >= image.height else None for image in images]


def weighted(prompts, images, weight, **kwargs):
    """The length of the prompt times the column `weight`."""
    return [len(prompt) * value for prompt, value in zip(prompts, weight, strict=True)]


async def from_async(prompts, images, **kwargs):
    await asyncio.sleep(0)
    return [len(prompt) for prompt in prompts]


def place_in_call(prompts, images, **kwargs):
    """The number of pictures in the call, and which one it is behind the point: tells how a batch was cut."""
    return [len(images) + i / 1000 for i in range(len(images))]


place_in_call.dense = False


def group_size(prompts, images, **kwargs):
    """How many pictures of its prompt are in the call."""
    return [prompts.count(prompt) for prompt in prompts]


group_size.needs_group = True


def as_told(prompts, images, **kwargs):
    """Does what the prompt says, and otherwise gives 1."""
    word, _, value = prompts[0].partition(" ")
    if word == "raise":
        raise KeyError(value)
    if word == "exit":
        sys.exit(3)
    if word == "sleep":
        time.sleep(float(value))
    if word == "wait":
        while not Path(value).exists():
            time.sleep(0.01)
    if word in ("touch", "begin"):
        Path(value).touch()
    if word == "begin":
        time.sleep(600)
    if word == "die":  # with "once" and a file, only if that is not there
        path = Path(value.removeprefix("once ")) if value else None
        if path is None or not path.exists():
            if path is not None:
                path.touch()
            os._exit(7)
    if word == "short":
        return [1.0] * (len(images) - 1)
    if word == "return":
        return [{"nan": float("nan"), "text": "high"}[value]] * len(images)
    return [1.0] * len(images)


def process(prompts, images, **kwargs):
    """Which process it is that scores."""
    return [os.getpid()] * len(images)


class Broken(ModelReward):
    """Its weights are not there."""

    def _load(self, device):
        raise OSError("there are no weights")

    def _score(self, loaded, prompts, images, columns):
        raise AssertionError


class SlowToLoad(ModelReward):
    """Loads once there is a file `go` in the current folder."""

    def _load(self, device):
        while not os.path.exists("go"):
            time.sleep(0.01)
        return "loaded"

    def _score(self, loaded, prompts, images, columns):
        return [0.5] * len(images)
