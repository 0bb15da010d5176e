"""The trainer's own callbacks."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerCallback
from transformers.utils import logging

from trl_flow.evaluation.outputs import whole_file, write_json
from trl_flow.evaluation.run_log import LOG_NAME, PROGRESS_NAME, diagnostics_table


logger = logging.get_logger(__name__)


class LoopCallback(TrainerCallback):
    """Calls the trainer before the first update, once everything is prepared, and after each optimizer step."""

    def __init__(self, on_train_begin: Callable[[], None], on_optimizer_step: Callable[[], None]):
        self._on_train_begin, self._on_optimizer_step = on_train_begin, on_optimizer_step

    def on_train_begin(self, args, state, control, **kwargs):
        self._on_train_begin()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._on_optimizer_step()


def _line(log: dict[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in log.items()}
    return json.dumps(finite) + "\n"


class RunLogCallback(TrainerCallback):
    """Writes logs to `output_dir/log_history.jsonl`, one a line, the table of `diagnostics_table` to
    `output_dir/diagnostics.md`, and where the run stands, with `about`, to `output_dir/progress.json`. A run that is
    resumed begins the logs anew with its checkpoint's. `counts` go into the next log of the run's own history and
    file, and to no tracker, which take numbers only."""

    _writes, _is_behind, _is_warned = False, False, False

    def __init__(self, about: dict[str, Any]):
        self._about, self._began = about, {}
        self.counts: dict[str, list[int]] = {}
        self.before: list[dict[str, Any]] = []  # logs of evaluations before training, which begins a log of its own

    def on_train_begin(self, args, state, control, **kwargs):
        self._writes = state.is_world_process_zero
        if not state.log_history:
            state.log_history.extend(self.before)
        self.before = []
        self._began = {"began_at": time.time(), "began_at_update": state.global_step}
        self._is_behind = True
        self._write(args, state)

    def on_log(self, args, state, control, **kwargs):
        state.log_history[-1] |= self.counts
        self.counts = {}
        self._write(args, state, state.log_history[-1:])

    def on_train_end(self, args, state, control, **kwargs):
        self._write(args, state, finished=True)

    def _write(self, args, state, new: Sequence[dict[str, Any]] = (), *, finished: bool = False) -> None:
        if not self._writes:
            return
        path = Path(args.output_dir, LOG_NAME)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self._is_behind:
                with whole_file(path) as file:
                    file.write("".join(map(_line, state.log_history)).encode())
            else:
                self._is_behind = True  # until all of it is written
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(map(_line, new))
            self._is_behind = False
            if (table := diagnostics_table(state.log_history)) is not None:
                path = path.with_name("diagnostics.md")
                path.write_text(table, encoding="utf-8")
            place = {"update": state.global_step, "max_steps": state.max_steps, "finished": finished}
            written = {"written_at": time.time()}
            write_json(path.with_name(PROGRESS_NAME), self._about | self._began | place | written)
        except OSError as error:  # training is worth more than its log, which checkpoints hold too
            if not self._is_warned:
                logger.warning(f"{path} cannot be written ({error}). It is tried again with each log.")
            self._is_warned = True
