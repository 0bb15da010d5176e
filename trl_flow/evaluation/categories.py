"""Scores by category: GenEval's tasks, and the dimensions and test points of UniGenBench++ (SLAS, Tables 1 to 3)."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from trl_flow.evaluation.intervals import finite
from trl_flow.prompt_words import TASKS, dimension_of
from trl_flow.rewards.judge_prompts import UNIGENBENCH_TESTPOINTS


# Headings and order of SLAS's tables
_TASKS = dict(zip(TASKS, ("Single Obj.", "Two Obj.", "Counting", "Colors", "Position", "Color Attr."), strict=True))
_DIMENSIONS = {
    "Style": "Style",
    "World Knowledge": "World Know.",
    "Attribute": "Attribute",
    "Action": "Action",
    "Relationship": "Relation",
    "Logical Reasoning": "Logic. Reason.",
    "Grammar": "Grammar",
    "Compound": "Compound",
    "Entity Layout": "Layout",
    "Text Generation": "Text",
}
OVERALL = "Overall"


def category_tables(
    dataset: Dataset,
    scores: Mapping[str, Mapping[str, np.ndarray]],
    points: Mapping[str, Sequence[Sequence[int] | None] | None],
    num_images_per_prompt: int,
) -> list[dict[str, Any]]:
    """
    The tables of one prompt set, none where its prompts have no categories.

    * Of a set with GenEval's `tag` one for each reward: the mean over each task's images, and over all six of these.
    * Where UniGenBench's reward has scored (`points`: by model, each image's list of 0 and 1, None where there is
      none, or None for all) one by dimension and one by test point, in percent: of all test points of the dimension on
      all images, the share that is passed; overall, the mean over the dimensions and not over the test points, as in
      SLAS's tables.

    Overall is for all models over the same categories, those that every one has scores of. `scores` are by model and
    reward, `(N,)`. Each table is a dict for JSON: `reward`, `by`, `columns`, `rows` (for each model a dict by column,
    None where a category has nothing), `counts` (the same: how many images or test points that is a mean of) and
    `note`, which categories Overall leaves out though some model has them.
    """
    tables = []
    if "tag" in dataset.column_names and set(dataset["tag"]) <= {*TASKS, None}:
        tags = [_TASKS.get(tag) for tag in dataset["tag"] for _ in range(num_images_per_prompt)]
        for reward in next(iter(scores.values())):
            cells = {model: zip(tags, by_reward[reward].tolist(), strict=True) for model, by_reward in scores.items()}
            found = {model: _means(pairs, _TASKS.values()) for model, pairs in cells.items()}
            tables.append(_table(reward, "task", [*_TASKS.values(), OVERALL], found, *_overall(found)))
    if any(points.values()):
        names = [row for row in dataset["testpoints"] for _ in range(num_images_per_prompt)]
        by_dimension, by_point = {}, {}
        for model, of_images in points.items():
            # An image whose answer could not be read counts for nothing
            pairs = [
                (n, 100 * v)
                for r, p in zip(names, of_images or [None] * len(names), strict=True)
                if p
                for n, v in zip(r, p, strict=True)
            ]
            groups = ((_DIMENSIONS.get(name := dimension_of(n), name), value) for n, value in pairs)
            by_dimension[model] = _means(groups, _DIMENSIONS.values())
            by_point[model] = _means(pairs, UNIGENBENCH_TESTPOINTS)
        overall = _overall(by_dimension)
        for by, found in (("dimension", by_dimension), ("test point", by_point)):
            columns = dict.fromkeys(itertools.chain.from_iterable(found.values()))
            tables.append(_table("unigenbench", by, [OVERALL, *columns], found, *overall))
    return tables


_Means = dict[str, tuple[float, int]]


def _means(pairs: Iterable[tuple[str | None, float]], order: Iterable[str]) -> _Means:
    """Mean and number of the values of each category, NaN left out: those of `order` first, then any others."""
    values: dict[str, list[float]] = {name: [] for name in order}
    for name, value in pairs:
        if name is not None and not math.isnan(value):
            values.setdefault(name, []).append(value)
    return {name: (float(np.mean(found)) if found else math.nan, len(found)) for name, found in values.items()}


def _overall(found: Mapping[str, _Means]) -> tuple[_Means, str]:
    """Each model's mean over the categories that all models have, with its number, and a note on the others."""
    some = dict.fromkeys(name for means in found.values() for name, (_, number) in means.items() if number)
    shared = [name for name in some if all(means.get(name, (0, 0))[1] for means in found.values())]
    left_out = ", ".join(name for name in some if name not in shared)
    note = f"Overall leaves out what not every model has scores of: {left_out}." if left_out else ""
    overall = {}
    for model, means in found.items():
        values = [means[name] for name in shared]
        mean = float(np.mean([value for value, _ in values])) if values else math.nan
        overall[model] = (mean, sum(number for _, number in values))
    return overall, note


def _table(
    reward: str, by: str, columns: Sequence[str], found: Mapping[str, _Means], overall: _Means, note: str
) -> dict[str, Any]:
    whole = {model: means | {OVERALL: overall[model]} for model, means in found.items()}
    cells = {model: {name: means.get(name, (math.nan, 0)) for name in columns} for model, means in whole.items()}
    rows = {model: {name: finite(mean) for name, (mean, _) in row.items()} for model, row in cells.items()}
    counts = {model: {name: number for name, (_, number) in row.items()} for model, row in cells.items()}
    return {"reward": reward, "by": by, "columns": list(columns), "counts": counts, "rows": rows, "note": note}
