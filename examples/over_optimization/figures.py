"""Figures of the report, as PNG. They are made without pyplot, so that no global state is touched."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from results import Curve


# Okabe and Ito's colors, which color-blind readers can tell apart, without the yellow one that white paper swallows;
# lines that lie on each other differ in their dashes as well. The first arm is the baseline.
_COLORS = ("#000000", "#E69F00", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#56B4E9", "#888888")
_DASHES = ("-", (0, (5, 1.5)))
_ABOVE, _BELOW = _COLORS[4], _COLORS[1]


def _figure(columns: int, rows: int = 1) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _style(axes: Any, title: str, x: str, y: str = "") -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def _line(number: int) -> dict[str, Any]:
    """How the line of an arm looks."""
    return {"color": _COLORS[number % len(_COLORS)], "linestyle": _DASHES[number % 2], "linewidth": 1.6}


def _legend(figure: Figure, axes: Any) -> None:
    """One legend for all panels, below them, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), fontsize="medium")


def training_curves(runs: dict[str, dict[int, Curve]], path: Path) -> None:
    """
    Proxy and gold over training, gold against proxy, diversity, and the spread of the reward while training.

    Lines are means over seeds; the bars behind their ends reach from the lowest seed to the highest.
    """
    figure, ((proxy, gold, against), (strict, diversity, deviation)) = _figure(3, 2)
    for number, (arm, by_seed) in enumerate(runs.items()):
        curves = list(by_seed.values())
        line = _line(number) | {"label": arm.split("/")[1]}
        steps = curves[0].steps
        # Side by side: on one place nobody could tell them apart
        place = steps[-1] * (1.02 + 0.015 * number)
        for axes, name in ((proxy, "proxy"), (gold, "gold"), (strict, "strict"), (diversity, "diversity")):
            values = np.array([curve.scores[name] for curve in curves])
            axes.plot(steps, values.mean(axis=0), **line)
            if len(curves) > 1:
                axes.vlines(place, values[:, -1].min(), values[:, -1].max(), color=line["color"], linewidth=2)
            axes.set_xticks(steps[:: max(1, len(steps) // 4)])  # none among the bars, which are no updates
        against.plot(
            np.mean([curve.scores["proxy"] for curve in curves], axis=0),
            np.mean([curve.scores["gold"] for curve in curves], axis=0),
            marker=".",
            **line,
        )
        series = [curve.training_series("reward_std") for curve in curves]
        deviation.plot(series[0][0], _smooth(np.mean([values for _, values in series], axis=0)), marker=".", **line)
    _style(proxy, "proxy (optimized), held-out prompts", "update")
    _style(gold, "gold (never optimized), base model = 1", "update")
    _style(against, "gold against proxy", "proxy", "gold")
    _style(strict, "strict checker", "update")
    _style(diversity, "diversity within a prompt", "update")
    _style(deviation, "standard deviation of the training reward", "update")
    against.locator_params(axis="x", nbins=6)  # labels of three digits would touch
    _legend(figure, proxy)
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
    figure, ((means, gradients), shares) = _figure(2, 2)
    for number, kind in enumerate(kinds):
        mean = np.mean([entry["ratios"][kind]["mean"] for entry in entries], axis=0)
        std = np.mean([entry["ratios"][kind]["std"] for entry in entries], axis=0)
        epsilon = np.mean([entry["ratios"][kind]["epsilon"] for entry in entries])
        steps = np.arange(len(mean))
        # In units of the clip range: the two ratios have different scales
        means.errorbar(
            steps + 0.16 * number - 0.08,
            mean / epsilon,
            std / epsilon,
            **_line(number),
            label=kind,
            capsize=3,
            marker="o",
        )
        above = np.mean([entry["ratios"][kind]["above"] for entry in entries], axis=0)
        below = np.mean([entry["ratios"][kind]["below"] for entry in entries], axis=0)
        shares[number].bar(steps - 0.2, above, 0.4, color=_ABOVE, label="above 1 + ε")
        shares[number].bar(steps + 0.2, below, 0.4, color=_BELOW, label="below 1 - ε")
        shares[number].set_ylim(0, 1)
        shares[number].legend(fontsize="small", loc="upper left")
        _style(shares[number], f"share outside the clip range, {kind}", "step")
    means.axhline(0, color="black", linewidth=0.5)
    means.legend(fontsize="small", loc="lower left")
    _style(means, f"r - 1, {largest} updates after sampling", "step", "mean ± std, in clip ranges")
    for number, name in enumerate(entries[0]["gradients"]):
        norms = np.array([entry["gradients"][name] for entry in entries])
        norms = (norms / np.exp(np.log(norms).mean(axis=1, keepdims=True))).mean(axis=0)
        gradients.plot(np.arange(len(norms)), norms, **_line(number), marker=".", label=name)
    gradients.set_yscale("log")
    gradients.legend(fontsize="small", loc="upper left")
    _style(gradients, "gradient norm (geometric mean over steps = 1)", "step")
    figure.savefig(path, format="png")


def steps_in_training(runs: dict[str, dict[int, Curve]], num_steps: int, path: Path) -> None:
    """What each arm's own training logged per step: spread of the ratio, and shares outside the clip range."""
    figure, (axes,) = _figure(3)
    keys = ("ratio/std", "clip_ratio/high", "clip_ratio/low")
    titles = ("std of the ratio", "share above 1 + ε", "share below 1 - ε")
    for number, (arm, by_seed) in enumerate(runs.items()):
        for place, key in enumerate(keys):
            values = np.mean([curve.per_step(key, num_steps) for curve in by_seed.values()], axis=0)
            axes[place].plot(np.arange(num_steps), values, **_line(number), marker=".", label=arm.split("/")[1])
    for place, title in enumerate(titles):
        _style(axes[place], title, "step")
    axes[0].set_yscale("log")
    # The two shares are there to be compared
    axes[2].sharey(axes[1])
    _legend(figure, axes[0])
    figure.savefig(path, format="png")
