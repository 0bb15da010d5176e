"""A run that stops and is resumed equals one that does not stop."""

import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import assert_equal, brightness, distance, prompts, tiny_lora, tiny_trainer, train, trained_weights
from transformers import TrainerCallback


def resumed(output_dir, checkpoint, **kwargs) -> dict[str, torch.Tensor]:
    trainer = tiny_trainer(output_dir, **kwargs)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == kwargs["max_steps"]
    return trained_weights(trainer)


def assert_resumes(tmp_path, stop: int, **kwargs) -> None:
    """Resuming at `stop` gives what the uninterrupted run gave."""
    kwargs = {"max_steps": 4, "save_strategy": "steps", "save_steps": stop, "seed": 3} | kwargs
    whole = train(tmp_path / "out", **kwargs)
    half = trained_weights(tiny_trainer(tmp_path / "half", **kwargs))
    checkpoint = tmp_path / "out" / f"checkpoint-{stop}"
    rest = resumed(tmp_path / "out", str(checkpoint), **kwargs)
    assert_equal(rest, whole)
    assert distance(half, whole) > 1e-4


def random_brightness(prompts, images, **kwargs):
    noise = random.random() + float(np.random.rand()) + torch.rand(()).item()
    return [value + 1e-3 * noise * i for i, value in enumerate(brightness(prompts, images))]


class Begin(TrainerCallback):
    """Notes the step at which training begins."""

    def __init__(self, steps: list[int]):
        self.steps = steps

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


# ---- Where it stops ----


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"lora": None, "learning_rate": 1e-3, "beta": 0.5},  # the reference is the initial model, not the checkpoint's
        {"beta": 0.5, "lr_scheduler_type": "linear"},
        {"reward_funcs": random_brightness},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
    ],
    ids=["lora", "all weights and kl", "kl and schedule", "random rewards", "accumulation", "gradient checkpointing"],
)
def test_at_the_end_of_a_generation_batch(fields, tmp_path):
    assert_resumes(tmp_path, 2, **fields)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_in_the_middle_of_a_generation_batch(stop, tmp_path):
    # four updates from each sampling phase: its two micro-batches, each trained on twice
    fields = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2, "max_steps": 5}
    assert_resumes(tmp_path, stop, **fields)


def test_in_the_middle_of_a_generation_batch_with_dense_rewards_and_all_weights(tmp_path):
    fields = {"lora": None, "learning_rate": 1e-3, "dense_rewards": True, "num_iterations": 2, "max_steps": 3}
    assert_resumes(tmp_path, 1, **fields)


@pytest.mark.parametrize("stop", [2, 3])
def test_in_the_second_epoch(stop, tmp_path):
    # Four prompts, two to an update: two updates to an epoch
    drawn = []

    def reward(prompts, images, **kwargs):
        drawn.append(prompts)
        return brightness(prompts, images)

    assert_resumes(tmp_path, stop, max_steps=5, reward_funcs=reward)
    whole, rest = drawn[:5], drawn[5:]
    assert rest == whole[stop:]
    assert whole[0] != whole[2] or whole[1] != whole[3], "both epochs have one order: the test shows nothing"
    assert sorted(whole[0] + whole[1]) == sorted(whole[2] + whole[3])


@pytest.mark.parametrize("lora", ["default", None], ids=["lora", "all weights"])
def test_with_a_moving_average(lora, tmp_path):
    fields = {
        "use_ema": True,
        "lora": lora,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_dataset": prompts(2),
    }
    whole = tiny_trainer(tmp_path / "out", **fields)
    whole.train()
    rest = tiny_trainer(tmp_path / "out", **fields)
    rest.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_equal(trained_weights(rest), trained_weights(whole))
    torch.testing.assert_close(rest.policy.ema.shadow_params, whole.policy.ema.shadow_params)
    assert rest.evaluate()["eval_reward"] == pytest.approx(whole.evaluate()["eval_reward"], abs=2e-5)


def test_with_an_evaluation_at_every_update(tmp_path):
    fields = {"eval_dataset": prompts(2), "eval_strategy": "steps", "eval_steps": 1, "reward_funcs": random_brightness}
    assert_resumes(tmp_path, 2, **fields)


def test_true_resumes_from_the_last_checkpoint(tmp_path):
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = train(tmp_path, **fields)
    shutil.rmtree(tmp_path / "checkpoint-4")
    seen = []
    assert_equal(resumed(tmp_path, True, callbacks=[Begin(seen)], **fields), whole)
    assert seen == [3]


# ---- How it stops ----


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    script = Path(__file__).with_name("killed_run.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, script, folder], env=environment, capture_output=True, text=True)
    ends = [line for line in run.stdout.splitlines() if line.startswith(("between", "during"))]
    assert ends == [f"between {signal.SIGKILL:d}", f"during {signal.SIGKILL:d}"], run.stdout + run.stderr
    return folder


@pytest.mark.parametrize(
    ("when", "left"),
    [
        ("between", {"checkpoint-2"}),
        ("during", {"checkpoint-1", "checkpoint-2", "checkpoint-3"}),  # the last is incomplete
    ],
)
def test_after_kill_9(when, left, killed_runs, tmp_path):
    assert {path.name for path in (killed_runs / when).glob("checkpoint-*")} == left
    seen = []
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    rest = resumed(killed_runs / when, True, callbacks=[Begin(seen)], **fields)
    assert seen == [2]
    assert_equal(rest, train(tmp_path, **fields))


@pytest.mark.parametrize("left", ["no state", "half a state", "no run state"])
def test_a_half_written_checkpoint_is_passed_over(left, tmp_path):
    fields = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    whole = train(tmp_path, **fields)
    for step in (2, 3):
        state = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        if left == "no state":
            state.unlink()
        elif left == "half a state":
            state.write_text(state.read_text()[: state.stat().st_size // 2])
        else:
            (tmp_path / f"checkpoint-{step}" / "run_state.json").unlink()
    assert_equal(resumed(tmp_path, True, **fields), whole)
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        tiny_trainer(tmp_path / "other", **fields).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_without_a_complete_checkpoint_resuming_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        tiny_trainer(tmp_path / "out").train(resume_from_checkpoint=True)
    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        tiny_trainer(tmp_path / "out").train(resume_from_checkpoint=True)


# ---- A full disk ----


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class FullDisk(TrainerCallback):
    """From step `step` on no file can grow beyond `size` bytes: a write fails as on a full disk."""

    def __init__(self, step: int, size: int):
        self.step, self.size = step, size
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.limits[1]))

    def lift(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)


# 0 bytes: the first file of the checkpoint fails; 30,000: the weights fit, the optimizer's state does not
@pytest.mark.parametrize("size", [0, 30_000])
@pytest.mark.parametrize("lora", ["default", None], ids=["lora", "all weights"])
def test_a_full_disk_leaves_earlier_checkpoints_alone(size, lora, tmp_path):
    fields = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "lora": lora, "learning_rate": 1e-3}
    fields["logging_strategy"] = "no"  # pytest keeps what is printed in files
    whole = train(tmp_path / "whole", **fields)
    out = tmp_path / "out"
    disk = FullDisk(step=2, size=size)
    before = {}

    class Remember(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            before.update(contents(out))

    trainer = tiny_trainer(out, callbacks=[Remember(), disk], **fields)
    try:
        with pytest.raises(
            RuntimeError, match=r"checkpoint-2 could not be written.*earlier checkpoints are untouched"
        ):
            trainer.train()
    finally:
        disk.lift()
    assert any(name.startswith("checkpoint-1/") for name in before)
    assert contents(out) == before
    assert_equal(resumed(out, True, **fields), whole)


# ---- What is in a checkpoint ----


def test_tokens_are_in_no_file(tmp_path):
    fields = {"model_init_kwargs": {"token": "hf_secret", "variant": "kept"}, "hub_token": "hf_secret"}
    train(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, **fields)
    assert "kept" in (tmp_path / "checkpoint-1" / "training_args.json").read_text()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]


def test_a_checkpoint_holds_no_rollouts_at_the_end_of_a_generation_batch(tmp_path):
    train(tmp_path, per_device_train_batch_size=4, steps_per_generation=2, save_strategy="steps", save_steps=1)
    assert (tmp_path / "checkpoint-1" / "rollouts-0.safetensors").is_file()
    assert not list((tmp_path / "checkpoint-2").glob("rollouts-*"))


def test_what_is_shared_is_the_average_and_what_resumes_is_not(tmp_path):
    trainer = tiny_trainer(tmp_path, use_ema=True, ema_decay=0.9, save_strategy="steps", save_steps=2)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    resumed_from = load_file(checkpoint / "adapter_model.safetensors")
    shared = load_file(checkpoint / "pytorch_lora_weights.safetensors")
    final = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    weights = trained_weights(trainer)
    for name, average in zip(names, trainer.policy.ema.shadow_params, strict=True):
        stored = name.replace(".default", "")
        assert torch.equal(resumed_from[stored], weights[name])
        in_diffusers = stored.replace("base_model.model", "transformer")
        assert torch.equal(shared[in_diffusers], average)
        assert torch.equal(final[in_diffusers], average)
    averages = trainer.policy.ema.shadow_params
    moved = max((weights[name] - a).abs().max().item() for name, a in zip(names, averages, strict=True))
    assert moved > 1e-4


def best_at_the_first_step(prompts, images, trainer_state, **kwargs):
    return [value - trainer_state.global_step for value in brightness(prompts, images)]


@pytest.mark.parametrize("lora", ["default", None], ids=["lora", "all weights"])
def test_the_best_model_is_the_average_that_was_evaluated(lora, tmp_path):
    evaluation = {
        "eval_dataset": prompts(2),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
    }
    trainer = tiny_trainer(
        tmp_path,
        reward_funcs=best_at_the_first_step,
        lora=lora,
        use_ema=True,
        max_steps=3,
        save_steps=1,
        save_strategy="steps",
        **evaluation,
    )
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"
    best, last = (load_file(tmp_path / f"checkpoint-{step}" / "run_state.safetensors") for step in (1, 3))
    assert any(not torch.equal(best[name], last[name]) for name in best)
    for index, average in enumerate(trainer.policy.ema.shadow_params):
        assert torch.equal(average, best[f"policy.average.{index}"])
    # and that is what has been saved at the end
    name = "diffusion_pytorch_model.safetensors" if lora is None else "pytorch_lora_weights.safetensors"
    saved = {tensor.numpy().tobytes() for tensor in load_file(tmp_path / name).values()}
    assert saved >= {tensor.numpy().tobytes() for tensor in best.values()}


@pytest.mark.parametrize(
    ("saved", "resumed", "part"),
    [(None, "default", "holds no adapter"), ("default", tiny_lora(r=2), "has r=4, but the trainer.s has r=2")],
    ids=["all weights", "another rank"],
)
def test_a_checkpoint_of_another_kind_is_refused(saved, resumed, part, tmp_path):
    train(tmp_path, lora=saved, max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match=part):
        tiny_trainer(tmp_path, lora=resumed).train(resume_from_checkpoint=True)
