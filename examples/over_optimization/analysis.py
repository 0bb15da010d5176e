"""What is read off the finished runs: curves, differences paired by seed, and their intervals."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from experiments import ARMS, CLAIMS, SEEDS, Claim
from training import SCORES, TRAINING, fingerprint, gold

from trl_flow.evaluation.equal_proxy import value_at_proxy
from trl_flow.evaluation.intervals import half_width, standard_error


Rows = dict[str, dict[str, Any]]


def read(path: Path) -> Rows:
    """Results by fingerprint; a line that an interruption has cut is none."""
    rows: Rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["fingerprint"]] = row
    return rows


@dataclass(frozen=True)
class Curve:
    """
    One finished training.

    Attributes:
        updates (`np.ndarray`): at the evaluations, `(E,)`; the first is 0, the base model.
        scores (`dict[str, np.ndarray]`): those of `training.SCORES` there and `"gold"`, and the means of training
            since the evaluation before, `(E,)`.
        row (`dict`): all of the line.
    """

    updates: np.ndarray
    scores: dict[str, np.ndarray]
    row: dict[str, Any]

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Curve":
        columns = {name: np.array(row["evaluations"][name], dtype=float) for name in ("update", *SCORES, *TRAINING)}
        return cls(columns.pop("update"), columns | {"gold": gold(columns)}, row)

    @property
    def highest(self) -> float:
        return float(self.scores["proxy"].max())

    def at_proxy(self, name: str, level: float) -> float:
        """A score, or `"update"`, where the proxy first reaches a level; NaN if it never does."""
        values = self.updates if name == "update" else self.scores[name]
        return value_at_proxy(self.scores["proxy"], values, level)


Runs = dict[str, dict[int, Any]]


def runs_of(rows: Rows, arms: Sequence[str], *, quick: bool = False) -> Runs:
    """`{arm: {seed: curve}}` of the runs that are there, or of measurements the rows."""
    found: Runs = {arm: {} for arm in arms}
    for arm, by_seed in found.items():
        for seed in range(1 if quick else SEEDS):
            row = rows.get(fingerprint(ARMS[arm].settings(seed, quick)))
            if row is not None:
                by_seed[seed] = Curve.of(row) if "evaluations" in row else row
    return found


def shared_levels(one: Curve, other: Curve) -> np.ndarray:
    """The upper half of eight equal steps of the proxy, from the base model's to the highest that both reach."""
    top = min(one.highest, other.highest)
    return np.linspace(max(one.scores["proxy"][0], other.scores["proxy"][0]), top, 9)[5:]


def difference(score: str, at: str, one: Curve, other: Curve) -> float:
    """How much more of a score the first has, at equal proxy or in the second half of the updates."""
    if at == "proxy":
        levels = shared_levels(one, other)
        return float(np.mean([one.at_proxy(score, x) - other.at_proxy(score, x) for x in levels]))
    return late(score, one) - late(score, other)


def late(score: str, curve: Curve) -> float:
    """Mean of a score in the second half of the updates."""
    return float(curve.scores[score][curve.updates > curve.updates[-1] / 2].mean())


def slowness(one: Curve, other: Curve) -> float:
    """Updates that the first takes to the middle of `shared_levels` for one of the other's, as a logarithm."""
    level = shared_levels(one, other)[0]
    return math.log(one.at_proxy("update", level) / other.at_proxy("update", level))


@dataclass(frozen=True)
class Effect:
    """A mean over seeds with half of its 95% interval by Student's t, NaN for fewer than two; `seeds` entered it."""

    mean: float
    half: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Effect":
        numbers = np.array([value for value in values if math.isfinite(value)])
        mean = float(numbers.mean()) if len(numbers) else math.nan
        return cls(mean, half_width(standard_error(numbers), len(numbers)), len(numbers))

    @property
    def is_detected(self) -> bool:
        """Whether the interval leaves 0 out."""
        return abs(self.mean) > self.half

    def text(self, digits: int = 3, *, signed: bool = False) -> str:
        if not self.seeds:
            return "–"
        mean = format(self.mean, f"{'+' if signed else ''}.{digits}f")
        return mean if math.isnan(self.half) else f"{mean} ± {self.half:.{digits}f}"


def effect(claim: Claim, arm: str, runs: Runs) -> Effect:
    """Of an arm over the claim's first one, paired by seed."""
    first, own = runs[claim.arms[0]], runs[arm]
    return Effect.of([difference(claim.score, claim.at, own[seed], first[seed]) for seed in own if seed in first])


def verdict(claim: Claim, runs: Runs) -> str:
    """`"holds"`, `"does not hold"` (the opposite is measured), `"not detected"`, or `"not decided"`: too few seeds."""
    found = effect(claim, claim.subject, runs)
    if found.seeds < SEEDS:
        return "not decided"
    if not found.is_detected:
        return "not detected"
    return "holds" if found.mean * claim.sign > 0 else "does not hold"


def summary(rows: Rows, *, quick: bool = False) -> dict[str, list[str]]:
    """The claims by verdict, each with its numbers."""
    found: dict[str, list[str]] = {name: [] for name in ("holds", "does not hold", "not detected", "not decided")}
    for claim in CLAIMS.values():
        runs = runs_of(rows, claim.arms, quick=quick)
        of = effect(claim, claim.subject, runs)
        about = of.text(signed=True) if of.seeds == SEEDS else f"{of.seeds} of {SEEDS} seeds"
        found[verdict(claim, runs)].append(f"{claim.short}: {about}")
    return found
