"""Several rewards: summed, normalized by themselves, missing. By hand, against TRL's arithmetic, and what follows."""

import math

import pytest
import torch
from trl.trainer.utils import nanstd

from trl_flow.functional import (
    combine_rewards,
    cumulative_values,
    dual_advantages,
    fill_missing,
    frac_zero_std,
    group_advantages,
    normalize_then_sum,
)


NAN = math.nan
TINY = 1e-4


def double(values):
    return torch.tensor(values, dtype=torch.float64)


# The weighted sum


def test_the_sum_by_hand():
    # 2 * 1 - 3 * 0.5; one of the two alone; none; the third is only watched
    rewards = double([[1, 3, 9], [NAN, 3, 9], [1, NAN, NAN], [NAN, NAN, 9]])
    combined = combine_rewards(rewards, double([2, -0.5, 0]))
    assert combined[:3].tolist() == [0.5, -1.5, 2]
    assert combined[3].isnan()


def test_the_sum_takes_steps_too_and_half_precision_and_refuses_other_shapes():
    rewards = torch.ones(4, 3, 2, dtype=torch.bfloat16)
    combined = combine_rewards(rewards, torch.tensor([1.0, 2.0]))
    assert combined.dtype == torch.float32
    assert combined.tolist() == [[3.0] * 3] * 4
    with pytest.raises(ValueError, match=r"rewards has shape \(4, 3, 2\) and weights \(3,\)"):
        combine_rewards(rewards, torch.ones(3))


# Missing rewards


def test_what_is_missing_takes_its_groups_mean_by_hand():
    # Groups of three: at the first step (1, -, 3) and (-, -, -), at the second (2, 5, -) and (4, -, -)
    rewards = double([[1, 2], [NAN, 5], [3, NAN], [NAN, 4], [NAN, NAN], [NAN, NAN]])
    # a sample without any reward stays without
    expected = double([[1, 2], [2, 5], [3, 3.5], [0, 4], [NAN, NAN], [NAN, NAN]])
    torch.testing.assert_close(fill_missing(rewards, 3), expected, equal_nan=True)


def test_a_sample_without_a_reward_has_no_advantage_and_leaves_the_means():
    instant = double([[1, 2], [NAN, NAN], [3, 3]])
    values = cumulative_values(fill_missing(instant, 3), 0.5)
    advantages = dual_advantages(values, 3, scale=0.1)
    assert advantages[1].tolist() == [0, 0]  # with an absolute part, too
    torch.testing.assert_close(advantages[[0, 2]], dual_advantages(values[[0, 2]], 2, scale=0.1))


def test_a_filled_step_has_no_relative_advantage():
    instant = double([[1, 2], [2, NAN], [3, 3]])
    advantages = dual_advantages(fill_missing(instant, 3), 3, scale=0.0)
    assert advantages[1].tolist() == pytest.approx([0, 0], abs=1e-9)


@pytest.mark.parametrize(
    ("rewards", "share"),
    [
        ([1.0, 1.0, 1.0, 2.0], 0.5),
        ([1.0, NAN, NAN, NAN], 1.0),  # nothing that would differ
        ([[1.0, 5.0], [1.0, 6.0], [2.0, 7.0], [2.0, 7.0]], 0.5),  # the second reward differs in the first group
        ([[1.0, NAN], [1.0, 6.0], [2.0, 7.0], [2.0, 7.0]], 1.0),
    ],
)
def test_share_of_groups_without_spread_by_hand(rewards, share):
    assert frac_zero_std(torch.tensor(rewards), 2).item() == share


def test_groups_that_do_not_come_out_are_refused():
    for function in (fill_missing, frac_zero_std):
        with pytest.raises(ValueError, match="5 samples do not split into whole groups of num_generations=2"):
            function(torch.zeros(5), 2)


# Normalized by themselves


def trl_advantages(rewards: torch.Tensor, weights: torch.Tensor, num_generations: int) -> torch.Tensor:
    """The arithmetic of TRL 1.16's GRPOTrainer for `multi_objective_aggregation="normalize_then_sum"`."""
    unscorable = rewards.isnan().all(dim=1)
    grouped = rewards.view(-1, num_generations, rewards.shape[1])
    each = (grouped - grouped.nanmean(dim=1, keepdim=True)) / (nanstd(grouped, dim=1, keepdim=True) + TINY)
    total = (each.view(-1, rewards.shape[1]) * weights).nansum(dim=1)
    total[unscorable] = NAN
    return ((total - total.nanmean()) / (nanstd(total) + TINY)).nan_to_num(0.0)


def test_normalized_by_hand():
    # One group of three, two rewards: means 2 and 30, standard deviations 1 and 10
    rewards, weights = double([[1, 40], [2, 20], [3, 30]]), double([1, 2])
    first, second = 1 / (1 + TINY), 10 / (10 + TINY)
    total = double([-first + 2 * second, -2 * second, first])  # about 1, -2, 1
    spread = math.sqrt(sum(value**2 for value in total.tolist()) / 2)
    torch.testing.assert_close(normalize_then_sum(rewards, weights, 3), total / (spread + TINY))


def test_normalized_by_hand_where_a_reward_does_not_apply():
    # Two groups of two. The second reward judges the first sample alone in its group, so that it says nothing there.
    rewards = double([[0, 9], [2, NAN], [5, 1], [5, 3]])
    unit = 1 / (math.sqrt(2) + TINY)  # deviations of 1, a spread of sqrt(2)
    total = double([-unit, unit, -unit, unit])
    expected = total / (unit * math.sqrt(4 / 3) + TINY)
    torch.testing.assert_close(normalize_then_sum(rewards, double([1, 1]), 2), expected)


@pytest.mark.parametrize("missing", [0.0, 0.2, 0.6])
@pytest.mark.parametrize("num_generations", [2, 4, 12])
def test_equals_trl(missing, num_generations):
    generator = torch.Generator().manual_seed(num_generations)
    for _ in range(20):
        rewards = torch.randn(24, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 30.0, 0.01])
        rewards[torch.rand(24, 3, generator=generator) < missing] = NAN
        weights = double([1, -0.5, 2])
        expected = trl_advantages(rewards, weights, num_generations)
        torch.testing.assert_close(normalize_then_sum(rewards, weights, num_generations), expected)


def test_neither_units_nor_spreads_count():
    rewards = torch.randn(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.tensor([1.0, 1.0], dtype=torch.float64)
    scaled = rewards * torch.tensor([1.0, 100.0]) + torch.tensor([0.0, 7.0])
    torch.testing.assert_close(
        normalize_then_sum(scaled, weights, 4), normalize_then_sum(rewards, weights, 4), rtol=0, atol=2e-3
    )
    # while the sum would be all but the second one
    summed = group_advantages(scaled.sum(dim=1), 4, scale_rewards="group")
    torch.testing.assert_close(summed, group_advantages(scaled[:, 1], 4, scale_rewards="group"), rtol=0, atol=0.1)


def test_rewards_whose_sum_hides_their_difference_are_told_apart():
    # (1, 0), (0, 1), (0, 0), (0, 1): GDPO's motive; a sum gives the first and the second the same
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    advantages = normalize_then_sum(rewards, torch.ones(2), 4)
    assert advantages[0] > advantages[1] + 0.1
    torch.testing.assert_close(advantages[1], advantages[3])


@pytest.mark.parametrize("value", [0.1, -7.3, 1e6])
def test_groups_of_equal_rewards_have_exactly_none(value):
    rewards = torch.full((10, 2), value)
    rewards[3, 0] = rewards[7, 1] = NAN
    assert (normalize_then_sum(rewards, torch.ones(2), 5) == 0).all()


def test_a_reward_with_weight_0_has_no_part():
    rewards = torch.tensor([[1.0, 5.0], [2.0, NAN], [3.0, 7.0], [NAN, 8.0]])
    weights = torch.tensor([1.0, 0.0])
    expected = normalize_then_sum(rewards[:, :1], weights[:1], 2)
    torch.testing.assert_close(normalize_then_sum(rewards, weights, 2), expected)
    assert expected[3] == 0  # judged by nobody who counts
    assert (normalize_then_sum(rewards, torch.zeros(2), 2) == 0).all()


def test_one_function_is_scaled_by_group_and_then_by_batch():
    rewards = torch.randn(12, 1, generator=torch.Generator().manual_seed(1))
    by_group = group_advantages(rewards[:, 0], 4, scale_rewards="group")
    torch.testing.assert_close(normalize_then_sum(rewards, torch.ones(1), 4), by_group / (by_group.std() + TINY))


@pytest.mark.parametrize(
    ("rewards", "weights", "part"),
    [
        (torch.zeros(4), torch.zeros(4), r"rewards has shape \(4,\)"),
        (torch.zeros(4, 2), torch.zeros(3), r"weights \(3,\)"),
        (torch.zeros(5, 2), torch.zeros(2), "5 samples do not split"),
        (torch.tensor([[1.0], [math.inf]]), torch.ones(1), "infinite"),
    ],
)
def test_normalized_refusals(rewards, weights, part):
    with pytest.raises(ValueError, match=part):
        normalize_then_sum(rewards, weights, 2)
