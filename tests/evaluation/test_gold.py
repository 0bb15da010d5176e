"""The composite gold score, by hand."""

import math

import numpy as np
import pytest

from trl_flow.evaluation.gold import check_base, gold_difference, gold_score


NAN = math.nan


def test_the_composite_by_hand():
    # (6 / 4 + 1 / 2) / 2: each function is divided by its own base first, so that their scales do not matter
    gold = gold_score({"a": [3.0, 5.0], "b": [0.1, 0.3]}, {"a": [6.0, 6.0], "b": [0.1, 0.1]})
    assert gold.scores == pytest.approx({"a": 6.0, "b": 0.1})
    assert gold.relative == pytest.approx({"a": 1.5, "b": 0.5})
    assert gold.average == pytest.approx(1.0)


def test_the_papers_first_row():
    # GRPO-Guard, Table 1: SD3.5-M and Flow-GRPO trained on GenEval; the average is published as 0.84
    base = {"hps": [0.293], "image_reward": [1.06], "unified": [3.31]}
    after = {"hps": [0.236], "image_reward": [0.85], "unified": [3.05]}
    assert gold_score(base, after).average == pytest.approx(0.84, abs=0.005)


def test_the_base_model_is_one_without_noise():
    scores = {"a": [0.2, 0.9, 0.4], "b": [3.0, NAN, 1.0]}
    gold = gold_score(scores, scores)
    assert (gold.average, gold.standard_error) == (1.0, 0.0)


def test_the_standard_error_by_hand():
    # b = (1, 3), a = (2, 3): the ratio of means is 5/4, the residuals a - 5/4 b = (3/4, -3/4), over the mean 2
    # (3/8, -3/8); their standard deviation is 3/8 sqrt(2), over sqrt(2) prompts 3/8
    gold = gold_score({"a": [1.0, 3.0]}, {"a": [2.0, 3.0]})
    assert gold.average == pytest.approx(5 / 4)
    assert gold.influence.tolist() == pytest.approx([3 / 8, -3 / 8])
    assert gold.standard_error == pytest.approx(3 / 8)


def test_a_prompts_difficulty_is_no_noise():
    # Every prompt is half as good as it was, however good that was
    base = np.random.default_rng(0).uniform(0.1, 10, size=20)
    gold = gold_score({"a": base}, {"a": base / 2})
    assert gold.average == pytest.approx(0.5)
    assert gold.standard_error == pytest.approx(0.0, abs=1e-15)


def test_images_of_one_prompt_are_one_observation():
    base = {"a": [1.0, 1.0, 3.0, 3.0]}
    after = {"a": [1.0, 3.0, 3.0, 3.0]}
    gold = gold_score(base, after, num_images_per_prompt=2)
    assert gold.influence.tolist() == pytest.approx([3 / 8, -3 / 8])  # means 2 and 3, as above
    assert gold.standard_error == pytest.approx(3 / 8)
    with pytest.raises(ValueError, match="num_images_per_prompt is 3"):
        gold_score(base, after, num_images_per_prompt=3)


def test_what_does_not_apply_is_left_out_in_pairs():
    # The second prompt has one pair, (3, 6); the third none; the base's 100 and the trained model's 50 have no partner
    base = {"a": [1.0, 1.0, 3.0, 100.0, NAN, NAN], "b": [2.0] * 6}
    after = {"a": [2.0, 2.0, 6.0, NAN, 50.0, NAN], "b": [2.0] * 6}
    gold = gold_score(base, after, num_images_per_prompt=2)
    assert gold.scores == {"a": 4.0, "b": 2.0}
    assert gold.relative == {"a": 2.0, "b": 1.0}
    assert gold.average == 1.5
    assert gold.influence.tolist() == [0.0, 0.0, 0.0]


def test_a_function_that_applies_nowhere_does_not_count():
    gold = gold_score({"a": [1.0, 1.0], "b": [NAN, NAN]}, {"a": [2.0, 4.0], "b": [NAN, NAN]})
    assert gold.average == 3.0
    assert gold.standard_error == pytest.approx(1.0)
    assert math.isnan(gold.relative["b"])
    nothing = gold_score({"b": [NAN, NAN]}, {"b": [NAN, 1.0]})
    assert math.isnan(nothing.average) and math.isnan(nothing.standard_error)


def test_the_standard_error_is_that_of_repeated_draws():
    """The spread of the average over many sets of prompts is what one set says it is."""
    rng = np.random.default_rng(0)

    def evaluation(number):
        difficulty = rng.uniform(0.2, 1.0, size=number)
        base = {"a": difficulty + 0.05 * rng.standard_normal(number), "b": 2 + rng.standard_normal(number)}
        # applies to about two prompts in three
        base["b"][rng.random(number) < 1 / 3] = NAN
        after = {"a": 0.8 * difficulty + 0.05 * rng.standard_normal(number), "b": base["b"] + 0.5}
        return gold_score(base, after)

    golds = [evaluation(100) for _ in range(2000)]
    spread = np.std([gold.average for gold in golds])
    claimed = np.mean([gold.standard_error for gold in golds])
    # 2000 sets: the spread itself is known to 1.6%; measured ratio 1.0 within that
    assert claimed == pytest.approx(spread, rel=0.06)


def test_the_difference_of_two_evaluations_is_paired():
    base = {"a": [1.0, 2.0, 3.0]}
    before = gold_score(base, {"a": [1.5, 2.9, 4.6]})
    after = gold_score(base, {"a": [1.3, 2.5, 4.0]})
    difference, error = gold_difference(before, after)
    assert difference == pytest.approx(-0.2)
    # d = (0.2, 0.4, 0.6) = 0.2 b: all prompts fell by the same share, so that nothing is left to chance
    assert error == pytest.approx(0.0, abs=1e-15)
    assert before.standard_error > 0.01
    unlike = gold_score(base, {"a": [1.4, 2.9, 3.5]})
    # d = (0.1, 0, 1.1), ratio 0.2: residuals (-0.1, -0.4, 0.5) over 2, standard deviation sqrt(0.21) / 2
    assert gold_difference(before, unlike) == pytest.approx((-0.2, math.sqrt(0.21) / 2 / math.sqrt(3)))
    with pytest.raises(ValueError, match="of 3 and of 2 prompts"):
        gold_difference(before, gold_score({"a": [1.0, 2.0]}, {"a": [1.0, 2.0]}))


def test_one_prompt_has_no_standard_error():
    gold = gold_score({"a": [2.0]}, {"a": [1.0]})
    assert gold.average == 0.5
    assert math.isnan(gold.standard_error)


@pytest.mark.parametrize("base", [[0.0, 0.0], [-3.0, 1.0], [0.0, NAN]])
def test_a_base_that_is_not_positive_is_refused_by_name(base):
    with pytest.raises(ValueError, match=r"'aesthetic' is (0|-1)\..*offset"):
        check_base("aesthetic", base)
    with pytest.raises(ValueError, match="'aesthetic'"):
        gold_score({"aesthetic": base}, {"aesthetic": [1.0, 1.0]})


def test_a_base_to_which_the_function_does_not_apply_is_none_that_could_be_wrong():
    check_base("aesthetic", [NAN, NAN])
    check_base("aesthetic", [-1.0, 2.0, NAN])


def test_functions_and_shapes_must_agree():
    with pytest.raises(ValueError, match="both must be the same"):
        gold_score({"a": [1.0]}, {"b": [1.0]})
    with pytest.raises(ValueError, match=r"(?s)'a'.*before has shape \(1,\) and after \(2,\)"):
        gold_score({"a": [1.0]}, {"a": [1.0, 2.0]})
