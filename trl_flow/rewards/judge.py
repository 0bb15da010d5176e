"""Images scored by a vision-language model behind an OpenAI-compatible server (vLLM, SGLang, ...)."""

import dataclasses
import logging
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

from PIL import Image

from trl_flow.images import spread
from trl_flow.rewards import judge_prompts
from trl_flow.rewards.base import Images, RewardInfo, all_at_once, check_choice, check_whole_number
from trl_flow.rewards.chat import ChatModel, JudgeError
from trl_flow.rewards.judge_prompts import DEQA_ANSWER_PREFIX, DEQA_LEVELS, DEQA_QUESTION


logger = logging.getLogger(__name__)

UnifiedRewardScore = Literal["overall", "overall_with_elements", "alignment", "coherence", "style"]


class UnreadableAnswer(ValueError):
    """A judge's answer holds no score or preference; the message is the answer.

    Example:

    ```pycon
    >>> import asyncio
    >>> from PIL import Image
    >>> from trl_flow.rewards import UnreadableAnswer, VLMComparer
    >>> better = VLMComparer("Which is better?", parse=lambda answer: None, base_url="http://localhost:8001/v1")
    >>> try:
    ...     asyncio.run(better("a cat", Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8))))
    ... except UnreadableAnswer as error:
    ...     print("the judge said:", error)
    ...
    the judge said: 2
    ```
    """


class Question:
    """What a vision-language model is asked about images, and how its answer is read: base of judges and comparers."""

    # Of the first request and of the second. At 0 the second answer would be the first one again
    _temperatures: ClassVar[tuple[float, ...]] = (0.0, 0.7)

    def __init__(self, prompt_template: str, parse: Callable[[str], Any], *, max_tokens: int = 4096, **server: Any):
        if not isinstance(prompt_template, str) or not callable(parse):
            needed = "a text and a function that reads the answer"
            raise TypeError(f"A judge needs {needed}, but was given {prompt_template!r} and {parse!r}.")
        self.prompt_template, self.parse, self.max_tokens = prompt_template, parse, max_tokens
        self.chat = ChatModel(**server)
        # Where an evaluation looks for what its scores were computed by
        self.model = self.chat.model

    async def _ask(self, prompt: str, *images: Image.Image, read: Callable | None = None) -> tuple[Any, str]:
        """What the first answer that can be read (by `read` or else `_read`) says, or None, and the last answer."""
        for temperature in self._temperatures:
            choice = await self._answer(prompt, images, temperature)
            # Empty where the server sent no text, as for an answer cut off while thinking
            text = choice.message.content or ""
            if (outcome := (read or self._read)(choice, text)) is not None:
                break
        return outcome, text

    async def _answer(self, prompt: str, images: tuple[Image.Image, ...], temperature: float) -> Any:
        # Not str.format: templates and prompts may hold braces of their own
        question = self.prompt_template.replace("{prompt}", prompt)
        return await self.chat.answer([*images, question], max_tokens=self.max_tokens, temperature=temperature)

    def _read(self, choice: Any, text: str) -> Any:
        return self.parse(text)


class VLMJudgeReward(Question):
    """
    The score that a vision-language model gives each image, asked by a prompt of your own.

    An asynchronous reward function: all images of a call are judged at the same time, in parallel with the other
    reward functions, by greedy decoding. An answer that cannot be read is asked for once more, at temperature 0.7. If
    that cannot be read either the score is `None`, a warning shows the answer, and the share of such images is logged
    as `{name}/unreadable`. If no answer to two images or more can be read, that is an error.

    Args:
        prompt_template (`str`): what the model is asked, after the image; `{prompt}` stands for its prompt.
        parse (`Callable[[str], float | None]`): gives the score in an answer, None if there is none.
        name (`str`, defaults to `"vlm_judge"`): what the reward is called in metrics.
        range (`tuple[float, float]`, defaults to no limits): smallest and largest score. An answer with a score beyond
            counts as one that cannot be read.
        num_frames (`int`, *optional*): of a video the model is shown so many frames, evenly spaced, in one message; by
            default the one frame that every reward gets as its image.
        max_tokens (`int`, defaults to 1024): length of an answer. One that is cut off may lack its score.
        server: how the model is reached: `model`, `base_url`, `api_key`, `max_concurrency`, `timeout`, `max_retries`,
            as in [`ChatModel`].

    Raises:
        ImportError: if the openai package is missing.
        ValueError: if there is no `base_url` or `num_frames` is below 1, and on a call if there are not as many
            prompts as images.
        TypeError: if `prompt_template` is no text or `parse` no callable, and on a call if a prompt is no text or an
            image no `PIL.Image.Image`.
        JudgeError: on a call, if the server cannot be reached, refuses, or gives no answer that can be read.

    Example:

    ```pycon
    >>> import asyncio
    >>> from PIL import Image
    >>> from trl_flow.rewards import VLMJudgeReward
    >>> judge = VLMJudgeReward(
    ...     "How well does this image show '{prompt}', from 0 to 10? Answer with a number.",
    ...     parse=float,
    ...     range=(0, 10),
    ...     base_url="http://localhost:8001/v1",
    ... )
    >>> asyncio.run(judge(prompts=["a red wall"], images=[Image.new("RGB", (64, 64), "red")]))
    [7.0]
    ```
    """

    info: ClassVar[RewardInfo] = RewardInfo.of("VLMJudgeReward")
    # A request for every image and step, to models that have not been trained on noise
    dense: ClassVar[bool] = False

    def __init__(
        self, prompt_template: str, parse: Callable[[str], float | None], *, name: str = "vlm_judge",
        range: tuple[float, float] = (-math.inf, math.inf), num_frames: int | None = None, max_tokens: int = 1024,
        **server: Any,
    ):  # fmt: skip
        low, high = range
        if not low < high:
            raise ValueError(f"range is {range!r}, but must be the smallest and the largest score, in that order.")
        if num_frames is not None:
            check_whole_number("num_frames", num_frames, 1)
        super().__init__(prompt_template, parse, max_tokens=max_tokens, **server)
        self.info = dataclasses.replace(self.info, range=(low, high))
        self.num_frames, self.takes_videos = num_frames, num_frames is not None
        self.__name__ = name

    async def __call__(
        self, prompts: list[str], images: Images, log_metric: Callable[[str, float], None] | None = None,
        videos: list[Images] | None = None, **kwargs: Any,
    ) -> list[float | None]:  # fmt: skip
        """
        `N` scores for `N` prompts and images, of which `videos` has all frames. `log_metric` is given the share of
        images without a score.
        """
        shown = [[image] for image in images]
        if videos is not None and self.num_frames is not None:
            shown = [spread(frames, self.num_frames) for frames in videos]
        judged = await all_at_once(self._ask(prompt, *frames) for prompt, frames in zip(prompts, shown, strict=True))
        unreadable = [answer for score, answer in judged if score is None]
        report_unreadable(self.__name__, unreadable, len(judged), log_metric)
        return [score for score, _ in judged]

    def _read(self, choice: Any, text: str) -> float | None:
        score, (low, high) = self.parse(text), self.info.range
        return score if score is not None and low <= score <= high else None


class UnifiedReward(VLMJudgeReward):
    """
    UnifiedReward's score of an image, from 1 to 5 (Wang et al., 2025, https://huggingface.co/papers/2503.05236).

    Serve one of its models, for example `vllm serve CodeGoat24/UnifiedReward-qwen-7b`.

    Args:
        score (`str`, defaults to `"overall"`): which one, by which of the published prompts:

            - `"overall"`: alignment with the prompt and quality in one, as Flow-GRPO and the papers after it evaluate.
            - `"overall_with_elements"`: the same, after the model has listed what is in the image, as in
              UnifiedReward's own script. Better founded, and several times slower.
            - `"alignment"`, `"coherence"`, `"style"`: one of the three scores of UnifiedReward 2.0
              (`CodeGoat24/UnifiedReward-2.0-qwen-7b` and its other sizes).
        max_tokens, server: as in [`VLMJudgeReward`].

    Raises:
        ValueError: if `score` is none of these.
        ImportError, ValueError, JudgeError: as [`VLMJudgeReward`].

    Example:

    ```pycon
    >>> from trl_flow.rewards import UnifiedReward
    >>> reward = UnifiedReward("alignment", base_url="http://localhost:8001/v1")
    >>> reward.__name__, reward.info.range
    ('unifiedreward_alignment', (1.0, 5.0))
    ```
    """

    info = RewardInfo.of("UnifiedReward")

    def __init__(self, score: UnifiedRewardScore = "overall", **server: Any):
        check_choice("score", score, UnifiedRewardScore, "UnifiedReward")
        prompt, parse = judge_prompts.UNIFIED_REWARD_AXES, partial(judge_prompts.axis_score, axis=score)
        if score.startswith("overall"):
            prompt, parse = judge_prompts.UNIFIED_REWARD_SCORE, judge_prompts.final_score
        if score == "overall_with_elements":
            prompt = judge_prompts.UNIFIED_REWARD_SCORE_WITH_ELEMENTS
        name = "unifiedreward" if score == "overall" else f"unifiedreward_{score}"
        super().__init__(prompt, parse, name=name, range=self.info.range, **server)


class VideoJudgeReward(VLMJudgeReward):
    """
    The score of a video, from 1 to 5, that any vision-language model gives which takes several images: it is shown
    evenly spaced frames, and asked by a prompt of ours about the video's text, its motion and its looks.

    Start the server so that a message may have as many images: `vllm serve MODEL --limit-mm-per-prompt.image 8`. It
    sees no motion between the frames that it is shown, so that flicker is missed: watch `motion` too.

    Args:
        num_frames (`int`, defaults to 8): frames that it is shown.
        max_tokens, server: as in [`VLMJudgeReward`].

    Raises:
        ImportError, ValueError, JudgeError: as [`VLMJudgeReward`].

    Example:

    ```pycon
    >>> from trl_flow.rewards import VideoJudgeReward
    >>> judge = VideoJudgeReward(num_frames=8, base_url="http://localhost:8001/v1")
    >>> judge.__name__, judge.info.range
    ('video_judge', (1.0, 5.0))
    ```
    """

    info = RewardInfo.of("VideoJudgeReward")

    def __init__(self, num_frames: int = 8, **server: Any):
        name, score = "video_judge", judge_prompts.final_score
        super().__init__(judge_prompts.VIDEO, score, name=name, range=self.info.range, num_frames=num_frames, **server)


class DeQAReward(VLMJudgeReward):
    """
    DeQA's score of the quality of an image, from 1 to 5, whatever its prompt (You et al., 2025,
    https://huggingface.co/papers/2501.11561).

    The model completes "The quality of the image is". With the probabilities that it gives the five words excellent
    (5), good (4), fair (3), poor (2) and bad (1) for the next one, among the 20 most probable tokens that the server
    lists, the score is the mean of their values. Where there are none the word that the answer begins with counts.

    The published model is `zhiyuanyou/DeQA-Score-Mix3`, an mPLUG-Owl2 with code of its own: make sure that your server
    can load it. Another vision-language model gives scores on the same scale, but not DeQA's.

    Args:
        server: as in [`VLMJudgeReward`]. It must be able to continue an answer (`continue_final_message`), as vLLM
            and SGLang are.

    Raises:
        ImportError, ValueError, JudgeError: as [`VLMJudgeReward`].

    Example:

    ```pycon
    >>> from trl_flow.rewards import DeQAReward
    >>> reward = DeQAReward(base_url="http://localhost:8001/v1", max_concurrency=16)
    >>> reward.info.range
    (1.0, 5.0)
    ```
    """

    info = RewardInfo.of("DeQAReward")
    # Probabilities do not depend on the temperature
    _temperatures = (0.0,)

    def __init__(self, **server: Any):
        super().__init__(DEQA_QUESTION, _first_level, name="deqa", range=self.info.range, max_tokens=4, **server)

    async def _answer(self, prompt: str, images: tuple[Image.Image, ...], temperature: float) -> Any:
        return await self.chat.answer(
            [self.prompt_template, *images],
            answer_prefix=DEQA_ANSWER_PREFIX, max_tokens=self.max_tokens, temperature=temperature,
            logprobs=True, top_logprobs=20,
        )  # fmt: skip

    def _read(self, choice: Any, text: str) -> float | None:
        tokens = choice.logprobs.content if choice.logprobs else None
        weights = dict.fromkeys(DEQA_LEVELS, 0.0)
        for candidate in tokens[0].top_logprobs if tokens else ():
            word = candidate.token.strip(" ▁Ġ").lower()  # some servers write spaces as the tokenizer does
            if word in weights:
                weights[word] += math.exp(candidate.logprob)
        if not (total := sum(weights.values())):
            return self.parse(text)
        return sum(DEQA_LEVELS[word] * weight for word, weight in weights.items()) / total


def _first_level(answer: str) -> float | None:
    word = re.search(r"[a-z]+", answer.replace(DEQA_ANSWER_PREFIX, "").lower())
    return DEQA_LEVELS.get(word.group()) if word else None


def report_unreadable(name: str, unreadable: list[str], total: int, log_metric: Callable | None) -> None:
    """Logs the share of answers to `name` that could not be read; a `JudgeError` if that is all of several."""
    if total and log_metric is not None:
        log_metric(f"{name}/unreadable", len(unreadable) / total)
    if not unreadable:
        return
    example = repr(unreadable[0][:300])
    if len(unreadable) == total > 1:
        raise JudgeError(
            f"Not one of the {total} answers to '{name}' can be read. The first begins {example}. Look whether the "
            "prompt was written for the model that is served, and whether max_tokens cuts its answers off."
        )
    logger.warning(f"{len(unreadable)} of {total} answers to '{name}' cannot be read. The first begins {example}")
