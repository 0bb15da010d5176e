"""[`SavingTrainer`]: nothing that has been trained is lost, whatever fails or is interrupted after it."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers.optimization import GreedyLR
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, rotate_checkpoints
from transformers.utils import logging

from trl_flow.evaluation.outputs import whole_file
from trl_flow.rewards.checks import RewardError
from trl_flow.trainer.checkpoints import STATE_FILE, CheckpointWriteError, writing_checkpoint
from trl_flow.trainer.metrics import going_on_without
from trl_flow.trainer.trl_compat import GroupTrainer


logger = logging.get_logger(__name__)


class SavingTrainer(GroupTrainer):
    """When a run is saved: before its evaluation, and when it is interrupted. What is saved stands in `run_state`."""

    resume_hint = "train(resume_from_checkpoint={!r})"  # what to do, in messages; a command says it in its own words
    # The step at which the run was last saved, or resumed, and where
    _saved: tuple[int, str] | None = None
    # Whether the weights are those of `run_state`: not before training, nor once the best ones have been loaded
    _is_training = False
    # Whether the optimizer is at work, and the number of updates when it last was
    _is_stepping, _stepped_at, _counted_at = False, None, None
    _step_hooks: tuple = ()
    _evaluated_at: int | None = None  # the step of the last evaluation that came to its end

    # ---- Before the evaluation ----

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs):
        """transformers evaluates first: an evaluation that is interrupted would lose what is to be saved."""
        control = self.control
        is_first = control.should_save and control.should_evaluate
        # These depend on what the evaluation finds
        is_first = is_first and self.args.save_strategy != SaveStrategy.BEST and not self._lr_follows_evaluation
        if is_first:
            control.should_save = control.should_evaluate = False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if is_first:
            self.run_state.evaluation_due = True
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self._evaluate_saved()

    def _evaluate_saved(self) -> None:
        """The evaluation of a run that has just been saved, or resumed from there, noted in the checkpoint."""
        step, folder = self.state.global_step, self._get_output_dir(trial=None)
        checkpoint = Path(folder, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        if self._saved is not None and self._saved[0] == step:
            checkpoint = Path(self._saved[1])
        if self._determine_best_metric(metrics=self._evaluate(None, None), trial=None):
            self.state.best_model_checkpoint = str(checkpoint)
        self.run_state.evaluation_due, contents = False, self.run_state.contents()
        # One that was resumed from may lie in another run's folder
        if not self.args.should_save or checkpoint.parent != Path(folder) or not checkpoint.is_dir():
            return
        for callback in [*self.callback_handler.callbacks, self.control]:
            name = type(callback).__name__
            # Of several of one class transformers keeps a list
            if isinstance(callback, ExportableState) and isinstance(self.state.stateful_callbacks.get(name), dict):
                self.state.stateful_callbacks[name] = callback.state()
        # If only the first is written, a resumed run evaluates again
        with whole_file(checkpoint / STATE_FILE) as file:
            self.state.save_to_json(file.name)
        self.run_state.save_values(checkpoint, contents)
        best = self.state.best_model_checkpoint
        limit = {"save_total_limit": self.args.save_total_limit, "best_model_checkpoint": best}
        rotate_checkpoints(output_dir=folder, **limit)

    @property
    def _lr_follows_evaluation(self) -> bool:
        return isinstance(self.lr_scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau | GreedyLR)

    def _evaluate(self, *args, **kwargs):
        metrics = super()._evaluate(*args, **kwargs)
        self._evaluated_at = self.state.global_step
        return metrics

    # ---- When it was interrupted after the last update ----

    def _run_epoch(self, *args, **kwargs) -> None:
        """A run that is resumed after its last update trains no more, but may lack an evaluation and its result."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    # ---- When it is interrupted ----

    def _watch_steps(self) -> None:
        """From now on it is known whether the weights are in the middle of an update."""
        for hook in self._step_hooks:
            hook.remove()
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        self._is_stepping, self._stepped_at, self._counted_at, self._is_training = False, None, None, True
        self._evaluated_at = None
        if isinstance(optimizer, torch.optim.Optimizer):
            before, after = self._before_step, self._after_step
            self._step_hooks = optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)

    def _before_step(self, *args) -> None:
        self._is_stepping = True

    def _after_step(self, *args) -> None:
        self._is_stepping, self._stepped_at = False, self.state.global_step

    @contextlib.contextmanager
    def _saving_what_is_trained(self) -> Iterator[None]:
        """Around training. A reward that fails does so on all processes; of other failures, and of Ctrl-C and SIGTERM,
        one process may know alone, so that only a run of one process is saved then."""
        self._saved, self._is_training = None, False
        is_main = threading.current_thread() is threading.main_thread()
        is_ours = self.args.world_size == 1 and is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        # While the run is saved SIGTERM is ignored: some schedulers send it again, or after Ctrl-C
        with _at_sigterm(signal.SIG_IGN, is_ours):
            try:
                with _at_sigterm(_stop, is_ours):
                    yield
            except RewardError as error:
                raise RewardError(f"{error} {self._save_after_failure()}") from error
            except BaseException as error:
                is_alone = self.accelerator.distributed_type == DistributedType.NO
                wanted = self.args.save_strategy != SaveStrategy.NO and not isinstance(error, CheckpointWriteError)
                if self._is_training and is_alone and wanted:
                    logger.warning(f"Training ends with {type(error).__name__}. {self._save_after_failure()}")
                raise
            finally:
                self._is_training = False

    def _save_after_failure(self) -> str:
        """Saves a checkpoint of the last update, unless there is one, and says where it is and how to go on."""
        if self._is_stepping:
            return "The weights are in the middle of an update, so that they are not saved."
        if self._stepped_at == self.state.global_step:
            self._count_update()
        step = self.state.global_step
        if step == 0:
            return "No update had been made, so there is nothing to save."
        if self._saved is None or self._saved[0] != step:
            if self._misses_evaluation(step):
                self.run_state.evaluation_due, logs = True, self.state.log_history
                self.state.log_history = [log for log in logs if log["step"] < step or not _is_evaluation(log)]
            only_model, self.args.save_only_model = self.args.save_only_model, False
            try:
                self._save_checkpoint(self.model, trial=None)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            except Exception as error:  # the first one is the one to raise
                return f"The run as it was after update {step} could not be saved: {error}"
            finally:
                self.args.save_only_model = only_model
        then = f"Once the cause is fixed, resume with {self.resume_hint.format(self._saved[1])}."
        return f"The run is saved as it was after update {step}, the last one, in {self._saved[1]}. {then}"

    def _misses_evaluation(self, step: int) -> bool:
        """Whether an evaluation belongs to this step, and has not come to its end."""
        args, is_done = self.args, self._evaluated_at == step
        is_due = args.eval_strategy == "steps" and step % self.state.eval_steps == 0 and step >= args.eval_delay
        return is_due and not is_done and not self._lr_follows_evaluation

    def _count_update(self) -> None:
        """What transformers' loop does between the optimizer's step and the next, if a callback has failed there."""
        if self._counted_at != self.state.global_step:
            self._after_update()
        self.lr_scheduler.step()
        batches, each = len(self.callback_handler.train_dataloader), self.args.gradient_accumulation_steps
        self.state.global_step += 1
        self.state.epoch = self.state.global_step / max(-(-batches // each), 1)

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.push_to_hub and self.args.hub_strategy != "end":
            with going_on_without(Path(self.args.output_dir, "README.md")):
                self.create_model_card()
        with writing_checkpoint(folder, self.args, self.resume_hint.format(True)):
            if self.args.should_save:
                _date_in_order(folder.parent)
            self.run_state.save(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
        if not self.args.save_only_model:
            self._saved = self.state.global_step, str(folder)


def _is_evaluation(log: dict[str, Any]) -> bool:
    return any(name.startswith("eval_") for name in log)


def _date_in_order(output_dir: Path) -> None:
    """transformers removes the checkpoints with the oldest dates first, and those may be in any order: after a clock
    was set back it would be the newest ones, or after a copy."""
    found = [(path.name.rpartition("-")[2], path) for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    in_order = sorted((int(step), path) for step, path in found if step.isdecimal())
    for age, (_, path) in enumerate(reversed(in_order), start=1):
        with contextlib.suppress(PermissionError):  # of another user, whose checkpoints cannot be removed either
            os.utime(path)  # now, by the file system's clock
            date = path.stat().st_mtime - age  # a second apart: transformers trusts no dates that are close
            os.utime(path, (date, date))


def _stop(*_) -> None:
    """A scheduler that takes the machine away sends SIGTERM first: as Ctrl-C, it raises where the program is."""
    raise SystemExit(128 + signal.SIGTERM)


@contextlib.contextmanager
def _at_sigterm(handler: Any, wanted: bool) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, handler) if wanted else None
    try:
        yield
    finally:
        if wanted:
            signal.signal(signal.SIGTERM, before)
