import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_flow.evaluation.intervals import (
    half_width,
    mean_interval,
    paired_prompt_means,
    prompt_means,
    share_interval,
)


@pytest.mark.parametrize("degrees, quantile", [(1, 12.7062), (2, 4.30265), (9, 2.26216), (120, 1.97993)])
def test_half_widths_are_those_of_students_table(degrees, quantile):
    # Published table, two-sided 95%
    assert half_width(1.0, degrees + 1) == pytest.approx(quantile, rel=5e-6)


def test_interval_worked_out_by_hand():
    # Prompts (1, 3) and (4, 6) and (8, 8): means 2, 5, 8; mean 5, s = 3, error 3 / sqrt(3), t for two degrees 4.30265
    found = mean_interval([1, 3, 4, 6, 8, 8], num_images_per_prompt=2)
    assert (found.mean, found.num_prompts) == (5.0, 3)
    assert found.standard_error == pytest.approx(math.sqrt(3), rel=1e-12)
    assert found.high - found.mean == pytest.approx(4.302653 * math.sqrt(3), rel=1e-6)
    assert found.mean - found.low == pytest.approx(found.high - found.mean, rel=1e-12)


def test_scores_that_do_not_apply_are_left_out():
    nan = math.nan
    # Prompt 0 has one image left, prompt 1 none, prompt 2 both
    np.testing.assert_array_equal(prompt_means([nan, 4, nan, nan, 1, 3], 2), [4, nan, 2])
    found = mean_interval([nan, 4, nan, nan, 1, 3], num_images_per_prompt=2)
    assert (found.mean, found.num_prompts) == (3.0, 2)


def test_an_image_without_a_score_is_left_out_on_both_sides():
    nan = math.nan
    # The second image of the first prompt has no score before, and the second prompt has no pair
    before, after = paired_prompt_means([1, nan, nan, 5, 2, 4], [7, 9, 3, nan, 1, 2], 2)
    np.testing.assert_array_equal(before, [1, nan, 3])
    np.testing.assert_array_equal(after, [7, nan, 1.5])


def test_what_has_no_interval_says_so():
    one = mean_interval([2.0])
    assert one.mean == 2.0 and one.to_dict() == {
        "mean": 2.0,
        "low": None,
        "high": None,
        "standard_error": None,
        "num_prompts": 1,
    }
    none = mean_interval([math.nan, math.nan])
    assert none.to_dict()["mean"] is None and none.num_prompts == 0
    with pytest.raises(ValueError, match="multiple"):
        mean_interval([1.0, 2.0, 3.0], num_images_per_prompt=2)


def test_students_interval_covers_what_it_says():
    # 95% of the intervals of five normal prompts hold the true mean, 0; 4,000 draws: within 3 sqrt(.05 * .95 / 4000)
    draws = np.random.default_rng(0).normal(size=(4000, 5))
    intervals = [mean_interval(draw) for draw in draws]
    covered = np.mean([found.low <= 0 <= found.high for found in intervals])
    assert abs(covered - 0.95) < 3 * math.sqrt(0.05 * 0.95 / 4000)


def test_wilsons_interval_worked_out_by_hand():
    # 10 of 10: low = 1 / (1 + z^2 / 10) with z^2 = 3.841459, so 0.722467
    assert share_interval(1.0, 10) == (pytest.approx(0.722467, abs=1e-6), pytest.approx(1.0))
    # 50 of 100: half = z sqrt(.25 / 100 + z^2 / 40000) / (1 + z^2 / 100) = 0.0961685
    assert share_interval(0.5, 100) == (pytest.approx(0.4038315, abs=1e-6), pytest.approx(0.5961685, abs=1e-6))


@given(st.floats(0, 1), st.integers(1, 1000))
def test_wilsons_interval_is_a_part_of_the_unit_interval_with_the_share_in_it(share, n):
    low, high = share_interval(share, n)
    assert 0 <= low < high <= 1
    assert low - 1e-9 <= share <= high + 1e-9
    mirrored = share_interval(1 - share, n)
    assert mirrored == (pytest.approx(1 - high, abs=1e-9), pytest.approx(1 - low, abs=1e-9))
