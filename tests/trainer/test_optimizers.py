"""Optimizers and schedules that look at more than gradients: what they evaluate, save and watch."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import assert_equal, brightness, darkness, distance, prompts, tiny_trainer, trained_weights
from transformers import TrainerCallback

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer


class ScheduleFreeSGD(torch.optim.Optimizer):
    """Defazio et al., 2024 (arXiv:2405.15682), without momentum's details: gradients are taken at
    `y = (1 - b) z + b x`, `z` descends, and `x`, the mean of all `z`, is what is evaluated."""

    def __init__(self, params, lr=1.0, b=0.5):
        super().__init__(params, {"lr": lr, "b": b, "k": 0, "train_mode": False})

    def _move(self, group, to_train: bool):
        if group["train_mode"] != to_train:
            group["train_mode"] = to_train
            for p in group["params"]:
                if "z" in self.state[p]:
                    z = self.state[p]["z"]
                    # y -> x: x = (y - (1 - b) z) / b
                    p.data.lerp_(z, 1 - group["b"] if to_train else 1 - 1 / group["b"])

    def train(self):
        for group in self.param_groups:
            self._move(group, True)

    def eval(self):
        for group in self.param_groups:
            self._move(group, False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"], "a step without train()"
            group["k"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                z = state.setdefault("z", p.detach().clone())
                x = p.lerp(z, 1 - 1 / group["b"])
                z -= group["lr"] * p.grad
                x.lerp_(z, 1 / group["k"])
                p.copy_(x.lerp(z, 1 - group["b"]))


def schedule_free(output_dir, **fields) -> FlowGRPOTrainer:
    trainer = tiny_trainer(output_dir, **fields)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.optimizer = ScheduleFreeSGD(parameters, lr=30.0)
    return trainer


def points(trainer) -> tuple[dict, dict]:
    """The weights of `y` and `x`, whatever the mode."""
    optimizer = trainer.optimizer.optimizer
    was = optimizer.param_groups[0]["train_mode"]
    optimizer.train()
    y = trained_weights(trainer)
    optimizer.eval()
    x = trained_weights(trainer)
    (optimizer.train if was else optimizer.eval)()
    return y, x


class Recording(TrainerCallback):
    """Of each update `y` and `x`, the weights while evaluating, and those afterwards."""

    def on_step_end(self, args, state, control, **kwargs):
        y, x = points(self.trainer)
        self.trainer.evaluate()
        self.seen.append((y, x, self.while_scoring, trained_weights(self.trainer)))

    def reward(self, prompts, images, **kwargs):
        self.while_scoring = trained_weights(self.trainer)
        return brightness(prompts, images)


def test_what_is_evaluated_and_saved_is_what_the_optimizer_recommends(tmp_path):
    recording = Recording()
    recording.seen = []
    fields = {"eval_dataset": prompts(1), "save_strategy": "steps", "save_steps": 2, "callbacks": [recording]}
    recording.trainer = trainer = schedule_free(tmp_path, reward_funcs=recording.reward, max_steps=2, **fields)
    trainer.train()
    y, x, while_evaluating, afterwards = recording.seen[1]
    assert distance(y, x) > 1e-3
    assert distance(while_evaluating, x) < 1e-5 and distance(afterwards, y) < 1e-5
    assert distance(trained_weights(trainer), x) < 1e-5  # the pipeline at hand draws with them, too
    expected = {name.replace(".default", ""): value for name, value in x.items()}
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert distance(load_file(folder / "adapter_model.safetensors"), expected) < 1e-5


def test_a_run_with_such_an_optimizer_is_resumed(tmp_path):
    """In the middle of a phase, whose ratios are of the weights that it was sampled with."""
    fields = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "steps_per_generation": 2}
    fields |= {"per_device_train_batch_size": 4, "num_inference_steps": 2}
    whole = schedule_free(tmp_path / "whole", **fields)
    whole.train()
    rest = schedule_free(tmp_path / "rest", **fields)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert_equal(trained_weights(rest), trained_weights(whole))


# ---- Schedules that watch a metric ----


@pytest.mark.parametrize(("scores", "rate"), [((0.1, 0.2, 0.3), 1e-3), ((0.3, 0.2, 0.1), 2.5e-4)])
def test_the_rate_falls_when_the_reward_does(scores, rate, tmp_path):
    left = iter(scores)

    def reward(prompts, images, **kwargs):
        return brightness(prompts, images) if trainer.model.training else [next(left)] * len(images)

    fields = {"lr_scheduler_kwargs": {"patience": 0, "factor": 0.5}, "learning_rate": 1e-3, "max_steps": 3}
    fields |= {"eval_strategy": "steps", "eval_steps": 1, "lr_scheduler_type": "reduce_lr_on_plateau"}
    fields |= {"num_inference_steps": 2, "eval_num_inference_steps": 1, "eval_dataset": prompts(1)}
    trainer = tiny_trainer(tmp_path, reward_funcs=reward, **fields)
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_a_metric_that_is_better_when_small(tmp_path):
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "use_cpu": True}
    fields = {"metric_for_best_model": "reward_std", "greater_is_better": False, **evaluating}
    config = FlowGRPOConfig(str(tmp_path), lr_scheduler_type="reduce_lr_on_plateau", **fields)
    assert config.lr_scheduler_kwargs == {"mode": "min"}
    fields = {"lr_scheduler_kwargs": '{"mode": "min", "factor": 0.5}', **evaluating}
    config = FlowGRPOConfig(str(tmp_path), lr_scheduler_type="greedy", **fields)
    assert config.lr_scheduler_kwargs == {"mode": "min", "factor": 0.5} and config.metric_for_best_model == "reward"


PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau"}
BEST = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize("watching", [PLATEAU, BEST, {"save_strategy": "best"}], ids=["plateau", "load", "save"])
def test_a_metric_that_there_will_not_be_is_refused(watching, tmp_path):
    fields = {"eval_dataset": prompts(2), "eval_strategy": "steps", "eval_steps": 1, **watching}
    for metric, near in (
        ("loss", "reward"),
        ("eval_rewards/britness/mean", "Did you mean 'rewards/brightness/mean'?"),
    ):
        with pytest.raises(ValueError) as raised:
            tiny_trainer(tmp_path / "out", metric_for_best_model=metric, **fields)
        message = str(raised.value)
        assert f"metric_for_best_model is {metric!r}" in message and near in message and "reward_std" in message
    with pytest.raises(ValueError, match="a_reward, .*b_reward"):
        sets = {"a": prompts(1), "b": prompts(1)}
        tiny_trainer(tmp_path / "out", **fields | {"eval_dataset": sets}, metric_for_best_model="reward_std")
    assert not (tmp_path / "out").exists()
    for metric in ("reward", "eval_reward", "rewards/brightness/std", "gold/average"):
        gold = {"eval_reward_funcs": lambda prompts, images, **kwargs: [1.0] * len(images)} if "gold" in metric else {}
        tiny_trainer(tmp_path / "fine", metric_for_best_model=metric, **fields, **gold)


def test_metrics_of_an_evaluation_are_those_that_can_be_watched(tmp_path):
    """The list in the message is complete."""
    fields = {"eval_dataset": prompts(1), "num_generations_eval": 2, "eval_reward_funcs": darkness}
    found = set(tiny_trainer(tmp_path, **fields).evaluate()) - {"epoch"}
    fields |= {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "?", **BEST}
    with pytest.raises(ValueError) as raised:
        tiny_trainer(tmp_path / "out", **fields)
    known = str(raised.value).partition("evaluations have ")[2].rstrip(".").split(", ")
    assert {f"eval_{name}" for name in known} == found - {"eval_rewards/brightness/frac_none"}  # nothing to watch
