"""How well an image of the bundled world follows its prompt, judged by rules."""

from typing import Any, Literal

from trl_flow.rewards.base import Images, RewardInfo, check_choice
from trl_flow.shapes import check, parse_caption


Score = Literal["soft", "strict", "fidelity"]


class ShapesReward:
    """
    The score that [`trl_flow.shapes.check`] gives each image, in `[0, 1]`.

    What an image should show is taken from the columns `objects` and `relation` of [`trl_flow.shapes.load_prompts`].
    A data set without an `objects` column will do as well: its prompts are then parsed as captions of that world.

    Args:
        score (`str`, defaults to `"soft"`):
            A field of [`trl_flow.shapes.CheckResult`]. `"soft"` is the mean of the parts (count, colors, shapes, the
            right pairs of them, relation), `"strict"` is 1 if all of them are right and 0 otherwise, and `"fidelity"`
            is how close the image is to a clean drawing of the shapes found in it, whatever the prompt.

    Raises:
        ValueError: if `score` is none of the three, and on a call without `objects` if a prompt is not a caption of
            the bundled world.

    Example:

    ```pycon
    >>> from trl_flow.rewards import ShapesReward
    >>> from trl_flow.shapes import PlacedShape, render
    >>> image = render([PlacedShape("red", "circle", x=32, y=32, size=20)])
    >>> rows = {"prompts": ["a red circle", "a blue circle"], "images": [image, image]}
    >>> ShapesReward("strict")(**rows)
    [1.0, 0.0]
    ```
    """

    info = RewardInfo.of("ShapesReward")
    dense = True

    def __init__(self, score: Score = "soft"):
        check_choice("score", score, Score, "the shapes checker")
        self.score = score
        self.__name__ = f"shapes_{score}"

    def __call__(
        self, prompts: list[str], images: Images, objects: list[list[dict]] | None = None,
        relation: list[str | None] | None = None, **kwargs: Any,
    ) -> list[float]:  # fmt: skip
        if objects is None:
            targets = [parse_caption(prompt) for prompt in prompts]
        else:
            targets = list(zip(objects, relation or [None] * len(objects), strict=True))
        results = [check(image, *target) for image, target in zip(images, targets, strict=True)]
        return [getattr(result, self.score) for result in results]
