"""What a person sees of a run: in a terminal a bar that says what is going on, in a file one line a log, in a notebook
a table. The part that a run is in, and how long each takes, is kept by [`Clock`]."""

import contextlib
import html
import logging
import math
import re
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import TrainerCallback
from transformers.utils import is_in_notebook

from trl_flow.evaluation.run_log import BETWEEN, PARTS, is_number


_EVALUATION = re.compile(r"eval_(?:(.+)_)?reward")
# So many logs are compared with as many before them
_TREND_LOGS = 5
_NOTEBOOK_ROWS = 20


class Clock:
    """Seconds that a process has spent on each part since it was last read."""

    def __init__(self):
        self._part, self._since = None, 0.0
        self._seconds: dict[str, float] = {}

    def enter(self, part: str | None) -> None:
        """Now the process is at this part; `None`: at none that counts."""
        now = time.perf_counter()
        if self._part is not None:
            self._seconds[self._part] = self._seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = part, now

    def read(self, updates: int) -> dict[str, float]:
        """`time/{part}`: seconds an update, of so many. Begins anew."""
        self.enter(self._part)
        seconds, self._seconds = self._seconds, {}
        return {f"time/{part}": seconds[part] / max(updates, 1) for part in PARTS if part in seconds}


def trend(values: Sequence[float]) -> str:
    """`"rising"`, `"falling"` or `"level"`: whether the mean of the latest values is above or below that of as many
    before them, by more than two standard errors of the difference; `""` for less than four values."""
    number = min(len(values) // 2, _TREND_LOGS)
    if number < 2:
        return ""
    before, latest = values[-2 * number : -number], values[-number:]
    error = math.sqrt((statistics.variance(before) + statistics.variance(latest)) / number)
    change = statistics.mean(latest) - statistics.mean(before)
    return "level" if abs(change) <= 2 * error else "rising" if change > 0 else "falling"


def watched(logs: Mapping[str, Any], history: Sequence[Mapping[str, Any]] = ()) -> dict[str, str]:
    """What a person watches of a log, in plain words and in their order; the rest, some forty values, would bury it.
    Of `history`, the run's logs up to this one, are the trends."""
    found: dict[str, str] = {}
    evaluation = next(filter(None, map(_EVALUATION.fullmatch, logs)), None)
    prefix = evaluation[0].removesuffix("reward") if evaluation else ""
    if evaluation:
        found["evaluation"] = evaluation[1] or ""
    _add(found, "reward", logs, f"{prefix}reward", history)
    rewards = [re.fullmatch(rf"{prefix}rewards/(.+)/mean", key) for key in logs]
    for match in filter(None, rewards if sum(map(bool, rewards)) > 1 else ()):
        _add(found, match[1], logs, match[0])
    _add(found, "gold", logs, f"{prefix}gold/average", history)
    if "gold" in found and logs.get(f"{prefix}gold/average_std_err"):
        found["gold"] += f" ± {1.96 * logs[f'{prefix}gold/average_std_err']:.2g}"
    for name, key in (("KL", "kl"), ("gradient", "grad_norm")):
        if logs.get(key) is not None:
            found[name] = f"{logs[key]:.2g}"
    if logs.get("clip_ratio/region_mean") is not None:
        found["clipped"] = f"{logs['clip_ratio/region_mean']:.0%}"
    if evaluation and logs.get(f"{prefix}runtime") is not None:
        found["took"] = duration(logs[f"{prefix}runtime"])
    if logs.get("step_time") is not None:
        parts = {part: logs.get(f"time/{part}") or 0.0 for part in PARTS}
        # Of an update, what counts, and what came between updates
        each = {part: f"{part} {duration(s)}" for part, s in parts.items() if s > 0.05 * logs["step_time"]}
        between = [each.pop(part) for part in BETWEEN if part in each]
        within = f" ({', '.join(each.values())})" if each else ""
        found["an update"] = " + ".join([duration(logs["step_time"]) + within, *between])
    return found


def _add(found: dict[str, str], name: str, logs: Mapping[str, Any], key: str, history: Sequence = ()) -> None:
    if (value := logs.get(key)) is not None:
        values = [log[key] for log in history if is_number(log.get(key))]
        found[name] = " ".join(filter(None, [f"{value:.4g}", trend(values)]))


def duration(seconds: float) -> str:
    """As one says it: `1.3 s`, `25 s`, `7 min`, `3 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


class FlowProgressCallback(TrainerCallback):
    """Shows what is going on, and what a person watches of each log: with `shows_bar` in a terminal's bar or, in a
    notebook, above a table, else line by line."""

    _shown_at, _part = 0.0, ""

    def __init__(self, shows_bar: bool = True):
        self._in_notebook = shows_bar and is_in_notebook() and "IPython" in sys.modules
        self._shows_bar = shows_bar and not self._in_notebook and sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._table: NotebookTable | None = None
        self._is_main = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._is_main = state.is_world_process_zero
        self._began = time.monotonic(), state.global_step
        if not self._is_main:
            return
        if self._in_notebook:
            self._table = NotebookTable()
        elif self._shows_bar:
            options = {"initial": state.global_step, "dynamic_ncols": True, "unit": "update"}
            self._bar = tqdm(desc="Training", total=state.max_steps, **options)

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self._is_main or not (shown := watched(logs or {}, state.log_history)):
            return
        place, left = f"update {state.global_step}/{state.max_steps}", self._left(state)
        if self._table is not None:
            takes = f"  an update takes {shown['an update']}" if "an update" in shown else ""
            self._table.add(state.global_step, shown)
            self._table.show(f"{place}{left}{takes}")
            return
        text = "  ".join(f"{name} {value}".strip() for name, value in shown.items())
        tqdm.write(f"{place}  {text}{'' if self._bar is not None else left}")
        sys.stdout.flush()  # a file is looked at while it is written

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.set_postfix_str("")
        self.close()
        if self._table is not None:
            self._table.show(f"finished after update {state.global_step}")

    def close(self) -> None:
        """Leaves the bar as it is, also of a training that failed: what is printed next begins a line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def show_stage(self, stage: str) -> None:
        """What is going on, in words of which the first is the part."""
        now, part = time.monotonic(), stage.split()[0].rstrip(",")
        # A small model takes steps far more often than anybody can follow
        if part != self._part or now - self._shown_at > 0.2:
            self._shown_at, self._part = now, part
            if self._bar is not None:
                self._bar.set_postfix_str(stage)
            if self._table is not None:
                self._table.show(stage)

    def _left(self, state) -> str:
        began, first = self._began
        if state.global_step <= first or state.global_step >= state.max_steps:
            return ""
        each = (time.monotonic() - began) / (state.global_step - first)
        return f"  about {duration(each * (state.max_steps - state.global_step))} left"


class NotebookTable:
    """A table that grows in the output of a notebook's cell, with a line on what is going on."""

    def __init__(self):
        self._rows: list[dict[str, str]] = []
        self._handle: Any = None

    def add(self, update: int, shown: dict[str, str]) -> None:
        """A row of what is watched of a log: of the time the sum alone, whose parts would make it wide."""
        row = {name: value for name, value in shown.items() if name != "evaluation"}
        if "an update" in row:
            row["an update"] = row["an update"].split(" (")[0]
        name = shown.get("evaluation")
        label = "" if name is None else f", evaluation {name}".rstrip()
        self._rows.append({"update": f"{update}{label}", **row})

    def show(self, status: str) -> None:
        ipython = import_module("IPython.display")
        content = ipython.HTML(self.html(status))
        if self._handle is None:
            self._handle = ipython.display(content, display_id=True)
        else:
            self._handle.update(content)

    def html(self, status: str) -> str:
        """The latest rows, evaluations among them, with a column for all that any has."""
        rows = self._rows[-_NOTEBOOK_ROWS:]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
        cells = ("".join(f"<td>{html.escape(row.get(name, ''))}</td>" for name in columns) for row in rows)
        body = "".join(f"<tr>{line}</tr>" for line in cells)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if rows else ""
        return f"<p>{html.escape(status)}</p>{table}"


@contextlib.contextmanager
def messages_above_the_bar() -> Iterator[None]:
    """In a terminal, warnings, logs of all libraries and what is printed are written above the bar, and not into its
    line."""
    if not sys.stderr.isatty():
        yield
        return
    # Libraries that write by handlers of their own, and the root, which writes for the others
    own = [each for each in map(logging.getLogger, ("transformers", "diffusers", "datasets")) if each.handlers]

    def show(message, category, filename, lineno, file=None, line=None):
        tqdm.write(warnings.formatwarning(message, category, filename, lineno, line).rstrip(), file=file or sys.stderr)

    shown_before = warnings.showwarning
    warnings.showwarning = show
    try:
        out = _AboveTheBar(sys.stdout) if sys.stdout.isatty() else sys.stdout
        with logging_redirect_tqdm(loggers=[logging.root, *own]), contextlib.redirect_stdout(out):
            yield
    finally:
        warnings.showwarning = shown_before


class _AboveTheBar:
    """`stream`, whose whole lines are written above the bar; what is flushed before, such as a prompt, where it is."""

    def __init__(self, stream: Any):
        self._stream, self._rest = stream, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        lines, newline, self._rest = (self._rest + text).rpartition("\n")
        if newline:
            with tqdm.external_write_mode(file=sys.stderr):
                self._stream.write(lines + newline)
                self._stream.flush()
        return len(text)

    def flush(self) -> None:
        self._stream.write(self._rest)
        self._rest = ""
        self._stream.flush()
