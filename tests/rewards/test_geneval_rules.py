import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_flow.rewards.geneval import CLASSES, COLORS, POSITIONS, TASKS, Detection
from trl_flow.rewards.geneval.rules import (
    geneval_class,
    judge,
    objects_to_color,
    parse_request,
    relative_position,
    select_objects,
)


def at(label, x, y, score=0.95, color="grey", size=10):
    """A detected square of `size` pixels around a point, and its color."""
    half = size / 2
    return Detection(label, score, (x - half, y - half, x + half, y + half)), color


def scored(tag, include, exclude, seen):
    """The result with GenEval's thresholds: 0.9 for counting, 0.3 for all else."""
    request = parse_request(tag, include, exclude)
    objects = select_objects((one for one, _ in seen), threshold=0.9 if tag == "counting" else 0.3)
    asked = objects_to_color(objects, request)
    paint = {(name, one): color for name, one in asked for own, color in seen if own is one}
    # A KeyError here is a color that was judged without having been asked for
    return judge(objects, request, lambda name, one: paint[name, one])


DOG = [{"class": "dog", "count": 1}]
DOG_AND_CAT = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]
THREE_DOGS = [{"class": "dog", "count": 3}]
NOT_FOUR_DOGS = [{"class": "dog", "count": 4}]
RED_CAR = [{"class": "car", "count": 1, "color": "red"}]
RED_CAR_BLUE_BUS = [
    {"class": "car", "count": 1, "color": "red"},
    {"class": "bus", "count": 1, "color": "blue"},
]


def cat_to_dog(relation):
    return [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": [relation, 0]}]


def dogs(number, score=0.95):
    return [at("dog", 20 * i, 0, score) for i in range(number)]


# name: tag, include, exclude, what is detected, and GenEval's `correct`, Flow-GRPO's `strict` and `partial`
TABLE = {
    # partial: 1 - |1 - found|
    "single: there": ("single_object", DOG, None, dogs(1), 1, 1, 1.0),
    "single: nothing there": ("single_object", DOG, None, [], 0, 0, 0.0),
    "single: another class": ("single_object", DOG, None, [at("cat", 0, 0)], 0, 0, 0.0),
    "single: another class beside it": ("single_object", DOG, None, [*dogs(1), at("cat", 0, 0)], 1, 1, 1),
    # GenEval wants at least one, Flow-GRPO exactly one
    "single: two of them": ("single_object", DOG, None, dogs(2), 1, 0, 0.0),
    "single: four of them are worth 1 - 3": ("single_object", DOG, None, dogs(4), 1, 0, -2.0),
    "single: the threshold must be exceeded": ("single_object", DOG, None, dogs(1, 0.3), 0, 0, 0.0),
    "single: 0.31 does": ("single_object", DOG, None, dogs(1, 0.31), 1, 1, 1.0),
    "single: a second one below the threshold is none": ("single_object", DOG, None, [*dogs(1), at("dog", 50, 0, 0.2)],
                                                         1, 1, 1.0),
    "single: COCO's mouse is GenEval's computer mouse": (
        "single_object", [{"class": "computer mouse", "count": 1}], None, [at("mouse", 0, 0)], 1, 1, 1.0),
    # partial: mean of one part for each object
    "two: both": ("two_object", DOG_AND_CAT, None, [at("dog", 0, 0), at("cat", 50, 0)], 1, 1, 1.0),
    "two: one missing, (1 + 0) / 2": ("two_object", DOG_AND_CAT, None, dogs(1), 0, 0, 0.5),
    "two: both missing": ("two_object", DOG_AND_CAT, None, [at("bus", 0, 0)], 0, 0, 0.0),
    "two: one of them twice, (1 + 0) / 2": (
        "two_object", DOG_AND_CAT, None, [at("cat", 50, 0), *dogs(2)], 1, 0, 0.5),
    # partial: 1 - |3 - found| / 3
    "counting: exact": ("counting", THREE_DOGS, NOT_FOUR_DOGS, dogs(3), 1, 1, 1.0),
    "counting: one too few": ("counting", THREE_DOGS, NOT_FOUR_DOGS, dogs(2), 0, 0, 2 / 3),
    "counting: one too many is excluded": ("counting", THREE_DOGS, NOT_FOUR_DOGS, dogs(4), 0, 0, 2 / 3),
    "counting: none": ("counting", THREE_DOGS, NOT_FOUR_DOGS, [], 0, 0, 0.0),
    "counting: seven, 1 - 4/3": ("counting", THREE_DOGS, NOT_FOUR_DOGS, dogs(7), 0, 0, -1 / 3),
    "counting: needs a confidence above 0.9": (
        "counting", THREE_DOGS, NOT_FOUR_DOGS, [*dogs(2), at("dog", 90, 0, 0.9)], 0, 0, 2 / 3),
    "counting: less sure ones are not too many": (
        "counting", THREE_DOGS, NOT_FOUR_DOGS, [*dogs(3), at("dog", 90, 0, 0.8)], 1, 1, 1.0),
    "counting: without exclude GenEval takes more": ("counting", THREE_DOGS, None, dogs(4), 1, 0, 2 / 3),
    # An excluded class is no part of the partial score
    "exclude: another class": ("single_object", DOG, [{"class": "cat", "count": 1}], [*dogs(1), at("cat", 0, 0)], 0, 0,
                               1.0),
    "exclude: fewer than its count": ("single_object", DOG, [{"class": "cat", "count": 2}],
                                      [*dogs(1), at("cat", 0, 0)], 1, 1, 1.0),
    # partial: mean of a part for the count and one for the color
    "colors: right": ("colors", RED_CAR, None, [at("car", 0, 0, color="red")], 1, 1, 1.0),
    "colors: wrong, (1 + 0) / 2": ("colors", RED_CAR, None, [at("car", 0, 0, color="blue")], 0, 0, 0.5),
    "colors: nothing to look at, (0 + 0) / 2": ("colors", RED_CAR, None, [], 0, 0, 0.0),
    "colors: GenEval looks at the surest of two; (0 + 0) / 2": (
        "colors", RED_CAR, None, [at("car", 0, 0, 0.5, "blue"), at("car", 50, 0, 0.8, "red")], 1, 0, 0.0),
    "colors: the surest of two is wrong": (
        "colors", RED_CAR, None, [at("car", 0, 0, 0.5, "red"), at("car", 50, 0, 0.8, "blue")], 0, 0, 0.0),
    "colors: one of two wanted, (1 + 1/2) / 2": (
        "colors", [{"class": "car", "count": 2, "color": "red"}], None,
        [at("car", 0, 0, color="red"), at("car", 50, 0, color="blue")], 0, 0, 0.75),
    # partial: a part for each count, and for the position 1, or 0 and 1 if it is wrong
    "position: right, (1 + 1 + 1) / 3": (
        "position", cat_to_dog("left of"), None, [at("dog", 50, 0), at("cat", 0, 0)], 1, 1, 1.0),
    "position: wrong side, (1 + 1 + 0 + 1) / 4": (
        "position", cat_to_dog("right of"), None, [at("dog", 50, 0), at("cat", 0, 0)], 0, 0, 0.75),
    "position: above is a smaller y": (
        "position", cat_to_dog("above"), None, [at("dog", 0, 50), at("cat", 0, 0)], 1, 1, 1.0),
    "position: below is a larger y": (
        "position", cat_to_dog("below"), None, [at("dog", 0, 0), at("cat", 0, 50)], 1, 1, 1.0),
    "position: beside is not above": (
        "position", cat_to_dog("above"), None, [at("dog", 50, 0), at("cat", 0, 0)], 0, 0, 0.75),
    "position: one on the other is nowhere": (
        "position", cat_to_dog("left of"), None, [at("dog", 0, 0), at("cat", 0, 0)], 0, 0, 0.75),
    "position: no reference, (0 + 1 + 0) / 3": (
        "position", cat_to_dog("left of"), None, [at("cat", 0, 0)], 0, 0, 1 / 3),
    "position: the object itself missing, (1 + 0 + 0) / 3": (
        "position", cat_to_dog("left of"), None, [at("dog", 50, 0)], 0, 0, 1 / 3),
    "position: nothing there": ("position", cat_to_dog("left of"), None, [], 0, 0, 0.0),
    "position: two references are none to Flow-GRPO, (0 + 1 + 0) / 3; GenEval takes the surest": (
        "position", cat_to_dog("left of"), None,
        [at("dog", 50, 0, 0.9), at("dog", -50, 0, 0.5), at("cat", 0, 0)], 1, 0, 1 / 3),
    "position: to the left of the less sure one only": (
        "position", cat_to_dog("left of"), None,
        [at("dog", 50, 0, 0.5), at("dog", -50, 0, 0.9), at("cat", 0, 0)], 0, 0, 1 / 3),
    "position: all pairs must hold, (1 + 1 + 0 + 1) / 4": (
        "position", [{"class": "dog", "count": 1}, {"class": "cat", "count": 2, "position": ["left of", 0]}], None,
        [at("dog", 50, 0), at("cat", 0, 0), at("cat", 100, 0)], 0, 0, 0.75),
    # partial: (count + color + count + color) / 4
    "color_attr: right": (
        "color_attr", RED_CAR_BLUE_BUS, None, [at("car", 0, 0, color="red"), at("bus", 50, 0, color="blue")], 1, 1, 1),
    "color_attr: colors swapped, (1 + 0 + 1 + 0) / 4": (
        "color_attr", RED_CAR_BLUE_BUS, None, [at("car", 0, 0, color="blue"), at("bus", 50, 0, color="red")],
        0, 0, 0.5),
    "color_attr: one color leaks, (1 + 1 + 1 + 0) / 4": (
        "color_attr", RED_CAR_BLUE_BUS, None, [at("car", 0, 0, color="red"), at("bus", 50, 0, color="red")],
        0, 0, 0.75),
    "color_attr: one object missing, (1 + 1 + 0 + 0) / 4": (
        "color_attr", RED_CAR_BLUE_BUS, None, [at("car", 0, 0, color="red")], 0, 0, 0.5),
    # A wrong color ends a clause: (1 + 1 + 0) / 3, and it is no reference for others
    "color and position: the position is not looked at": (
        "position",
        [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "color": "red", "position": ["left of", 0]}],
        None, [at("dog", 50, 0), at("cat", 0, 0, color="blue")], 0, 0, 2 / 3),
    "color and position: no reference of the wrong color, (1 + 0 + 1 + 0) / 4": (
        "position",
        [{"class": "dog", "count": 1, "color": "red"}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
        None, [at("dog", 50, 0, color="blue"), at("cat", 0, 0)], 0, 0, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_rules_agree_with_the_published_ones(row):
    *request, seen, correct, strict, partial = row
    result = scored(*request, seen)
    assert (result.correct, result.strict) == (correct, strict)
    assert result.partial == pytest.approx(partial, abs=1e-12)


def test_table_covers_every_task_right_and_wrong():
    assert {(tag, correct) for tag, *_, correct, _, _ in TABLE.values()} == {(t, c) for t in TASKS for c in (0, 1)}


@pytest.mark.parametrize(
    "offset, expected",
    [
        # Two boxes of 10 x 10: the slack is 0.1 * (10 + 10) = 2 along each axis
        ((-10, 0), {"left of"}),  # (10 - 2) / 10 = 0.8
        ((10, 0), {"right of"}),
        ((0, -10), {"above"}),
        ((0, 10), {"below"}),
        # (4 - 2) / 4 is 0.5, which is not more than half
        ((-4, 0), set()),
        ((4, 0), set()),
        ((0, -4), set()),
        ((0, 4), set()),
        ((-4.1, 0), {"left of"}),  # 2.1 / 4.1 = 0.512
        ((-2, 0), set()),
        ((0, 0), set()),
        ((10, 10), {"right of", "below"}),  # 8 / 14.1 = 0.566 both
        ((10, 20), {"below"}),  # 8 / 22.4 = 0.36 and 18 / 22.4 = 0.80
        ((-5, 5), set()),  # 3 / 7.07 = 0.42 both
    ],
)
def test_relative_position(offset, expected):
    x, y = offset
    assert relative_position((x, y, x + 10, y + 10), (0, 0, 10, 10)) == expected


def test_relative_position_counts_with_the_size_of_the_boxes():
    # Slack 0.1 * (100 + 10) = 11: of a distance of 20 less than half is left
    assert relative_position((-65, 0, 35, 10), (0, 0, 10, 10)) == set()
    assert relative_position((-65, 0, 35, 10), (0, 0, 10, 10), position_threshold=0.0) == {"left of"}


def test_only_the_surest_objects_of_a_class_count():
    objects = select_objects((one for one, _ in dogs(20)), threshold=0.3)
    assert len(objects["dog"]) == 16
    sure, less_sure, cat = at("dog", 0, 0, 0.9)[0], at("dog", 50, 0, 0.5)[0], at("cat", 0, 0, 0.7)[0]
    assert select_objects([less_sure, cat, sure], threshold=0.3, max_objects=1) == {"dog": [sure], "cat": [cat]}


def test_overlapping_boxes_are_suppressed_within_a_class_where_asked():
    sure, other = at("dog", 0, 0, 0.9)[0], at("dog", 5, 0, 0.8)[0]
    far, cat = at("dog", 100, 0, 0.5)[0], at("cat", 0, 0, 0.6)[0]
    # 11 x 11 pixels each, 6 x 11 in common: 66 / (242 - 66) = 0.375
    for threshold, kept in ((0.37, [sure, far]), (0.38, [sure, other, far])):
        objects = select_objects([far, other, cat, sure], threshold=0.3, nms_threshold=threshold)
        assert objects == {"dog": kept, "cat": [cat]}
    twice = [at("dog", 0, 0, 0.9)[0], at("dog", 0, 0, 0.8)[0]]
    assert select_objects(twice, threshold=0.3)["dog"] == twice  # 1.0 drops none, not even the same box


def test_vocabulary_is_the_published_one():
    assert (len(CLASSES), len(set(CLASSES)), len(COLORS), len(POSITIONS)) == (80, 80, 10, 4)
    assert [geneval_class(name) for name in ("mouse", "remote", "keyboard", "tv", "Hair_Drier")] == [
        "computer mouse", "tv remote", "computer keyboard", "tv", "hair drier",
    ]  # fmt: skip
    assert all(geneval_class(name) == name for name in CLASSES)


LABELS = ["dog", "cat", "bus"]


@st.composite
def scenes(draw):
    """Detections of three classes with their colors; no two are equally sure."""
    scores = draw(st.lists(st.integers(1, 99), max_size=9, unique=True))
    return [
        at(
            draw(st.sampled_from(LABELS)),
            draw(st.integers(-60, 60)),
            draw(st.integers(-60, 60)),
            score / 100,
            draw(st.sampled_from(["red", "blue"])),
            draw(st.integers(1, 30)),
        )
        for score in scores
    ]


@st.composite
def requests(draw):
    include = []
    for i in range(draw(st.integers(1, 3))):
        clause = {"class": draw(st.sampled_from(LABELS)), "count": draw(st.integers(1, 3))}
        if draw(st.booleans()):
            clause["color"] = draw(st.sampled_from(["red", "blue"]))
        if i and draw(st.booleans()):
            clause["position"] = [draw(st.sampled_from(POSITIONS)), draw(st.integers(0, i - 1))]
        include.append(clause)
    exclude = [{"class": draw(st.sampled_from(LABELS)), "count": draw(st.integers(1, 4))}]
    return draw(st.sampled_from(TASKS)), include, draw(st.sampled_from([None, [], exclude]))


@settings(max_examples=50)
@given(scenes(), requests())
def test_scores_are_ordered_and_bounded(seen, request):
    result = scored(*request, seen)
    assert result.strict <= result.correct
    assert 2 - 16 <= result.partial <= 1
    if result.strict:
        assert result.partial == 1
    if result.partial == 1 and not request[2]:
        assert result.strict == 1


@settings(max_examples=50)
@given(scenes(), requests(), st.randoms())
def test_order_of_the_detections_does_not_matter(seen, request, random):
    shuffled = random.sample(seen, len(seen))
    assert scored(*request, shuffled) == scored(*request, seen)


@settings(max_examples=50)
@given(scenes(), requests(), st.integers(-1000, 1000), st.floats(0, 1))
def test_an_object_that_nobody_asked_for_changes_nothing(seen, request, x, score):
    before, after = scored(*request, seen), scored(*request, [*seen, at("zebra", x, 0, score)])
    assert (after.correct, after.strict, after.partial) == (before.correct, before.strict, before.partial)


@settings(max_examples=50)
@given(scenes(), requests())
def test_mirrored_pictures_fulfil_mirrored_requests(seen, request):
    tag, include, exclude = request
    opposite = {"left of": "right of", "right of": "left of"}
    mirrored = [
        {**clause, "position": [opposite.get(clause["position"][0], clause["position"][0]), clause["position"][1]]}
        if "position" in clause
        else clause
        for clause in include
    ]
    flipped = [
        (Detection(one.label, one.score, (-one.box[2], one.box[1], -one.box[0], one.box[3])), color)
        for one, color in seen
    ]
    assert scored(tag, mirrored, exclude, flipped) == scored(*request, seen)


@settings(max_examples=50)
@given(scenes(), requests(), st.integers(-500, 500), st.integers(-500, 500))
def test_only_relative_places_matter(seen, request, dx, dy):
    moved = [
        (Detection(o.label, o.score, tuple(e + d for e, d in zip(o.box, (dx, dy, dx, dy), strict=True))), color)
        for o, color in seen
    ]
    assert scored(*request, moved) == scored(*request, seen)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.sampled_from(LABELS), st.integers(1, 5)), min_size=1, unique_by=lambda pair: pair[0]),
    st.sampled_from([None, "red"]),
)
def test_what_was_asked_is_right_and_one_more_is_not(wanted, color):
    colored = {} if color is None else {"color": color}
    include = [{"class": label, "count": count, **colored} for label, count in wanted]
    seen = [at(label, 20 * i, 0, 0.95, color) for label, count in wanted for i in range(count)]
    result = scored("two_object", include, None, seen)
    assert (result.correct, result.strict, result.partial) == (1, 1, 1)
    label, count = wanted[0]
    more = scored("two_object", include, None, [*seen, at(label, 0, 50, 0.95, color)])
    assert (more.correct, more.strict) == (1, 0)
    # The count's part is 1 - 1 / count, and where there is a color, its part is 0
    parts = len(wanted) * (1 if color is None else 2)
    assert more.partial == pytest.approx(1 - (1 / count if color is None else 1 / count + 1) / parts)


def test_keys_that_are_none_are_absent():
    filled = [{"class": "dog", "count": 1, "color": None, "position": None}]
    assert parse_request("single_object", filled, None) == parse_request("single_object", DOG)
    assert parse_request("single_object", DOG, []) == parse_request("single_object", DOG)


@pytest.mark.parametrize(
    "tag, include, exclude, message",
    [
        ("count", DOG, None, "the tag is 'count', but must be one of single_object"),
        (None, DOG, None, "the tag is None"),
        (["counting"], DOG, None, "the tag is"),
        ("counting", None, None, "`include` is None"),
        ("counting", [], None, "at least one clause"),
        ("counting", {"class": "dog", "count": 1}, None, "must be a list"),
        ("counting", "dog", None, "must be a list"),
        ("counting", ["dog"], None, "a clause is 'dog'"),
        ("counting", [{"count": 1}], None, "has no `class`"),
        ("counting", [{"class": "dog"}], None, "the count None"),
        ("counting", [{"class": "dog", "count": 0}], None, "the count 0"),
        ("counting", [{"class": "dog", "count": True}], None, "the count True"),
        ("counting", [{"class": "dog", "count": 1.5}], None, "the count 1.5"),
        ("counting", [{"class": "dog", "count": 1, "colour": "red"}], None, "unknown keys .'colour'."),
        ("colors", [{"class": "dog", "count": 1, "color": 3}], None, "the color 3"),
        ("counting", DOG, "cat", "`exclude` is 'cat'"),
        ("counting", DOG, [{"class": "cat", "count": -1}], "the count -1"),
        ("position", cat_to_dog("near"), None, "the position .'near', 0."),
        ("position", [{"class": "dog", "count": 1, "position": ["left of", 0]}], None, "number 0, refers to"),
        ("position", [*DOG, {"class": "cat", "count": 1, "position": ["left of", 1]}], None, "number 1, refers to"),
        ("position", [*DOG, {"class": "cat", "count": 1, "position": ["left of", -1]}], None, "the clause -1"),
        ("position", [*DOG, {"class": "cat", "count": 1, "position": "left of"}], None, "the position 'left of'"),
    ],
)
def test_other_metadata_is_refused(tag, include, exclude, message):
    with pytest.raises(ValueError, match=f"not GenEval's metadata: .*{message}.*A row looks like"):
        parse_request(tag, include, exclude)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((3, 0.5, (0, 0, 1, 1)), TypeError, "label is 3"),
        (("dog", math.nan, (0, 0, 1, 1)), ValueError, "the score nan"),
        (("dog", 0.5, (0, 0, 1)), ValueError, "four finite numbers"),
        (("dog", 0.5, (0, 0, math.inf, 1)), ValueError, "four finite numbers"),
        # Left, top, width, height: what COCO's files have
        (("dog", 0.5, (30, 30, 10, 10)), ValueError, "edge comes before.*not left, top, width, height"),
    ],
)
def test_wrong_detections_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Detection(*arguments)


def test_numbers_of_numpy_are_numbers():
    one = Detection("dog", np.float32(0.95), np.array([0, 0, 10, 10], dtype=np.float32))
    request = parse_request("single_object", DOG)
    assert judge(select_objects([one], threshold=0.3), request, lambda name, one: "red").strict == 1
