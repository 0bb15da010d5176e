"""The trainer's own callbacks."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback, TrainerCallback
from transformers.utils import logging

from trl_flow.evaluation.run_log import LOG_NAME, diagnostics_table


logger = logging.get_logger(__name__)


class FlowProgressCallback(ProgressCallback):
    """The training bar, with what is going on beside it (sampling, rewards, updating), and one short line a log."""

    # What a person watches; the rest (some forty values a log) would bury it
    SHOWN = ("reward", "reward_std", "kl", "clip_ratio/region_mean", "loss", "grad_norm", "step_time")

    _shown_at = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            options = {"initial": state.global_step, "dynamic_ncols": True}
            self.training_bar = tqdm(desc="Training", total=state.max_steps, **options)
        self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        shown = {name: value for name, value in (logs or {}).items() if self._is_shown(name) and value is not None}
        if shown:
            values = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            self.training_bar.write(f"step {state.global_step}/{state.max_steps}  {values}")

    def _is_shown(self, name: str) -> bool:
        is_reward = name.endswith("/mean") and "rewards/" in name
        # And how long an evaluation took
        return name in self.SHOWN or is_reward or name.endswith(("_reward", "_gold/average", "_runtime"))

    def show_stage(self, stage: str) -> None:
        if self.training_bar is not None:
            # A small model changes stage far more often than anybody, or a log file, can follow
            now = time.monotonic()
            self.training_bar.set_postfix_str(stage, refresh=now - self._shown_at > 0.2)
            self._shown_at = now if now - self._shown_at > 0.2 else self._shown_at


class LoopCallback(TrainerCallback):
    """Calls the trainer before the first update, once everything is prepared, and after each optimizer step."""

    def __init__(self, on_train_begin: Callable[[], None], on_optimizer_step: Callable[[], None]):
        self._on_train_begin, self._on_optimizer_step = on_train_begin, on_optimizer_step

    def on_train_begin(self, args, state, control, **kwargs):
        self._on_train_begin()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._on_optimizer_step()


class RunLogCallback(TrainerCallback):
    """Writes logs to `output_dir/log_history.jsonl`, one a line, and the table of `diagnostics_table` to
    `output_dir/diagnostics.md`. A run that is resumed begins the logs anew with its checkpoint's. `counts` go into the
    next log of the run's own history and file, and to no tracker, which take numbers only."""

    _writes = False

    def __init__(self):
        self.counts: dict[str, list[int]] = {}
        self.before: list[dict[str, Any]] = []  # logs of evaluations before training, which begins a log of its own

    def on_train_begin(self, args, state, control, **kwargs):
        self._writes = state.is_world_process_zero
        if not state.log_history:
            state.log_history.extend(self.before)
        self.before = []
        self._write(args, state, "w", state.log_history)

    def on_log(self, args, state, control, **kwargs):
        state.log_history[-1] |= self.counts
        self.counts = {}
        self._write(args, state, "a", state.log_history[-1:])

    def _write(self, args, state, mode: str, logs: list[dict[str, Any]]) -> None:
        if not self._writes:
            return
        path = Path(args.output_dir, LOG_NAME)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open(mode, encoding="utf-8") as file:
                for log in logs:
                    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in log.items()}
                    file.write(json.dumps(finite) + "\n")
            if (table := diagnostics_table(state.log_history)) is not None:
                path = path.with_name("diagnostics.md")
                path.write_text(table, encoding="utf-8")
        except OSError as error:  # training is worth more than its log, which checkpoints hold too
            self._writes = False
            logger.warning(f"{path} cannot be written ({error}): logs are kept in checkpoints and trackers only.")
