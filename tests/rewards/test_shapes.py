"""The shapes reward gives the checker's scores for what the columns, or else the prompts, ask for."""

import pytest

from trl_flow.rewards import ShapesReward
from trl_flow.rewards.checks import RewardError, check_reward_func, reward_name
from trl_flow.rewards.scorer import RewardScorer
from trl_flow.shapes import PlacedShape, load_prompts, render


CIRCLE_AND_SQUARE = "a red circle and a green square"
LEFT_OF = "a red circle left of a green square"

RED_CIRCLE = PlacedShape("red", "circle", x=16, y=32, size=18)
GREEN_SQUARE = PlacedShape("green", "square", x=46, y=32, size=18)
BLUE_SQUARE = PlacedShape("blue", "square", x=46, y=32, size=18)


@pytest.fixture(scope="module")
def images():
    return {
        "right": render([RED_CIRCLE, GREEN_SQUARE]),
        "wrong color": render([RED_CIRCLE, BLUE_SQUARE]),
        "empty": render([]),
    }


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        # The second picture has the count (1), one of two colors (1/2), both shapes (1) and one of two pairs (1/2).
        ("soft", [1.0, 3 / 4, 0.0]),
        ("strict", [1.0, 0.0, 0.0]),
        # All three are clean drawings, whatever the prompt; two of them of the wrong thing.
        ("fidelity", [1.0, 1.0, 1.0]),
    ],
)
def test_scores_by_hand(score, expected, images):
    rewards = ShapesReward(score)(prompts=[CIRCLE_AND_SQUARE] * 3, images=list(images.values()))
    assert rewards == pytest.approx(expected, abs=0.01)


def test_soft_is_the_default():
    assert ShapesReward().score == "soft"


def test_a_spoilt_drawing_has_less_fidelity(images):
    clean = images["right"]
    spoilt = clean.copy()
    spoilt.paste("gray", (24, 0, 36, 64))
    fidelity = ShapesReward("fidelity")([CIRCLE_AND_SQUARE] * 2, [clean, spoilt])
    assert fidelity[0] > 0.99 and fidelity[1] < 0.7


def test_relation_is_judged_from_column_and_from_prompt(images):
    mirrored = render([PlacedShape("red", "circle", 46, 32, 18), PlacedShape("green", "square", 16, 32, 18)])
    objects = [
        {"count": 1, "color": "red", "shape": "circle"},
        {"count": 1, "color": "green", "shape": "square"},
    ]
    pictures = [images["right"], mirrored]
    from_prompt = ShapesReward("soft")([LEFT_OF] * 2, pictures)
    from_columns = ShapesReward("soft")([""] * 2, pictures, objects=[objects] * 2, relation=["left of"] * 2)
    assert from_prompt == from_columns == [1.0, pytest.approx(4 / 5)]  # four parts of five are right
    without_relation = ShapesReward("soft")([""] * 2, pictures, objects=[objects] * 2)
    assert without_relation == [1.0, 1.0]


def test_columns_go_before_the_prompt(images):
    objects = [{"count": 1, "color": "red", "shape": "circle"}, {"count": 1, "color": "blue", "shape": "square"}]
    rewards = ShapesReward("strict")([CIRCLE_AND_SQUARE], [images["wrong color"]], objects=[objects], relation=[None])
    assert rewards == [1.0]


@pytest.mark.parametrize("split", ["train", "test"])
def test_columns_of_the_prompt_set_ask_for_what_its_prompts_say(split, images):
    prompt_set = load_prompts(split)
    reward = ShapesReward("soft")
    check_reward_func(reward, prompt_set.column_names)
    pictures = [images["right"]] * len(prompt_set)
    columns = {"objects": prompt_set["objects"][:], "relation": prompt_set["relation"][:]}
    prompts = prompt_set["prompt"][:]
    with_columns = RewardScorer([reward]).score(prompts, pictures, columns).rewards
    from_prompts = RewardScorer([reward]).score(prompts, pictures, {}).rewards
    assert with_columns.tolist() == from_prompts.tolist()
    assert with_columns.unique().numel() > 3  # one picture, many prompts: it fits some better than others


def test_a_prompt_from_elsewhere_is_an_error_that_shows_it(images):
    with pytest.raises(RewardError, match="'shapes_soft' raised ValueError: 'a photo of a cat' is not a caption"):
        RewardScorer([ShapesReward()]).score(["a photo of a cat"], [images["right"]], {})


@pytest.mark.parametrize("score", ["soft", "strict", "fidelity"])
def test_names_in_metrics(score):
    assert reward_name(ShapesReward(score)) == f"shapes_{score}"


def test_an_unknown_score_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'hard' .*'soft', 'strict', 'fidelity'"):
        ShapesReward("hard")
