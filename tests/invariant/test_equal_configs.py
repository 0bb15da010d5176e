"""Configurations that mean the same train the same."""

import random

import numpy as np
import pytest
import torch
from tiny_training import assert_equal, brightness, distance, prompts, tiny_trainer, train, trained_weights
from transformers import TrainerCallback

from trl_flow import GuardConfig, SLASConfig, VGPOConfig


# Plain gradient descent where results are equal but for rounding: Adam divides each gradient by its own size, so that
# of one that is 0 but for rounding it makes a whole step. The learning rate moves weights by some 0.01.
SGD = {"optim": "sgd", "learning_rate": 10.0, "weight_decay": 0.0}
# Of the way that the weights have moved. A pixel that falls on the other side of 1/2 changes a reward by 5e-6, and
# that is 1e-3 of the rewards' spread.
ROUNDING = 5e-3


def assert_close(actual, expected, trainer_kwargs, tmp_path) -> None:
    """Equal up to rounding: the difference is a tiny share of the way from the initial weights."""
    start = trained_weights(tiny_trainer(tmp_path / "start", **trainer_kwargs))
    moved = distance(expected, start)
    assert moved > 1e-4, "the test trains on nothing"
    assert distance(actual, expected) < ROUNDING * moved


VARIANTS = {
    "flow-grpo": {},
    "kl": {"beta": 1.0},
    "guard": {"cls": GuardConfig, "epsilon": 1e-3, "scale_epsilon": False, "learning_rate": 10.0},
    "vgpo": {"cls": VGPOConfig},
    "slas in a window": {"cls": SLASConfig, "sde_window_size": 2},
    "iterations": {"num_iterations": 2, "epsilon": 1.0},
    "all weights": {"lora": None, "learning_rate": 0.01},
}


# ---- Batches ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_eight_batches_of_one_equal_one_batch_of_eight(variant, tmp_path):
    # To rounding: matrix products of other shapes add up in another order, in the rollout and in the update.
    kwargs = SGD | VARIANTS[variant]
    one = train(tmp_path / "one", per_device_train_batch_size=8, gradient_accumulation_steps=1, **kwargs)
    eight = train(tmp_path / "eight", per_device_train_batch_size=1, gradient_accumulation_steps=8, **kwargs)
    assert_close(eight, one, kwargs, tmp_path)


def test_the_same_configuration_trains_the_same(tmp_path):
    assert_equal(train(tmp_path / "a"), train(tmp_path / "b"))


def test_another_seed_trains_differently(tmp_path):
    assert distance(train(tmp_path / "a"), train(tmp_path / "b", seed=7)) > 1e-3


# ---- Gradients ----


@pytest.mark.parametrize("lora", ["default", None], ids=["lora", "all weights"])
def test_gradient_checkpointing_changes_nothing(lora, tmp_path):
    kwargs = {"lora": lora, "learning_rate": 1e-3}
    with_it = train(tmp_path / "with", gradient_checkpointing=True, **kwargs)
    assert_equal(with_it, train(tmp_path / "without", gradient_checkpointing=False, **kwargs))


class SavedBytes:
    """Counts the bytes that autograd keeps for backward passes: those at this moment, and the most at any."""

    def __init__(self):
        self.now = self.most = 0

    def pack(self, tensor):
        return Saved(self, tensor)

    @staticmethod
    def unpack(saved):
        return saved.tensor


class Saved:
    def __init__(self, counter, tensor):
        self.counter, self.tensor = counter, tensor
        counter.now += tensor.nbytes
        counter.most = max(counter.most, counter.now)

    def __del__(self):
        self.counter.now -= self.tensor.nbytes


def most_saved_bytes(tmp_path, **fields) -> int:
    trainer = tiny_trainer(tmp_path / "out", max_steps=1, **fields)
    counter = SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, counter.unpack):
        trainer.train()
    return counter.most


def test_memory_does_not_grow_with_the_number_of_steps(tmp_path):
    two = most_saved_bytes(tmp_path, num_inference_steps=2)
    eight = most_saved_bytes(tmp_path, num_inference_steps=8)
    assert two > 0
    assert eight <= 1.01 * two
    # and the count can tell: with the number of samples it does grow
    more = {"per_device_train_batch_size": 16, "num_inference_steps": 2}
    assert most_saved_bytes(tmp_path, **more) > 1.5 * two


def test_gradient_checkpointing_saves_memory(tmp_path):
    assert most_saved_bytes(tmp_path, gradient_checkpointing=True) < 0.6 * most_saved_bytes(tmp_path)


# ---- Evaluation in between ----


def random_brightness(prompts, images, **kwargs):
    """Draws from every global random state there is, as rewards with augmentations do."""
    noise = random.random() + float(np.random.rand()) + torch.rand(()).item()
    return [value + 1e-3 * noise * i for i, value in enumerate(brightness(prompts, images))]


@pytest.mark.parametrize("reward_func", [brightness, random_brightness])
def test_an_evaluation_in_between_changes_nothing(reward_func, tmp_path):
    kwargs = {"reward_funcs": reward_func, "max_steps": 3}
    without = train(tmp_path / "without", **kwargs)
    evaluated = train(
        tmp_path / "with", eval_dataset=prompts(3), eval_strategy="steps", eval_steps=1, eval_on_start=True, **kwargs
    )
    assert_equal(evaluated, without)


def test_evaluation_does_not_depend_on_when_or_in_which_batches_it_runs(tmp_path):
    trainer = tiny_trainer(tmp_path, eval_dataset=prompts(3))
    torch.manual_seed(5)
    first = trainer.evaluate()["eval_reward"]
    torch.manual_seed(6)
    trainer.args.per_device_eval_batch_size = 2
    assert trainer.evaluate()["eval_reward"] == pytest.approx(first, rel=1e-6)


class Draw(TrainerCallback):
    """Draws from the global random state between updates, as some other callback or user code may."""

    def on_step_end(self, args, state, control, **kwargs):
        torch.rand(3)
        np.random.rand()
        random.random()


def test_sampling_does_not_depend_on_the_global_random_state(tmp_path):
    assert_equal(train(tmp_path / "a", callbacks=[Draw()], max_steps=3), train(tmp_path / "b", max_steps=3))
