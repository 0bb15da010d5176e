"""Advantages from one and several rewards, as sums and as values per step; and the power that adapts itself."""

import math

import numpy as np
import pytest
import torch
from tiny_training import tiny_config, tiny_lora, tiny_stages

from trl_flow import FlowGRPOConfig, GuardConfig, SLASConfig, VGPOConfig
from trl_flow.algorithms import PhaseScores, StepPlan
from trl_flow.algorithms.advantages import AdaptivePower, AdvantageEstimator
from trl_flow.functional import normalize_then_sum, super_linear
from trl_flow.rewards.checks import RewardError


NAN = math.nan


def estimated(
    tmp_path, rewards: torch.Tensor, *, weights=None, instant=None, names=None, cls=FlowGRPOConfig, **fields
):
    """The advantages and metrics of `(N, K)` rewards, in groups of four."""
    weights = torch.tensor([1.0] * rewards.shape[1] if weights is None else weights)
    names = [f"reward {k}" for k in range(rewards.shape[1])] if names is None else names
    plan = StepPlan((0, 1, 2), (0, 1, 2), project=instant is not None)
    estimator = AdvantageEstimator(tiny_config(tmp_path, cls=cls, **fields), weights)
    return estimator(PhaseScores(rewards, names, plan, instant))


# ---- Several rewards ----

# Of two groups of four
FIRST = [1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 5.0, 5.0]
SECOND = [30.0, NAN, 10.0, 0.0, 7.0, 7.0, NAN, 7.0]
WATCHED = [0.0, 100.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0]
SEVERAL, WEIGHTS = torch.tensor([FIRST, SECOND, WATCHED]).T, [1.0, 0.5, 0.0]
EACH = {"multi_objective_aggregation": "normalize_then_sum", "weights": WEIGHTS}


def expected() -> torch.Tensor:
    return normalize_then_sum(SEVERAL[:, :2], torch.tensor([1.0, 0.5]), 4)


@pytest.mark.parametrize("scale_rewards", ["batch", "group", "none"])
def test_each_reward_is_normalized_by_itself(scale_rewards, tmp_path):
    advantages, _ = estimated(tmp_path, SEVERAL, scale_rewards=scale_rewards, **EACH)
    torch.testing.assert_close(advantages, expected())
    assert (advantages[4:] == 0).all()  # nothing that counts differs there


def test_by_default_the_weighted_sum_is(tmp_path):
    advantages, _ = estimated(tmp_path, SEVERAL, weights=WEIGHTS, scale_rewards="none", advantage_clip=100.0)
    total = torch.tensor([1 + 15.0, 2.0, 3 + 5.0, 4.0])
    torch.testing.assert_close(advantages[:4], total - total.mean())
    assert advantages[6] < -1  # 5 beside 8.5: not applicable counts as 0 there


def test_guard_and_slas_shape_what_comes_out(tmp_path):
    of_guard, _ = estimated(tmp_path, SEVERAL, cls=GuardConfig, **EACH)
    torch.testing.assert_close(of_guard, expected())
    of_slas, _ = estimated(tmp_path, SEVERAL, cls=SLASConfig, advantage_clip=1.0, **EACH)
    # clamped before it is shaped
    torch.testing.assert_close(of_slas, super_linear(expected().clamp(-1, 1), 0.25))


@pytest.mark.parametrize(
    ("rewards", "power", "share"),
    [
        ([0, 1, 0, 1, 1, 0, 1, 0], 0.0, 1.0),  # all advantages alike
        ([0, 0, 0, 0, 1, 0, 1, 0], 0.0, 0.5),  # a group without any
        # 3 and three times -1, but for the scale s: (2 (3 + 3))^2 / (8 * 2 (9 + 3)), and with squares
        # (2 (9 + 3))^2 / (8 * 2 (81 + 3))
        ([0, 0, 0, 1, 1, 0, 0, 0], 0.0, 0.75),
        ([0, 0, 0, 1, 1, 0, 0, 0], 1.0, 3 / 7),
        ([0] * 8, 0.5, 0.0),
    ],
)
def test_the_effective_share_of_the_samples(rewards, power, share, tmp_path):
    _, stats = estimated(tmp_path, torch.tensor(rewards, dtype=torch.float32)[:, None], advantage_power=power)
    assert stats["advantage/effective_share"] == pytest.approx(share, rel=1e-5)


# ---- Values per step ----

TABLE = np.random.default_rng(0).uniform(0.1, 2.0, size=(8, 3))
VALUES = {"dense_rewards": True, "value_discount": 0.5, "value_scale": 0.2}


def values_by_hand(instant: np.ndarray, *, discount: float, scale: float) -> torch.Tensor:
    """Eq. 11, 12 and 14 in loops, for groups of four."""
    number, steps = instant.shape
    values = np.zeros_like(instant)
    for i in range(number):
        for t in range(steps):
            values[i, t] = sum(discount ** (u - t) * instant[i, u] for u in range(t, steps))
    advantages = np.zeros_like(instant)
    for i in range(number):
        group = values[i // 4 * 4 : i // 4 * 4 + 4]
        for t in range(steps):
            weight = values[i, t] / values[i].mean()
            relative = (values[i, t] - group[:, t].mean()) / (group[:, t].std(ddof=1) + 1e-4)
            advantages[i, t] = weight * (relative + scale * values[i, t])
    return torch.tensor(advantages, dtype=torch.float32)


def dense(tmp_path, *tables: np.ndarray, weights=None, names=None, **fields):
    """The advantages of `(N, T)` rewards per step, one table for each reward function."""
    instant = torch.tensor(np.stack(tables, axis=-1), dtype=torch.float32)
    return estimated(tmp_path, instant[:, -1], weights=weights, instant=instant, names=names, **VALUES | fields)


def test_values_by_hand(tmp_path):
    advantages, stats = dense(tmp_path, TABLE)
    both = values_by_hand(TABLE, discount=0.5, scale=0.2)
    torch.testing.assert_close(advantages, both, rtol=1e-4, atol=1e-4)
    relative = values_by_hand(TABLE, discount=0.5, scale=0.0)
    absolute = (both - relative).abs().sum()
    share = (absolute / (absolute + relative.abs().sum())).item()
    assert stats["advantage/value_share"] == pytest.approx(share, rel=1e-3)


def test_rewards_are_added_with_their_weights_before_they_become_values(tmp_path):
    advantages, _ = dense(tmp_path, TABLE, TABLE[::-1], weights=[1.0, 2.0])
    total = values_by_hand(TABLE + 2 * TABLE[::-1], discount=0.5, scale=0.2)
    torch.testing.assert_close(advantages, total, rtol=1e-4, atol=1e-4)


def test_equal_images_leave_the_absolute_value_as_signal(tmp_path):
    # All of a group alike: the relative part vanishes, and what is left is omega k Q (the paper's Appendix B)
    table = np.repeat(TABLE[:2], 4, axis=0)
    advantages, _ = dense(tmp_path, table)
    values = np.stack(
        [table[:, 0] + 0.5 * table[:, 1] + 0.25 * table[:, 2], table[:, 1] + 0.5 * table[:, 2], table[:, 2]], 1
    )
    left = torch.tensor(values / values.mean(1, keepdims=True) * 0.2 * values, dtype=torch.float32)
    torch.testing.assert_close(advantages, left, rtol=1e-3, atol=1e-4)
    assert (advantages > 0).all()
    # while the group's own advantages give nothing to learn from
    terminal, _ = estimated(tmp_path, torch.tensor(table[:, 2:], dtype=torch.float32))
    assert (terminal.abs() < 1e-3).all()


def test_the_function_with_negative_rewards_is_named_with_the_remedy(tmp_path):
    with pytest.raises(RewardError) as error:
        dense(tmp_path, TABLE, np.full((8, 3), -3.0), names=["brightness", "minus_three"])
    message = str(error.value)
    assert "'minus_three' gave -3 " in message and "brightness" not in message
    assert "offset" in message and "value + 5" in message and "dense_rewards=False" in message


def test_a_negative_weight_is_found_out_as_well(tmp_path):
    with pytest.raises(RewardError, match=r"'reward 0' gave -2 .*negative, as its weight is.*value - 5"):
        dense(tmp_path, np.full((8, 3), 2.0), weights=[-1.0])


def test_one_negative_part_of_a_positive_sum_is_allowed(tmp_path):
    assert dense(tmp_path, TABLE - 2.0, np.full((8, 3), 2.0))[0].isfinite().all()


def test_without_dense_rewards_negative_ones_are_fine(tmp_path):
    assert estimated(tmp_path, torch.tensor(TABLE[:, :1] - 5, dtype=torch.float32))[0].abs().max() > 0.1


# ---- The power that adapts itself ----

TWO_UPDATES = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "advantage_power": "auto"}
REWARDS = [0.1, 0.5, 0.2, 0.9, 0.4, 0.3, 0.8, 0.7]


@pytest.mark.parametrize("sde_type", ["flow", "cps"])
def test_the_kl_that_counts_is_that_of_a_phases_second_update(sde_type, tmp_path):
    """Before the first there is none, and what the third and fourth are of is the path of several updates."""
    fields = TWO_UPDATES | {"num_iterations": 2, "sde_type": sde_type, "lora": tiny_lora(init_lora_weights=False)}
    stages = tiny_stages(tmp_path, **fields)
    power = stages.algorithm.estimator.power
    batches = stages.micro_batches(REWARDS)
    stages.losses(batches[0])
    stages.descend(batches[0], learning_rate=10.0)
    outputs = stages.losses(batches[1])
    # by hand, of the Gaussians
    kls, dynamics = [], stages.algorithm.dynamics
    condition = stages.policy.condition(batches[1].prompts)
    for index, step in enumerate(outputs):
        latents, old = (batches[1].tensors[name][:, index] for name in ("latents", "means"))
        with torch.no_grad():
            prediction = stages.policy.predict(latents, dynamics.schedule.timesteps[step], condition)
        mean, std = dynamics.transition(prediction, latents, step)
        std = std.double().view(-1, 1, 1, 1)
        normal = torch.distributions.Normal
        kl = torch.distributions.kl_divergence(normal(old.double(), std), normal(mean.double(), std))
        kls.append(kl.mean().item())
    assert len(kls) == 3 and min(kls) > 1e-9
    stages.policy.updates_since_sampling = 2
    for batch in batches:
        stages.losses(batch)
    assert power.choose() == 0
    assert power.target_kl == pytest.approx(sum(kls) / len(kls), rel=1e-3)


def observing(power: AdaptivePower, *kls: float, num_updates: int = 1) -> float:
    power.observe(torch.tensor(kls), num_updates)
    return power.choose()


def test_the_power_rises_below_the_target_and_falls_above_it():
    power = AdaptivePower(1e-4)
    assert power.choose() == 0  # nothing is known yet
    assert observing(power, 5e-5) == pytest.approx(0.1 * math.log(2))
    assert observing(power, 1e-9) == pytest.approx(0.1 * math.log(2) + 0.1)  # a factor of e counts at most
    assert observing(power, 5e-5, 1.5e-4) == pytest.approx(0.1 * math.log(2) + 0.1)  # the mean is the target
    assert observing(power, 2e-4) == pytest.approx(0.1)
    assert observing(power, 1.0) == pytest.approx(0, abs=1e-6)
    assert observing(power, 1.0) == 0
    for _ in range(25):
        highest = observing(power, 1e-9)
    assert highest == AdaptivePower.MAX_POWER == 2
    # a phase of one update, or one that was resumed at its end, changes nothing
    assert observing(power, 1.0, num_updates=0) == 2
    assert power.target_kl == 1e-4


def test_without_a_target_the_first_kl_is_held():
    power = AdaptivePower(None)
    # a phase of equal rewards moves nothing, and says nothing
    assert observing(power, 0.0, 0.0) == 0
    assert power.target_kl is None
    assert observing(power, 2e-5, 4e-5) == 0
    assert power.target_kl == pytest.approx(3e-5)
    assert observing(power, 1.5e-5) == pytest.approx(0.1 * math.log(2))
    assert observing(power, 3e-5) == pytest.approx(0.1 * math.log(2))
    assert power.target_kl == pytest.approx(3e-5)


def test_the_power_goes_on_from_its_state():
    power = AdaptivePower(None)
    observing(power, 4e-5)
    observing(power, 1e-5)
    power.observe(torch.tensor([2e-5]), 1)
    power.gather()  # after an update in the middle of a phase
    state = power.state_dict()
    resumed = AdaptivePower(None)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert resumed.choose() == power.choose() > 0
    # and training anew begins at 0, with the target that was given
    for target in (None, 1e-3):
        power = AdaptivePower(target)
        power.load_state_dict(state)
        power.load_state_dict({})
        assert power.state_dict() == AdaptivePower(target).state_dict()
        assert (power.power, power.target_kl) == (0.0, target)


def test_the_power_of_a_phase_shapes_its_advantages(tmp_path):
    fields = {"advantage_power": "auto", "target_kl": 1e-4}
    estimator = AdvantageEstimator(tiny_config(tmp_path, **fields), torch.ones(1))
    scores = PhaseScores(torch.tensor(REWARDS)[:, None], ["reward"], StepPlan((0,), (0,)))
    linear, stats = estimator(scores)
    assert stats["advantage_power"] == 0
    estimator.power.observe(torch.tensor([1e-5]), 1)
    shaped, stats = estimator(scores)
    assert stats["advantage_power"] == pytest.approx(0.1)
    torch.testing.assert_close(shaped, super_linear(linear, 0.1))


def test_a_measured_kl_changes_no_loss(tmp_path):
    fields = TWO_UPDATES | {"lora": tiny_lora(init_lora_weights=False)}
    losses = []
    for power in ("auto", 0.0):
        stages = tiny_stages(tmp_path, **fields | {"advantage_power": power})
        batches = stages.micro_batches(REWARDS)
        stages.descend(batches[0], learning_rate=1.0)
        losses.append(torch.stack([output.loss for output in stages.losses(batches[1]).values()]))
    torch.testing.assert_close(*losses)


def test_vgpos_weights_are_shares_of_all_steps_where_a_window_is_trained_too(tmp_path):
    # Rewards of 1 at every step and a discount of 0.9: Q = 4.69, 4.10, 3.44, 2.71, 1.90, 1.00 of six steps, mean 2.97;
    # a window from the fourth step on keeps the last three shares
    fields = {"num_inference_steps": 6, "value_scale": 1.0, "train_last_step": True}
    stages = tiny_stages(tmp_path, cls=VGPOConfig, sde_window_size=3, sde_window_range=[3, 6], **fields)
    assert stages.algorithm.plan(0).project
    (batch,) = stages.micro_batches([1.0] * 8, instant=torch.ones(8, 6))
    assert batch.steps == (3, 4, 5)
    values, weights = torch.tensor([2.71, 1.9, 1.0]), torch.tensor([0.912, 0.639, 0.337])
    torch.testing.assert_close(batch.advantages, (weights * values).expand(8, 3), rtol=1e-3, atol=1e-3)


def test_vgpos_scale_may_differ_between_steps(tmp_path):
    both = dense(tmp_path, TABLE, value_scale=[0.2, 0.0, 0.2], num_inference_steps=3)[0]
    with_scale = dense(tmp_path, TABLE, value_scale=0.2)[0]
    without = dense(tmp_path, TABLE, value_scale=0.0)[0]
    torch.testing.assert_close(both[:, [0, 2]], with_scale[:, [0, 2]])
    torch.testing.assert_close(both[:, 1], without[:, 1])


def test_a_sample_that_no_reward_applies_to_has_no_advantage(tmp_path):
    table = TABLE.copy()
    table[2] = math.nan
    advantages, stats = dense(tmp_path, table, value_scale=0.3)
    assert advantages[2].tolist() == [0.0] * 3
    assert advantages.isfinite().all() and (advantages[[0, 1, 3]] != 0).all()
    assert 0 < stats["advantage/value_share"] < 1
