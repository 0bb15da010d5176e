"""Captions of the world, their inverse, and the prompt set with its held-out half.

Four kinds of caption, each about one to three shapes:

| kind | example | objects | relation |
| --- | --- | --- | --- |
| single | a red circle | 1 x red circle | none |
| count | three blue squares | 3 x blue square | none |
| pair | a red circle and a green square | 1 x red circle, 1 x green square | none |
| relation | a red circle left of a green square | the same | left of |

Held out are whole combinations: a third of the (count, color, shape) triples and a third of the unordered pairs of
colored shapes. No image and no caption of a held-out combination is met in pre-training, nor in the `train` split.
Every word, every colored shape, every count and every relation is.
"""

import random
import re
from itertools import combinations, product
from typing import TYPE_CHECKING

from trl_flow.shapes.world import COLORS, RELATIONS, SHAPES


if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "test")
_COUNT_WORDS = {1: "a", 2: "two", 3: "three"}
_COUNTS = {word: count for count, word in _COUNT_WORDS.items()}
_INDEX = {word: index for words in (COLORS, SHAPES) for index, word in enumerate(words)}

_WORDS = f"Colors: {', '.join(COLORS)}; shapes: {', '.join(SHAPES)}; relations: {', '.join(RELATIONS)}"
_NOUN = rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_GROUP = re.compile(rf"(a|two|three) {_NOUN}(s?)")
_PAIR = re.compile(rf"a {_NOUN} (and|{'|'.join(RELATIONS)}) a {_NOUN}")


def make_caption(objects: list[dict], relation: str | None = None) -> str:
    """Caption of a target, the inverse of [`parse_caption`]: of one object with a count of 1 to 3, or two with a count
    of 1 and the relation of the first to the second, if any; `ValueError` when there is no caption for them.

    Example:

    ```pycon
    >>> from trl_flow.shapes import COLORS, make_caption
    >>> make_caption([{"count": 2, "color": "red", "shape": "circle"}])
    'two red circles'
    >>> [make_caption([{"count": 1, "color": color, "shape": "square"}]) for color in COLORS][:2]
    ['a red square', 'a yellow square']
    ```
    """
    nouns = [f"{item['color']} {item['shape']}" for item in objects]
    counts = [item["count"] for item in objects]
    if len(objects) == 1 and relation is None and counts[0] in _COUNT_WORDS:
        caption = f"{_COUNT_WORDS[counts[0]]} {nouns[0]}{'s' if counts[0] > 1 else ''}"
    elif counts == [1, 1]:
        caption = f"a {nouns[0]} {relation or 'and'} a {nouns[1]}"
    else:
        caption = ""
    try:
        parse_caption(caption)
    except ValueError:
        raise ValueError(
            f"no caption for the objects {objects} with the relation {relation!r}: give one object with a count of 1, "
            f"2 or 3 and no relation, or two objects with a count of 1. {_WORDS}"
        ) from None
    return caption


def parse_caption(prompt: str) -> tuple[list[dict], str | None]:
    """
    Objects and relation that a caption such as `"three blue squares"` names; the inverse of `make_caption`;
    `ValueError` when the prompt is not a caption of this world.

    Returns:
        `(objects, relation)`: `objects` is a list of dicts with the keys `count`, `color` and `shape`; `relation` is
        one of `RELATIONS`, of the first object to the second, or `None`.

    Example:

    ```pycon
    >>> from trl_flow.shapes import RELATIONS, parse_caption
    >>> objects, relation = parse_caption("a red circle left of a blue square")
    >>> objects[1], relation in RELATIONS
    ({'count': 1, 'color': 'blue', 'shape': 'square'}, True)
    ```
    """
    if match := _GROUP.fullmatch(prompt):
        word, color, shape, plural = match.groups()
        if (word == "a") == (plural == ""):
            return [_object(_COUNTS[word], color, shape)], None
    if match := _PAIR.fullmatch(prompt):
        color, shape, link, other_color, other_shape = match.groups()
        objects = [_object(1, color, shape), _object(1, other_color, other_shape)]
        return objects, None if link == "and" else link
    raise ValueError(
        f"{prompt!r} is not a caption of the shapes world. Captions are 'a red circle', 'two red circles', 'three red "
        f"circles', 'a red circle and a green square', 'a red circle left of a green square', in lower case. {_WORDS}"
    )


def _object(count: int, color: str, shape: str) -> dict:
    return {"count": count, "color": color, "shape": shape}


def is_held_out(objects: list[dict]) -> bool:
    """
    Whether a combination of objects, as from [`parse_caption`], is kept for evaluation: the indices of words (color
    and shape, and the count or second color and shape) add up to a multiple of three. So a colored shape is held out
    at one of its three counts, and each pair of colors with three of its nine pairs of shapes, in either order.
    """
    total = sum(_INDEX[item["color"]] + _INDEX[item["shape"]] for item in objects)
    return (total + (objects[0]["count"] if len(objects) == 1 else 0)) % 3 == 0


def prompt_kind(objects: list[dict], relation: str | None) -> str:
    """Kind of a target: `"single"`, `"count"`, `"pair"` or `"relation"`.

    Example:

    ```pycon
    >>> from trl_flow.shapes import parse_caption, prompt_kind
    >>> prompt_kind(*parse_caption("three blue squares"))
    'count'
    ```
    """
    if len(objects) == 1:
        return "single" if objects[0]["count"] == 1 else "count"
    return "pair" if relation is None else "relation"


def all_targets() -> list[tuple[list[dict], str | None]]:
    """The targets of the prompt set, both splits, in a fixed order: each (count, color, shape) once, and each
    unordered pair of differently colored shapes twice, joined by "and" and by one of the four relations, in both
    orders."""
    triples = product(_COUNT_WORDS, COLORS, SHAPES)
    targets: list[tuple[list[dict], str | None]] = [([_object(*triple)], None) for triple in triples]
    seen = {True: 0, False: 0}
    for (color, other_color), shape, other_shape in product(combinations(COLORS, 2), SHAPES, SHAPES):
        pair = [_object(1, color, shape), _object(1, other_color, other_shape)]
        number = seen[is_held_out(pair)]
        seen[is_held_out(pair)] += 1
        forward, backward = (pair, pair[::-1]) if number % 2 else (pair[::-1], pair)
        targets += [(forward, None), (backward, RELATIONS[number // 2 % len(RELATIONS)])]
    return targets


def load_prompts(split: str) -> "Dataset":
    """
    The prompt set, in a fixed shuffled order: `"train"` (216 prompts) or `"test"` (108 prompts of held-out
    combinations); `ValueError` for another split. Columns: `prompt` (`str`), `objects` (list of dicts with `count`,
    `color` and `shape`) and `relation` (`str` or `None`).

    Example:

    ```pycon
    >>> from trl_flow.shapes import load_prompts
    >>> prompts = load_prompts("test")
    >>> len(prompts), prompts[0]["prompt"]
    (108, 'a red triangle right of a yellow circle')
    ```
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the prompt set has {' and '.join(SPLITS)}")
    from datasets import Dataset, Features, List, Value

    rows = [
        {"prompt": make_caption(objects, relation), "objects": objects, "relation": relation}
        for objects, relation in all_targets()
        if is_held_out(objects) == (split == "test")
    ]
    random.Random(0).shuffle(rows)
    text = Value("string")
    objects = List({"count": Value("int64"), "color": text, "shape": text})
    dataset = Dataset.from_list(rows, features=Features({"prompt": text, "objects": objects, "relation": text}))
    dataset.info.dataset_name = "trl_flow.shapes"
    return dataset
