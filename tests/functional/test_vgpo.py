"""VGPO's values, weights and dual advantages: hand-computed values, the printed equation, and its limit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_flow.functional import cumulative_values, dual_advantages, group_advantages, value_share, value_weights


few = settings(deadline=None, derandomize=True, max_examples=60)
rewards = st.integers(1, 6).flatmap(
    lambda steps: st.lists(
        st.lists(st.integers(0, 80).map(lambda n: n / 8), min_size=steps, max_size=steps), min_size=1, max_size=4
    )
)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


# Values


def test_values_by_hand():
    # from the last step back: 4, 2 + 4 / 2 = 4, 1 + 4 / 2 = 3; and 0, 0, 8
    values = cumulative_values(double([[1, 2, 4], [8, 0, 0]]), 0.5)
    assert values.tolist() == [[3, 4, 4], [8, 0, 0]]


@few
@given(rows=rewards)
def test_without_discount_the_values_are_the_instant_rewards(rows):
    assert torch.equal(cumulative_values(double(rows), 0.0), double(rows))


@few
@given(rows=rewards, discount=st.floats(0, 0.99))
def test_values_are_the_printed_sum(rows, discount):
    values = cumulative_values(double(rows), discount)
    for row, result in zip(rows, values.tolist(), strict=True):
        for i, value in enumerate(result):
            assert value == pytest.approx(sum(discount**k * r for k, r in enumerate(row[i:])), abs=1e-9)


@pytest.mark.parametrize("discount", [-0.1, 1.0, 1.5, math.nan])
def test_discounts_out_of_their_domain_are_refused(discount):
    with pytest.raises(ValueError, match="discount is"):
        cumulative_values(torch.zeros(2, 3), discount)


def test_values_refuse_what_is_not_samples_by_steps():
    for function in (lambda x: cumulative_values(x, 0.5), value_weights, lambda x: dual_advantages(x, 1, scale=0.0)):
        with pytest.raises(ValueError, match=r"\(4,\).*\(B, T\)"):
            function(torch.zeros(4))


# Weights


def test_weights_by_hand():
    # means 11/3 and 2
    torch.testing.assert_close(
        value_weights(double([[3, 4, 4], [0, 6, 0]])), double([[9 / 11, 12 / 11, 12 / 11], [0, 3, 0]])
    )


@few
@given(rows=rewards, factor=st.floats(1e-3, 1e3))
def test_weights_of_a_sample_average_to_one_and_do_not_see_its_scale(rows, factor):
    weights = value_weights(double(rows))
    steps = len(rows[0])
    torch.testing.assert_close(weights.mean(dim=1), torch.ones(len(rows), dtype=torch.float64))
    assert weights.min() >= 0
    assert weights.max() <= steps * (1 + 1e-12)
    torch.testing.assert_close(value_weights(factor * double(rows)), weights)


@pytest.mark.parametrize("value", [0.0, 1e-38, 3e38])  # four times 3e38 is more than float32 holds
def test_equal_values_weigh_one_each_however_small_or_large(value):
    assert value_weights(torch.full((1, 4), value)).tolist() == [[1.0] * 4]


@pytest.mark.parametrize("bad", [[1.0, -0.25], [-1.0, -0.25]])
def test_negative_values_are_refused_with_place_and_remedy(bad):
    with pytest.raises(ValueError, match=rf"{min(bad):g} \(sample 1, step {bad.index(min(bad))}\).*offset"):
        value_weights(torch.tensor([[1.0, 2.0], bad]))
    with pytest.raises(ValueError, match="offset"):
        dual_advantages(torch.tensor([[1.0, 2.0], bad]), 2, scale=0.1)


def test_values_that_are_all_negative_are_refused_too():
    # their shares would be positive, and the worst step would weigh the most
    with pytest.raises(ValueError, match="offset"):
        value_weights(torch.tensor([[-1.0, -2.0]]))


def test_values_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match=r"values holds 1 .*index \(0, 1\)"):
        value_weights(torch.tensor([[1.0, math.nan]]))


# Dual advantages


def test_dual_advantages_by_hand():
    # One group of two. Step 0: values 1 and 3, mean 2, std sqrt(2): relative -+1 / (1.4142135624 + 0.0001) =
    # -+0.7070567848. Step 1: 3 and 3, std 0: relative 0. k = 0.1. Weights: (0.5, 1.5) and (1, 1).
    # 0.5 (-0.7070567848 + 0.1), 1.5 (0 + 0.3); 1 (0.7070567848 + 0.3), 1 (0 + 0.3)
    advantages = dual_advantages(double([[1, 3], [3, 3]]), 2, scale=0.1)
    expected = double([[-0.3035283924, 0.45], [1.0070567848, 0.3]])
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-9)


def test_dual_advantages_are_the_printed_equation_where_it_is_defined():
    # Eq. 14 word for word; its only difference is the 1e-4 beside a standard deviation of about 1e4
    generator = torch.Generator().manual_seed(0)
    groups, size, steps, k = 3, 4, 5, 0.2
    q = 1e4 * torch.rand(groups * size, steps, generator=generator, dtype=torch.float64)
    advantages = dual_advantages(q, size, scale=k)
    for p in range(groups):
        for step in range(steps):
            column = q[p * size : (p + 1) * size, step]
            alpha = k * column.std()
            for i, value in enumerate(column):
                row = p * size + i
                printed = q[row, step] / q[row].mean() * ((1 + alpha) * value - column.mean()) / column.std()
                assert advantages[row, step].item() == pytest.approx(printed.item(), rel=1e-6, abs=1e-6)


def test_dual_advantages_become_the_values_when_diversity_vanishes():
    # 0.3 three times: the mean is not 0.3 in float32, and a relative part of rounding errors must not come up
    values = torch.full((3, 4), 0.3)
    torch.testing.assert_close(dual_advantages(values, 3, scale=0.1), torch.full((3, 4), 0.03), rtol=1e-6, atol=0)
    assert dual_advantages(values, 3, scale=0.0).tolist() == [[0.0] * 4] * 3


def test_dual_advantages_approach_that_limit_without_a_jump():
    # Values 1 -+ h: the relative part, h / (sqrt(2) h + 1e-4), fades as h falls below 1e-4; k Q stays.
    k = 0.5
    for h in (1e-6, 1e-8, 1e-12):
        advantages = dual_advantages(double([[1 - h], [1 + h]]), 2, scale=k)
        expected = h / (math.sqrt(2) * h + 1e-4)
        torch.testing.assert_close(advantages, double([[k - expected], [k + expected]]), rtol=1e-4, atol=1e-6)


@few
@given(rows=st.lists(st.integers(0, 80).map(lambda n: n / 8), min_size=6, max_size=6))
def test_with_one_step_and_no_scale_they_are_grpo_advantages(rows):
    values = double(rows)
    dual = dual_advantages(values.view(6, 1), 3, scale=0.0)
    torch.testing.assert_close(dual.flatten(), group_advantages(values, 3, scale_rewards="group"))


def test_statistics_are_per_group_and_per_step():
    # Another prompt, or a change at another step that leaves the weights alone, must not be seen.
    generator = torch.Generator().manual_seed(0)
    q = torch.rand(8, 3, generator=generator, dtype=torch.float64)
    both = dual_advantages(q, 4, scale=0.3)
    torch.testing.assert_close(both[:4], dual_advantages(q[:4], 4, scale=0.3), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(both[4:], dual_advantages(q[4:], 4, scale=0.3), rtol=1e-12, atol=1e-12)
    relative = both / value_weights(q) - 0.3 * q
    for step in range(3):
        expected = group_advantages(q[:, step].contiguous(), 4, scale_rewards="group")
        torch.testing.assert_close(relative[:, step], expected)


def test_a_group_of_one_is_left_with_its_value():
    torch.testing.assert_close(dual_advantages(double([[2.0, 2.0]]), 1, scale=0.25), double([[0.5, 0.5]]))


def test_a_sample_with_a_missing_value_has_no_advantage_and_is_left_out():
    # beside the group by hand above: the same advantages for the others, 0 for it, with k above 0 too
    values = double([[1, 3], [math.nan, 7], [3, 3]])
    advantages = dual_advantages(values, 3, scale=0.1)
    expected = double([[-0.3035283924, 0.45], [0, 0], [1.0070567848, 0.3]])
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-9)
    assert dual_advantages(torch.full((2, 2), math.nan), 2, scale=0.1).tolist() == [[0.0] * 2] * 2


def test_value_share_by_hand():
    # the same group: relative 0.5 * 0.7070567848 + 1 * 0.7070567848 = 1.0605851772; absolute
    # 0.1 * (0.5 * 1 + 1.5 * 3 + 1 * 3 + 1 * 3) = 1.1; 1.1 / 2.1605851772
    values = double([[1, 3], [3, 3]])
    assert value_share(values, 2, scale=0.1).item() == pytest.approx(0.5091213305, abs=1e-9)
    assert value_share(values, 2, scale=0.0).item() == 0
    assert value_share(torch.full((2, 2), 0.3), 2, scale=0.1).item() == 1  # nothing else is left
    assert value_share(torch.zeros(2, 2), 2, scale=0.1).item() == 0


def test_the_scale_may_differ_between_steps():
    # the group by hand above, with k = 0.1 at the first step and 0 at the second
    values = double([[1, 3], [3, 3]])
    advantages = dual_advantages(values, 2, scale=torch.tensor([0.1, 0.0]))
    expected = double([[-0.3035283924, 0.0], [1.0070567848, 0.0]])
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-7)
    # relative 1.0605851772 as below; absolute 0.1 (0.5 * 1 + 1 * 3) = 0.35
    share = value_share(values, 2, scale=torch.tensor([0.1, 0.0])).item()
    assert share == pytest.approx(0.35 / 1.4105851772, abs=1e-7)


def test_dual_advantages_refusals():
    with pytest.raises(ValueError, match=r"scale has shape \(3,\).*each of the 2 steps"):
        dual_advantages(torch.ones(4, 2), 2, scale=torch.ones(3))
    with pytest.raises(ValueError, match=r"(?s)\(5, 2\).*num_generations=2"):
        dual_advantages(torch.ones(5, 2), 2, scale=0.1)
    with pytest.raises(ValueError, match="scale is -0.1"):
        dual_advantages(torch.ones(4, 2), 2, scale=-0.1)


def test_half_precision_is_widened_and_double_stays():
    for dtype, inside in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        values = cumulative_values(torch.ones(2, 3, dtype=dtype), 0.5)
        assert values.dtype == value_weights(values).dtype == dual_advantages(values, 2, scale=0.1).dtype == inside
