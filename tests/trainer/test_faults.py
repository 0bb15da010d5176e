"""What `benchmarks/faults.py` tries on real commands, here its mechanisms one by one: nothing is lost."""

import json
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from tiny_training import assert_equal, darkness, prompts, tiny_trainer, trained_weights, warnings_of
from transformers import TrainerCallback

from trl_flow import OverOptimizationCallback
from trl_flow.evaluation.outputs import whole_file
from trl_flow.evaluation.run_log import read_log_history
from trl_flow.rewards.checks import RewardError
from trl_flow.rewards.scorer import RewardScorer
from trl_flow.trainer.checkpoints import RunIsCompleteError, complete_checkpoints


FIELDS = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
GOLD = {"eval_reward_funcs": darkness, "eval_dataset": prompts(2), "eval_strategy": "steps", "eval_steps": 3}
ADAPTER = "pytorch_lora_weights.safetensors"


class PowerCut(BaseException):
    """Which nothing can be saved after."""


def cut_off(folder, method):
    """A run that ends when this method is called, once the checkpoint of its last update is written."""
    trainer = tiny_trainer(folder, **FIELDS, **GOLD)
    own = getattr(trainer, method)

    def cut(*args, **kwargs):
        if not args:
            raise PowerCut
        own(*args, **kwargs)  # of a checkpoint

    setattr(trainer, method, cut)
    trainer._save_after_failure = lambda: ""
    with pytest.raises(PowerCut):
        trainer.train()
    assert list(complete_checkpoints(folder)) == [3]


@pytest.mark.parametrize("method", ["_evaluate_saved", "save_model", "save_state"])
def test_a_run_that_is_cut_off_after_its_last_update_comes_to_its_end(method, tmp_path):
    out = tmp_path / "out"
    cut_off(out, method)
    rest = tiny_trainer(out, **FIELDS, **GOLD)
    rest.train(resume_from_checkpoint=True)
    whole = tiny_trainer(tmp_path / "whole", **FIELDS, **GOLD)
    whole.train()
    assert rest.state.global_step == 3
    assert_equal(trained_weights(rest), trained_weights(whole))
    assert_equal(load_file(out / ADAPTER), load_file(tmp_path / "whole" / ADAPTER))
    evaluated = [
        [log["step"] for log in trainer.state.log_history if "eval_reward" in log] for trainer in (rest, whole)
    ]
    assert evaluated == [[0, 3], [0, 3]]
    # and then there is nothing more to do
    with pytest.raises(RunIsCompleteError, match="Raise max_steps"):
        tiny_trainer(out, **FIELDS, **GOLD).train(resume_from_checkpoint=True)


def test_a_resumed_run_has_not_ended_until_it_has_written_all(tmp_path):
    tiny_trainer(tmp_path, **FIELDS | {"save_steps": 1}).train()
    rest = tiny_trainer(tmp_path, **FIELDS | {"save_steps": 1})
    rest.save_state = lambda: None  # cut off
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    tiny_trainer(tmp_path, **FIELDS).train(resume_from_checkpoint=True)
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 3


def test_auto_begins_a_run_and_goes_on_with_it(tmp_path):
    first = tiny_trainer(tmp_path / "out", **FIELDS | {"max_steps": 2, "save_steps": 2})
    first.train(resume_from_checkpoint="auto")
    assert first.state.global_step == 2
    rest = tiny_trainer(tmp_path / "out", **FIELDS)
    rest.train(resume_from_checkpoint="auto")
    whole = tiny_trainer(tmp_path / "whole", **FIELDS)
    whole.train()
    assert_equal(trained_weights(rest), trained_weights(whole))
    with pytest.raises(RunIsCompleteError):
        tiny_trainer(tmp_path / "out", **FIELDS).train(resume_from_checkpoint="auto")


def test_auto_leaves_a_run_alone_that_was_stopped_early(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    for save_steps in (1, 3):  # with a checkpoint of that update, and without
        fields = FIELDS | {"save_steps": save_steps}
        tiny_trainer(tmp_path, callbacks=[Stop()], **fields).train()
        with pytest.raises(RunIsCompleteError, match="stopped by a callback at update 1 of 3"):
            tiny_trainer(tmp_path, **fields).train(resume_from_checkpoint="auto")
        assert (tmp_path / ADAPTER).exists()
        if save_steps == 1:
            rest = tiny_trainer(tmp_path, **fields)
            rest.train(resume_from_checkpoint=True)
            assert rest.state.global_step == 3


def test_a_run_of_epochs_is_complete_until_there_are_more(tmp_path):
    fields = {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "steps", "save_steps": 1}
    first = tiny_trainer(tmp_path, **fields)
    first.train(resume_from_checkpoint="auto")
    with pytest.raises(RunIsCompleteError, match="Raise num_train_epochs"):
        tiny_trainer(tmp_path, **fields).train(resume_from_checkpoint="auto")
    rest = tiny_trainer(tmp_path, **fields | {"num_train_epochs": 2})
    rest.train(resume_from_checkpoint="auto")
    assert rest.state.global_step == 2 * first.state.global_step


def test_the_newest_checkpoints_are_kept_whatever_their_dates_are(tmp_path):
    class ClockSetBack(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            for path in tmp_path.glob("checkpoint-*"):
                date = time.time() + 3600 / state.global_step
                os.utime(path, (date, date))

    fields = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    tiny_trainer(tmp_path, callbacks=[ClockSetBack()], **fields).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]


def test_a_best_model_that_cannot_be_written_is_written_by_the_resumed_run(tmp_path):
    # An evaluation that no checkpoint belongs to: it is noted in the one that is written after the failure
    fields = FIELDS | GOLD | {"eval_steps": 1, "save_steps": 2}

    def full(evaluation, folder, state):
        raise OSError("No space left on device")

    watching = OverOptimizationCallback()
    watching._write_scores = full
    with pytest.raises(OSError, match="No space left"):
        tiny_trainer(tmp_path / "out", callbacks=[watching], **fields).train()
    assert list(complete_checkpoints(tmp_path / "out")) == [1]
    steps, scores, weights = [], [], []
    for name, checkpoint in (("out", True), ("whole", None)):
        trainer = tiny_trainer(tmp_path / name, callbacks=[OverOptimizationCallback()], **fields)
        trainer.train(resume_from_checkpoint=checkpoint)
        steps.append([log["step"] for log in trainer.state.log_history])
        scores.append(json.loads((tmp_path / name / "best_gold" / "scores.json").read_text()))
        weights.append(load_file(tmp_path / name / "best_gold" / ADAPTER))
    assert steps[0] == steps[1] and scores[0]["step"] == scores[1]["step"] == 1
    assert scores[0]["gold_average"] == pytest.approx(scores[1]["gold_average"], abs=1e-5)
    assert_equal(*weights)


def test_a_log_and_images_that_cannot_be_written_for_a_while_stop_nothing(tmp_path):
    log, images = tmp_path / "log_history.jsonl", tmp_path / "images"

    class Full(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:  # a folder and a file in the way
                log.unlink()
                log.mkdir()
                images.rename(tmp_path / "aside")
                images.touch()
            elif state.global_step == 2:
                log.rmdir()
                images.unlink()

    trainer = tiny_trainer(tmp_path, callbacks=[Full()], max_steps=3, log_images=True)
    with warnings_of("trl_flow.trainer") as messages:
        trainer.train()
    assert read_log_history(tmp_path) == trainer.state.log_history
    assert sum("log_history.jsonl cannot be written" in message for message in messages) == 1
    assert sum("step-000002.png cannot be written" in message for message in messages) == 1
    assert [path.name for path in images.iterdir()] == ["step-000003.png"]


def test_a_card_that_cannot_be_written_keeps_no_checkpoint_from_being_written(tmp_path):
    trainer = tiny_trainer(tmp_path, **FIELDS)
    trainer.args.push_to_hub = True
    trainer.publisher.push_checkpoint = lambda *_: None
    (tmp_path / "README.md").mkdir()
    with warnings_of("trl_flow.trainer.metrics") as messages:
        trainer.train()
    assert list(complete_checkpoints(tmp_path)) == [3]
    assert any("README.md cannot be written" in message for message in messages)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    (tmp_path / "_saving-1a2b").mkdir()
    (tmp_path / "_saving-1a2b" / ADAPTER).write_bytes(b"half")
    with whole_file(tmp_path / "progress.json") as file:
        left = Path(file.name)
    left.write_bytes(b"half")
    (mine := tmp_path / ".my.tmp").write_bytes(b"")
    (tmp_path / "evaluation").mkdir()
    with whole_file(tmp_path / "evaluation" / "results.json") as file:  # which goes on beside the run
        tiny_trainer(tmp_path, **FIELDS).train()
        assert Path(file.name).exists()
    assert not left.exists() and not (tmp_path / "_saving-1a2b").exists()
    assert mine.exists()


def test_an_evaluation_that_cannot_be_noted_leaves_its_checkpoint_whole(tmp_path, monkeypatch):
    def full(state, path):
        Path(path).write_text('{"best_')
        raise OSError("No space left on device")

    trainer = tiny_trainer(tmp_path, **FIELDS, **GOLD)
    evaluate = trainer._evaluate

    def then_full(*args, **kwargs):
        metrics = evaluate(*args, **kwargs)
        if trainer.state.global_step == 3:
            monkeypatch.setattr(type(trainer.state), "save_to_json", full)
        return metrics

    trainer._evaluate = then_full
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert list(complete_checkpoints(tmp_path)) == [3]


def test_a_reward_that_runs_out_of_memory_gives_back_what_it_held():
    class Held:
        pass

    held = []

    def hungry(prompts, images, **kwargs):
        own = Held()
        held.append(weakref.ref(own))
        raise MemoryError

    with pytest.raises(RewardError, match="'hungry' raised MemoryError") as error:
        RewardScorer([hungry]).score(["a cat"], [Image.new("RGB", (4, 4))], {})
    assert held[0]() is None and error.value.__cause__.__traceback__ is not None


@pytest.mark.slow
def test_the_fault_table_in_short():
    program = Path(__file__).parents[2] / "benchmarks" / "faults.py"
    ended = subprocess.run([sys.executable, program, "--quick"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("| ok |") == 13
