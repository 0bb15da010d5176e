"""Figures of the report, as PNG. They are made without pyplot, so that no global state is touched."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from results import Curve


def _figure(columns: int, rows: int = 1) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _style(axes: Any, title: str, x: str, y: str = "") -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def _color(number: int) -> Any:
    return f"C{number}" if number < 10 else "black"


def training_curves(runs: dict[str, dict[int, Curve]], path: Path) -> None:
    """Proxy and gold over training, gold against proxy, diversity, and the spread of the reward while training."""
    figure, ((proxy, gold, against), (strict, diversity, deviation)) = _figure(3, 2)
    for number, (arm, by_seed) in enumerate(runs.items()):
        curves = list(by_seed.values())
        color, label = _color(number), arm.split("/")[1]
        steps = curves[0].steps
        for axes, name in ((proxy, "proxy"), (gold, "gold"), (strict, "strict"), (diversity, "diversity")):
            values = np.array([curve.scores[name] for curve in curves])
            axes.plot(steps, values.mean(axis=0), color=color, label=label)
            if len(curves) > 1:
                low, high = values.min(axis=0), values.max(axis=0)
                axes.fill_between(steps, low, high, color=color, alpha=0.08, linewidth=0)
        against.plot(
            np.mean([curve.scores["proxy"] for curve in curves], axis=0),
            np.mean([curve.scores["gold"] for curve in curves], axis=0),
            color=color,
            marker=".",
            label=label,
        )
        series = [curve.training_series("reward_std") for curve in curves]
        deviation.plot(
            series[0][0], _smooth(np.mean([values for _, values in series], axis=0)), color=color, label=label
        )
    _style(proxy, "proxy (optimised), held-out prompts", "update")
    _style(gold, "gold (never optimised), base model = 1", "update")
    _style(against, "gold against proxy", "proxy", "gold")
    _style(strict, "strict checker", "update")
    _style(diversity, "diversity within a prompt", "update")
    _style(deviation, "standard deviation of the training reward", "update")
    proxy.legend(fontsize="x-small")
    figure.savefig(path, format="png")


def _smooth(values: np.ndarray, width: int = 4) -> np.ndarray:
    if len(values) < 2 * width:
        return values
    padded = np.concatenate([values[:1].repeat(width // 2), values, values[-1:].repeat(width - 1 - width // 2)])
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def ratios(measured: list[dict[str, Any]], path: Path) -> None:
    """Ratios, shares outside the clip range and gradient norms per step, on the same rollouts."""
    largest = max(entry["updates"] for entry in measured)
    entries = [entry for entry in measured if entry["updates"] == largest]
    kinds = [kind for kind in ("standard", "ratio_norm") if kind in entries[0]["ratios"]]
    figure, (axes,) = _figure(4)
    for number, kind in enumerate(kinds):
        mean = np.mean([entry["ratios"][kind]["mean"] for entry in entries], axis=0)
        std = np.mean([entry["ratios"][kind]["std"] for entry in entries], axis=0)
        epsilon = np.mean([entry["ratios"][kind]["epsilon"] for entry in entries])
        steps = np.arange(len(mean))
        # In units of the clip range: the two ratios have different scales
        axes[0].errorbar(
            steps + 0.1 * number,
            mean / epsilon,
            std / epsilon,
            color=_color(number),
            label=kind,
            capsize=3,
            marker="o",
        )
        above = np.mean([entry["ratios"][kind]["above"] for entry in entries], axis=0)
        below = np.mean([entry["ratios"][kind]["below"] for entry in entries], axis=0)
        axes[1 + number].bar(steps - 0.2, above, 0.4, color="C2", label="above 1 + ε")
        axes[1 + number].bar(steps + 0.2, below, 0.4, color="C3", label="below 1 - ε")
        axes[1 + number].set_ylim(0, 1)
        axes[1 + number].legend(fontsize="x-small")
        _style(axes[1 + number], f"share outside the clip range, {kind}", "step")
    axes[0].axhline(0, color="black", linewidth=0.5)
    axes[0].legend(fontsize="x-small")
    _style(axes[0], f"r - 1 in clip ranges, {largest} updates after sampling", "step", "mean ± std")
    for number, name in enumerate(entries[0]["gradients"]):
        norms = np.array([entry["gradients"][name] for entry in entries])
        norms = (norms / np.exp(np.log(norms).mean(axis=1, keepdims=True))).mean(axis=0)
        axes[3].plot(np.arange(len(norms)), norms, color=_color(number), marker=".", label=name)
    axes[3].set_yscale("log")
    axes[3].legend(fontsize="x-small")
    _style(axes[3], "gradient norm (geometric mean over steps = 1)", "step")
    figure.savefig(path, format="png")


def steps_in_training(runs: dict[str, dict[int, Curve]], num_steps: int, path: Path) -> None:
    """What each arm's own training logged per step: spread of the ratio, and shares outside the clip range."""
    figure, (axes,) = _figure(3)
    keys = ("ratio/std", "clip_ratio/high", "clip_ratio/low")
    titles = ("std of the ratio", "share above 1 + ε", "share below 1 - ε")
    for number, (arm, by_seed) in enumerate(runs.items()):
        for place, key in enumerate(keys):
            values = np.mean([curve.per_step(key, num_steps) for curve in by_seed.values()], axis=0)
            axes[place].plot(np.arange(num_steps), values, color=_color(number), marker=".", label=arm.split("/")[1])
    for place, title in enumerate(titles):
        _style(axes[place], title, "step")
    axes[0].set_yscale("log")
    axes[0].legend(fontsize="x-small")
    figure.savefig(path, format="png")
