"""Images of one prompt compared with each other, two at a time: the reward of Pref-GRPO."""

import asyncio
import inspect
import itertools
import numbers
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from trl_flow.rewards.base import Images, RewardInfo, all_at_once, check_callable
from trl_flow.rewards.judge import Question, UnreadableAnswer, report_unreadable
from trl_flow.rewards.judge_prompts import UNIFIED_REWARD_PAIR, UNIFIED_REWARD_THINK_PAIR, Preference, preferred_image


# Which of two images is better: the first, the second or neither; or the probability that it is the first
Outcome = Preference | float
Comparer = Callable[[str, Image.Image, Image.Image], Outcome | Awaitable[Outcome]]


class VLMComparer(Question):
    """
    Asks a vision-language model which of two images is better.

    An answer that cannot be read is asked for once more, at temperature 0.7.

    Args:
        prompt_template (`str`): what the model is asked, after the two images; `{prompt}` stands for their prompt.
        parse (`Callable[[str], "a" | "b" | "tie" | float | None]`): gives the outcome in an answer, None if there is
            none. A number is the probability that the first image is better.
        max_tokens (`int`, defaults to 4096): length of an answer.
        server: how the model is reached, as in [`ChatModel`].

    Raises:
        ImportError: if the openai package is missing.
        ValueError: if there is no `base_url`.
        TypeError: if `prompt_template` is no text or `parse` no callable.
        JudgeError: on a call, if the server cannot be reached or refuses.
        UnreadableAnswer: on a call, if the second answer cannot be read either.

    Example:

    ```pycon
    >>> import asyncio
    >>> from PIL import Image
    >>> from trl_flow.rewards import VLMComparer
    >>> better = VLMComparer(
    ...     "Which image shows '{prompt}' better, 1 or 2?",
    ...     parse=lambda answer: {"1": "a", "2": "b"}.get(answer.strip()),
    ...     base_url="http://localhost:8001/v1",
    ... )
    >>> images = [Image.new("RGB", (64, 64), color) for color in ("blue", "red")]
    >>> asyncio.run(better("a red wall", *images))
    'b'
    ```
    """

    async def __call__(self, prompt: str, image_a: Image.Image, image_b: Image.Image) -> Outcome:
        outcome, answer = await self._ask(prompt, image_a, image_b)
        if outcome is None:
            raise UnreadableAnswer(answer)
        return outcome


class UnifiedRewardComparer(VLMComparer):
    """
    UnifiedReward asked which of two images is better, by its published prompts.

    Args:
        think (`bool`, defaults to `True`): with a chain of thought, as in Pref-GRPO: for
            `CodeGoat24/UnifiedReward-Think-qwen-7b` (https://huggingface.co/papers/2505.03318). Without, for
            `CodeGoat24/UnifiedReward-qwen-7b` (https://huggingface.co/papers/2503.05236): the answer is a sentence,
            and may be a tie. Where vLLM does not take two images in a request by itself, start it with
            `--limit-mm-per-prompt.image 2`.
        max_tokens, server: as in [`VLMComparer`].

    Example:

    ```pycon
    >>> from trl_flow.rewards import UnifiedRewardComparer, WinRateReward
    >>> comparer = UnifiedRewardComparer(think=False, base_url="http://localhost:8001/v1")
    >>> WinRateReward(comparer).__name__
    'win_rate'
    ```
    """

    def __init__(self, think: bool = True, **server: Any):
        super().__init__(UNIFIED_REWARD_THINK_PAIR if think else UNIFIED_REWARD_PAIR, preferred_image, **server)


class WinRateReward:
    """
    The share of its comparisons that an image wins against the others of its prompt, in `[0, 1]`: Pref-GRPO (Wang et
    al., 2025, https://huggingface.co/papers/2508.20751).

    Every two images of a group are compared; a tie counts half for both. A group of `N` takes `N (N - 1) / 2`
    comparisons (66 for 12 images), and twice as many with `both_orders`. Values of a group add up to `N / 2`
    whatever the images are worth, so that the mean tells nothing about progress: watch another score.

    A group is the images next to each other in a call whose prompts and data set columns are equal. The trainer does
    not cut groups apart for it: a phase in which processes would share one is refused. The only image of its group
    gets `None`.

    An asynchronous reward function: with an asynchronous comparer all pairs are compared at the same time, with a
    plain one in turn. An answer that cannot be read counts as a tie, as in Pref-GRPO; their share is logged as
    `win_rate/unreadable`.

    Args:
        comparer (`Callable`, *optional*): `(prompt, image_a, image_b)` to `"a"`, `"b"`, `"tie"` or the probability
            that `image_a` is better, sync or async; by default [`UnifiedRewardComparer`], Pref-GRPO's.
        both_orders (`bool`, defaults to `False`): whether each two images are compared a second time in the other
            order. Judges tend to prefer the first image (or the second); this evens it out, for twice the price.
        server: how the default comparer reaches its model, as in [`ChatModel`].

    Raises:
        TypeError: if there are both a comparer and server settings, or the comparer cannot be called.
        ImportError, ValueError: as [`UnifiedRewardComparer`], if there is no comparer.
        ValueError: on a call, if there are not as many prompts as images, or the comparer returns something else.
        TypeError: on a call, if a prompt is no text or an image no `PIL.Image.Image`.
        JudgeError: on a call, as [`VLMComparer`], and if no answer at all can be read.

    Example:

    ```pycon
    >>> import asyncio
    >>> from PIL import Image
    >>> from trl_flow.rewards import WinRateReward
    >>> def brighter(prompt, image_a, image_b):
    ...     return "a" if image_a.getpixel((0, 0)) > image_b.getpixel((0, 0)) else "b"
    ...
    >>> images = [Image.new("L", (8, 8), level) for level in (10, 200, 90)]
    >>> asyncio.run(WinRateReward(brighter)(prompts=["light"] * 3, images=images))
    [0.0, 1.0, 0.5]
    ```
    """

    info: ClassVar[RewardInfo] = RewardInfo.of("WinRateReward")
    dense: ClassVar[bool] = False
    # A call must hold whole groups: the trainer splits calls between groups only
    needs_group: ClassVar[bool] = True

    def __init__(self, comparer: Comparer | None = None, *, both_orders: bool = False, **server: Any):
        if comparer is not None and server:
            both = f"both a comparer and {', '.join(server)}"
            raise TypeError(f"WinRateReward was given {both}. Give the latter to the comparer.")
        if comparer is not None:
            check_callable("comparer", comparer, " (prompt, image_a, image_b)")
        self.comparer = UnifiedRewardComparer(**server) if comparer is None else comparer
        self.both_orders = both_orders
        self.__name__ = "win_rate"

    async def __call__(
        self, prompts: list[str], images: Images, trainer_state: Any = None,
        log_metric: Callable[[str, float], None] | None = None, log_extra: Any = None, **columns: Any,
    ) -> list[float | None]:  # fmt: skip
        """
        The shares of `N` images, those of a group next to each other. `columns` are the data set's, lists of `N`
        entries; `log_metric` is given the share of comparisons without a readable answer.
        """
        rows = [(prompt,) for prompt, _ in zip(prompts, images, strict=True)]
        for column in columns.values():
            if isinstance(column, list | tuple) and len(column) == len(rows):
                rows = [(*row, entry) for row, entry in zip(rows, column, strict=True)]
        pairs = [pair for group in _groups(rows) for pair in itertools.combinations(group, 2)]
        if self.both_orders:
            pairs = [ordered for a, b in pairs for ordered in ((a, b), (b, a))]

        unreadable: list[str] = []

        async def compare(a: int, b: int) -> float:
            try:
                outcome = self.comparer(prompts[a], images[a], images[b])
                if inspect.isawaitable(outcome):
                    outcome = await outcome
                else:
                    await asyncio.sleep(0)  # the other reward functions' turn
            except UnreadableAnswer as error:
                unreadable.append(str(error))
                return 0.5
            return _probability(outcome, prompts[a])

        shares: list[list[float]] = [[] for _ in rows]
        for (a, b), first_wins in zip(pairs, await all_at_once(compare(a, b) for a, b in pairs), strict=True):
            shares[a].append(first_wins)
            shares[b].append(1 - first_wins)
        report_unreadable(self.__name__, unreadable, len(pairs), log_metric)
        return [sum(wins) / len(wins) if wins else None for wins in shares]


def _groups(rows: list[tuple]) -> list[list[int]]:
    """The indices of equal rows next to each other."""
    groups: list[list[int]] = []
    for index, row in enumerate(rows):
        if groups and all(map(_equal, row, rows[groups[-1][-1]])):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, np.ndarray | torch.Tensor):
        return np.array_equal(np.asarray(value), np.asarray(other))
    # Only NaN differs from itself: a column's missing numbers are equal
    return value is other or bool(value == other) or bool(value != value and other != other)


def _probability(outcome: Any, prompt: str) -> float:
    """The probability that the first image is better."""
    if isinstance(outcome, str) and outcome in (known := {"a": 1.0, "b": 0.0, "tie": 0.5}):
        return known[outcome]
    if isinstance(outcome, torch.Tensor | np.ndarray | np.generic) and outcome.ndim == 0:
        outcome = outcome.item()
    if isinstance(outcome, numbers.Real) and 0 <= outcome <= 1:
        return float(outcome)
    expected = "'a', 'b', 'tie' or the probability, from 0 to 1, that the first image is better"
    raise ValueError(f"The comparer returned {outcome!r} for two images of {prompt!r}. It must return {expected}.")
