import math

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trl_flow.evaluation.scoring import PairedDifference, paired_difference, score_images
from trl_flow.rewards.checks import RewardError


# ---- paired_difference ----


def test_difference_worked_out_by_hand():
    # d = 1, 0, 2, 1: mean 1, sum of squares 0 + 1 + 1 + 0 = 2, variance 2 / 3, error sqrt(2 / 3 / 4) = sqrt(1 / 6)
    result = paired_difference([0, 1, 1, 2], [1, 1, 3, 3])
    assert result.mean_before == 1.0
    assert result.mean_after == 2.0
    assert result.difference == 1.0
    assert result.standard_error == pytest.approx(math.sqrt(1 / 6), rel=1e-12)
    assert result.standard_errors == pytest.approx(math.sqrt(6), rel=1e-12)
    assert result.num_pairs == 4


def test_images_of_one_prompt_count_once():
    # Prompts 0 and 1 with three images each: differences (1, 1, 1) and (0, 3, 0) average to 1 and 1, so the error
    # is 0; six independent images would have had one above 0
    before, after = [0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 4, 1]
    grouped = paired_difference(before, after, num_images_per_prompt=3)
    assert (grouped.difference, grouped.standard_error, grouped.num_pairs) == (1.0, 0.0, 2)
    assert paired_difference(before, after).standard_error > 0.4


def test_repeated_images_make_no_result_surer():
    single = paired_difference([0.1, 0.5, 0.2], [0.4, 0.6, 0.9])
    copied = paired_difference(
        np.repeat([0.1, 0.5, 0.2], 50), np.repeat([0.4, 0.6, 0.9], 50), num_images_per_prompt=50
    )
    assert copied.standard_error == pytest.approx(single.standard_error, rel=1e-12)


def test_pairs_with_nan_are_left_out():
    # Prompt 0 keeps its second image, prompt 1 has none left
    result = paired_difference([9, 1, math.nan, 9, 3, 3], [math.nan, 2, 9, math.nan, 3, 5], num_images_per_prompt=2)
    assert (result.mean_before, result.mean_after, result.num_pairs) == (2.0, 3.0, 2)
    with pytest.raises(ValueError, match="no pair"):
        paired_difference([math.nan], [1.0])


def test_what_has_no_standard_error_says_so():
    one = paired_difference([1.0], [3.0])
    assert one.difference == 2.0 and math.isnan(one.standard_error) and math.isnan(one.standard_errors)
    assert one.to_dict()["standard_error"] is None and one.to_dict()["standard_errors"] is None
    assert paired_difference([0, 0], [1, 1]).standard_errors == math.inf
    assert math.isnan(paired_difference([0, 0], [0, 0]).standard_errors)


def test_to_dict_has_every_number():
    assert PairedDifference(1.0, 3.0, 2.0, 0.5, 7).to_dict() == {
        "mean_before": 1.0,
        "mean_after": 3.0,
        "difference": 2.0,
        "standard_error": 0.5,
        "standard_errors": 4.0,
        "num_pairs": 7,
    }


@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=2, max_size=30))
def test_swapping_the_two_turns_the_sign(pairs):
    before, after = zip(*pairs, strict=True)
    forth, back = paired_difference(before, after), paired_difference(after, before)
    assert back.difference == pytest.approx(-forth.difference, abs=1e-12)
    assert back.standard_error == pytest.approx(forth.standard_error, abs=1e-12)


@pytest.mark.parametrize(
    "before, after, images, message",
    [
        ([1, 2], [1], 1, r"\(2,\) and after \(1,\)"),
        ([[1]], [[1]], 1, r"\(1, 1\)"),
        ([1, 2, 3], [1, 2, 3], 2, "num_images_per_prompt is 2"),
    ],
)
def test_scores_that_are_no_pairs_are_refused(before, after, images, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(before, after, num_images_per_prompt=images)


# ---- score_images ----


def brightness(images, **kwargs):
    return [image.getpixel((0, 0)) for image in images]


def gray(*levels: int) -> list[Image.Image]:
    return [Image.new("L", (2, 2), level) for level in levels]


def test_scores_by_function_in_the_images_order():
    def times_factor(prompts, images, factor, **kwargs):
        return [image.getpixel((0, 0)) * f if p != "b" else None for p, image, f in zip(prompts, images, factor)]  # noqa: B905

    dataset = Dataset.from_dict({"prompt": ["a", "b"], "factor": [10, 100]})
    scores = score_images(gray(1, 2, 3, 4), dataset, [brightness, times_factor])
    assert list(scores) == ["brightness", "times_factor"]
    np.testing.assert_array_equal(scores["brightness"], [1, 2, 3, 4])
    np.testing.assert_array_equal(scores["times_factor"], [10, 20, math.nan, math.nan])


def test_one_function_may_stand_alone():
    assert list(score_images(gray(1), Dataset.from_dict({"prompt": ["a"]}), brightness)) == ["brightness"]


def test_images_that_do_not_fit_the_rows_are_refused():
    with pytest.raises(ValueError, match="3 images for 2 rows"):
        score_images(gray(1, 2, 3), Dataset.from_dict({"prompt": ["a", "b"]}), brightness)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (tuple(gray(1, 2)), "Sample 0 is tuple, .* list\\(frames\\) for a tuple"),
        (np.zeros((2, 4, 4, 3)), "Sample 0 is ndarray, .* Image.fromarray"),
        ([np.zeros((4, 4, 3))], "Sample 0 is a list of ndarray"),
        ([], "Sample 0 is a list of nothing"),
        (["video.mp4"], "Sample 0 is a list of str"),
    ],
    ids=["tuple", "array", "arrays", "empty", "path"],
)
def test_what_is_neither_an_image_nor_a_video_is_refused(sample, message):
    with pytest.raises(TypeError, match=message):
        score_images([sample], Dataset.from_dict({"prompt": ["a"]}), brightness)


def test_images_and_videos_are_not_scored_together():
    with pytest.raises(TypeError, match="Sample 1 is Image, but all must be PIL images, or all videos"):
        score_images([gray(1, 2), *gray(3)], Dataset.from_dict({"prompt": ["a"]}), brightness)
    with pytest.raises(ValueError, match="'motion' needs videos"):
        score_images(gray(3), Dataset.from_dict({"prompt": ["a"]}), "motion")


def test_a_function_that_fails_is_named():
    def broken(**kwargs):
        return [math.inf]

    with pytest.raises(RewardError, match="broken"):
        score_images(gray(1), Dataset.from_dict({"prompt": ["a"]}), broken)
