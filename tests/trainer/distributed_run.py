"""`torchrun --nproc_per_node 2 distributed_run.py FOLDER`: what two processes make of `SCENARIOS`, for comparison.

The same program with one process has the same global batch. Each process writes `FOLDER/{name}-{rank}.json`, and what
happened in it beside training `FOLDER/report-{rank}.json`.
"""

import json
import os
import re
import sys
import threading
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))  # tiny_training
sys.path.insert(0, str(Path(__file__).parents[2]))  # trl_flow, where it is not installed

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_loras import saved_adapter
from tiny_training import assert_equal, brightness, darkness, prompts, tiny_trainer, trained_weights
from tiny_wan import tiny_wan_experts_pipeline
from torch.nn.parallel import DistributedDataParallel

from trl_flow import AWMConfig, DiffusionNFTConfig, OverOptimizationCallback
from trl_flow.rewards import WinRateReward
from trl_flow.rewards.checks import RewardError


RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def redness(prompts, images, **kwargs):
    """Ten times the mean of the red channel, for all prompts but one."""
    means = (np.asarray(image)[..., 0].mean() / 255 for image in images)
    return [None if prompt == "two dogs" else 10 * mean for mean, prompt in zip(means, prompts, strict=True)]


def read_by(batch):
    """A transform that says which process has read a row, as one with a generator of its own would differ."""
    return {"prompt": [f"{prompt} {RANK}" for prompt in batch["prompt"]]}


def brighter(prompt, image_a, image_b):
    a, b = brightness([prompt] * 2, [image_a, image_b])
    return "tie" if a == b else "a" if a > b else "b"


# Plain gradient descent: Adam makes a whole step of a gradient that is 0 but for rounding
SGD = {"optim": "sgd", "learning_rate": 10.0, "weight_decay": 0.0}
SCENARIOS = {
    "flow": {},
    "accumulation": {"batch": 4, "gradient_accumulation_steps": 2},
    "shared noise in a window": {"share_initial_noise": True, "sde_window_size": 1},
    "dense and kl": {"dense_rewards": True, "value_scale": 0.1, "beta": 0.1},
    "guard, slas and vgpo with kl in a window, groups of 8": {
        "importance_ratio": "ratio_norm",
        "timestep_weighting": "inverse_dt",
        "advantage_power": 0.5,
        "dense_rewards": True,
        "value_scale": 0.1,
        "beta": 0.1,
        "sde_window_size": 1,
        "sde_window_schedule": "progressive",
        "sde_window_interval": 1,
        "share_initial_noise": True,
        "num_generations": 8,
    },
    # groups of 8: each prompt's group is split over the processes
    "large groups and second epoch": {"num_generations": 8, "max_steps": 5, "data_seed": 1},
    "several rewards": {"reward_funcs": [redness], "multi_objective_aggregation": "normalize_then_sum"},
    "adapted power": {"advantage_power": "auto", "target_kl": 1e-3, "max_steps": 3},
    "a probed ratio": {"importance_ratio": "ratio_norm", "ratio_probe": 8, "num_iterations": 2, "max_steps": 4},
    "steps of each sample's own": {"timestep_fraction": 0.7, "timestep_fraction_per_sample": True},
    "the largest and smallest rewards alone": {"num_generations_trained": 2},
    "nft": {"cls": DiffusionNFTConfig, "old_decay_rate": 0.3, "max_steps": 3, "num_generations": 8},
    "awm": {"cls": AWMConfig, "timestep_sampling": "logit_normal", "num_iterations": 2, "max_steps": 4},
    "all weights": {"lora": None, "learning_rate": 0.01},
    "on from an adapter, with kl to it": {"lora": None, "init_adapter": "adapter", "beta": 0.1},
    # each prompt's three images are split over the processes
    "gold": {"eval_reward_funcs": [darkness], "num_generations_eval": 3},
    "a transform, groups of 8": {"train_dataset": prompts().with_transform(read_by), "num_generations": 8},
    "videos, of the second of two experts": {
        "pipeline": tiny_wan_experts_pipeline,
        "component": "transformer_2",
        "num_frames": 5,
        "reward_frame": "last",
    },
    "compared": {"reward_funcs": [WinRateReward(brighter)], "num_generations_eval": 3},
}


def beginning(folder: str, name: str) -> dict:
    """The fields of a scenario that say which weights are trained, with the adapter that it goes on from."""
    names = ("lora", "init_adapter", "pipeline", "component")
    fields = {field: SCENARIOS[name][field] for field in names if field in SCENARIOS[name]}
    if "pipeline" in fields:
        fields["pipeline"] = fields["pipeline"]()
    if "init_adapter" in fields:
        fields["init_adapter"] = os.path.join(folder, f"adapter-{RANK}")
        saved_adapter("sd3", Path(fields["init_adapter"]), target_modules=["to_q", "to_v"])
    return fields


def run(folder: str, name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Trains a scenario; returns the weights, and what was drawn, scored and logged in this process."""
    fields = SCENARIOS[name] | beginning(folder, name)
    batch = fields.pop("batch", 8)
    others = fields.pop("reward_funcs", [])
    drawn = []

    def reward(prompts, images, **kwargs):
        values = brightness(prompts, images)
        # Groups are scored as they come: what belongs to one sampling phase is put together
        local = trainer.args.generation_batch_size // WORLD_SIZE
        if trainer.model.training and drawn and drawn[-1][2] and len(drawn[-1][0]) < local:
            drawn[-1] = [drawn[-1][0] + prompts, drawn[-1][1] + values, True]
        else:
            drawn.append([prompts, values, trainer.model.training])
        return values

    trainer = tiny_trainer(
        os.path.join(folder, name),
        per_device_train_batch_size=batch // WORLD_SIZE,
        reward_funcs=[reward, *others],
        eval_dataset=prompts(3),  # which two processes cannot share evenly
        eval_strategy="steps",
        eval_steps=1,
        **SGD | fields,
    )
    assert trainer.accelerator.num_processes == WORLD_SIZE
    assert trainer.args.world_size == WORLD_SIZE
    trainer.train()
    return trained_weights(trainer), {"drawn": drawn, "log_history": trainer.state.log_history}


def error_on_the_last_process(folder: str) -> str:
    """A reward that fails in one process: the message in this one."""

    def picky(prompts, images, **kwargs):
        if RANK == WORLD_SIZE - 1:
            raise OSError("the scorer is gone")
        return brightness(prompts, images)

    try:
        tiny_trainer(folder, per_device_train_batch_size=4, reward_funcs=picky).train()
    except RewardError as error:
        return str(error)
    return "none"


def cut_groups(folder: str) -> tuple[str, int]:
    """A reward that compares, where each process would have half a group: the message, and the images of a process
    with the number of steps that it names."""
    fields = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "reward_funcs": WinRateReward(brighter),
    }
    try:
        tiny_trainer(folder, **fields)
    except ValueError as error:
        steps = int(re.search(r"steps_per_generation=(\d+)", str(error))[1])
        args = tiny_trainer(folder, **fields | {"generation_batch_size": steps * 2 * WORLD_SIZE}).args
        return str(error), args.generation_batch_size // WORLD_SIZE
    return "none", 0


def only_on_the_last_process(folder: str) -> list[dict]:
    """A reward that applies, and logs a metric, in one process alone: the logs."""

    def partial(prompts, images, log_metric, **kwargs):
        if RANK < WORLD_SIZE - 1:
            return [None] * len(prompts)
        log_metric("scored", 2.0)
        return brightness(prompts, images)

    trainer = tiny_trainer(folder, per_device_train_batch_size=4, reward_funcs=[brightness, partial])
    trainer.train()
    return trainer.state.log_history


def reductions(folder: str) -> list[bool]:
    """One update of two micro-batches: whether each forward in turn makes ready for the gradients' reduction."""
    ready, forward = [], DistributedDataParallel.forward

    def recorded(self, *args, **kwargs):
        ready.append(self.require_backward_grad_sync)
        return forward(self, *args, **kwargs)

    DistributedDataParallel.forward = recorded
    try:
        tiny_trainer(folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1).train()
    finally:
        DistributedDataParallel.forward = forward
    return ready


# Two updates a phase, of 8 images in all; a power that is adapted to what all processes have seen
RESUMED = {
    "steps_per_generation": 2,
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 1,
    "use_ema": True,
    "advantage_power": "auto",
    "target_kl": 3e-5,
    **SGD,
}


def resume(folder: str) -> list[float]:
    """Resuming in the middle of a generation batch and at its end equals going on, in every process. The average and
    the weights are kept for one process, which goes on at the end, too; the power is returned."""
    whole = tiny_trainer(folder, per_device_train_batch_size=2, **RESUMED)
    whole.train()
    expected = trained_weights(whole)
    for step in (1, 4):
        rest = tiny_trainer(os.path.join(folder, "rest"), per_device_train_batch_size=2, **RESUMED)
        rest.train(resume_from_checkpoint=os.path.join(folder, f"checkpoint-{step}"))
        assert_equal(trained_weights(rest), expected)
    average = {f"average.{i}": p.contiguous() for i, p in enumerate(whole.policy.ema.shadow_params)}
    save_file(expected | average, Path(folder, f"resumed-{RANK}.safetensors"))
    # What one process has left goes on in two at a phase's end, and is refused in its middle
    alone = os.path.join(folder, "..", "alone")
    rest = tiny_trainer(os.path.join(folder, "of one"), per_device_train_batch_size=2, **RESUMED)
    try:
        rest.train(resume_from_checkpoint=os.path.join(alone, "checkpoint-3"))
        raise AssertionError("it was not refused")
    except ValueError as error:
        assert "num_processes=1" in str(error) and "num_processes=2" in str(error), error
    rest.train(resume_from_checkpoint=os.path.join(alone, "checkpoint-4"))
    save_file(trained_weights(rest), Path(folder, f"of-one-{RANK}.safetensors"))
    return [log["advantage_power"] for log in whole.state.log_history if "advantage_power" in log]


# Of four groups, two in each process, some are replaced: in one process more than in the other, or none
RESAMPLED = {
    "in a window": {"share_initial_noise": True, "sde_window_size": 1, "sde_window_range": [1, 3]},
    "dense": {"dense_rewards": True},
}


def resampled(folder: str, name: str) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """The weights and logs of a run that replaces groups without spread: about half of the prompts give such."""

    def picky(prompts, images, **kwargs):
        pairs = zip(prompts, brightness(prompts, images), strict=True)
        return [0.0 if prompt.startswith("a ") else value for prompt, value in pairs]

    fields = {"reward_funcs": picky, "train_dataset": prompts(16), "max_steps": 3, "dynamic_sample": True, **SGD}
    batch = {"per_device_train_batch_size": 16 // WORLD_SIZE}
    trainer = tiny_trainer(folder, **batch | fields | RESAMPLED[name])
    trainer.train()
    return trained_weights(trainer), trainer.state.log_history


class Failing:
    """Rewards, random ones if asked for; in the last process call number `gone_at` fails."""

    def __init__(self, gone_at: int | None = None, noise: float = 0.0):
        self.gone_at = gone_at
        self.noise = noise
        self.calls = 0
        self.in_main = []

    def __call__(self, prompts, images, **kwargs):
        self.calls += 1
        self.in_main.append(threading.current_thread() is threading.main_thread())
        values = [value + self.noise * torch.rand(()).item() for value in brightness(prompts, images)]
        if RANK == WORLD_SIZE - 1 and self.calls == self.gone_at:
            raise ConnectionError("the server is gone")
        return values


# In each process two groups, in four parts of half a group
PARTS = {"per_device_train_batch_size": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": 4}


def overlapped(folder: str) -> list[bool]:
    """The overlapped order equals the serial one; whether each call of the former was made in the main thread."""
    weights, functions = [], []
    for overlap in (True, False):
        functions.append(Failing(noise=1.0))
        trainer = tiny_trainer(folder, reward_funcs=functions[-1], overlap_rewards=overlap, **PARTS)
        trainer.train()
        weights.append(trained_weights(trainer))
    assert_equal(*weights)
    assert all(functions[1].in_main)
    return functions[0].in_main


def failure_on_the_last_process(folder: str) -> str:
    """A reward that fails later on in one process: the message in this one. Going on from the checkpoint is exact."""
    message = "none"
    try:
        tiny_trainer(folder, reward_funcs=Failing(gone_at=3), **PARTS).train()
    except RewardError as error:
        message = str(error)
    rest = tiny_trainer(folder, reward_funcs=Failing(), **PARTS)
    rest.train(resume_from_checkpoint=True)
    whole = tiny_trainer(folder, reward_funcs=Failing(), **PARTS)
    whole.train()
    assert_equal(trained_weights(rest), trained_weights(whole))
    return message


def stop_of_over_optimization(folder: str) -> list[int]:
    """The updates after which this process saved the best model, and the one at which it stopped."""
    saved = []

    def growing(prompts, images, trainer_state, **kwargs):
        return [value + trainer_state.global_step for value in brightness(prompts, images)]

    def falling(prompts, images, trainer_state, **kwargs):
        # one process alone sees it fall
        level = 1.0 if RANK < WORLD_SIZE - 1 else [1.0, 1.2, 0.9, 0.8, 0.7][trainer_state.global_step]
        return [level + 1e-3 * value for value in darkness(prompts, images)]

    trainer = tiny_trainer(
        folder,
        per_device_train_batch_size=4,
        reward_funcs=growing,
        eval_reward_funcs=falling,
        eval_dataset=prompts(4),
        eval_strategy="steps",
        eval_steps=1,
        max_steps=4,
        callbacks=[OverOptimizationCallback(stop=True, num_standard_errors=1.0)],
    )
    save_model = trainer.save_model

    def counted(*args, **kwargs):
        saved.append(trainer.state.global_step)
        save_model(*args, **kwargs)

    trainer.save_model = counted
    trainer.train()
    return [*saved, trainer.state.global_step]


def main(folder: str) -> None:
    torch.set_num_threads(1)
    for name in SCENARIOS:
        weights, record = run(folder, name)
        save_file(weights, Path(folder, f"{name}-{RANK}.safetensors"))
        Path(folder, f"{name}-{RANK}.json").write_text(json.dumps(record))
    for name in RESAMPLED:
        weights, logs = resampled(os.path.join(folder, name), name)
        save_file(weights, Path(folder, f"resampled {name}-{RANK}.safetensors"))
        Path(folder, f"resampled {name}-{RANK}.json").write_text(json.dumps(logs))
    report = {
        "error": error_on_the_last_process(os.path.join(folder, "error")),
        "cut": cut_groups(os.path.join(folder, "cut")),
        "only": only_on_the_last_process(os.path.join(folder, "only")),
        "reductions": reductions(os.path.join(folder, "reductions")),
        "overlapped": overlapped(os.path.join(folder, "overlapped")),
        "failure": failure_on_the_last_process(os.path.join(folder, "failure")),
        "power": resume(os.path.join(folder, "resume")),
        "stop": stop_of_over_optimization(os.path.join(folder, "stop")),
    }
    Path(folder, f"report-{RANK}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()  # its threads would be torn out of what they do at exit


if __name__ == "__main__":
    main(sys.argv[1])
