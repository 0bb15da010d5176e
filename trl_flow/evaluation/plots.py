"""Curves of training runs, as PNG. Figures are made without pyplot, so that no global state is touched.

A run is what [`~trl_flow.evaluation.run_log.read_log_history`] takes, such as an `output_dir`. Where several can be
compared (`runs`), a dictionary gives their labels: `gradient_norms({"Flow-GRPO": "out/flow", "Guard": "out/guard"})`.

All functions return the figure, and write it to `path` (`str` or `os.PathLike`, *optional*) as PNG, whose folder is
made if need be. They raise `ValueError` if a run has not logged what they show, saying what to do. `last` (`int`,
*optional*) takes only the latest so many logs; by default all.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from trl_flow.evaluation.equal_proxy import gold_at_proxy, gold_history, not_logged
from trl_flow.evaluation.run_log import (
    LogHistory,
    Run,
    StepStatistics,
    is_number,
    read_log_history,
    step_histograms,
    step_statistics,
)
from trl_flow.functional.grpo import RATIO_BIN_EDGES


Runs = Run | Mapping[str, Run]

# `rewards/{function}/mean` while training, `eval_…` or `eval_{data set}_…` in evaluations
_MEAN = re.compile(r"(?:eval_(?:(?P<dataset>.+)_)?)?rewards/(?P<name>.+)/mean")
_STEP = "sampling step (0: noisiest)"
_MORE_UPDATES = "Train with steps_per_generation a multiple of gradient_accumulation_steps, or num_iterations above 1"
_POINTS = {"marker": "o", "markersize": 4}
_BARS = {"elinewidth": 0.8, "capsize": 2}


def reward_curves(log_history: Run, path: str | os.PathLike | None = None) -> Figure:
    """One panel for each reward function, in the order in which they were logged: its mean over training with a band
    of one standard deviation of the images' rewards, and the evaluations' means as points."""
    log_history = read_log_history(log_history)
    # Logged means by function and, for evaluations, data set: {name: {key: label}}
    keys: dict[str, dict[str, str]] = {}
    for key in dict.fromkeys(key for entry in log_history for key in entry):
        if match := _MEAN.fullmatch(key):
            label = "training" if not key.startswith("eval_") else f"evaluation {match['dataset'] or ''}".strip()
            keys.setdefault(match["name"], {})[key] = label
    if not keys:
        raise ValueError("The log has no rewards/{name}/mean: nothing was logged yet, or not by this trainer.")
    columns = min(len(keys), 3)
    rows = math.ceil(len(keys) / columns)
    figure = new_figure(max(5.6, 4.4 * columns), 3.4 * rows)
    for number, (name, labels) in enumerate(keys.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        for key, label in labels.items():
            steps, means = _series(log_history, key)
            if label != "training":
                axes.plot(steps, means, label=label, linestyle="--", linewidth=1, marker="o", markersize=5)
                continue
            (line,) = axes.plot(steps, means, label=label, linewidth=1.5, marker="." if len(steps) < 30 else "")
            steps, means, stds = map(np.array, _series(log_history, key, key.removesuffix("mean") + "std"))
            if len(steps):
                style = {"color": line.get_color(), "alpha": 0.15, "linewidth": 0}
                axes.fill_between(steps, means - stds, means + stds, label="± 1 std of the images", **style)
        _label(axes, name, "update", "reward")
    return saved_figure(figure, path)


def ratio_distribution(runs: Runs, path: str | os.PathLike | None = None, *, last: int | None = None) -> Figure:
    """Mean and spread of the importance ratio at each trained step (GRPO-Guard, Figure 2): left the mean less 1, with
    bars of one standard deviation, right the standard deviation alone. Refused where all ratios are exactly 1."""
    rows = _off_policy_rows(
        runs, "ratio_std", last, "no importance ratios of single steps: nothing was trained yet, or not on steps"
    )
    figure = new_figure(9.0, 3.6)
    mean, std = figure.subplots(1, 2)
    for label, steps, found, offset in _side_by_side(rows, 0.12):
        stds, shifts = [row.ratio_std for row in found], [row.ratio_mean - 1 for row in found]
        mean.errorbar(steps + offset, shifts, yerr=stds, label=label, linewidth=1.5, **_POINTS, **_BARS)
        std.plot(steps, stds, label=_with_spread(label, stds), **_POINTS)
    mean.axhline(0, color="black", linewidth=0.8, linestyle=":")
    std.set_yscale("log")
    _label(mean, "importance ratio", _STEP, "mean - 1, ± 1 std")
    _label(std, "its spread", _STEP, "std")
    return saved_figure(figure, path)


def ratio_histograms(runs: Runs, path: str | os.PathLike | None = None, *, last: int | None = None) -> Figure:
    """
    The distribution of the importance ratio at each trained step (GRPO-Guard, Figure 2), one panel for each run, of
    the updates after the first of each sampling phase. The ratio less 1 is in clip ranges: dashed lines are the
    clipping, and the outermost points are all that lies beyond.
    """
    found = {label: step_histograms(history, last=last) for label, history in _histories(runs).items()}
    for label, counts in found.items():
        if not counts:
            what = "no histograms of single steps' ratios, which are of updates after the first of each sampling phase"
            raise ValueError(not_logged(label, f"{what}. {_MORE_UPDATES}, by a method that trains on steps"))
    edges, figure = np.array(RATIO_BIN_EDGES), new_figure(1.4 + 4.6 * len(found), 3.8)
    centers = np.concatenate([[edges[0] - 0.5], (edges[:-1] + edges[1:]) / 2, [edges[-1] + 0.5]])
    scale = ScalarMappable(Normalize(0, max(1, *(step for counts in found.values() for step in counts))), "viridis")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (label, counts) in zip(panels, found.items(), strict=True):
        for step, values in counts.items():
            shares, color = np.array(values) / sum(values), scale.to_rgba(step)
            axes.plot(centers[1:-1], shares[1:-1], color=color, linewidth=1.2)
            axes.plot(centers[[0, -1]], shares[[0, -1]], color=color, **_POINTS, linestyle="")
        for side in (-1, 1):
            axes.axvline(side, color="black", linewidth=0.8, linestyle="--")
        _label(axes, label or "importance ratio", "(r - 1) / clip range", "")
        axes.set_xticks([centers[0], *range(-3, 4), centers[-1]], ["< -5", *range(-3, 4), "> 5"])
    panels[0].set_ylabel("share of samples")
    panels[0].yaxis.set_major_formatter(PercentFormatter(xmax=1))
    figure.colorbar(scale, ax=list(panels), label=_STEP, ticks=MaxNLocator(integer=True))
    return saved_figure(figure, path)


def gradient_norms(runs: Runs, path: str | os.PathLike | None = None, *, last: int | None = None) -> Figure:
    """Mean norm of each trained step's policy gradient (GRPO-Guard, Figure 3), with the largest over the smallest."""
    missing = "no gradient norms of single steps. Train with diagnostics_steps=1, or more to do it less often"
    rows = _step_rows(runs, "grad_norm", last, missing)
    figure = new_figure(5.6, 3.6)
    axes = figure.subplots()
    for label, found in rows.items():
        norms = [row.grad_norm for row in found]
        axes.plot([row.step for row in found], norms, label=_with_spread(label, norms), **_POINTS)
    axes.set_yscale("log")
    _label(axes, "policy gradient", _STEP, "norm")
    return saved_figure(figure, path)


def clip_shares(runs: Runs, path: str | os.PathLike | None = None, *, last: int | None = None) -> Figure:
    """Share of importance ratios below and above the clip range at each trained step, whatever the advantage's sign
    (GRPO-Guard's supplement, Figure 4). Refused where all ratios are exactly 1."""
    rows = _off_policy_rows(
        runs, "clip_low", last, "no clip shares of single steps: nothing was trained yet, or not on steps"
    )
    figure = new_figure(9.0, 3.6)
    low, high = figure.subplots(1, 2, sharey=True)
    width = 0.8 / len(rows)
    for label, steps, found, offset in _side_by_side(rows, width):
        low.bar(steps + offset, [row.clip_low for row in found], width, label=label)
        high.bar(steps + offset, [row.clip_high for row in found], width, label=label)
    low.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    _label(low, "ratio below 1 - epsilon", _STEP, "samples")
    _label(high, "ratio above 1 + epsilon", _STEP, "samples")
    return saved_figure(figure, path)


def reward_std(runs: Runs, path: str | os.PathLike | None = None) -> Figure:
    """Standard deviation of a sampling phase's rewards, over training (VGPO, Figure 1), and its running mean."""
    figure = new_figure(5.6, 3.6)
    axes = figure.subplots()
    for label, history in _histories(runs).items():
        steps, values = _series(history, "reward_std")
        if not steps:
            raise ValueError(not_logged(label, "no reward_std: nothing was trained yet, or not by this trainer"))
        window = max(1, len(values) // 20)
        means = np.convolve(values, np.full(window, 1 / window), mode="valid")
        color = axes.plot(steps, values, linewidth=0.8, alpha=0.35)[0].get_color() if window > 1 else None
        axes.plot(steps[window - 1 :], means, color=color, linewidth=1.8, label=label)
    axes.set_ylim(bottom=0)
    _label(axes, "spread of rewards", "update", "reward std")
    return saved_figure(figure, path)


def proxy_against_gold(runs: Runs, path: str | os.PathLike | None = None, *, eval_name: str | None = None) -> Figure:
    """The optimized reward (the proxy) and the gold average of the evaluations (GRPO-Guard, Figures 1 and 4): both
    over training, and one against the other. Gold is 1 for the base model; bars are one standard error. `eval_name`
    is which of several evaluation sets; by default the first that was logged."""
    figure = new_figure(12.6, 3.8)
    proxy, gold, both = figure.subplots(1, 3)
    for label, history in _histories(runs).items():
        found = gold_history(history, eval_name=eval_name, label=label)
        style = {"label": label, "linewidth": 1.3, **_POINTS}
        proxy.plot(found.updates, found.proxy, **style)
        gold.errorbar(found.updates, found.gold, yerr=np.nan_to_num(found.standard_errors), **style, **_BARS)
        (line,) = both.plot(found.proxy, found.gold, **style)
        # Where the run stands: paths turn back
        both.plot(found.proxy[-1:], found.gold[-1:], marker="s", markersize=8, color=line.get_color(), linestyle="")
    for axes in (gold, both):
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    _label(proxy, "proxy (optimized)", "update", "evaluation reward")
    _label(gold, "gold (never optimized)", "update", "gold average, base model = 1")
    _label(both, "gold against proxy (square: last)", "evaluation reward", "gold average")
    both.xaxis.set_major_locator(MaxNLocator(6))
    return saved_figure(figure, path)


def equal_proxy(
    runs: Mapping[str, Run],
    path: str | os.PathLike | None = None,
    *,
    levels: Sequence[float] | None = None,
    eval_name: str | None = None,
    proxy: str | None = None,
) -> Figure:
    """
    Gold against proxy, and each run's gold at equal proxy (VGPO, Figure 4c), with bars of its 95% interval: the points
    of [`~trl_flow.evaluation.equal_proxy.gold_at_proxy`], which has the same arguments. A dotted line is a level.
    """
    options = {"eval_name": eval_name, "proxy": proxy}
    points = gold_at_proxy(runs, levels, **options)
    found = {label: gold_history(run, label=label, **options) for label, run in runs.items()}
    # Side by side, or the bars of several would hide each other
    width = 0.012 * np.ptp(np.concatenate([history.proxy for history in found.values()]))
    figure = new_figure(7.2, 4.4)
    axes = figure.subplots()
    for number, (label, history) in enumerate(found.items()):
        shift = width * (number - (len(found) - 1) / 2)
        (line,) = axes.plot(history.proxy, history.gold, label=label, linewidth=1.0, marker=".", alpha=0.6)
        own = [point for point in points if point.run == label]
        place, gold, bars = zip(*((point.level + shift, point.gold, point.half_width) for point in own), strict=True)
        style = {"color": line.get_color(), "linestyle": "", "marker": "D", "markersize": 6, "capsize": 3}
        axes.errorbar(place, gold, yerr=np.nan_to_num(bars), **style)
    for level in dict.fromkeys(point.level for point in points):
        axes.axvline(level, color="black", linewidth=0.8, linestyle=":")
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    name = proxy or "evaluation reward"
    _label(axes, "gold at equal proxy", f"{name} (proxy)", "gold average, base model = 1")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    return saved_figure(figure, path)


def all_plots(run: Run, folder: str | os.PathLike | None = None) -> dict[str, Path]:
    """Draws every figure that one run has logged the values for, into `folder` (by default `plots` in the run's
    folder), and returns the PNG file of each by the name of its function. `ValueError` if there is no log, or `folder`
    is missing and the run is not given by its folder."""
    history = read_log_history(run)
    if folder is None:
        if not isinstance(run, str | os.PathLike) or not Path(run).is_dir():
            raise ValueError("folder is missing: it can only be left out when the run is given by its folder.")
        folder = Path(run, "plots")
    drawn = {}
    single = (reward_curves, ratio_distribution, ratio_histograms, gradient_norms, clip_shares, reward_std)
    for draw in (*single, proxy_against_gold):
        path = Path(folder, f"{draw.__name__}.png")
        with suppress(ValueError):
            draw(history, path)
            drawn[draw.__name__] = path
    return drawn


def _histories(runs: Runs) -> dict[str, LogHistory]:
    """Logs by label; a single run has none."""
    if runs == {}:
        raise ValueError("There is no run to draw: the dictionary is empty.")
    return {label: read_log_history(run) for label, run in (runs if isinstance(runs, Mapping) else {"": runs}).items()}


def _step_rows(runs: Runs, value: str, last: int | None, missing: str) -> dict[str, list[StepStatistics]]:
    """The statistics of the steps that have a value, by run; `ValueError` if a run has none."""
    rows = {}
    for label, history in _histories(runs).items():
        rows[label] = [row for row in step_statistics(history, last=last) if getattr(row, value) is not None]
        if not rows[label]:
            raise ValueError(not_logged(label, missing))
    return rows


def _off_policy_rows(runs: Runs, value: str, last: int | None, missing: str) -> dict[str, list[StepStatistics]]:
    rows = _step_rows(runs, value, last, missing)
    what = (
        "importance ratios of exactly 1 only: each sampling phase serves a single update, and the ratio is 1 there by "
        f"definition. {_MORE_UPDATES}"
    )
    for label, found in rows.items():
        if not any(row.ratio_std for row in found):
            raise ValueError(not_logged(label, what))
    return rows


def _series(log_history: LogHistory, *keys: str) -> list[list[float]]:
    """The steps at which all keys were logged, and the values of each."""
    entries = [entry for entry in log_history if all(is_number(entry.get(key)) for key in keys)]
    return [[entry[key] for entry in entries] for key in ("step", *keys)]


def _side_by_side(rows: dict[str, list], width: float) -> Iterator[tuple[str, np.ndarray, list, float]]:
    """Label, steps, rows and offset of each run, so that the bars of several do not hide each other."""
    for i, (label, found) in enumerate(rows.items()):
        yield label, np.array([row.step for row in found]), found, width * (i - (len(rows) - 1) / 2)


def _with_spread(label: str, values: Sequence[float]) -> str:
    """The label with how much the values of the steps differ."""
    spread = f"max/min {max(values) / min(values):.3g}" if min(values) > 0 else "one step has 0"
    return f"{label} ({spread})" if label else spread


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, without pyplot."""
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def saved_figure(figure: Figure, path: str | os.PathLike | None) -> Figure:
    """The figure, written to `path` as PNG unless that is `None`."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    return figure


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y, axisbelow=True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    # The only run has no label
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small")
