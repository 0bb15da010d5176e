"""VGPO in the trainer: which images are scored, and by what."""

import functools

import numpy as np
import pytest
import torch
from tiny_training import brightness, prompts, tiny_trainer, warnings_of

from trl_flow import VGPOConfig
from trl_flow.functional import cumulative_values, dual_advantages
from trl_flow.rewards.checks import RewardError
from trl_flow.rollout import decode


def sampled(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def dense(tmp_path, **fields):
    # three steps, all of them trained
    fields = {"num_inference_steps": 3, "train_last_step": True} | fields
    return tiny_trainer(tmp_path, **{"dense_rewards": True, "value_discount": 0.5, "value_scale": 0.2} | fields)


def advantages_of(instant: np.ndarray) -> torch.Tensor:
    """Of rewards `(N, T)` in groups of four; `tests/algorithms/test_advantages.py` has them by hand."""
    return dual_advantages(cumulative_values(torch.tensor(instant, dtype=torch.float32), 0.5), 4, scale=0.2)


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


def test_the_scores_of_the_steps_become_advantages(tmp_path):
    batch = sampled(dense(tmp_path, reward_funcs=Table(TABLE, ORDER)))
    expected = advantages_of(TABLE)
    torch.testing.assert_close(batch.advantages, expected, rtol=1e-4, atol=1e-4)


def test_no_more_images_are_held_than_the_samples_of_one_step(tmp_path):
    reward = Table(TABLE, ORDER)
    fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    batch = sampled(dense(tmp_path, reward_funcs=reward, **fields))
    # the finished images by groups as they come, then those of each step
    assert [len(images) for images in reward.calls] == [4, 4, 8, 8]
    # micro-batch 0 has the samples 0 and 4
    expected = advantages_of(TABLE)[[0, 4]]
    torch.testing.assert_close(batch.advantages, expected, rtol=1e-4, atol=1e-4)


def test_what_is_scored_is_the_projection_of_the_result_of_each_step(tmp_path):
    reward = Table(TABLE, ORDER)
    trainer = dense(tmp_path, reward_funcs=reward, guidance_scale=1.0)
    batch = sampled(trainer)
    condition = trainer.policy.condition(batch.prompts)
    schedule = trainer.algorithm.dynamics.schedule
    for t in (0, 1):
        # after step t a sample is at the next step's sigma
        after = batch.tensors["next_latents"][:, t]
        with torch.no_grad():
            velocity = trainer.policy.predict(after, schedule.timesteps[t + 1], condition)
        images = decode(trainer.backbone, after - schedule.sigmas[t + 1] * velocity)
        for image, scored in zip(images, reward.calls[t + 1], strict=True):
            assert np.abs(np.asarray(image, dtype=int) - scored).max() <= 1


# ---- Functions that cannot judge an unfinished image ----


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
    expected = advantages_of(TABLE[:, [2, 2, 2]])
    torch.testing.assert_close(batch.advantages, expected, rtol=1e-4, atol=1e-4)


def test_dense_and_terminal_rewards_are_added_at_every_step(tmp_path):
    finished_only.calls = 0
    table = Table(TABLE, ORDER)
    trainer = dense(tmp_path, reward_funcs=[finished_only, table], reward_weights=[2.0, 1.0])
    batch = sampled(trainer)
    assert finished_only.calls == 1 and len(table.calls) == 3
    expected = advantages_of(TABLE + 2 * TABLE[:, [2, 2, 2]])
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
    assert len(warnings) == 1 and "None was returned for all 8 images" in warnings[0] and "seldom" in warnings[0]
    expected = advantages_of(TABLE[:, [2, 2, 2]])
    torch.testing.assert_close(batch.advantages, expected, rtol=1e-4, atol=1e-4)


def test_an_opt_out_that_is_no_truth_value_is_refused_before_training(tmp_path):
    def reward(prompts, images, **kwargs):
        return brightness(prompts, images)

    reward.dense = "no"
    with pytest.raises(TypeError, match="`dense` of the reward function 'reward' is 'no'"):
        tiny_trainer(tmp_path, reward_funcs=reward)


def test_a_negative_reward_of_an_unfinished_image_ends_training(tmp_path):
    with pytest.raises(RewardError, match="'<lambda>' gave -2 .*Add an offset"):
        sampled(dense(tmp_path, reward_funcs=lambda prompts, images, **_: [-2.0] * len(images)))


def test_the_rewards_of_each_step_are_logged(tmp_path):
    trainer = dense(tmp_path, reward_funcs=Table(TABLE, ORDER))
    sampled(trainer)
    logged = trainer.metrics.flush(trainer.algorithm)
    assert 0 < logged["advantage/value_share"] < 1
    for t in range(3):
        assert logged[f"instant_reward/mean_step_{t}"] == pytest.approx(TABLE[:, t].mean(), rel=1e-5)
        assert logged[f"instant_reward/std_step_{t}"] == pytest.approx(TABLE[:, t].std(ddof=1), rel=1e-5)


def test_the_preset_trains_with_one_that_opted_out(tmp_path):
    finished_only.calls = 0
    trainer = tiny_trainer(
        tmp_path, cls=VGPOConfig, reward_funcs=[brightness, finished_only], train_dataset=prompts(4), max_steps=1
    )
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0
