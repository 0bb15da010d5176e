from collections import Counter

import numpy as np
import pytest

from trl_flow.prompts import generate_geneval_prompts, geneval_benchmark
from trl_flow.prompts.geneval import FLOW_GRPO_MIX
from trl_flow.rewards.geneval import CLASSES, COLORS, POSITIONS, TASKS
from trl_flow.rewards.geneval.rules import parse_request


NUMBERS = {2: "two", 3: "three", 4: "four"}


def said(include):
    """The prompt of some metadata, put together by other code than the generator's."""

    def a(words):
        return ("an " if words[0] in "aeiou" else "a ") + words

    def name(clause):
        return a(" ".join(filter(None, [clause.get("color"), clause["class"]])))

    first, *rest = include
    if first["count"] > 1:
        return f"a photo of {NUMBERS[first['count']]} {first['class']}{'es' if first['class'][-1] == 's' else 's'}"
    if rest and rest[0].get("position"):
        relation, target = rest[0]["position"]
        assert target == 0
        return f"a photo of {name(rest[0])} {relation} {name(first)}"
    return "a photo of " + " and ".join(name(clause) for clause in include)


def test_benchmark_is_the_published_one():
    rows = geneval_benchmark()
    # GenEval, section 3.2 and its metadata file: as many of each task, in this order
    counts = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
    assert list(Counter(rows["tag"]).items()) == list(counts.items())
    assert len(set(rows["prompt"])) == 553
    # Lines of that file
    published = {
        0: "a photo of a bench",
        1: "a photo of a cow",
        2: "a photo of a bicycle",
        3: "a photo of a clock",
        80: "a photo of a bench and a sports ball",
        81: "a photo of a toothbrush and a snowboard",
        179: "a photo of two clocks",
        184: "a photo of two bears",
        259: "a photo of a blue fire hydrant",
        353: "a photo of a dog right of a teddy bear",
        453: "a photo of a purple wine glass and a black apple",
    }
    assert {index: rows[index]["prompt"] for index in published} == published
    # Elsewhere in that file, the odd plurals and articles among them
    assert {
        "a photo of four benchs",
        "a photo of two toothbrushs",
        "a photo of two wine glasses",
        "a photo of four broccolis",
        "a photo of a pink handbag and a black scissors",
        "a photo of an orange",
        "a photo of a person and a bear",
        "a photo of a green surfboard and an orange oven",
        "a photo of a cow below an airplane",
        "a photo of a carrot left of an orange",
    } <= set(rows["prompt"])


def test_metadata_is_that_of_the_published_file():
    rows = {row["prompt"]: row for row in geneval_benchmark()}
    assert rows["a photo of a dog right of a teddy bear"] == {
        "tag": "position",
        "include": [{"class": "teddy bear", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
        "prompt": "a photo of a dog right of a teddy bear",
        "exclude": None,
    }
    assert rows["a photo of two wine glasses"] == {
        "tag": "counting",
        "include": [{"class": "wine glass", "count": 2}],
        "prompt": "a photo of two wine glasses",
        "exclude": [{"class": "wine glass", "count": 3}],
    }
    assert rows["a photo of a green surfboard and an orange oven"]["include"] == [
        {"class": "surfboard", "count": 1, "color": "green"},
        {"class": "oven", "count": 1, "color": "orange"},
    ]


@pytest.mark.parametrize("rows", [geneval_benchmark(), generate_geneval_prompts(2000)], ids=["benchmark", "generated"])
def test_prompts_say_what_their_metadata_asks_for(rows):
    for row in rows:
        assert row["prompt"] == said(row["include"])
        request = parse_request(row["tag"], row["include"], row["exclude"])
        names = [clause.name for clause in request.include]
        colors = [clause.color for clause in request.include if clause.color]
        assert set(names) <= set(CLASSES) and set(colors) <= set(COLORS)
        assert len(set(names)) == len(names) and len(set(colors)) == len(colors)
        assert not (colors and "person" in names)
        if row["tag"] == "counting":
            assert request.exclude[0].name == names[0]
            assert request.exclude[0].count == request.include[0].count + 1
        else:
            assert not request.exclude
            assert all(clause.count == 1 for clause in request.include)


def meaning(row):
    """What a prompt asks for, in whatever order: left of is right of, seen from the other side."""
    swapped = {"left of": "right of", "above": "below"}
    classes = [clause["class"] for clause in row["include"]]
    position = row["include"][-1].get("position")
    if position is None:
        return row["tag"], frozenset((c["class"], c["count"], c.get("color")) for c in row["include"])
    if position[0] in swapped:
        return row["tag"], classes[1], swapped[position[0]], classes[0], "swapped"
    return row["tag"], classes[0], position[0], classes[1], "swapped"


def test_training_prompts_are_none_of_the_benchmark():
    benchmark = {meaning(row) for row in geneval_benchmark()}
    rows = generate_geneval_prompts(3000, seed=1)
    assert not benchmark & {meaning(row) for row in rows}
    # Without the rule there would be some
    assert benchmark & {meaning(row) for row in generate_geneval_prompts(3000, seed=1, exclude_benchmark=False)}


def test_nothing_comes_twice_before_all_has_come():
    rows = generate_geneval_prompts(1000, tasks=["two_object", "counting"], exclude_benchmark=False)
    times = {
        task: Counter(meaning(row) for row in rows if row["tag"] == task).values()
        for task in ("two_object", "counting")
    }
    assert set(times["two_object"]) == {1}
    # 80 classes x 3 counts = 240 prompts for 500 places: twice each, and 20 of them once more
    assert Counter(times["counting"]) == {2: 220, 3: 20}
    rows = generate_geneval_prompts(320, tasks="counting")
    assert Counter(Counter(row["prompt"] for row in rows).values()) == {2: 160}  # 240 less the benchmark's 80


def test_every_prompt_can_come():
    rows = generate_geneval_prompts(240 + 80, tasks={"counting": 3, "single_object": 1}, exclude_benchmark=False)
    assert len(set(rows["prompt"])) == 320
    rows = generate_geneval_prompts(790, tasks=["colors"], exclude_benchmark=False)
    assert len(set(rows["prompt"])) == 79 * 10


def test_shares_of_the_tasks():
    assert Counter(generate_geneval_prompts(170)["tag"]) == {task: 10 * share for task, share in FLOW_GRPO_MIX.items()}
    # 10 / 3 each: the rest goes to one of them
    thirds = Counter(generate_geneval_prompts(10, tasks=["colors", "position", "counting"])["tag"])
    assert sorted(thirds.values()) == [3, 3, 4]
    assert set(generate_geneval_prompts(6, tasks=TASKS, exclude_benchmark=False)["tag"]) == set(TASKS)
    for number in range(1, 19):
        assert len(generate_geneval_prompts(number)) == number


def test_all_words_are_used_about_equally():
    rows = generate_geneval_prompts(4000, tasks=["position"])
    relations = Counter(row["include"][1]["position"][0] for row in rows)
    classes = Counter(clause["class"] for row in rows for clause in row["include"])
    # Expected 1000 of each relation, with a standard deviation of 27; 100 of each class, with one of 10
    assert set(relations) == set(POSITIONS)
    assert all(abs(number - 1000) < 5 * 27 for number in relations.values())
    assert len(classes) == 80 and all(abs(number - 100) < 5 * 10 for number in classes.values())


def test_seeds():
    one = generate_geneval_prompts(50, seed=3).to_list()
    np.random.seed(0)  # the global state must not matter
    assert generate_geneval_prompts(50, seed=3).to_list() == one
    assert generate_geneval_prompts(50, seed=4).to_list() != one


@pytest.mark.parametrize(
    "number, options, message",
    [
        (0, {}, "num_prompts is 0"),
        (2.5, {}, "num_prompts is 2.5"),
        (True, {}, "num_prompts is True"),
        (10, {"tasks": ["colours"]}, "'colours' is not one of GenEval's tasks, which are single_object"),
        (10, {"tasks": []}, "one must be positive"),
        (10, {"tasks": {"colors": 0}}, "one must be positive"),
        (10, {"tasks": {"colors": 2, "counting": -1}}, "not negative"),
        (10, {"tasks": {"colors": float("nan")}}, "one must be positive"),
        (10, {"tasks": {"colors": float("inf")}}, "must be finite"),
        (10, {"tasks": ["single_object"]}, "All prompts of single_object are in GenEval's benchmark"),
    ],
)
def test_wrong_requests_are_refused(number, options, message):
    with pytest.raises(ValueError, match=message):
        generate_geneval_prompts(number, **options)
