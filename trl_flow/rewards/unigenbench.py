"""UniGenBench++ as a reward: which of its test points an image passes."""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

from trl_flow.prompt_words import dimension_of
from trl_flow.rewards.base import Images, RewardInfo, all_at_once
from trl_flow.rewards.judge import Question, report_unreadable
from trl_flow.rewards.judge_prompts import UNIGENBENCH, UNIGENBENCH_TESTPOINTS, passed_testpoints


class UniGenBenchReward(Question):
    """
    The share of its prompt's test points that an image passes, in `[0, 1]`: UniGenBench++ (Wang et al., 2025,
    https://arxiv.org/abs/2510.18701), ten dimensions and 27 test points, judged by a vision-language model.

    Needs the columns `testpoints` and `testpoint_descriptions`, as from [`trl_flow.prompts.load_unigenbench`]. A row
    without test points (`None` or an empty list) has the score `None`. The model is asked once for each image, about
    all of its test points, and answers with a list of 0 and 1 as in the benchmark's own program; the prompt asks for
    the same in our own words. The papers' scores are by Gemini 2.5 Pro; the authors' model for your own server is
    `CodeGoat24/UniGenBench-EvalModel-qwen-72b-v1`.

    An answer without such a list, or with another number of entries, is asked for once more at temperature 0.7 (the
    benchmark's program asks until it gets one). If that cannot be read either, none of its test points counts: the
    score is `None`. Of several images not one of which gets an answer that can be read, that is an error.

    Logs `unigenbench/{dimension}`, the share of passed test points of each dimension in the call,
    `unigenbench/unreadable`, and each image's list of 0 and 1 as the column [`POINTS`] of `log_extra`, from which
    `trl-flow evaluate` makes its tables.

    Args:
        max_tokens (`int`, defaults to 2048): length of an answer: a sentence for each test point, and the list.
        server: as in [`VLMJudgeReward`].

    Raises:
        ImportError, ValueError, JudgeError: as [`VLMJudgeReward`]. A `ValueError` on a call also if a row's test
            points are no list of texts, or have another number of descriptions.

    Example:

    ```pycon
    >>> from trl_flow.rewards import UniGenBenchReward
    >>> reward = UniGenBenchReward(base_url="http://localhost:8001/v1")
    >>> reward.info.range  # the share of an image's test points that it passes
    (0.0, 1.0)
    ```
    """

    info: ClassVar[RewardInfo] = RewardInfo.of("UniGenBenchReward")
    dense: ClassVar[bool] = False
    # What the lists of 0 and 1 are called in `log_extra`
    POINTS: ClassVar[str] = "unigenbench_testpoints"

    def __init__(self, *, max_tokens: int = 2048, **server: Any):
        super().__init__("{prompt}", passed_testpoints, max_tokens=max_tokens, **server)
        self.__name__ = "unigenbench"

    async def __call__(
        self,
        prompts: list[str],
        images: Images,
        testpoints: list[list[str] | None],
        testpoint_descriptions: list[list[str] | None],
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """`N` scores for `N` prompts, images and rows of test points."""
        rows = list(zip(prompts, testpoints, testpoint_descriptions, strict=True))
        questions = [_question(*row) for row in rows]
        asked = [i for i, question in enumerate(questions) if question is not None]

        async def ask(i: int) -> tuple[list[int] | None, str]:
            number = len(testpoints[i])
            return await self._ask(questions[i], images[i], read=lambda choice, text: self.parse(text, number))

        answers = dict(zip(asked, await all_at_once(ask(i) for i in asked), strict=True))
        unreadable = [text for scores, text in answers.values() if scores is None]
        report_unreadable(self.__name__, unreadable, len(asked), log_metric)
        points = [answers[i][0] if i in answers else None for i in range(len(rows))]
        if log_metric is not None:
            by_dimension = defaultdict(list)
            for names, scores in zip(testpoints, points, strict=True):
                for name, score in zip(names or (), scores or ()):  # noqa: B905 - unreadable answers have no scores
                    by_dimension[dimension_of(name)].append(score)
            for dimension, scores in by_dimension.items():
                log_metric(f"unigenbench/{dimension}", sum(scores) / len(scores))
        if log_extra is not None:
            log_extra(self.POINTS, points)
        return [None if scores is None else sum(scores) / len(scores) for scores in points]


def _question(prompt: str, names: Any, descriptions: Any) -> str | None:
    if not names:
        return None
    lists = isinstance(names, list | tuple) and isinstance(descriptions, list | tuple)
    if not lists or len(names) != len(descriptions) or not all(isinstance(t, str) for t in (*names, *descriptions)):
        raise ValueError(
            f"The prompt {prompt!r} has test points {names!r} and descriptions {descriptions!r}, but must have "
            "two lists of texts of one length, as trl_flow.prompts.load_unigenbench gives them."
        )
    lines = []
    for name, description in zip(names, descriptions, strict=True):
        # Of the Chinese sets' test points the name must do
        about = f" ({UNIGENBENCH_TESTPOINTS[name]})" if name in UNIGENBENCH_TESTPOINTS else ""
        lines.append(f"* {name}{about}, here: {description}")
    values = {"prompt": prompt, "testpoints": "\n".join(lines), "number": str(len(names))}
    # At once: a prompt may hold braces of its own
    return re.sub(r"\{(prompt|testpoints|number)\}", lambda found: values[found[1]], UNIGENBENCH)
