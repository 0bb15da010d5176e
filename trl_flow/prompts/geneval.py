"""
Prompts of GenEval's six tasks, with the metadata that they are scored by; nothing is downloaded.

Wording, articles, plurals and classes are those of GenEval's `create_prompts.py` (Ghosh et al., 2023,
https://arxiv.org/abs/2310.11513), its odd ones included ("four benchs"): that is how the published prompts read. So
are the limits: counts from 2 to 4, no colored persons, two different classes and colors in one prompt.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, Json, List, Value

from trl_flow.prompt_words import CLASSES, COLORS, POSITIONS, TASKS


Row = dict[str, Any]

# Flow-GRPO's training mix: https://arxiv.org/abs/2505.05470, section 5.1
FLOW_GRPO_MIX = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}

_COUNTS = {2: "two", 3: "three", 4: "four"}
_COLORABLE = CLASSES[1:]  # all but "person", which is the first

# As `load_dataset("json", ...)` reads the published files. A position is a list of a word and a number, and keys are
# left out where they do not apply: JSON is the type that keeps both
_TEXT, _CLAUSES = Value("string"), List(Json())
_FEATURES = Features({"tag": _TEXT, "include": _CLAUSES, "prompt": _TEXT, "exclude": _CLAUSES})


def generate_geneval_prompts(
    num_prompts: int, *, seed: int = 0, tasks: Mapping[str, float] | Sequence[str] = FLOW_GRPO_MIX,
    exclude_benchmark: bool = True,
) -> Dataset:  # fmt: skip
    """
    Random prompts to train on, in random order. None occurs twice as long as its task has others left; counting, with
    160 prompts outside of the benchmark, runs out first and then begins again.

    Args:
        num_prompts (`int`): how many.
        seed (`int`, defaults to 0): the same seed gives the same prompts.
        tasks (`Mapping[str, float]` or `Sequence[str]`, defaults to Flow-GRPO's mix): shares of the tasks, in any
            unit, or the tasks that have equal shares. The mix is position 7, counting 5, color_attr 3, colors 1 and
            two_object 1.
        exclude_benchmark (`bool`, defaults to True): leaves out what [`geneval_benchmark`] asks for, in whatever
            order its objects are named, so that the benchmark measures something new. `single_object` has no other
            prompts: asking for it needs False.

    Returns:
        `datasets.Dataset`: columns `tag`, `include`, `prompt` and `exclude` as in GenEval's metadata files.

    Raises:
        ValueError: if `num_prompts` is below 1, a task is unknown, no share is positive, or a task has no prompts
            outside of the benchmark.

    Example:

    ```pycon
    >>> from trl_flow.prompts import generate_geneval_prompts
    >>> prompts = generate_geneval_prompts(1000, tasks=["counting", "colors"])
    >>> sorted(set(prompts["tag"]))
    ['colors', 'counting']
    ```
    """
    if isinstance(num_prompts, bool) or not isinstance(num_prompts, int) or num_prompts < 1:
        raise ValueError(f"num_prompts is {num_prompts!r}, but must be a whole number of at least 1.")
    taken = {_meaning(row) for row in _benchmark_rows()} if exclude_benchmark else set()
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for task, number in _numbers_of_prompts(num_prompts, tasks).items():
        allowed = [row for row in _all_rows(task, rng, number + len(taken)) if _meaning(row) not in taken]
        if number and not allowed:
            raise ValueError(f"All prompts of {task} are in GenEval's benchmark: give exclude_benchmark=False.")
        rows += [allowed[i % len(allowed)] for i in range(number)]
    return _dataset([rows[i] for i in rng.permutation(len(rows))])


def geneval_benchmark() -> Dataset:
    """
    GenEval's own 553 prompts, in its order: what published scores are measured on. They are drawn again, as
    `create_prompts.py` drew them: 80 of single objects, 99 of two, 80 of counting, 94 of colors, 100 each of position
    and color attribution. Columns as from [`generate_geneval_prompts`].

    Example:

    ```pycon
    >>> from trl_flow.prompts import geneval_benchmark
    >>> len(geneval_benchmark()), geneval_benchmark()[0]["prompt"]
    (553, 'a photo of a bench')
    ```
    """
    return _dataset(_benchmark_rows())


def _dataset(rows: Sequence[Row]) -> Dataset:
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in _FEATURES}, features=_FEATURES)


def _numbers_of_prompts(num_prompts: int, tasks: Mapping[str, float] | Sequence[str]) -> dict[str, int]:
    """Shares to whole numbers that add up to `num_prompts`: the largest remainders are rounded up."""
    names = [tasks] if isinstance(tasks, str) else tasks
    shares = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1)
    if unknown := [task for task in shares if task not in TASKS]:
        raise ValueError(f"{unknown[0]!r} is not one of GenEval's tasks, which are {', '.join(TASKS)}.")
    total = sum(shares.values())
    if not 0 < total < math.inf or any(share < 0 for share in shares.values()):
        raise ValueError(f"The shares {shares} of tasks must be finite and not negative, and one must be positive.")
    exact = {task: num_prompts * share / total for task, share in shares.items()}
    numbers = {task: int(number) for task, number in exact.items()}
    by_remainder = sorted(exact, key=lambda task: numbers[task] - exact[task])
    for task in by_remainder[: num_prompts - sum(numbers.values())]:
        numbers[task] += 1
    return numbers


def _all_rows(task: str, rng: np.random.Generator, number: int) -> list[Row]:
    """The first `number` of all prompts of a task, without two of the same meaning, in random order."""
    build, sizes = _BUILDERS[task]
    rows: dict[Any, Row] = {}
    for index in rng.permutation(math.prod(sizes)).tolist():
        if len(rows) == number:
            break
        # Fortran's order: the first argument changes first
        if row := build(*map(int, np.unravel_index(index, sizes, order="F"))):
            rows.setdefault(_meaning(row), row)
    return list(rows.values())


def _meaning(row: Row) -> Any:
    """Equal for prompts that ask for the same: "a dog and a cat" and "a cat and a dog"."""
    if row["tag"] == "position":
        (other, one), mirrored = row["include"], {"right of": "left of", "below": "above"}
        relation, classes = one["position"][0], (one["class"], other["class"])
        return "position", mirrored.get(relation, relation), classes[::-1] if relation in mirrored else classes
    return row["tag"], frozenset((c["class"], c["count"], c.get("color")) for c in row["include"])


# One prompt of each task. Arguments are indices (colored objects' classes among all but "person", counts from the
# smallest). None stands for what GenEval does not ask: the same class or color twice.


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _row(tag: str, include: list[Row], words: str, **exclude: Any) -> Row:
    # A clause asks for one object unless it says otherwise
    include = [{"class": clause["class"], "count": 1, **clause} for clause in include]
    return {"tag": tag, "include": include, "prompt": f"a photo of {words}", **exclude}


def _single_object(a: int) -> Row:
    return _row("single_object", [{"class": CLASSES[a]}], _article(CLASSES[a]))


def _two_object(a: int, b: int) -> Row | None:
    names = CLASSES[a], CLASSES[b]
    return None if a == b else _row("two_object", [{"class": n} for n in names], " and ".join(map(_article, names)))


def _counting(a: int, number: int) -> Row:
    name, count = CLASSES[a], list(_COUNTS)[number]
    words = f"{_COUNTS[count]} {name}{'es' if name.endswith('s') else 's'}"
    return _row("counting", [{"class": name, "count": count}], words, exclude=[{"class": name, "count": count + 1}])


def _colors(a: int, color: int) -> Row:
    name, color = _COLORABLE[a], COLORS[color]
    return _row("colors", [{"class": name, "color": color}], f"{_article(color)} {name}")


def _position(a: int, b: int, position: int) -> Row | None:
    relation = POSITIONS[position]
    include = [{"class": CLASSES[b]}, {"class": CLASSES[a], "position": [relation, 0]}]
    words = f"{_article(CLASSES[a])} {relation} {_article(CLASSES[b])}"
    return None if a == b else _row("position", include, words)


def _color_attr(a: int, b: int, color_a: int, color_b: int) -> Row | None:
    include = [{"class": _COLORABLE[n], "color": COLORS[c]} for n, c in ((a, color_a), (b, color_b))]
    words = " and ".join(f"{_article(clause['color'])} {clause['class']}" for clause in include)
    return None if a == b or color_a == color_b else _row("color_attr", include, words)


# The builder of each task, and how many values each of its arguments has
_BUILDERS = {
    "single_object": (_single_object, (len(CLASSES),)),
    "two_object": (_two_object, (len(CLASSES), len(CLASSES))),
    "counting": (_counting, (len(CLASSES), len(_COUNTS))),
    "colors": (_colors, (len(_COLORABLE), len(COLORS))),
    "position": (_position, (len(CLASSES), len(CLASSES), len(POSITIONS))),
    "color_attr": (_color_attr, (len(_COLORABLE), len(_COLORABLE), len(COLORS), len(COLORS))),
}


@functools.cache
def _benchmark_rows() -> list[Row]:
    """GenEval's draws, one by one in its order: 100 of each task but the first, and what comes twice only once."""
    rng = np.random.default_rng(43)
    rows = [_single_object(a) for a in rng.choice(len(CLASSES), size=len(CLASSES), replace=False)]
    rows += [_two_object(*rng.choice(len(CLASSES), size=2, replace=False)) for _ in range(100)]
    rows += [_counting(rng.choice(len(CLASSES)), rng.integers(0, len(_COUNTS))) for _ in range(100)]
    rows += [_colors(rng.choice(len(_COLORABLE)), rng.choice(len(COLORS))) for _ in range(100)]
    pair = lambda total: rng.choice(total, size=2, replace=False)  # noqa: E731
    rows += [_position(*pair(len(CLASSES)), rng.choice(len(POSITIONS))) for _ in range(100)]
    rows += [_color_attr(*pair(len(_COLORABLE)), *pair(len(COLORS))) for _ in range(100)]
    return list({row["prompt"]: row for row in rows}.values())
