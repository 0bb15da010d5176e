"""What finished runs gave: curves, and what is read off them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from experiments import ARMS, COMMON, RATIO_SEEDS, RATIOS, SECTIONS, Scale
from training import RESULT, fingerprint, is_finished, settings_of

from trl_flow.evaluation.equal_proxy import value_at_proxy


# What the log calls them
SCORES = {
    "proxy": "eval_reward",
    "strict": "eval_gold/shapes_strict",
    "fidelity": "eval_gold/shapes_fidelity",
    "soft": "eval_gold/shapes_soft",
    "diversity": "eval_diversity",
}
# The mean of these, each divided by the base model's value, is "gold". The soft checker is not: it sees colors too.
GOLD = ("strict", "fidelity", "diversity")


@dataclass(frozen=True)
class Curve:
    """
    One finished run.

    Attributes:
        steps (`np.ndarray`): updates at the evaluations, `(E,)`; the first is 0, the base model.
        scores (`dict[str, np.ndarray]`): for each of `SCORES` its values there, `(E,)`, and the composite `"gold"`.
        training (`list[dict]`): the log of every update.
        seconds (`float`): how long the run took.
    """

    steps: np.ndarray
    scores: dict[str, np.ndarray]
    training: list[dict[str, Any]]
    seconds: float

    def updates_to(self, proxy: float) -> float:
        """Updates after which the proxy first reaches a level, straight lines between evaluations; NaN if never."""
        return value_at_proxy(self.scores["proxy"], self.steps, proxy)

    def score_at(self, name: str, proxy: float) -> float:
        """A score at the place where the proxy first reaches a level; NaN if it never does."""
        return value_at_proxy(self.scores["proxy"], self.scores[name], proxy)

    def mean_on_the_way(self, name: str, proxy: float) -> float:
        """Mean of a score at eight equal steps of the proxy from the base model's to a level."""
        levels = np.linspace(self.scores["proxy"][0], proxy, 9)[1:]
        return float(np.mean([self.score_at(name, level) for level in levels]))

    def training_series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Updates and values of a training metric."""
        entries = [(entry["step"], entry[name]) for entry in self.training if entry.get(name) is not None]
        return np.array([step for step, _ in entries]), np.array([value for _, value in entries])

    def per_step(self, name: str, number: int) -> np.ndarray:
        """Mean over training of `{name}_step_{i}`, `(number,)`, without the updates whose ratio is always 1."""
        moved = [entry for entry in self.training if entry.get("ratio/std", 0) > 0]
        values = [[entry.get(f"{name}_step_{i}", np.nan) for i in range(number)] for entry in moved]
        return np.nanmean(np.array(values, dtype=float), axis=0)


def read_curve(path: Path) -> Curve:
    """The run of a `result.json`."""
    content = json.loads(path.read_text(encoding="utf-8"))
    log = content["log_history"]
    evaluations = [entry for entry in log if SCORES["proxy"] in entry]
    scores = {name: np.array([entry[key] for entry in evaluations], dtype=float) for name, key in SCORES.items()}
    scores["gold"] = np.mean([scores[name] / scores[name][0] for name in GOLD], axis=0)
    return Curve(
        steps=np.array([entry["step"] for entry in evaluations]),
        scores=scores,
        training=[entry for entry in log if "ratio/mean" in entry],
        seconds=content["seconds"],
    )


def read_section(output: Path, section: str, scale: Scale, seeds: int | None) -> dict[str, dict[int, Curve]]:
    """`{arm: {seed: curve}}` of what is finished with the settings of the table, in its order, of the section's number
    of seeds or `seeds`; arms without any are left out."""
    found: dict[str, dict[int, Curve]] = {}
    for arm in SECTIONS[section].arms:
        for seed in range(seeds or SECTIONS[section].seeds):
            folder = output / "runs" / arm / f"seed-{seed}"
            if is_finished(folder, settings_of(ARMS[arm], seed, scale)):
                found.setdefault(arm, {})[seed] = read_curve(folder / RESULT)
    return found


def ratio_settings(scale: Scale, seeds: int = RATIO_SEEDS) -> list[dict[str, Any]]:
    """The measurements of section "ratios", for seeds 0 ... `seeds - 1`: keyword arguments of `ratios.measure`."""
    # Twice a training batch: the numbers are to be those of the formulas, not of the batch
    sizes = {"prompts": 2 * scale.prompts, "num_generations": scale.num_generations}
    num_steps = COMMON["num_inference_steps"]
    return [
        {**settings, **sizes, "num_steps": num_steps, "seed": seed} for settings in RATIOS for seed in range(seeds)
    ]


def ratio_file(output: Path, settings: dict[str, Any]) -> Path:
    """Where a measurement is kept."""
    name = "{sde_type}-{updates}-updates-rate-{learning_rate:g}-seed-{seed}.json".format(**settings)
    return output / "ratios" / name


def read_ratio(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """A measurement with these settings, if it is there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content["measured"] if content.get("fingerprint") == fingerprint(settings) else None


def common_level(runs: dict[str, dict[int, Curve]], slow: tuple[str, ...]) -> float:
    """The highest proxy that every run has reached, slow arms aside; NaN without runs."""
    highest = [
        curve.scores["proxy"].max() for arm, by_seed in runs.items() if arm not in slow for curve in by_seed.values()
    ]
    return float(min(highest, default=np.nan))


def spread(values: list[float]) -> str:
    """Mean ± standard deviation over seeds, of those that are numbers, and how many they are if not all."""
    numbers = [value for value in values if not np.isnan(value)]
    if not numbers:
        return "–"
    text = f"{np.mean(numbers):.3g}" if abs(np.mean(numbers)) >= 10 else f"{np.mean(numbers):.3f}"
    if len(numbers) > 1:
        deviation = np.std(numbers, ddof=1)
        text += f" ± {deviation:.2g}" if abs(np.mean(numbers)) >= 10 else f" ± {deviation:.3f}"
    return text if len(numbers) == len(values) else f"{text} ({len(numbers)} of {len(values)})"
