"""The log of a finished or running training run, and what it says about each trained step."""

import json
import math
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


# What the trainer writes as training goes on
LOG_NAME, _STATE_NAME = "log_history.jsonl", "trainer_state.json"
PROGRESS_NAME = "progress.json"  # where the run stands
# Of a run, as `time/{part}` has their seconds
PARTS = ("compiling", "sampling", "decoding", "scoring", "updating", "logging", "saving", "evaluating")
BETWEEN = ("logging", "saving", "evaluating")  # of these, what is between updates, and not in `step_time`

# The table shows the latest of so many logs, so that it says how training is doing and not how it has been
_TABLE_LOGS = 50

LogHistory = Sequence[Mapping[str, Any]]
Run = LogHistory | str | os.PathLike

_STEP_METRIC = re.compile(r"(ratio/mean|ratio/std|clip_ratio/low|clip_ratio/high|grad_norm)(?:_|/)step_(\d+)")

_HISTOGRAM = re.compile(r"ratio/histogram_step_(\d+)")


def read_log_history(run: Run) -> LogHistory:
    """The logs of a run, in order. It is a run's `output_dir`, finished or running; a checkpoint's folder; a
    `trainer_state.json` or `log_history.jsonl`; or `trainer.state.log_history` itself. `ValueError` without a log."""
    if not isinstance(run, str | os.PathLike):
        return run
    path = Path(run)
    if path.is_dir():
        path = _newest_log(path)
    try:
        text = path.read_text(encoding="utf-8")
        # The last line of a running training may be half written
        whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        logs = list(map(json.loads, whole)) if path.suffix == ".jsonl" else json.loads(text)["log_history"]
        if not isinstance(logs, list) or not all(isinstance(log, dict) and "step" in log for log in logs):
            raise TypeError("it is not a list of logs with a step each")
        return logs
    except OSError as error:
        raise ValueError(f"The log {path} cannot be read: {error}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a log of a training run ({type(error).__name__}: {error}). Give the run's output_dir, or "
            f"the {_STATE_NAME} or {LOG_NAME} in it."
        ) from error


def _newest_log(folder: Path) -> Path:
    steps = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    steps = sorted((step for step in steps if step.isdigit()), key=int, reverse=True)
    paths = [folder / name for name in (LOG_NAME, _STATE_NAME, *(f"checkpoint-{s}/{_STATE_NAME}" for s in steps))]
    if found := next(filter(Path.is_file, paths), None):
        return found
    raise ValueError(
        f"{folder} has no {LOG_NAME}, no {_STATE_NAME} and no checkpoint with one: nothing has been logged there yet, "
        "or it is not the output_dir of a training run."
    )


@dataclass(frozen=True)
class StepStatistics:
    """What was logged of one trained step (0 is the noisiest) over several logs; `None` where nothing was. Mean and
    standard deviation are those of the importance ratio over all samples of all the logs, `clip_low` and `clip_high`
    the share of ratios below `1 - epsilon` and above `1 + epsilon_high`, whatever the advantage's sign, and
    `grad_norm` is the mean norm of the step's policy gradient."""

    step: int
    ratio_mean: float | None
    ratio_std: float | None
    clip_low: float | None
    clip_high: float | None
    grad_norm: float | None


def step_statistics(log_history: LogHistory, *, last: int | None = None) -> list[StepStatistics]:
    """Means over logs for each trained step, in the steps' order; each log counts the same. `last`, at least 1, takes
    only the latest so many logs with such values."""
    _check_last(last)
    logs = list(filter(None, map(_step_values, log_history)))
    values: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for found in logs if last is None else logs[-last:]:
        for (name, step), value in found.items():
            values[step][name].append(value)
    rows = []
    for step, found in sorted(values.items()):
        means, stds = found["ratio/mean"], found["ratio/std"]
        # Of all samples: the logs' own spreads, and that of their means
        is_known = stds and len(stds) == len(means)
        spread = math.sqrt(_mean([std**2 for std in stds]) + statistics.pvariance(means)) if is_known else None
        others = (_mean(found[name]) for name in ("clip_ratio/low", "clip_ratio/high", "grad_norm"))
        rows.append(StepStatistics(step, _mean(means), spread, *others))
    return rows


def step_histograms(log_history: LogHistory, *, last: int | None = None) -> dict[int, list[int]]:
    """Counts of the importance ratios by trained step, in the 47 bins of
    [`~trl_flow.functional.ratio_histogram`], added up over logs. `last`, at least 1, takes only the latest so many
    logs that have some."""
    _check_last(last)
    logs = [found for found in map(_histograms, log_history) if found]
    counts: dict[int, list[int]] = {}
    for found in logs if last is None else logs[-last:]:
        for step, values in found.items():
            before = counts.get(step, [0] * len(values))
            counts[step] = [a + b for a, b in zip(before, values, strict=True)]
    return dict(sorted(counts.items()))


def _histograms(log: Mapping[str, Any]) -> dict[int, list[int]]:
    return {int(match[1]): value for key, value in log.items() if (match := _HISTOGRAM.fullmatch(key))}


def _check_last(last: int | None) -> None:
    if last is not None and last < 1:
        raise ValueError(f"last is {last}, but must be a number of logs, at least 1, or None for all.")


def _mean(numbers: Sequence[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None


def _step_values(log: Mapping[str, Any]) -> dict[tuple[str, int], float]:
    found = {_STEP_METRIC.fullmatch(key): value for key, value in log.items() if is_number(value)}
    return {(match[1], int(match[2])): value for match, value in found.items() if match}


def diagnostics_table(log_history: LogHistory) -> str | None:
    """The latest logs' statistics as a Markdown table, one row for each trained step; `None` if there are none."""
    logs = [entry for entry in log_history[-4 * _TABLE_LOGS :] if _step_values(entry)][-_TABLE_LOGS:]
    if not logs:
        return None
    rows = step_statistics(logs)
    lines = [
        f"Means over the {len(logs)} latest logs, of updates up to {logs[-1]['step']}. Step 0 is the noisiest.",
        "",
        "| step | ratio mean - 1 | ratio std | below 1 - epsilon | above 1 + epsilon | gradient norm |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    forms = ("+.2e", ".2e", ".1%", ".1%", ".3g")
    for row in rows:
        shift = None if row.ratio_mean is None else row.ratio_mean - 1
        values = (shift, row.ratio_std, row.clip_low, row.clip_high, row.grad_norm)
        cells = ["-" if value is None else format(value, form) for value, form in zip(values, forms, strict=True)]
        lines.append(f"| {row.step} | {' | '.join(cells)} |")
    if all(row.grad_norm is None for row in rows):
        lines += ["", "Gradient norms are measured with `diagnostics_steps=1` (or more, to do it less often)."]
    return "\n".join(lines) + "\n"


def is_number(value: Any) -> bool:
    """Whether a logged value is one; `None` stands for a mean over nothing."""
    return isinstance(value, int | float) and math.isfinite(value)
