"""`num_generations_trained`: a phase's images of which some are trained on."""

import numpy as np
import pytest
import torch
from tiny_training import assert_equal, brightness, prompts, tiny_config, tiny_trainer, trained_weights

from trl_flow import AWMConfig, DiffusionNFTConfig, FlowGRPOConfig, GuardConfig, VGPOConfig
from trl_flow.functional import group_advantages


def phase(tmp_path, **fields):
    """The micro-batches of a first phase of two groups of four images, and their rewards."""
    scored = []

    def reward(prompts, images, **kwargs):
        scored.extend(brightness(prompts, images))
        return scored[-len(images) :]

    trainer = tiny_trainer(tmp_path, reward_funcs=reward, **fields)
    rows = [{"prompt": prompt} for prompt in ("a cat", "two dogs") for _ in range(4)]
    return trainer._generate_and_score(rows), torch.tensor(scored)


@pytest.mark.parametrize("steps_per_generation", [1, 2])
def test_the_extremes_of_each_group_are_trained_on_with_advantages_among_them(tmp_path, steps_per_generation):
    batch = {"per_device_train_batch_size": 8 // steps_per_generation, "steps_per_generation": steps_per_generation}
    whole, rewards = phase(tmp_path, **batch)
    chosen, _ = phase(tmp_path, num_generations_trained=2, **batch)
    order = [rewards[first : first + 4].argsort() + first for first in (0, 4)]
    kept = sorted(int(own[i]) for own in order for i in (0, -1))
    expected = dict(zip(kept, group_advantages(rewards[kept], 2, scale_rewards="batch"), strict=True))

    assert [len(each.samples) for each in chosen] == [4 // steps_per_generation] * steps_per_generation
    assert sorted(i for each in chosen for i in each.samples) == kept
    of_whole = {sample: (each, k) for each in whole for k, sample in enumerate(each.samples)}
    for each in chosen:
        for k, sample in enumerate(each.samples):
            torch.testing.assert_close(each.advantages[k], expected[sample].expand(3))
            other, place = of_whole[sample]
            assert each.prompts[k] == other.prompts[place]
            for name, tensor in each.tensors.items():
                assert torch.equal(tensor[k], other.tensors[name][place]), name


@pytest.mark.parametrize("cls", [GuardConfig, VGPOConfig, DiffusionNFTConfig, AWMConfig])
def test_every_method_trains_on_some_and_measures_all(cls, tmp_path):
    trainer = tiny_trainer(tmp_path, cls=cls, num_generations_trained=2, max_steps=2)
    before = trained_weights(trainer)
    trainer.train()
    assert any((before[name] != weight).any() for name, weight in trained_weights(trainer).items())
    measured = tiny_trainer(tmp_path / "all", cls=cls, max_steps=2)
    measured.train()
    first, of_all = trainer.state.log_history[0], measured.state.log_history[0]
    assert first["reward"] == of_all["reward"] and first["reward_std"] == of_all["reward_std"]


def test_all_of_them_is_the_same_as_none_said(tmp_path):
    runs = [tiny_trainer(tmp_path / str(number), num_generations_trained=number) for number in (None, 4)]
    for run in runs:
        run.train()
    assert_equal(*map(trained_weights, runs))


def test_several_rewards_are_compared_as_they_are_added(tmp_path):
    def large(prompts, images, **kwargs):  # differs in one image of four by what the other never reaches
        return [1000.0 if np.asarray(image).sum() == 0 else 0.0 for image in images]

    fields = {"num_generations_trained": 2, "multi_objective_aggregation": "normalize_then_sum"}
    both = tiny_trainer(tmp_path, reward_funcs=[brightness, large], train_dataset=prompts(), **fields)
    both.train()
    assert both.state.log_history[0]["frac_reward_zero_std"] == 0


def test_the_middle_of_a_phase_is_resumed(tmp_path):
    fields = {"num_generations_trained": 2, "steps_per_generation": 2, "per_device_train_batch_size": 4}
    fields |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = tiny_trainer(tmp_path / "whole", **fields)
    whole.train()
    resumed = tiny_trainer(tmp_path / "resumed", **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert_equal(trained_weights(whole), trained_weights(resumed))


@pytest.mark.parametrize(("fields", "parts"), [
    ({"num_generations_trained": 1}, ["num_generations_trained is 1", "from 2 to num_generations (4)"]),
    ({"num_generations_trained": 5}, ["num_generations_trained is 5", "from 2 to num_generations (4)"]),
    ({"num_generations_trained": 3, "per_device_train_batch_size": 2, "steps_per_generation": 2},
     ["3/4 of per_device_train_batch_size (2)", "a multiple of 4"]),
])  # fmt: skip
def test_what_is_refused(fields, parts, tmp_path):
    with pytest.raises(ValueError) as raised:
        tiny_config(tmp_path, FlowGRPOConfig, **fields)
    assert all(part in str(raised.value) for part in parts), raised.value


def test_a_micro_batch_is_smaller_by_what_is_left_out(tmp_path):
    assert tiny_config(tmp_path, num_generations_trained=2).trained_batch_size == 4
    assert tiny_config(tmp_path).trained_batch_size == 8
