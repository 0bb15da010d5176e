"""Curves of a training run, as PNG. Figures are made without pyplot, so that no global state is touched."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


# `rewards/{function}/mean` while training, `eval_…` or `eval_{data set}_…` in evaluations
_MEAN = re.compile(r"(?:eval_(?:(?P<dataset>.+)_)?)?rewards/(?P<name>.+)/mean")


def reward_curves(
    log_history: Sequence[Mapping[str, Any]] | str | os.PathLike, path: str | os.PathLike | None = None
) -> Figure:
    """
    One panel for each reward function: its mean over training with a band of one standard deviation of the pictures'
    rewards, and the evaluations' means as points.

    Args:
        log_history (`Sequence[Mapping]`, `str` or `os.PathLike`): `trainer.state.log_history`, or the
            `trainer_state.json` that holds it.
        path (`str` or `os.PathLike`, *optional*): PNG file to write; its folder is made if need be.

    Returns:
        [`~matplotlib.figure.Figure`]: the figure; its axes in the order in which the functions were logged.

    Raises:
        ValueError: if no reward has been logged.
    """
    if isinstance(log_history, str | os.PathLike):
        log_history = json.loads(Path(log_history).read_text(encoding="utf-8"))["log_history"]
    # Logged means by function and, for evaluations, data set: {name: {key: label}}
    keys: dict[str, dict[str, str]] = {}
    for entry in log_history:
        for key in entry:
            if match := _MEAN.fullmatch(key):
                label = "training" if not key.startswith("eval_") else f"evaluation {match['dataset'] or ''}".strip()
                keys.setdefault(match["name"], {})[key] = label
    if not keys:
        raise ValueError("The log has no rewards/{name}/mean: nothing was logged yet, or not by this trainer.")

    columns = min(len(keys), 3)
    rows = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(max(5.6, 4.4 * columns), 3.4 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, labels) in enumerate(keys.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        for key, label in labels.items():
            steps, means = _series(log_history, key)
            if label == "training":
                (line,) = axes.plot(steps, means, label=label, linewidth=1.5, marker="." if len(steps) < 30 else "")
                _band(axes, log_history, key, line.get_color())
            else:
                axes.plot(steps, means, label=label, linestyle="--", linewidth=1, marker="o", markersize=5)
        axes.set_title(name)
        axes.set_xlabel("update")
        axes.set_ylabel("reward")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    return figure


def _series(log_history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    entries = [entry for entry in log_history if _is_number(entry.get(key))]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def _band(axes: Any, log_history: Sequence[Mapping[str, Any]], key: str, color: str) -> None:
    std_key = key.removesuffix("mean") + "std"
    entries = [entry for entry in log_history if _is_number(entry.get(key)) and _is_number(entry.get(std_key))]
    if entries:
        axes.fill_between(
            [entry["step"] for entry in entries],
            [entry[key] - entry[std_key] for entry in entries],
            [entry[key] + entry[std_key] for entry in entries],
            color=color,
            alpha=0.15,
            linewidth=0,
            label="± 1 std of the pictures",
        )


def _is_number(value: Any) -> bool:
    # None stands for a mean over no picture
    return isinstance(value, int | float) and math.isfinite(value)
