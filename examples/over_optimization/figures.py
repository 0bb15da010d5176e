"""Figures of the report, as PNG. They are made without pyplot, so that no global state is touched."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from analysis import Curve, Effect, Runs
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mechanism import RATIOS


# Okabe and Ito's colors, which color-blind readers can tell apart, without the yellow one that white paper swallows;
# lines that lie on each other differ in their dashes as well. The first arm is the one that others are compared with.
_COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888")
_DASHES = ("-", (0, (5, 1.5)))


def _figure(columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(4.6 * columns, 3.7), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _style(axes: Any, title: str, x: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(x)
    axes.grid(alpha=0.3)
    if x == "sampling step":
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, axes: Any, path: Path) -> None:
    """With one legend for all panels, below them, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), fontsize="medium")
    figure.savefig(path)


def _lines(runs: Runs) -> Iterator[tuple[dict[str, Any], list[Curve]]]:
    """How the line of each arm looks, and its curves."""
    for number, (arm, by_seed) in enumerate(runs.items()):
        if by_seed:
            look = {"color": _COLORS[number % 8], "linestyle": _DASHES[number % 2], "linewidth": 1.6}
            yield look | {"label": arm.split(": ")[-1]}, list(by_seed.values())


def _band(axes: Any, x: np.ndarray, columns: list[list[float]], line: dict[str, Any]) -> None:
    """The mean over seeds, and its 95% interval behind it."""
    effects = [Effect.of(column) for column in columns]
    mean, half = (np.array([getattr(effect, name) for effect in effects]) for name in ("mean", "half"))
    axes.plot(x, mean, **line)
    if not np.isnan(half).all():
        axes.fill_between(x, mean - half, mean + half, color=line["color"], alpha=0.12, linewidth=0)


def _over_updates(axes: Any, runs: Runs, score: str) -> None:
    """As far as all seeds of an arm have come."""
    for line, curves in _lines(runs):
        number = min(len(curve.updates) for curve in curves)
        _band(axes, curves[0].updates[:number], [[c.scores[score][i] for c in curves] for i in range(number)], line)


def _over_proxy(axes: Any, runs: Runs, score: str) -> None:
    for line, curves in _lines(runs):
        first, top = max(curve.scores["proxy"][0] for curve in curves), min(curve.highest for curve in curves)
        levels = np.linspace(first, top, 25)
        _band(axes, levels, [[curve.at_proxy(score, level) for curve in curves] for level in levels], line)


def gold(runs: Runs, path: Path) -> None:
    """Gold against proxy, and both over the updates."""
    figure, (against, proxy, over) = _figure(3)
    _over_proxy(against, runs, "gold")
    _over_updates(proxy, runs, "proxy")
    _over_updates(over, runs, "gold")
    _style(against, "gold (base model = 1) against proxy", "proxy")
    _style(proxy, "proxy, held-out prompts", "update")
    _style(over, "gold", "update")
    _save(figure, against, path)


def strict(runs: dict[str, Runs], path: Path) -> None:
    """The strict score over the updates, a panel for each noise."""
    figure, panels = _figure(len(runs))
    for axes, (noise, own) in zip(panels, runs.items(), strict=True):
        _over_updates(axes, own, "strict")
        _style(axes, f"strict score, held-out prompts; noise {noise}", "update")
        axes.sharey(panels[0])
    _save(figure, panels[0], path)


def values(runs: Runs, path: Path) -> None:
    """The reward, how many groups are constant, and diversity over the updates."""
    figure, (proxy, equal, diversity) = _figure(3)
    for axes, score, title in (
        (proxy, "proxy", "binary reward, held-out prompts"),
        (equal, "equal", "share of groups with equal rewards"),
        (diversity, "diversity", "diversity within a prompt"),
    ):
        _over_updates(axes, runs, score)
        _style(axes, title, "update")
    _save(figure, proxy, path)


def clipping(by_seed: dict[int, dict[str, Any]], lag: str, path: Path) -> None:
    """Shares outside of the clip range by step at a lag, and gradient norms."""
    figure, (below, above, norms) = _figure(3)
    rows = list(by_seed.values())
    for number, kind in enumerate(RATIOS):
        line = {"color": _COLORS[number], "linestyle": _DASHES[number % 2], "label": kind, "marker": "."}
        for axes, side in ((below, "below"), (above, "above")):
            columns = np.array([row["lags"][lag][kind][side] for row in rows])
            _band(axes, np.arange(columns.shape[1]), columns.T.tolist(), line)
            axes.set_ylim(0, 1)
    for number, name in enumerate(rows[0]["gradients"]):
        line = {"color": _COLORS[number], "linestyle": _DASHES[number % 2]}
        each = np.array([row["gradients"][name] for row in rows])
        norms.plot((each / each.max(axis=1, keepdims=True)).mean(axis=0), label=name, marker=".", **line)
    norms.set_yscale("log")
    norms.legend(fontsize="small")
    _style(below, "share of ratios below the clip range", "sampling step")
    _style(above, "share above", "sampling step")
    _style(norms, "gradient norm, largest = 1", "sampling step")
    _save(figure, below, path)


def walks(by_seed: dict[int, dict[str, Any]], path: Path) -> None:
    """Norm of the mean gradient over the number of groups, relative to the first."""
    figure, (axes,) = _figure(1)
    for number, name in enumerate(("absolute", "relative")):
        for seed, row in by_seed.items():
            groups = [int(key) for key in row[name]["norms"]]
            norms = np.array(list(row[name]["norms"].values()))
            label = f"{name} part" if seed == min(by_seed) else None
            axes.loglog(groups, norms / norms[0], color=_COLORS[number + 1], marker=".", label=label)
    axes.loglog(groups, [math.sqrt(groups[0] / n) for n in groups], color="0.5", linestyle=":", label="random walk")
    _style(axes, "norm of the mean gradient, first = 1", "groups")
    _save(figure, axes, path)
