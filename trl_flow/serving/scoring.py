"""Scores the images of one request with the reward functions of a server."""

import dataclasses
import itertools
import logging
import math
import time
from dataclasses import dataclass, field

import torch

from trl_flow.rewards.checks import RewardError
from trl_flow.rewards.scorer import RewardScorer
from trl_flow.serving.form import ScoreRequest, decode_images


logger = logging.getLogger(__name__)


@dataclass
class Scored:
    """Scores and seconds by the name of the reward function. Of one that failed `failure` has the name, and what the
    client is told."""

    scores: dict[str, list[float | None]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failure: tuple[str, str] | None = None


def decoded(asked: ScoreRequest, max_pixels: int) -> ScoreRequest:
    """`asked` with images instead of PNG files. Raises as [`decode_images`]."""
    images = decode_images(asked.images, max_pixels)
    if asked.videos is None:
        return dataclasses.replace(asked, images=images)
    frames = iter(decode_images(asked.frames, max_pixels))
    videos = [list(itertools.islice(frames, number)) for number in asked.videos]
    return dataclasses.replace(asked, images=images, frames=[], columns={**asked.columns, "videos": videos})


def score(scorer: RewardScorer, names: list[str], asked: ScoreRequest) -> Scored:
    """The scores by the functions `names` of a request that is [`decoded`]. It raises nothing: errors are logged."""
    scored = Scored()
    for name in names:
        index, started = scorer.names.index(name), time.perf_counter()
        try:
            with torch.no_grad():
                values = scorer.score(asked.prompts, asked.images, asked.columns, only=[index]).values[index]
            scored.scores[name] = [None if math.isnan(value) else value for value in values]
        except BaseException as error:  # a reward function that calls sys.exit() may not end the server
            scored.failure = name, _told(name, error)
            break
        finally:
            scored.seconds[name] = time.perf_counter() - started
    return scored


def _told(name: str, error: BaseException) -> str:
    """Logs what was raised; returns what the client is told, who does not see the traceback."""
    message, cause = str(error), error.__cause__
    if not isinstance(error, RewardError):
        message, cause = f"The reward function {name!r} raised {type(error).__name__}: {error}", error
    logger.error("%s", message, exc_info=cause or error)
    if cause is not None:
        reason = f"{message.split(' raised ')[0]} raised {type(cause).__name__}: {cause}"
        message = f"{reason[:2000]}. The server's log has the traceback."
    return message[:3000].encode("utf-8", "backslashreplace").decode()
