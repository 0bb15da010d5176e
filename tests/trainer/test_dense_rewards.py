"""VGPO in the trainer: which pictures are scored, by what, and how values become advantages."""

import functools

import numpy as np
import pytest
import torch
from tiny_training import brightness, prompts, tiny_trainer, warnings_of

from trl_flow import VGPOConfig
from trl_flow.rewards.checks import RewardError


def sampled(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def dense(tmp_path, **fields):
    return tiny_trainer(tmp_path, **{"dense_rewards": True, "value_discount": 0.5, "value_scale": 0.2} | fields)


def advantages_by_hand(instant: np.ndarray, *, discount: float, scale: float) -> torch.Tensor:
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


class Table:
    """Gives the t-th call the t-th column of a table; a call for a part of the samples the next values of it."""

    def __init__(self, table: np.ndarray, order: list[int]):
        self.values = iter(np.concatenate([table[:, t] for t in order]).tolist())
        self.calls = []

    def __call__(self, prompts, images, **kwargs):
        self.calls.append([np.asarray(image) for image in images])
        return [next(self.values) for _ in images]


TABLE = np.random.default_rng(0).uniform(0.1, 2.0, size=(8, 3))
# The finished images are scored first
ORDER = [2, 0, 1]


def test_advantages_by_hand(tmp_path):
    batch = sampled(dense(tmp_path, reward_funcs=Table(TABLE, ORDER)))
    expected = advantages_by_hand(TABLE, discount=0.5, scale=0.2)
    torch.testing.assert_close(batch.advantages, expected, rtol=1e-4, atol=1e-4)


def test_no_more_pictures_are_held_than_the_samples_of_one_step(tmp_path):
    reward = Table(TABLE, ORDER)
    fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    batch = sampled(dense(tmp_path, reward_funcs=reward, **fields))
    # the finished images by groups as they come, then those of each step
    assert [len(images) for images in reward.calls] == [4, 4, 8, 8]
    # micro-batch 0 has the samples 0 and 4
    expected = advantages_by_hand(TABLE, discount=0.5, scale=0.2)[[0, 4]]
    torch.testing.assert_close(batch.advantages, expected, rtol=1e-4, atol=1e-4)


def test_what_is_scored_is_the_projection_of_the_result_of_each_step(tmp_path):
    reward = Table(TABLE, ORDER)
    trainer = dense(tmp_path, reward_funcs=reward, guidance_scale=1.0)
    batch = sampled(trainer)
    condition = trainer.prompt_cache(batch.prompts)
    schedule = trainer.dynamics.schedule
    for t in (0, 1):
        # after step t a sample is at the next step's sigma
        after = batch.next_latents[:, t]
        with torch.no_grad():
            velocity = trainer.backbone.velocity(trainer.model, after, schedule.timesteps[t + 1], condition)
        images = trainer._decode(after - schedule.sigmas[t + 1] * velocity)
        for image, scored in zip(images, reward.calls[t + 1], strict=True):
            assert np.abs(np.asarray(image, dtype=int) - scored).max() <= 1


# ---- Functions that can not judge an unfinished image ----


def finished_only(prompts, images, **kwargs):
    finished_only.calls += 1
    return TABLE[: len(images), 2].tolist()


finished_only.dense = False


class FinishedOnly:
    dense = False

    def __call__(self, prompts, images, **kwargs):
        return finished_only(prompts, images)


@pytest.mark.parametrize("reward", [finished_only, functools.partial(finished_only), FinishedOnly()])
def test_a_function_may_opt_out_and_counts_with_its_terminal_reward(reward, tmp_path):
    finished_only.calls = 0
    trainer = dense(tmp_path, reward_funcs=reward)
    batch = sampled(trainer)
    assert finished_only.calls == 1
    expected = advantages_by_hand(TABLE[:, [2, 2, 2]], discount=0.5, scale=0.2)
    torch.testing.assert_close(batch.advantages, expected, rtol=1e-4, atol=1e-4)


def test_dense_and_terminal_rewards_are_added_at_every_step(tmp_path):
    finished_only.calls = 0
    table = Table(TABLE, ORDER)
    trainer = dense(tmp_path, reward_funcs=[finished_only, table], reward_weights=[2.0, 1.0])
    batch = sampled(trainer)
    assert finished_only.calls == 1 and len(table.calls) == 3
    expected = advantages_by_hand(TABLE + 2 * TABLE[:, [2, 2, 2]], discount=0.5, scale=0.2)
    torch.testing.assert_close(batch.advantages, expected, rtol=1e-4, atol=1e-4)


def test_a_function_that_is_only_watched_scores_finished_images_only(tmp_path):
    watched = Table(TABLE, [2])
    sampled(dense(tmp_path, reward_funcs=[Table(TABLE, ORDER), watched], reward_weights=[1.0, 0.0]))
    assert len(watched.calls) == 1


def test_a_terminal_reward_that_applies_is_enough_where_the_dense_one_does_not(tmp_path):
    finished_only.calls = 0

    def seldom(prompts, images, **kwargs):
        return [None] * len(images)

    trainer = dense(tmp_path, reward_funcs=[finished_only, seldom])
    with warnings_of("trl_flow") as warnings:
        batch = sampled(trainer)
    assert warnings == []
    expected = advantages_by_hand(TABLE[:, [2, 2, 2]], discount=0.5, scale=0.2)
    torch.testing.assert_close(batch.advantages, expected, rtol=1e-4, atol=1e-4)


def test_an_opt_out_that_is_no_truth_value_is_refused_before_training(tmp_path):
    def reward(prompts, images, **kwargs):
        return brightness(prompts, images)

    reward.dense = "no"
    with pytest.raises(TypeError, match="`dense` of the reward function 'reward' is 'no'"):
        tiny_trainer(tmp_path, reward_funcs=reward)


# ---- Rewards of one sign ----


def shifted(prompts, images, **kwargs):
    return [value - 0.5 for value in brightness(prompts, images)]


def test_the_function_with_negative_rewards_is_named_with_the_remedy(tmp_path):
    def minus_three(prompts, images, **kwargs):
        return [-3.0] * len(images)

    trainer = dense(tmp_path, reward_funcs=[brightness, minus_three])
    with pytest.raises(RewardError) as error:
        sampled(trainer)
    message = str(error.value)
    assert "'minus_three' gave -3 " in message and "brightness" not in message
    assert "offset" in message and "value + 5" in message and "dense_rewards=False" in message


def test_a_negative_weight_is_found_out_as_well(tmp_path):
    trainer = dense(tmp_path, reward_funcs=brightness, reward_weights=[-1.0])
    with pytest.raises(RewardError, match="'brightness' gave -0.*negative, as its weight is.*value - 5"):
        sampled(trainer)


def test_one_negative_part_of_a_positive_sum_is_allowed(tmp_path):
    def plenty(prompts, images, **kwargs):
        return [2.0] * len(images)

    batch = sampled(dense(tmp_path, reward_funcs=[shifted, plenty]))
    assert batch.advantages.isfinite().all()


def test_without_dense_rewards_negative_ones_are_fine(tmp_path):
    assert sampled(tiny_trainer(tmp_path, reward_funcs=shifted)).advantages.isfinite().all()


# ---- When diversity is gone ----


def test_equal_images_leave_the_absolute_value_as_signal(tmp_path):
    # All of a group alike: the relative part vanishes, and what is left is omega k Q (the paper's Appendix B)
    table = np.repeat(TABLE[:2], 4, axis=0)
    batch = sampled(dense(tmp_path, reward_funcs=Table(table, ORDER)))
    values = np.stack(
        [table[:, 0] + 0.5 * table[:, 1] + 0.25 * table[:, 2], table[:, 1] + 0.5 * table[:, 2], table[:, 2]], 1
    )
    expected = torch.tensor(values / values.mean(1, keepdims=True) * 0.2 * values, dtype=torch.float32)
    torch.testing.assert_close(batch.advantages, expected, rtol=1e-3, atol=1e-4)
    assert (batch.advantages > 0).all()
    # while the group's own advantages give nothing to learn from
    assert (sampled(tiny_trainer(tmp_path, reward_funcs=Table(table, [2]))).advantages.abs() < 1e-3).all()


def test_the_share_of_the_absolute_value_is_logged(tmp_path):
    trainer = dense(tmp_path, reward_funcs=Table(TABLE, ORDER))
    sampled(trainer)
    both = advantages_by_hand(TABLE, discount=0.5, scale=0.2)
    relative = advantages_by_hand(TABLE, discount=0.5, scale=0.0)
    absolute = (both - relative).abs().sum()
    logged = trainer._metrics["train"]
    assert logged["advantage/value_share"] == [
        pytest.approx((absolute / (absolute + relative.abs().sum())).item(), rel=1e-3)
    ]
    for t in range(3):
        assert logged[f"instant_reward/mean_step_{t}"] == [pytest.approx(TABLE[:, t].mean(), rel=1e-5)]
        assert logged[f"instant_reward/std_step_{t}"] == [pytest.approx(TABLE[:, t].std(ddof=1), rel=1e-5)]


def test_the_preset_trains_with_one_that_opted_out(tmp_path):
    finished_only.calls = 0
    trainer = tiny_trainer(
        tmp_path, cls=VGPOConfig, reward_funcs=[brightness, finished_only], train_dataset=prompts(4), max_steps=1
    )
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0
