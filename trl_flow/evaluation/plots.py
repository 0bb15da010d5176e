"""Curves of training runs, as PNG. Figures are made without pyplot, so that no global state is touched.

A run is given as its `output_dir`, finished or still running, as the file of its logs or as `log_history` itself, see
[`~trl_flow.evaluation.run_log.read_log_history`]. Where several can be compared, a dictionary of them gives their
labels: `gradient_norms({"Flow-GRPO": "out/flow", "GRPO-Guard": "out/guard"})`.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from trl_flow.evaluation.run_log import LogHistory, Run, StepStatistics, is_number, read_log_history, step_statistics


# `rewards/{function}/mean` while training, `eval_…` or `eval_{data set}_…` in evaluations
_MEAN = re.compile(r"(?:eval_(?:(?P<dataset>.+)_)?)?rewards/(?P<name>.+)/mean")


def reward_curves(log_history: Run, path: str | os.PathLike | None = None) -> Figure:
    """
    One panel for each reward function: its mean over training with a band of one standard deviation of the images'
    rewards, and the evaluations' means as points.

    Args:
        log_history (`Sequence[Mapping]`, `str` or `os.PathLike`): the run.
        path (`str` or `os.PathLike`, *optional*): PNG file to write; its folder is made if need be.

    Returns:
        [`~matplotlib.figure.Figure`]: the figure; its axes in the order in which the functions were logged.

    Raises:
        ValueError: if no reward has been logged.
    """
    log_history = read_log_history(log_history)
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
    figure = new_figure(max(5.6, 4.4 * columns), 3.4 * rows)
    for place, (name, labels) in enumerate(keys.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        for key, label in labels.items():
            steps, means = _series(log_history, key)
            if label == "training":
                (line,) = axes.plot(steps, means, label=label, linewidth=1.5, marker="." if len(steps) < 30 else "")
                _band(axes, log_history, key, line.get_color())
            else:
                axes.plot(steps, means, label=label, linestyle="--", linewidth=1, marker="o", markersize=5)
        _label(axes, title=name, x="update", y="reward", legend=True)
    return saved_figure(figure, path)


def ratio_distribution(
    runs: Run | Mapping[str, Run], path: str | os.PathLike | None = None, *, last: int | None = None
) -> Figure:
    """
    Mean and spread of the importance ratio at each trained step (GRPO-Guard, Figure 2).

    Left the mean less 1, with bars of one standard deviation; right the standard deviation alone.

    Args:
        runs: one run, or several by label.
        path (`str` or `os.PathLike`, *optional*): PNG file to write.
        last (`int`, *optional*): only the latest so many logs; default: all.

    Raises:
        ValueError: if no ratio has been logged, or all are exactly 1.
    """
    rows = _step_rows(runs, lambda row: row.ratio_std, last, "no importance ratios: nothing was trained yet")
    rows = _off_policy(rows)
    figure = new_figure(9.0, 3.6)
    mean, std = figure.subplots(1, 2)
    for i, (label, found) in enumerate(rows.items()):
        # Side by side, so that the bars of several runs do not hide each other
        places = [row.step + 0.12 * (i - (len(rows) - 1) / 2) for row in found]
        mean.errorbar(
            places,
            [row.ratio_mean - 1 for row in found],
            yerr=[row.ratio_std for row in found],
            label=label,
            marker="o",
            markersize=4,
            linewidth=1.5,
            elinewidth=0.8,
            capsize=2,
        )
        std.plot(
            [row.step for row in found],
            [row.ratio_std for row in found],
            label=_with_spread(label, [row.ratio_std for row in found]),
            marker="o",
            markersize=4,
        )
    mean.axhline(0, color="black", linewidth=0.8, linestyle=":")
    std.set_yscale("log")
    _label(mean, title="importance ratio", x="sampling step (0: noisiest)", y="mean - 1, ± 1 std", legend=_named(rows))
    _label(std, title="its spread", x="sampling step (0: noisiest)", y="std", legend=True)
    return saved_figure(figure, path)


def gradient_norms(
    runs: Run | Mapping[str, Run], path: str | os.PathLike | None = None, *, last: int | None = None
) -> Figure:
    """
    Mean norm of the policy gradient of each trained step (GRPO-Guard, Figure 3), with the largest over the smallest.

    Args:
        runs: one run, or several by label.
        path (`str` or `os.PathLike`, *optional*): PNG file to write.
        last (`int`, *optional*): only the latest so many logs; default: all.

    Raises:
        ValueError: if no gradient norm of a step has been logged.
    """
    missing = "no gradient norms of single steps. Train with diagnostics_steps=1, or more to do it less often"
    rows = _step_rows(runs, lambda row: row.grad_norm, last, missing)
    figure = new_figure(5.6, 3.6)
    axes = figure.subplots()
    for label, found in rows.items():
        norms = [row.grad_norm for row in found]
        axes.plot(
            [row.step for row in found],
            norms,
            label=_with_spread(label, norms),
            marker="o",
            markersize=4,
        )
    axes.set_yscale("log")
    _label(axes, title="policy gradient", x="sampling step (0: noisiest)", y="norm", legend=True)
    return saved_figure(figure, path)


def clip_shares(
    runs: Run | Mapping[str, Run], path: str | os.PathLike | None = None, *, last: int | None = None
) -> Figure:
    """
    Share of importance ratios below and above the clip range at each trained step, whatever the advantage's sign
    (GRPO-Guard's supplement, Figure 4).

    Args:
        runs: one run, or several by label.
        path (`str` or `os.PathLike`, *optional*): PNG file to write.
        last (`int`, *optional*): only the latest so many logs; default: all.

    Raises:
        ValueError: if no clip share has been logged, or all ratios are exactly 1.
    """
    rows = _step_rows(runs, lambda row: row.clip_low, last, "no clip shares: nothing was trained yet")
    rows = _off_policy(rows)
    figure = new_figure(9.0, 3.6)
    low, high = figure.subplots(1, 2, sharey=True)
    width = 0.8 / len(rows)
    for i, (label, found) in enumerate(rows.items()):
        places = [row.step + width * (i - (len(rows) - 1) / 2) for row in found]
        low.bar(places, [row.clip_low for row in found], width, label=label)
        high.bar(places, [row.clip_high for row in found], width, label=label)
    low.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    for axes, title in ((low, "ratio below 1 - epsilon"), (high, "ratio above 1 + epsilon")):
        _label(axes, title=title, x="sampling step (0: noisiest)", y="samples", legend=_named(rows))
    return saved_figure(figure, path)


def reward_std(runs: Run | Mapping[str, Run], path: str | os.PathLike | None = None) -> Figure:
    """
    The standard deviation of the rewards of a sampling phase, over training (VGPO, Figure 1), and its running mean.

    Args:
        runs: one run, or several by label.
        path (`str` or `os.PathLike`, *optional*): PNG file to write.

    Raises:
        ValueError: if no spread of rewards has been logged.
    """
    figure = new_figure(5.6, 3.6)
    axes = figure.subplots()
    histories = _histories(runs)
    for label, history in histories.items():
        steps, values = _series(history, "reward_std")
        if not steps:
            raise ValueError(_missing(label, "no reward_std: nothing was trained yet, or not by this trainer"))
        window = max(1, len(values) // 20)
        (line,) = axes.plot(steps, values, linewidth=0.8 if window > 1 else 1.5, alpha=0.35 if window > 1 else 1.0)
        if window > 1:
            means = [sum(values[i : i + window]) / window for i in range(len(values) - window + 1)]
            axes.plot(steps[window - 1 :], means, color=line.get_color(), linewidth=1.8, label=label)
        else:
            line.set_label(label)
    axes.set_ylim(bottom=0)
    _label(axes, title="spread of rewards", x="update", y="reward std", legend=_named(histories))
    return saved_figure(figure, path)


def proxy_against_gold(
    runs: Run | Mapping[str, Run], path: str | os.PathLike | None = None, *, eval_name: str | None = None
) -> Figure:
    """
    The optimized reward (the proxy) and the gold average of the evaluations (GRPO-Guard, Figures 1 and 4): both over
    training, and one against the other. Gold is 1 for the base model; bars are one standard error.

    Args:
        runs: one run, or several by label.
        path (`str` or `os.PathLike`, *optional*): PNG file to write.
        eval_name (`str`, *optional*): which of several evaluation sets; default: the first that was logged.

    Raises:
        ValueError: if no gold score has been logged, or not of that set.
    """
    figure = new_figure(12.6, 3.8)
    proxy, gold, both = figure.subplots(1, 3)
    histories = _histories(runs)
    for label, history in histories.items():
        prefix = _gold_prefix(history, eval_name, label)
        entries = [
            entry
            for entry in history
            if is_number(entry.get(f"{prefix}_gold/average")) and is_number(entry.get(f"{prefix}_reward"))
        ]
        steps = [entry["step"] for entry in entries]
        rewards = [entry[f"{prefix}_reward"] for entry in entries]
        averages = [entry[f"{prefix}_gold/average"] for entry in entries]
        errors = [entry.get(f"{prefix}_gold/average_std_err") for entry in entries]
        errors = [error if is_number(error) else 0.0 for error in errors]
        style = {"label": label, "marker": "o", "markersize": 4, "linewidth": 1.3}
        proxy.plot(steps, rewards, **style)
        gold.errorbar(steps, averages, yerr=errors, elinewidth=0.8, capsize=2, **style)
        (line,) = both.plot(rewards, averages, **style)
        # Where the run stands: paths turn back
        both.plot(rewards[-1:], averages[-1:], marker="s", markersize=8, color=line.get_color(), linestyle="")
    for axes in (gold, both):
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    legend = _named(histories)
    _label(proxy, title="proxy (optimized)", x="update", y="evaluation reward", legend=legend)
    _label(gold, title="gold (never optimized)", x="update", y="gold average, base model = 1", legend=legend)
    _label(both, title="gold against proxy (square: last)", x="evaluation reward", y="gold average", legend=legend)
    both.xaxis.set_major_locator(MaxNLocator(6))
    return saved_figure(figure, path)


def all_plots(run: Run, folder: str | os.PathLike | None = None) -> dict[str, Path]:
    """
    Draws every figure that one run has logged the values for.

    Args:
        run: the run.
        folder (`str` or `os.PathLike`, *optional*): where to write; default: `plots` in the run's folder.

    Returns:
        `dict[str, Path]`: the PNG file of each figure, by the name of its function; figures without values are left
        out.

    Raises:
        ValueError: if there is no log, or `folder` is missing for a run that is none.
    """
    history = read_log_history(run)
    if folder is None:
        if not isinstance(run, str | os.PathLike) or not Path(run).is_dir():
            raise ValueError("folder is missing: it can only be left out when the run is given by its folder.")
        folder = Path(run, "plots")
    drawn = {}
    for draw in (reward_curves, ratio_distribution, gradient_norms, clip_shares, reward_std, proxy_against_gold):
        path = Path(folder, f"{draw.__name__}.png")
        try:
            draw(history, path)
        except ValueError:
            continue
        drawn[draw.__name__] = path
    return drawn


def _histories(runs: Run | Mapping[str, Run]) -> dict[str, LogHistory]:
    """Logs by label; a single run has none."""
    if isinstance(runs, Mapping):
        if not runs:
            raise ValueError("There is no run to draw: the dictionary is empty.")
        return {label: read_log_history(run) for label, run in runs.items()}
    return {"": read_log_history(runs)}


def _step_rows(
    runs: Run | Mapping[str, Run], value: Callable[[StepStatistics], float | None], last: int | None, missing: str
) -> dict[str, list[StepStatistics]]:
    """The statistics of the steps that have a value, by run; `ValueError` if a run has none."""
    rows = {}
    for label, history in _histories(runs).items():
        rows[label] = [row for row in step_statistics(history, last=last) if value(row) is not None]
        if not rows[label]:
            raise ValueError(_missing(label, missing))
    return rows


def _off_policy(rows: dict[str, list[StepStatistics]]) -> dict[str, list[StepStatistics]]:
    for label, found in rows.items():
        if not any(row.ratio_std for row in found):
            raise ValueError(
                _missing(
                    label,
                    "importance ratios of exactly 1 only: each sampling phase serves a single update, and the ratio "
                    "is 1 there by definition. Train with steps_per_generation a multiple of "
                    "gradient_accumulation_steps, or num_iterations above 1",
                )
            )
    return rows


def _gold_prefix(history: LogHistory, eval_name: str | None, label: str) -> str:
    suffix = "_gold/average"
    prefixes = dict.fromkeys(key.removesuffix(suffix) for entry in history for key in entry if key.endswith(suffix))
    if not prefixes:
        raise ValueError(
            _missing(label, "no gold scores. Train with eval_reward_funcs, an eval_dataset and eval_strategy='steps'")
        )
    wanted = next(iter(prefixes)) if eval_name is None else f"eval_{eval_name}"
    if wanted not in prefixes:
        names = [prefix.removeprefix("eval").removeprefix("_") or "(without a name)" for prefix in prefixes]
        raise ValueError(_missing(label, f"no gold scores of an evaluation set {eval_name!r}, but of {names}"))
    return wanted


def _missing(label: str, what: str) -> str:
    return f"The log{f' of {label!r}' if label else ''} has {what}."


def _with_spread(label: str, values: Sequence[float]) -> str:
    """The label with how much the values of the steps differ."""
    spread = f"max/min {max(values) / min(values):.3g}" if min(values) > 0 else "one step has 0"
    return f"{label} ({spread})" if label else spread


def _named(runs: Mapping[str, Any]) -> bool:
    return any(runs)


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _label(axes: Axes, *, title: str, x: str, y: str, legend: bool) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    if legend:
        axes.legend(fontsize="small")


def saved_figure(figure: Figure, path: str | os.PathLike | None) -> Figure:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    return figure


def _series(log_history: LogHistory, key: str) -> tuple[list[int], list[float]]:
    entries = [entry for entry in log_history if is_number(entry.get(key))]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def _band(axes: Axes, log_history: LogHistory, key: str, color: str) -> None:
    std_key = key.removesuffix("mean") + "std"
    entries = [entry for entry in log_history if is_number(entry.get(key)) and is_number(entry.get(std_key))]
    if entries:
        axes.fill_between(
            [entry["step"] for entry in entries],
            [entry[key] - entry[std_key] for entry in entries],
            [entry[key] + entry[std_key] for entry in entries],
            color=color,
            alpha=0.15,
            linewidth=0,
            label="± 1 std of the images",
        )
