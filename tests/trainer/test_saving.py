"""Nothing that has been trained is lost, at whatever moment a run is interrupted, and what is resumed equals it."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import assert_equal, brightness, darkness, prompts, tiny_trainer, trained_weights, warnings_of
from transformers import TrainerCallback

from trl_flow.trainer.checkpoints import complete_checkpoints, step_of


HOOKS = [
    *("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log"),
    *("on_save", "on_evaluate"),
]
# Two updates a phase, of two micro-batches each: update 3, the one that is due, is in the middle of the second phase
PHASES = {"per_device_train_batch_size": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
FIELDS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3, "use_ema": True, "lr_scheduler_type": "linear"}
FIELDS |= {"eval_strategy": "steps", "eval_steps": 3, "eval_dataset": prompts(2), **PHASES}


class Interrupt(TrainerCallback):
    """Raises `error` at `hook`, once `updates` updates have been trained."""

    def __init__(self, hook: str, error: BaseException, updates: int = 3):
        self.trained = 0
        count = self.on_optimizer_step

        def raises(args, state, control, **kwargs):
            if hook == "on_optimizer_step":
                count(args, state, control)
            if self.trained >= updates:
                raise error

        setattr(self, hook, raises)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trained += 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = tiny_trainer(tmp_path_factory.mktemp("whole"), **FIELDS)
    trainer.train()
    return trainer


@pytest.mark.parametrize("hook", [*HOOKS, "crash on_log", "crash on_evaluate"])
def test_an_update_that_is_due_to_be_saved_is_not_lost(hook, whole, tmp_path):
    error = ConnectionError("the tracker is gone") if hook.startswith("crash ") else KeyboardInterrupt()
    hook = hook.removeprefix("crash ")
    trainer = tiny_trainer(tmp_path, callbacks=[Interrupt(hook, error)], **FIELDS)
    with pytest.raises(type(error)):
        trainer.train()
    last = list(complete_checkpoints(tmp_path))[-1]
    assert last == 3
    rest = tiny_trainer(tmp_path, **FIELDS)
    rest.train(resume_from_checkpoint=True)
    assert_equal(trained_weights(rest), trained_weights(whole))
    evaluated = [log["step"] for log in rest.state.log_history if "eval_reward" in log]
    assert evaluated == [3, 4]


def test_without_a_checkpoint_due_ctrl_c_saves_too_unless_nothing_is_to_be_saved(tmp_path):
    for strategy, steps in (("steps", [1]), ("no", [])):
        folder, fields = tmp_path / strategy, FIELDS | {"save_strategy": strategy}
        trainer = tiny_trainer(folder, callbacks=[Interrupt("on_step_begin", KeyboardInterrupt(), 1)], **fields)
        with warnings_of("trl_flow.trainer.saving") as messages, pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert list(complete_checkpoints(folder)) == steps
        assert len(messages) == len(steps) and all("checkpoint-1" in message for message in messages)


def test_in_the_middle_of_the_optimizers_step_nothing_is_saved(tmp_path):
    """Some weights have moved and others have not."""
    trainer = tiny_trainer(tmp_path, **FIELDS)

    class Torn(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                parameter = trainer.policy.trained_parameters[-1]
                optimizer = trainer.optimizer.optimizer
                parameter.grad, optimizer.step = None, torn(optimizer)

    def torn(optimizer):
        hooks = list(optimizer._optimizer_step_pre_hooks.values())

        def step(*args, **kwargs):
            for hook in hooks:
                hook(optimizer, args, kwargs)
            raise KeyboardInterrupt

        return step

    trainer.add_callback(Torn())
    with warnings_of("trl_flow.trainer.saving") as messages, pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "in the middle of an update" in messages[0] and not complete_checkpoints(tmp_path)


def test_sigterm_saves(tmp_path):
    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = tiny_trainer(tmp_path, callbacks=[Kill()], **FIELDS)
    with pytest.raises(SystemExit) as exit:
        trainer.train()
    assert exit.value.code == 143 and list(complete_checkpoints(tmp_path)) == [2]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_sigterm_does_not_keep_the_run_from_being_saved(tmp_path):
    trainer = tiny_trainer(tmp_path, callbacks=[Interrupt("on_step_begin", KeyboardInterrupt(), 2)], **FIELDS)
    save = trainer._save_checkpoint

    def terminated(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*args, **kwargs)

    trainer._save_checkpoint = terminated
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert list(complete_checkpoints(tmp_path)) == [2]


def best_after(step: int):
    def reward(prompts, images, trainer_state, **kwargs):
        return [value - abs(trainer_state.global_step - step) for value in brightness(prompts, images)]

    return reward


@pytest.mark.parametrize("best", [1, 2, 3])
def test_the_best_model_is_found_and_kept_though_it_is_saved_before_it_is_evaluated(best, tmp_path):
    fields = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    fields |= {"load_best_model_at_end": True, "save_total_limit": 1, "eval_dataset": prompts(2)}
    trainer = tiny_trainer(tmp_path / "out", reward_funcs=best_after(best), **fields)
    trainer.train()
    assert step_of(trainer.state.best_model_checkpoint) == best
    # One limit, which holds for the best and the last
    assert list(complete_checkpoints(tmp_path / "out")) == [best]
    saved = json.loads((tmp_path / "out" / f"checkpoint-{best}" / "trainer_state.json").read_text())
    assert saved["best_global_step"] == best and "eval_reward" in saved["log_history"][-1]
    two = tiny_trainer(tmp_path / "two", reward_funcs=best_after(best), **fields | {"max_steps": best})
    two.train()
    assert_equal(trained_weights(trainer), trained_weights(two))


def test_the_best_by_gold_is_loaded_where_there_is_a_gold_score(tmp_path):
    def gold(prompts, images, trainer_state, **kwargs):
        return [1 + value - abs(trainer_state.global_step - 1) / 10 for value in darkness(prompts, images)]

    fields = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    fields |= {"load_best_model_at_end": True, "eval_dataset": prompts(2), "reward_funcs": best_after(3)}
    for metric, best in ((None, 1), ("reward", 1), ("eval_reward", 3)):
        options = {"eval_reward_funcs": gold, "metric_for_best_model": metric}
        trainer = tiny_trainer(tmp_path / str(metric), **options, **fields)
        trainer.train()
        assert step_of(trainer.state.best_model_checkpoint) == best, metric
    # and without gold the reward's
    trainer = tiny_trainer(tmp_path / "reward alone", **fields)
    trainer.train()
    assert step_of(trainer.state.best_model_checkpoint) == 3


@pytest.mark.parametrize("lora", ["default", None], ids=["lora", "full"])
def test_a_run_that_is_compiled_saves_what_another_does(lora, tmp_path):
    """As accelerate wraps the model with torch_compile=True; nothing is compiled before a forward."""
    trainer = tiny_trainer(tmp_path, lora=lora)
    trainer.save_model(str(tmp_path / "plain"))
    trainer.model_wrapped = torch.compile(trainer.model, backend="eager")
    assert trainer.policy.is_adapter is (lora is not None)
    assert trainer.policy.sampling_module is trainer.model_wrapped
    trainer.save_model(str(tmp_path / "compiled"))
    names = [sorted(file.name for file in (tmp_path / kind).iterdir()) for kind in ("plain", "compiled")]
    assert names[0] == names[1]
    for file in (tmp_path / "plain").glob("*.safetensors"):
        saved = load_file(tmp_path / "compiled" / file.name)
        assert_equal(saved, load_file(file))
