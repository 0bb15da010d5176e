"""
GenEval's rules: what detected objects have to be like for an image to show what its prompt asks for. Pure Python.

Three scores come out of them, from two sources:

* `correct` is GenEval's own (Ghosh et al., 2023, https://arxiv.org/abs/2310.11513, `evaluate_images.py`), what papers
  report. Each `include` clause wants *at least* its count, and looks at the most confident that many; each `exclude`
  clause wants fewer than its count.
* `strict` and `partial` are what Flow-GRPO trains and reports besides it (Liu et al., 2025,
  https://arxiv.org/abs/2505.05470, https://github.com/yifan123/reward-server). Each `include` clause wants *exactly*
  its count. `partial` is the mean over all that was looked at: per clause `1 - |wanted - found| / wanted` for the
  objects, the same for those of the right color, and 1 or 0 for the position.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from trl_flow.prompt_words import POSITIONS, TASKS


Box = tuple[float, float, float, float]

# What detectors call these classes: COCO's own names, and those of the older lists that some checkpoints carry
_OTHER_NAMES = {
    **{"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard", "aeroplane": "airplane"},
    **{"motorbike": "motorcycle", "sofa": "couch", "pottedplant": "potted plant", "diningtable": "dining table"},
    **{"tvmonitor": "tv", "tv monitor": "tv", "hair dryer": "hair drier"},
}


def geneval_class(label: str) -> str:
    """What GenEval calls the class that a detector calls `label`; other labels come back in lower case."""
    name = label.strip().lower().replace("_", " ")
    return _OTHER_NAMES.get(name, name)


@dataclass(frozen=True, eq=False)
class Detection:
    """
    An object that a detector found.

    Attributes:
        label (`str`), score (`float`): its class, in GenEval's or COCO's words, and the confidence, in `[0, 1]`.
        box (`tuple[float, float, float, float]`): left, top, right and bottom edge in pixels, y pointing down.
        mask (`numpy.ndarray`, *optional*): `(height, width)` of the whole image, True on the object. Colors are
            judged on the object alone where there is one, else on the whole box.

    Raises:
        ValueError: if `score` or `box` holds a NaN or infinity, or the box's edges are in the wrong order.
        TypeError: if `label` is no string.
    """

    label: str
    score: float
    box: Box
    mask: np.ndarray | None = None

    def __post_init__(self):
        if not isinstance(self.label, str):
            raise TypeError(f"A detection's label is {self.label!r}, but must be a string: the name of its class.")
        if not math.isfinite(self.score):
            raise ValueError(f"A detection of {self.label!r} has the score {self.score}, which is not a confidence.")
        has_box = f"A detection of {self.label!r} has the box {self.box}"
        if len(self.box) != 4 or not all(math.isfinite(edge) for edge in self.box):
            raise ValueError(f"{has_box}, but a box is four finite numbers: left, top, right, bottom.")
        left, top, right, bottom = self.box
        if right < left or bottom < top:
            advice = "give left, top, right, bottom, and not left, top, width, height"
            raise ValueError(f"{has_box}, whose right or bottom edge comes before its left or top one: {advice}.")


class Clause(NamedTuple):
    """One entry of `include` or `exclude`. A position is a relation to the objects of the clause of an index."""

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


class Request(NamedTuple):
    """What a prompt asks for: its task and the clauses, in the order of the metadata."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


@dataclass(frozen=True)
class GenEvalResult:
    """
    What became of an image: GenEval's score `correct` and Flow-GRPO's `strict`, 1.0 or 0.0, its reward `partial`, and
    how many objects of each class were `found`. `partial` is 1.0 where every `include` clause holds exactly, less
    elsewhere, and can be negative: 5 objects where 1 is wanted are worth 1 - 4 = -3.
    """

    correct: float
    strict: float
    partial: float
    found: dict[str, int]

    @property
    def nonnegative(self) -> float:
        """`partial`, or 0 where that is negative."""
        return max(self.partial, 0.0)


def parse_request(tag: Any, include: Any, exclude: Any = None) -> Request:
    """
    Reads one row of GenEval's metadata; a `ValueError` if it is none. Keys whose value is None count as absent:
    `datasets` fills in such.
    """
    _expect(tag in TASKS, f"the tag is {tag!r}, but must be one of {', '.join(TASKS)}")
    some = isinstance(include, list | tuple) and len(include) > 0
    _expect(some, f"`include` is {include!r}, but must be a list of at least one clause")
    exclude = () if exclude is None else exclude
    _expect(isinstance(exclude, list | tuple), f"`exclude` is {exclude!r}, but must be a list of clauses")
    included = tuple(_parse_clause(clause, index) for index, clause in enumerate(include))
    return Request(tag, included, tuple(_parse_clause(clause, index=0) for clause in exclude))


def _parse_clause(clause: Any, index: int) -> Clause:
    _expect(isinstance(clause, Mapping), f"a clause is {clause!r}, but must be a dictionary")
    clause = {key: value for key, value in clause.items() if value is not None}
    unknown = sorted(clause.keys() - {"class", "count", "color", "position"})
    name, count, color, position = (clause.get(key) for key in ("class", "count", "color", "position"))
    has = f"the clause {clause} has"
    _expect(not unknown, f"{has} the unknown keys {unknown}")
    _expect(name and isinstance(name, str), f"{has} no `class`")
    _expect(_is_index(count) and count, f"{has} the count {count!r}, but must have a whole number of at least 1")
    _expect(color is None or isinstance(color, str), f"{has} the color {color!r}, but must have a word")
    if position is not None:
        known = isinstance(position, list | tuple) and len(position) == 2 and position[0] in POSITIONS
        expected = f"[relation, index of a clause], the relation one of {', '.join(POSITIONS)}"
        _expect(known, f"{has} the position {position!r}, but must have {expected}")
        refers = f"the clause {clause}, number {index}, refers to the clause {position[1]!r}"
        _expect(_is_index(position[1]) and position[1] < index, f"{refers}, but can only refer to one before it")
        position = tuple(position)
    return Clause(geneval_class(name), count, color, position)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _expect(condition: Any, otherwise: str) -> None:
    if not condition:
        raise ValueError(
            f"This is not GenEval's metadata: {otherwise}. A row looks like "
            '{"tag": "position", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": '
            '["left of", 0]}], "prompt": "a photo of a cat left of a dog"}.'
        )


def select_objects(
    detections: Iterable[Detection], *, threshold: float, max_objects: int = 16, nms_threshold: float = 1.0
) -> dict[str, list[Detection]]:
    """
    The detections that count as objects, by class in GenEval's words, the most confident first: of each class the
    `max_objects` most confident with a score above `threshold`, but for those whose box overlaps a more confident
    one's by `nms_threshold` or more. 1.0, GenEval's, drops none.
    """
    objects: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda detection: -detection.score):
        if detection.score > threshold:
            objects.setdefault(geneval_class(detection.label), []).append(detection)
    for name, found in objects.items():
        kept: list[Detection] = []
        for detection in found[:max_objects]:
            if nms_threshold >= 1 or all(_overlap(detection.box, other.box) < nms_threshold for other in kept):
                kept.append(detection)
        objects[name] = kept
    return objects


def _overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, of which both edges' pixels count as inside."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return shared / (area(*a) + area(*b) - shared)


def relative_position(a: Box, b: Box, position_threshold: float = 0.1) -> set[str]:
    """
    Where box `a` is, seen from box `b`: none, one or two of "left of", "right of", "above", "below". The offset of the
    centers, less `position_threshold` times both boxes' sizes along each axis, must be more than half the distance.
    """
    distances, offsets = [], []
    for axis in (0, 1):
        offset = (a[axis] + a[axis + 2] - b[axis] - b[axis + 2]) / 2
        slack = position_threshold * (a[axis + 2] - a[axis] + b[axis + 2] - b[axis])
        offsets.append(offset)
        distances.append(math.copysign(max(abs(offset) - slack, 0.0), offset))
    # The tolerance is GenEval's
    if all(abs(distance) < 1e-3 for distance in distances):
        return set()
    x, y = (distance / math.hypot(*offsets) for distance in distances)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, true in holds.items() if true}


def objects_to_color(objects: Mapping[str, Sequence[Detection]], request: Request) -> list[tuple[str, Detection]]:
    """The objects whose color [`judge`] will ask for, each with the class that it is asked for, none twice."""
    asked = []
    for clause in request.include:
        found = objects.get(clause.name, ())
        if clause.color is not None and len(found) >= clause.count:
            asked += [pair for one in found[: clause.count] if (pair := (clause.name, one)) not in asked]
    return asked


def judge(
    objects: Mapping[str, Sequence[Detection]], request: Request, color_of: Callable[[str, Detection], str],
    position_threshold: float = 0.1,
) -> GenEvalResult:  # fmt: skip
    """
    Applies the rules to `objects` as from [`select_objects`]. `color_of` tells the color of an object of a class, and
    is asked for those of [`objects_to_color`] only; `position_threshold` is as in [`relative_position`].

    `exclude` enters `strict` too, unlike in Flow-GRPO. In GenEval's prompts, where only counting has such clauses and
    what they exclude is not the exact count either, that makes no difference.
    """
    excluded = any(len(objects.get(clause.name, ())) >= clause.count for clause in request.exclude)
    enough, _ = _judge_include(objects, request, color_of, position_threshold, exact=False)
    exact, parts = _judge_include(objects, request, color_of, position_threshold, exact=True)
    return GenEvalResult(
        correct=float(enough and not excluded),
        strict=float(exact and not excluded),
        partial=sum(parts) / len(parts),
        found={name: len(found) for name, found in objects.items()},
    )


def _judge_include(
    objects: Mapping[str, Sequence[Detection]], request: Request, color_of: Callable[[str, Detection], str],
    position_threshold: float, exact: bool,
) -> tuple[bool, list[float]]:  # fmt: skip
    """Whether all `include` clauses hold, and what each thing looked at is worth."""
    parts: list[float] = []
    # What later clauses' positions refer to: the objects of each clause, None where it does not hold
    groups: list[Sequence[Detection] | None] = []
    for clause in request.include:
        found = objects.get(clause.name, ())
        parts.append(_share(len(found), clause.count))
        if len(found) < clause.count or (exact and len(found) > clause.count):
            # One part for color and position together, as Flow-GRPO has it
            parts += [0.0] * (clause.color is not None or clause.position is not None)
            groups.append(None)
            continue
        found = found[: clause.count]
        holds = True
        if clause.color is not None:
            right = sum(color_of(clause.name, one) == clause.color for one in found)
            parts.append(_share(right, clause.count))
            holds = right == clause.count
        if clause.position is not None and holds:
            relation, target = clause.position
            others = groups[target]
            holds = others is not None and all(
                relation in relative_position(one.box, other.box, position_threshold)
                for one, other in itertools.product(found, others)
            )
            # Flow-GRPO adds the 1 even after the 0 of a wrong position, so that with two objects that is worth 3/4.
            # Only a missing reference gets none
            parts += [0.0] * (not holds) + [1.0] * (others is not None)
        groups.append(found if holds else None)
    return None not in groups, parts


def _share(found: int, wanted: int) -> float:
    return 1 - abs(wanted - found) / wanted
