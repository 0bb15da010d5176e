"""What may change when a run is resumed: what acts is said, what does not is said, and the rest is refused."""

import json
import shutil

import pytest
from tiny_training import darkness, prompts, tiny_lora, tiny_trainer, trained_weights, warnings_of
from transformers import TrainerCallback

from trl_flow.trainer.checkpoints import missing_in


LOGGER = "trl_flow.trainer.resuming"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoint-1 in the middle of a phase, and checkpoint-2 at its end."""
    folder = tmp_path_factory.mktemp("run")
    tiny_trainer(folder, max_steps=2, save_strategy="steps", save_steps=1, **PHASES).train()
    return folder


PHASES = {"per_device_train_batch_size": 4, "steps_per_generation": 2}


def resumed(run, tmp_path, step=2, **fields):
    """A trainer that has gone on, and what it was warned of."""
    trainer = tiny_trainer(tmp_path, **PHASES | {"max_steps": 3} | fields)
    with warnings_of(LOGGER) as messages:
        trainer.train(resume_from_checkpoint=str(run / f"checkpoint-{step}"))
    return trainer, messages


def test_what_acts_and_what_does_not_is_said(run, tmp_path):
    fields = {"epsilon": 0.5, "num_generations": 2, "learning_rate": 0.5, "adam_beta1": 0.5, "save_strategy": "steps"}
    trainer, (message,) = resumed(run, tmp_path, reward_funcs=darkness, train_dataset=prompts(5), **fields)
    acting, kept = message.split("The optimizer's state holds others")
    for part in ("epsilon 0.0001 -> 0.5", "num_generations 4 -> 2", "prompts 4 -> 5", "max_steps 2 -> 3"):
        assert part in acting
    assert "reward_funcs ['brightness'] -> ['darkness']" in acting
    assert "learning_rate stays 0.01 (not 0.5)" in kept and "adam_beta1 stays 0.9 (not 0.5)" in kept
    # That is what happens, and what is written
    group = trainer.optimizer.param_groups[0]
    assert group["lr"] == 0.01 and group["betas"][0] == 0.9
    written = json.loads((tmp_path / "training_args.json").read_text())
    assert (written["learning_rate"], written["adam_beta1"], written["epsilon"]) == (0.01, 0.9, 0.5)


def test_nothing_is_said_where_nothing_has_changed(run, tmp_path):
    assert resumed(run, tmp_path, max_steps=3, save_steps=7)[1][0].count("->") == 1  # max_steps
    shutil.copytree(run, tmp_path / "again")
    trainer = tiny_trainer(tmp_path / "again", max_steps=2, save_strategy="steps", save_steps=1, **PHASES)
    with warnings_of(LOGGER) as messages:
        trainer.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-1"))
    assert messages == []


def test_how_often_is_logged_and_saved_may_change(run, tmp_path):
    """transformers goes on with the checkpoint's numbers."""
    fields = {"max_steps": 6, "logging_steps": 2, "save_strategy": "steps", "save_steps": 3}
    trainer, _ = resumed(run, tmp_path, **fields)
    assert [log["step"] for log in trainer.state.log_history if "loss" in log] == [1, 2, 4, 6]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}


@pytest.mark.parametrize(
    ("step", "fields", "parts"),
    [
        (
            1,
            {"guidance_scale": 1.0},
            ["guidance_scale=2.0", "guidance_scale=1.0", "in the middle of a sampling"],
        ),
        (1, {"noise_level": 0.1}, ["noise_level=0.7", "noise_level=0.1", "end of a sampling phase"]),
        (2, {"optim": "sgd"}, ["optim='adamw_torch", "optim='sgd'"]),
        (2, {"lora": tiny_lora(r=2)}, ["r=4", "r=2"]),
        (2, {"lora": tiny_lora(lora_alpha=4)}, ["lora_alpha=8", "lora_alpha=4"]),
        (2, {"lora": tiny_lora(use_rslora=True)}, ["use_rslora=False", "use_rslora=True"]),
        (2, {"lora": tiny_lora(target_modules=["attn.to_q"])}, ["target_modules=", "modules (such as"]),
    ],
    ids=["guidance in a phase", "noise in a phase", "optimizer", "rank", "alpha", "rslora", "modules"],
)
def test_what_cannot_change_is_refused_before_anything_is_loaded(step, fields, parts, run, tmp_path):
    trainer = tiny_trainer(tmp_path, **PHASES | {"max_steps": 3} | fields)
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=str(run / f"checkpoint-{step}"))
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert trainer.optimizer is None and not list(tmp_path.glob("*.jsonl"))


def test_at_a_phases_end_the_sampling_may_change(run, tmp_path):
    _, (message,) = resumed(run, tmp_path, guidance_scale=1.0, num_inference_steps=5)
    assert "guidance_scale 2.0 -> 1.0" in message and "num_inference_steps 4 -> 5" in message


# ---- Checkpoints that are not whole ----


def test_a_checkpoint_of_the_model_alone_is_refused(tmp_path):
    fields = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    tiny_trainer(tmp_path, save_only_model=True, **fields).train()
    for given, part in ((str(tmp_path / "checkpoint-1"), "holds the model alone"), (True, "no complete checkpoint")):
        trainer = tiny_trainer(tmp_path, **fields)
        with warnings_of("trl_flow.trainer.checkpoints") as messages, pytest.raises(ValueError, match=part):
            trainer.train(resume_from_checkpoint=given)
        assert all("save_only_model=True" in message for message in messages)


def test_complete_is_what_has_all_that_resuming_reads(run, tmp_path):
    """Each file of a checkpoint in turn is missing, or ends in its middle."""
    whole = run / "checkpoint-1"
    assert missing_in(whole, 0) is None
    unread = {"training_args.json", "adapter_config.json", "pytorch_lora_weights.safetensors"}
    for path in whole.iterdir():
        for damage in ("missing", "cut"):
            copy = tmp_path / f"{damage}-{path.name}"
            shutil.copytree(whole, copy)
            (copy / path.name).unlink()
            if damage == "cut":
                (copy / path.name).write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            if damage == "missing" and path.name in unread:
                continue
            why = missing_in(copy, 0)
            assert why is not None and (path.name in why or "weights are missing" in why or "optimizer" in why), path


def test_training_goes_on_from_the_last_one_that_is_whole(run, tmp_path):
    shutil.copytree(run, tmp_path / "out")
    optimizer = tmp_path / "out" / "checkpoint-2" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    begun = []

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            begun.append(state.global_step)

    trainer = tiny_trainer(tmp_path / "out", callbacks=[Begin()], **PHASES)
    with warnings_of("trl_flow.trainer.checkpoints") as messages:
        trainer.train(resume_from_checkpoint=True)
    assert begun == [1] and "optimizer.pt is damaged or cut off" in messages[0]
    assert trained_weights(trainer)
