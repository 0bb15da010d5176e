"""Captions and targets are each other's inverse, and the splits share no combination."""

import pytest

from trl_flow.shapes import COLORS, RELATIONS, SHAPES, load_prompts, make_caption, parse_caption, prompt_kind
from trl_flow.shapes.prompts import all_targets


def combination(objects: list[dict]) -> frozenset:
    """What must not be in both splits: a (count, color, shape), or two colored shapes in whatever order."""
    return frozenset((item["count"], item["color"], item["shape"]) for item in objects)


def test_captions_by_hand():
    red_circle = {"count": 1, "color": "red", "shape": "circle"}
    green_square = {"count": 1, "color": "green", "shape": "square"}
    assert parse_caption("a red circle") == ([red_circle], None)
    assert parse_caption("three blue squares") == ([{"count": 3, "color": "blue", "shape": "square"}], None)
    assert parse_caption("a red circle and a green square") == ([red_circle, green_square], None)
    assert parse_caption("a green square left of a red circle") == ([green_square, red_circle], "left of")
    assert parse_caption("a red circle above a green square") == ([red_circle, green_square], "above")


def test_round_trip_over_every_prompt():
    captions = [make_caption(*target) for target in all_targets()]
    assert len(set(captions)) == 324
    assert [parse_caption(caption) for caption in captions] == all_targets()
    for split in ("train", "test"):
        for row in load_prompts(split):
            assert parse_caption(row["prompt"]) == (row["objects"], row["relation"])


def test_splits_share_no_combination():
    train, test = load_prompts("train").to_list(), load_prompts("test").to_list()
    assert (len(train), len(test)) == (216, 108)
    assert not {combination(row["objects"]) for row in train} & {combination(row["objects"]) for row in test}


def test_train_has_every_word_and_every_part():
    train = load_prompts("train").to_list()
    test_words = {word for row in load_prompts("test") for word in row["prompt"].split()}
    assert test_words <= {word for row in train for word in row["prompt"].split()}
    things = [(item["color"], item["shape"], len(row["objects"])) for row in train for item in row["objects"]]
    for color in COLORS:
        for shape in SHAPES:
            assert (color, shape, 1) in things and (color, shape, 2) in things
            assert {
                row["objects"][0]["count"]
                for row in train + load_prompts("test").to_list()
                if len(row["objects"]) == 1 and row["objects"][0]["color"] == color
            } == {1, 2, 3}
    assert {row["relation"] for row in train} == {None, *RELATIONS}


def test_kinds_have_the_same_shares_in_both_splits():
    shares = []
    for split in ("train", "test"):
        kinds = [prompt_kind(row["objects"], row["relation"]) for row in load_prompts(split)]
        shares.append({kind: kinds.count(kind) / len(kinds) for kind in ("single", "count", "pair", "relation")})
    assert shares[0] == pytest.approx(shares[1])
    assert shares[0] == pytest.approx({"single": 12 / 216, "count": 24 / 216, "pair": 90 / 216, "relation": 90 / 216})


def test_columns_and_order_are_fixed():
    test = load_prompts("test")
    assert test.column_names == ["prompt", "objects", "relation"]
    assert test[0] == {
        "prompt": "a red triangle right of a yellow circle",
        "objects": [
            {"count": 1, "color": "red", "shape": "triangle"},
            {"count": 1, "color": "yellow", "shape": "circle"},
        ],
        "relation": "right of",
    }
    assert load_prompts("train")[0]["prompt"] == "a blue circle and a yellow triangle"


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a photo of a cat",
        "a red circles",
        "two red circle",
        "four red circles",
        "A red circle",
        "a red circle ",
        "an orange circle",
        "a red circle and",
        "a red circle near a green square",
        "two red circles and a green square",
    ],
)
def test_other_prompts_are_refused_by_name(prompt):
    with pytest.raises(ValueError, match="is not a caption of the shapes world") as error:
        parse_caption(prompt)
    assert repr(prompt) in str(error.value)


@pytest.mark.parametrize(
    "objects, relation",
    [
        ([], None),
        ([{"count": 4, "color": "red", "shape": "circle"}], None),
        ([{"count": 1, "color": "red", "shape": "star"}], None),
        ([{"count": 1, "color": "red", "shape": "circle"}], "above"),
        ([{"count": 2, "color": "red", "shape": "circle"}, {"count": 1, "color": "blue", "shape": "circle"}], None),
        ([{"count": 1, "color": "red", "shape": "circle"}, {"count": 1, "color": "blue", "shape": "circle"}], "near"),
    ],
)
def test_targets_without_a_caption_are_refused(objects, relation):
    with pytest.raises(ValueError, match="no caption for"):
        make_caption(objects, relation)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'validation'.*train and test"):
        load_prompts("validation")
