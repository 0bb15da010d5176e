"""Group advantages, the clipped loss and the KL penalty: hand-computed values, gradients, properties, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_flow.functional import (
    clipped_loss,
    gaussian_kl,
    group_advantages,
    ratio_histogram,
    ratio_statistics,
    transition_kl,
)
from trl_flow.functional.grpo import RATIO_BIN_EDGES


few = settings(deadline=None, derandomize=True, max_examples=60)
# Multiples of 1/8 of moderate size: sums and differences of them are exact, so that equalities can be asked for.
eighths = st.integers(-800, 800).map(lambda n: n / 8)


def groups(min_groups=1):
    """Rewards of one to four prompts with the group size, one to six."""
    return st.integers(2, 6).flatmap(
        lambda size: st.tuples(
            st.lists(st.lists(eighths, min_size=size, max_size=size), min_size=min_groups, max_size=4), st.just(size)
        )
    )


def double(values):
    return torch.tensor(values, dtype=torch.float64)


# Group advantages. Rewards 1, 3 | 5, 5: group means 2 and 5.


def test_unscaled_advantages_by_hand():
    advantages = group_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2, scale_rewards="none")
    assert advantages.tolist() == [-1.0, 1.0, 0.0, 0.0]


def test_group_scaled_advantages_by_hand():
    # std of (1, 3), unbiased: sqrt(2) = 1.4142135624; 1 / (1.4142135624 + 0.0001) = 0.7070567848
    advantages = group_advantages(double([1, 3, 5, 5]), 2, scale_rewards="group")
    torch.testing.assert_close(advantages, double([-0.7070567848, 0.7070567848, 0, 0]), rtol=0, atol=1e-9)


def test_batch_scaled_advantages_by_hand():
    # deviations from 3.5: 6.25 + 0.25 + 2.25 + 2.25 = 11; std = sqrt(11 / 3) = 1.9148542155;
    # 1 / (1.9148542155 + 0.0001) = 0.5222056973
    advantages = group_advantages(double([1, 3, 5, 5]), 2, scale_rewards="batch")
    torch.testing.assert_close(advantages, double([-0.5222056973, 0.5222056973, 0, 0]), rtol=0, atol=1e-9)


def test_centered_batch_scaled_advantages_by_hand():
    # centered -1, 1, 0, 0: std = sqrt(2 / 3) = 0.8164965809; 1 / (0.8164965809 + 0.0001) = 1.2245948898
    advantages = group_advantages(double([1, 3, 5, 5]), 2, scale_rewards="batch_centered")
    torch.testing.assert_close(advantages, double([-1.2245948898, 1.2245948898, 0, 0]), rtol=0, atol=1e-9)
    # what differs between prompts alone does not count
    shifted = group_advantages(double([1, 3, 905, 905]), 2, scale_rewards="batch_centered")
    torch.testing.assert_close(shifted, advantages)


def test_groups_are_contiguous():
    # read the other way, as every second sample, no group would have equal rewards
    advantages = group_advantages(torch.tensor([1.0, 1.0, 1.0, 7.0, 7.0, 7.0]), 3, scale_rewards="group")
    assert advantages.tolist() == [0.0] * 6


def test_samples_without_a_reward_are_left_out_by_hand():
    # Groups (1, -, 3) and (-, -, 5): means 2 and 5. Spread of the group: sqrt(2) of two deviations of 1; of one
    # reward: 0. Of the batch: 1, 3, 5 have mean 3, deviations 4 + 0 + 4 = 8, over 2: std 2; 1 / 2.0001 = 0.4999750012
    nan = math.nan
    rewards = double([1, nan, 3, nan, nan, 5])
    unscaled = group_advantages(rewards, 3, scale_rewards="none")
    assert unscaled.tolist() == [-1, 0, 1, 0, 0, 0]
    by_group = group_advantages(rewards, 3, scale_rewards="group")
    torch.testing.assert_close(by_group, 0.7070567848 * unscaled, rtol=0, atol=1e-9)
    by_batch = group_advantages(rewards, 3, scale_rewards="batch")
    torch.testing.assert_close(by_batch, 0.4999750012 * unscaled, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "batch_centered", "none"])
def test_a_batch_without_any_reward_has_no_advantage(scale_rewards):
    assert group_advantages(torch.full((4,), math.nan), 2, scale_rewards=scale_rewards).tolist() == [0.0] * 4


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "batch_centered", "none"])
def test_a_group_of_equal_rewards_has_no_advantage_not_even_rounding(scale_rewards):
    # 0.1 three times has a mean that is not 0.1 in float32; divided by 1e-4 the difference would be a signal
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.1 + 1e6, 0.1 + 1e6, 0.1 + 1e6, 0.0, 1.0, 2.0])
    assert group_advantages(rewards, 3, scale_rewards=scale_rewards)[:6].tolist() == [0.0] * 6
    assert group_advantages(rewards[:6], 3, scale_rewards=scale_rewards).tolist() == [0.0] * 6


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "batch_centered", "none"])
def test_a_group_of_one_has_no_advantage(scale_rewards):
    assert group_advantages(torch.tensor([1.0, 4.0]), 1, scale_rewards=scale_rewards).tolist() == [0.0, 0.0]
    assert group_advantages(torch.tensor([1.0]), 1, scale_rewards=scale_rewards).tolist() == [0.0]


@few
@given(case=groups(), scale_rewards=st.sampled_from(["group", "batch", "batch_centered", "none"]))
def test_advantages_of_a_group_sum_to_zero_and_keep_its_order(case, scale_rewards):
    rewards, size = case
    advantages = group_advantages(double(rewards).flatten(), size, scale_rewards=scale_rewards).view(-1, size)
    assert advantages.sum(dim=1).abs().max() < 1e-9 * max(1, advantages.abs().max().item()) * size
    for row, result in zip(rewards, advantages.tolist(), strict=True):
        pairs = list(zip(row, result, strict=True))
        assert all(x < y for a, x in pairs for b, y in pairs if a < b)


@few
@given(case=groups(), shift=eighths, scale_rewards=st.sampled_from(["group", "batch", "batch_centered", "none"]))
def test_advantages_do_not_see_an_offset_of_the_rewards(case, shift, scale_rewards):
    rewards, size = case
    flat = double(rewards).flatten()
    torch.testing.assert_close(
        group_advantages(flat + shift, size, scale_rewards=scale_rewards),
        group_advantages(flat, size, scale_rewards=scale_rewards),
        rtol=1e-9,
        atol=1e-9,
    )


@few
@given(case=groups(), factor=st.integers(1, 64))
def test_scaled_advantages_see_a_factor_of_the_rewards_only_through_epsilon(case, factor):
    # (c d) / (c std + e) against d / (std + e): between the two lies at most |d| / std * e / std
    rewards, size = case
    flat = double(rewards).flatten()
    for scale_rewards in ("group", "batch"):
        plain = group_advantages(flat, size, scale_rewards=scale_rewards)
        scaled = group_advantages(factor * flat, size, scale_rewards=scale_rewards)
        # eighths: the smallest std that is not 0 is 1/8 / sqrt(24) = 0.0255 for 24 samples
        torch.testing.assert_close(scaled, plain, rtol=1e-4 / 0.0255, atol=1e-12)
    unscaled = group_advantages(flat, size, scale_rewards="none")
    torch.testing.assert_close(group_advantages(factor * flat, size, scale_rewards="none"), factor * unscaled)


@few
@given(case=groups(min_groups=2))
def test_a_group_does_not_see_the_others_unless_the_batch_scales_it(case):
    rewards, size = case
    flat = double(rewards).flatten()
    for scale_rewards in ("group", "none"):
        together = group_advantages(flat, size, scale_rewards=scale_rewards)
        alone = [group_advantages(double(row), size, scale_rewards=scale_rewards) for row in rewards]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_infinite_rewards_are_refused_with_their_index(bad):
    with pytest.raises(ValueError, match=r"rewards holds 1 .*index \(2,\)"):
        group_advantages(torch.tensor([1.0, 2.0, bad, 4.0]), 2, scale_rewards="group")


def test_rewards_that_do_not_form_groups_are_refused():
    with pytest.raises(ValueError, match=r"(?s)\(5,\).*num_generations=2"):
        group_advantages(torch.zeros(5), 2, scale_rewards="group")
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        group_advantages(torch.zeros(2, 2), 2, scale_rewards="group")
    with pytest.raises(ValueError, match=r"(?s)\(0,\).*num_generations=2"):
        group_advantages(torch.zeros(0), 2, scale_rewards="group")
    with pytest.raises(ValueError, match="num_generations=0"):
        group_advantages(torch.zeros(4), 0, scale_rewards="group")


def test_an_unknown_scaling_is_refused():
    with pytest.raises(ValueError, match="'prompt'"):
        group_advantages(torch.zeros(4), 2, scale_rewards="prompt")


# Clipped loss


@pytest.mark.parametrize(
    "ratio, advantage, expected",
    [
        (1.2, 2.0, -2.2),  # min(2.4, 1.1 * 2): clipped
        (1.2, -2.0, 2.4),  # min(-2.4, -2.2)
        (0.8, 2.0, -1.6),  # min(1.6, 1.8)
        (0.8, -2.0, 1.8),  # min(-1.6, -1.8): clipped
        (1.05, 2.0, -2.1),  # inside
        (1.0, 2.0, -2.0),
        (1.2, 0.0, 0.0),
    ],
)
def test_clipped_loss_by_hand(ratio, advantage, expected):
    loss = clipped_loss(double([ratio]).log(), double([advantage]), epsilon=0.1)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_epsilon_high_bounds_only_the_upper_side():
    log_ratio = double([1.2, 1.4, 0.8]).log()
    loss = clipped_loss(log_ratio, double([2, 2, -2]), epsilon=0.1, epsilon_high=0.3)
    torch.testing.assert_close(loss, double([-2.4, -2.6, 1.8]))


def test_weight_multiplies_each_sample():
    log_ratio, advantages = double([1.2, 0.8, 1.0]).log(), double([2, 2, -1])
    loss = clipped_loss(log_ratio, advantages, epsilon=0.1, weight=double([10, 0.5, 3]))
    torch.testing.assert_close(loss, double([-22, -0.8, 3]))


def test_gradient_at_ratio_one_is_minus_advantage_times_weight():
    log_ratio = torch.zeros(3, requires_grad=True)
    advantages, weight = torch.tensor([2.0, -0.5, 0.0]), torch.tensor([10.0, 4.0, 3.0])
    loss = clipped_loss(log_ratio, advantages, epsilon=2e-6, weight=weight)
    assert torch.equal(loss, -advantages * weight)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert torch.equal(gradient, -advantages * weight)


def test_gradient_is_zero_where_clipped_and_only_there():
    log_ratio = double([1.2, 1.2, 0.8, 0.8]).log().requires_grad_()
    loss = clipped_loss(log_ratio, double([2, -2, 2, -2]), epsilon=0.1)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    # where not clipped, d(-r A) / d log r = -r A
    torch.testing.assert_close(gradient, double([0, 2.4, -1.6, 0]))


def test_clip_range_of_two_millionths_is_exact_in_float32():
    # 1 + 2e-6 is 17 float32 steps above 1 and 1 + 2.02e-6 rounds to the same number; the loss tells them apart
    log_ratio = torch.tensor([1.98e-6, 2.02e-6, -1.98e-6, -2.02e-6], requires_grad=True)
    loss = clipped_loss(log_ratio, torch.tensor([1.0, 1.0, -1.0, -1.0]), epsilon=2e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert (gradient != 0).tolist() == [True, False, True, False]


@few
@given(log_r=st.floats(-1, 1), advantage=eighths, low=st.floats(0, 0.5), high=st.floats(0, 0.5))
def test_clipped_loss_is_the_printed_one_and_never_below_the_unclipped(log_r, advantage, low, high):
    ratio = math.exp(log_r)
    loss = clipped_loss(double([log_r]), double([advantage]), epsilon=low, epsilon_high=high).item()
    printed = -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    assert loss == pytest.approx(printed, abs=1e-9)
    assert loss >= -ratio * advantage - 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_and_advantages_of_half_precision_are_float32(dtype):
    assert clipped_loss(torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype), epsilon=0.1).dtype == torch.float32
    assert group_advantages(torch.ones(2, dtype=dtype), 2, scale_rewards="group").dtype == torch.float32
    assert group_advantages(torch.tensor([0, 1]), 2, scale_rewards="none").tolist() == [-0.5, 0.5]


def test_clipped_loss_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"log_ratio has shape \(4,\) and advantages has shape \(4, 1\)"):
        clipped_loss(torch.zeros(4), torch.zeros(4, 1), epsilon=0.1)
    with pytest.raises(ValueError, match=r"weight has shape \(4, 1, 1, 1\): .*\(B,\)"):
        clipped_loss(torch.zeros(4), torch.zeros(4), epsilon=0.1, weight=torch.ones(4, 1, 1, 1))
    with pytest.raises(ValueError, match=r"\(4, 1, 1, 4\).*\(B,\)"):
        clipped_loss(torch.zeros(4, 1, 1, 4), torch.zeros(4, 1, 1, 4), epsilon=0.1)


def test_negative_clip_ranges_are_refused():
    with pytest.raises(ValueError, match="epsilon is -0.1"):
        clipped_loss(torch.zeros(1), torch.zeros(1), epsilon=-0.1)
    with pytest.raises(ValueError, match="epsilon_high is -0.1"):
        clipped_loss(torch.zeros(1), torch.zeros(1), epsilon=0.1, epsilon_high=-0.1)


# Statistics of the ratio


def test_ratio_statistics_by_hand():
    # range 0.9 to 1.3; the clipping acts above for positive advantages and below for negative ones
    log_ratio = double([1.4, 1.4, 0.8, 0.8, 1.2]).log()
    statistics = ratio_statistics(log_ratio, double([2, -2, 2, -2, 2]), epsilon=0.1, epsilon_high=0.3)
    torch.testing.assert_close(statistics.pop("deviation"), double([0.4, 0.4, -0.2, -0.2, 0.2]))
    assert {name: flags.tolist() for name, flags in statistics.items()} == {
        "above": [1, 1, 0, 0, 0],
        "below": [0, 0, 1, 1, 0],
        "high": [1, 0, 0, 0, 0],
        "low": [0, 0, 0, 1, 0],
    }


def test_clipping_acts_where_the_loss_has_no_gradient():
    generator = torch.Generator().manual_seed(0)
    log_ratio, advantages = 4e-6 * torch.randn(200, generator=generator), torch.randn(200, generator=generator)
    log_ratio.requires_grad_()
    loss = clipped_loss(log_ratio, advantages, epsilon=2e-6, epsilon_high=3e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    statistics = ratio_statistics(log_ratio.detach(), advantages, epsilon=2e-6, epsilon_high=3e-6)
    clipped = statistics["high"] + statistics["low"]
    assert 0.2 < clipped.mean() < 0.8
    assert torch.equal(clipped == 1, gradient == 0)


def test_the_bins_of_ratios_by_hand():
    """In clip ranges, 0.1 below 1 and 0.4 above: -6, -2, -0.5, 0, 0.5, 2, 6. Bin 0 is below -5, then 2/9 each."""
    log_ratio = double([0.4, 0.8, 0.95, 1, 1.2, 1.8, 3.4]).log()
    bins = ratio_histogram(log_ratio, epsilon=0.1, epsilon_high=0.4)
    # (-2 + 5) * 4.5 = 13.5, (-0.5 + 5) * 4.5 = 20.25, 5 * 4.5 = 22.5, 24.75, 31.5: one bin further, for the tail
    assert bins.argmax(dim=1).tolist() == [0, 14, 21, 23, 25, 32, 46]
    assert bins.shape == (7, 47) and bins.sum(dim=1).tolist() == [1.0] * 7
    assert RATIO_BIN_EDGES[0] == -5 and RATIO_BIN_EDGES[-1] == 5 and {-1.0, 1.0} < set(RATIO_BIN_EDGES)
    assert ratio_histogram(torch.zeros(2), epsilon=0.0).argmax(dim=1).tolist() == [23, 23]


def test_what_lies_outside_in_the_histogram_is_what_the_statistics_count():
    log_ratio = 4e-6 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    statistics = ratio_statistics(log_ratio, torch.ones(500), epsilon=2e-6, epsilon_high=3e-6)
    counts = ratio_histogram(log_ratio, epsilon=2e-6, epsilon_high=3e-6).sum(dim=0)
    low, high = RATIO_BIN_EDGES.index(-1.0), RATIO_BIN_EDGES.index(1.0)
    assert counts[: low + 1].sum() == statistics["below"].sum() > 50
    assert counts[high + 1 :].sum() == statistics["above"].sum() > 50


# KL


def test_kl_by_hand():
    # differences 1 and 3: mean of squares 5; sigma_t 2: 5 / 8. Second sample: differences 0 and 2: 2 / (2 * 0.25)
    mean, reference = torch.tensor([[1.0, 3.0], [1.0, 2.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert gaussian_kl(mean, reference, torch.tensor([2.0, 0.5])).tolist() == [0.625, 4.0]
    assert gaussian_kl(mean, reference, 2.0).tolist() == [0.625, 0.25]


def test_kl_of_the_transition_is_the_gaussians_and_the_penalty_that_times_dt():
    # KL of two Gaussians of variance sigma_t^2 dt, as torch has it, averaged over the dimensions
    generator = torch.Generator().manual_seed(0)
    mean, reference = torch.randn(2, 3, 4, 5, 5, generator=generator, dtype=torch.float64)
    diffusion, dt = double([0.3, 0.7, 2.0]), double([0.1, 0.2, 0.05])
    std = (diffusion * dt.sqrt()).view(3, 1, 1, 1)
    normal = torch.distributions.Normal
    true = torch.distributions.kl_divergence(normal(mean, std), normal(reference, std)).flatten(1).mean(1)
    torch.testing.assert_close(transition_kl(mean, reference, std.flatten()), true)
    torch.testing.assert_close(gaussian_kl(mean, reference, diffusion), true * dt)


def test_kl_of_equal_means_is_exactly_zero():
    mean = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert gaussian_kl(mean, mean.clone(), 0.7).tolist() == [0.0, 0.0]


def test_kl_refusals():
    with pytest.raises(ValueError, match=r"(?s)\(4, 3\).*\(1, 3\)"):
        gaussian_kl(torch.zeros(4, 3), torch.zeros(1, 3), 0.7)
    with pytest.raises(ValueError, match=r"(?s)\(4, 1\).*\(4, 3\)"):
        gaussian_kl(torch.zeros(4, 3), torch.zeros(4, 3), torch.ones(4, 1))
    with pytest.raises(ValueError, match=r"(?s)\(4, 3\).*\(1, 3\)"):
        transition_kl(torch.zeros(4, 3), torch.zeros(1, 3), 0.7)
    with pytest.raises(ValueError, match="std is .* above 0"):
        transition_kl(torch.zeros(4, 3), torch.zeros(4, 3), 0.0)
