"""GenEval as a reward."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal

import torch

from trl_flow.rewards.base import Columns, HubReward, Images, RewardInfo, check_callable, check_choice
from trl_flow.rewards.geneval.colors import CLIPColorClassifier, crop_object
from trl_flow.rewards.geneval.detector import Mask2FormerDetector
from trl_flow.rewards.geneval.rules import (
    Detection,
    GenEvalResult,
    Request,
    judge,
    objects_to_color,
    parse_request,
    select_objects,
)


Score = Literal["partial", "nonnegative", "strict", "correct"]
Clauses = list[list[dict] | None]
Detector = Callable[[Images], Sequence[Sequence[Detection]]]
ColorClassifier = Callable[[Images, list[str]], Sequence[str]]


@dataclass(eq=False)
class GenEvalReward(HubReward):
    """
    Whether an image has the objects, counts, colors and positions that its prompt asks for: GenEval (Ghosh et al.,
    2023, https://arxiv.org/abs/2310.11513) with Mask2Former and zero-shot CLIP colors.

    Needs the columns `tag` and `include`, and `exclude` for counting, as in GenEval's and Flow-GRPO's metadata files
    and from [`trl_flow.prompts.generate_geneval_prompts`]. The prompt's text is not read. A row without a tag and
    clauses (`None` in both) has the score `None`. The share of images that are correct by GenEval's own rules is
    logged for each task as `geneval/{tag}`.

    Args:
        score (`str`, defaults to `"partial"`): `"partial"` and `"strict"` are Flow-GRPO's training reward and its
            all-or-nothing version, which want exactly the named number of objects, `"nonnegative"` is
            `max(partial, 0)`, for methods that need rewards of one sign (VGPO, Eq. 12), `"correct"` is GenEval's own
            score, which papers report, and wants at least that number; see `trl_flow/rewards/geneval/rules.py`.
        detector (`Callable`, *optional*): finds the objects, instead of Mask2Former: from a list of RGB images to a
            list of [`Detection`] for each. With an attribute `classes` a request for another class is refused.
        color_classifier (`Callable`, *optional*): tells colors, instead of CLIP: from a list of images, one object
            each, and the list of their classes to that of their colors. With an attribute `colors` a request for
            another color is refused.
        threshold (`float`, defaults to 0.3): what scores of detections must exceed.
        counting_threshold (`float`, defaults to 0.9): the same for the task `counting`.
        max_objects (`int`, defaults to 16): most objects of a class that are looked at.
        nms_threshold (`float`, defaults to 1.0): overlap from which the less confident of two boxes of a class is
            dropped; 1.0 drops none.
        position_threshold (`float`, defaults to 0.1): how far beyond each other, in shares of their sizes, objects
            must be to be left of, right of, above or below each other.
        model (`str`), clip_model (`str`): hub id or folder of the Mask2Former and of the CLIP.
        clip_revision (`str`, *optional*): branch, tag or commit of the CLIP on the Hub.
        revision, token, device, dtype, batch_size: as in [`HubReward`].

    Raises:
        ValueError: if `score`, a threshold or `max_objects` is out of range. On a call, if a row is not GenEval's
            metadata, or the detector or color classifier returns something else than described above.
        TypeError: if `detector` or `color_classifier` is no callable.

    Example:

    ```pycon
    >>> from trl_flow.prompts import geneval_benchmark
    >>> from trl_flow.rewards import GenEvalReward
    >>> row = geneval_benchmark()[0]
    >>> row["prompt"], row["include"][0]["class"]  # the reward reads the columns, not the prompt
    ('a photo of a bench', 'bench')
    >>> GenEvalReward("strict").info.range  # its models load at the first call
    (0.0, 1.0)
    ```
    """

    # The range is that of the default score: one object is wanted and 16, the most that are counted, are found
    info = RewardInfo.of("GenEvalReward")

    score: Score = "partial"
    _: KW_ONLY
    detector: Detector | None = None
    color_classifier: ColorClassifier | None = None
    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    nms_threshold: float = 1.0
    position_threshold: float = 0.1
    model: str = "facebook/mask2former-swin-small-coco-instance"
    clip_model: str = "openai/clip-vit-large-patch14"
    clip_revision: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_choice("score", self.score, Score, "GenEval")
        for name in ("detector", "color_classifier"):
            if getattr(self, name) is not None:
                check_callable(name, getattr(self, name), "")
        for name in ("threshold", "counting_threshold", "nms_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is not between 0 and 1.")
        if self.position_threshold < 0:
            raise ValueError(f"position_threshold={self.position_threshold} is negative.")
        if self.max_objects < 1:
            raise ValueError(f"max_objects={self.max_objects}, but at least 1 object must be looked at.")
        lowest = min(2.0 - self.max_objects, 0.0) if self.score == "partial" else 0.0
        self.info = replace(self.info, range=(lowest, 1.0))
        self.__name__ = "geneval" if self.score == "partial" else f"geneval_{self.score}"

    def __call__(
        self,
        prompts: list[str], images: Images, tag: list[str | None], include: Clauses, exclude: Clauses | None = None,
        log_metric: Callable[[str, float], None] | None = None, **kwargs: Any,
    ) -> list[float | None]:  # fmt: skip
        """`N` scores for `N` prompts, images and rows of metadata, `None` where a row asks for nothing."""
        results = self.results(prompts, images, tag, include, exclude)
        for task in dict.fromkeys(tag) if log_metric else ():
            if correct := [result.correct for result, own in zip(results, tag, strict=True) if result and own == task]:
                log_metric(f"geneval/{task}", sum(correct) / len(correct))
        return [None if result is None else getattr(result, self.score) for result in results]

    def results(
        self,
        prompts: list[str], images: Images, tag: list[str | None], include: Clauses, exclude: Clauses | None = None,
    ) -> list[GenEvalResult | None]:  # fmt: skip
        """All scores of each image and what was found on it; arguments and errors as for a call."""
        exclude = [None] * len(tag) if exclude is None else exclude
        if not len(prompts) == len(tag) == len(include) == len(exclude):
            lists = f"{len(include)} include and {len(exclude)} exclude lists. Give one of each for each image."
            raise ValueError(f"There are {len(prompts)} prompts, {len(tag)} tags, {lists}")
        requests = [self._request(*row) for row in zip(prompts, tag, include, exclude, strict=True)]
        return super().__call__(prompts, images, requests=requests)

    def _request(self, prompt: str, tag: Any, include: Any, exclude: Any) -> Request | None:
        if tag is None and not include:
            return None
        try:
            request = parse_request(tag, include, exclude)
            names = [clause.name for clause in (*request.include, *request.exclude)]
            colors = [clause.color for clause in request.include if clause.color is not None]
            models = self.detector or Mask2FormerDetector, self.color_classifier or CLIPColorClassifier
            for kind, model, words in zip(("classes", "colors"), models, (names, colors), strict=True):
                known = getattr(model, kind, None)
                if known is not None and (unknown := [word for word in words if word not in known]):
                    raise ValueError(f"it asks for {unknown[0]!r}, but the {kind} are {', '.join(sorted(known))}.")
        except ValueError as error:
            raise ValueError(f"The prompt {prompt!r} cannot be scored by '{self.__name__}': {error}") from error
        return request

    def _load(self, device: torch.device) -> tuple[Detector, ColorClassifier]:
        options: dict[str, Any] = {"token": self.token, "device": device, "dtype": self.dtype}
        least = min(self.threshold, self.counting_threshold)
        return (
            self.detector or Mask2FormerDetector(self.model, revision=self.revision, min_score=least, **options),
            self.color_classifier or CLIPColorClassifier(self.clip_model, revision=self.clip_revision, **options),
        )

    def _score(
        self, loaded: tuple[Detector, ColorClassifier], prompts: list[str], images: Images, columns: Columns
    ) -> list[GenEvalResult | None]:
        detector, color_classifier = loaded
        requests: list[Request | None] = columns["requests"]
        asked = [i for i, request in enumerate(requests) if request is not None]
        objects = {}
        for i, detections in zip(asked, _detect(detector, [images[i] for i in asked]), strict=True):
            threshold = self.counting_threshold if requests[i].tag == "counting" else self.threshold
            limits = {"max_objects": self.max_objects, "nms_threshold": self.nms_threshold}
            objects[i] = select_objects(detections, threshold=threshold, **limits)
        # The whole batch's colors at once. By the index too: a detector may give the same object for several images
        colored = [(i, name, one) for i in asked for name, one in objects_to_color(objects[i], requests[i])]
        crops = [crop_object(images[i], one) for i, _, one in colored]
        colors = list(color_classifier(crops, [name for _, name, _ in colored])) if colored else []
        if len(colors) != len(colored):
            raise ValueError(f"The color classifier returned {len(colors)} colors for {len(colored)} objects.")
        color_of = dict(zip(colored, colors, strict=True))
        judged = {
            i: judge(objects[i], requests[i], lambda name, one, i=i: color_of[i, name, one], self.position_threshold)
            for i in asked
        }
        return [judged.get(i) for i in range(len(images))]


def _detect(detector: Detector, images: Images) -> list[list[Detection]]:
    found = [list(detections) for detections in detector(images)] if images else []
    if len(found) != len(images):
        counts = f"{len(found)} lists of detections for {len(images)} images"
        raise ValueError(f"The detector returned {counts}. It must return one for each, empty where it finds nothing.")
    if others := [one for detections in found for one in detections if not isinstance(one, Detection)]:
        expected = "objects of trl_flow.rewards.geneval.Detection"
        raise ValueError(f"The detector returned {others[0]!r}, but must return {expected}.")
    return found
