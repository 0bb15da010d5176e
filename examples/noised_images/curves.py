"""What the evaluations of `compare.py`'s runs say: when a score was reached, and what an update took."""

import math
import statistics
from typing import Any


Rows = list[dict[str, Any]]


def smoothed(rows: Rows, name: str = "reward") -> list[tuple[int, float]]:
    """Updates, and the mean of the last two evaluations, of each evaluation."""
    means = [rows[0][name], *((a[name] + b[name]) / 2 for a, b in zip(rows, rows[1:], strict=False))]
    return [(row["update"], mean) for row, mean in zip(rows, means, strict=True)]


def updates_to(rows: Rows, target: float) -> float:
    """Updates at which the smoothed score first was at `target`, between two evaluations by a straight line; infinity
    where it never was."""
    points = smoothed(rows)
    for (u0, s0), (u1, s1) in zip(points, points[1:], strict=False):
        if s1 >= target:
            return u0 + ((target - s0) / (s1 - s0) if s1 > s0 else 0.0) * (u1 - u0)
    return math.inf


def seconds_an_update(rows: Rows) -> float:
    """The least between two evaluations: what the arm takes where nothing is in its way."""
    pairs = zip(rows, rows[1:], strict=False)
    return min((b["seconds"] - a["seconds"]) / (b["update"] - a["update"]) for a, b in pairs)


def summary(values: list[float], digits: int = 0) -> str:
    """Mean and standard error of what is finite, and of how many."""
    found = [value for value in values if math.isfinite(value)]
    if not found:
        return "not reached"
    error = f" ± {statistics.stdev(found) / math.sqrt(len(found)):.{digits}f}" if len(found) > 1 else ""
    of = "" if len(found) == len(values) else f" ({len(found)} of {len(values)} seeds)"
    return f"{statistics.mean(found):.{digits}f}{error}{of}"
