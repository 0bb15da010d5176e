"""The table and the figure of `compare.py`'s results.

Use: `python examples/noised_images/report.py noised_images.jsonl --timing timing.jsonl --figure noised_images.png`.

Time is that of an update, from `--timing` (`compare.py --quick` on a quiet machine), times the number of updates,
so that what else the machine did in the hours of `compare.py` does not count.
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

from curves import Rows, seconds_an_update, smoothed, summary, updates_to


def at_proxy(rows: Rows, level: float) -> float:
    """The gold average where the smoothed proxy first was at `level`; NaN where it never was."""
    gold = [score for _, score in smoothed(rows, "gold/average")]
    proxy = [score for _, score in smoothed(rows)]
    for i in range(1, len(proxy)):
        if proxy[i] >= level:
            share = (level - proxy[i - 1]) / (proxy[i] - proxy[i - 1]) if proxy[i] > proxy[i - 1] else 0.0
            return gold[i - 1] + share * (gold[i] - gold[i - 1])
    return math.nan


def read(path: Path, reward: str) -> dict[str, dict[float, list[Rows]]]:
    """Evaluations of each run, by arm and learning rate, in the order of the seeds."""
    runs: dict[str, dict[float, list[Rows]]] = defaultdict(lambda: defaultdict(list))
    for result in sorted(map(json.loads, path.read_text().splitlines()), key=lambda result: result["seed"]):
        if result["reward"] == reward:
            runs[result["arm"]][result["rate"]].append(result["evaluations"])
    return runs


def differences(rows: list[Rows], others: list[Rows], level: float) -> list[float]:
    """How much more gold the first have at `level` of the proxy, seed by seed; none is left out before the last."""
    return [at_proxy(own, level) - at_proxy(other, level) for own, other in zip(rows, others, strict=False)]


def print_runs(path: Path) -> None:
    """A row for each run on the score."""
    heads = ["score before", "best mean of two evaluations", "strict at the best evaluation", "seconds"]
    print(f"\n| all runs: learning rate, seed | {' | '.join(heads)} |\n|{' --- |' * 5}")
    results = [result for result in map(json.loads, path.read_text().splitlines()) if result["reward"] == "score"]
    for result in sorted(results, key=lambda result: (result["arm"], result["rate"], result["seed"])):
        rows, strict = result["evaluations"], "gold/shapes_strict"
        best = max(rows, key=lambda row: row["reward"])
        mean = max(score for _, score in smoothed(rows)[1:])
        cells = [f"{rows[0]['reward']:.3f}", f"{mean:.3f}", f"{best[strict]:.2f} (from {rows[0][strict]:.2f})"]
        name = f"{result['arm']}: {result['rate']:g}, {result['seed']}"
        print(f"| {' | '.join([name, *cells, format(rows[-1]['seconds'], '.0f')])} |")


def best_rate(rates: dict[float, list[Rows]], target: float) -> float:
    """Of the learning rates with the most seeds the one with which the most came to `target`, and the soonest."""

    def order(rate: float) -> tuple[int, int, float]:
        found = [number for rows in rates[rate] if math.isfinite(number := updates_to(rows, target))]
        return len(rates[rate]), len(found), -statistics.mean(found) if found else 0.0

    return max(rates, key=order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--target", type=float, default=1.06)
    parser.add_argument("--levels", type=float, nargs="+", default=[0.62, 0.64, 0.66], help="Of the learned scorer.")
    parser.add_argument("--timing", type=Path, help="Default: the results.")
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    scores, learned = read(given.results, "score"), read(given.results, "learned")
    best = {arm: best_rate(rates, given.target) for arm, rates in scores.items()}
    timing = read(given.timing or given.results, "score")
    cost = {arm: min(seconds_an_update(rows) for each in timing[arm].values() for rows in each) for arm in best}
    heads = ["method", "learning rate", "updates", "seconds an update", f"seconds to {given.target:g}"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for arm, rate in best.items():
        reached = [updates_to(rows, given.target) for rows in scores[arm][rate]]
        seconds = summary([number * cost[arm] for number in reached])
        print(f"| {arm} | {rate:g} | {summary(reached)} | {cost[arm]:.2f} | {seconds} |")
    if learned:
        heads = " | ".join(f"gold at {level}" for level in given.levels)
        print(f"\n| method | {heads} |\n| --- |{' --- |' * len(given.levels)}")
        for arm, rates in learned.items():
            runs = max(rates.values(), key=len)
            cells = [summary([at_proxy(rows, level) for rows in runs], 2) for level in given.levels]
            print(f"| {arm} | {' | '.join(cells)} |")
        print("\nGRPO-Guard's gold above that of the others, paired by seed:")
        guard = max(learned["GRPO-Guard"].values(), key=len)
        for arm, rates in learned.items():
            if arm != "GRPO-Guard":
                runs = max(rates.values(), key=len)
                print(arm, *(summary(differences(guard, runs, level), 3) for level in given.levels), sep=", ")
    print_runs(given.results)
    if given.figure:
        draw({arm: scores[arm][rate] for arm, rate in best.items()}, cost, given.target, given.figure)


def draw(runs: dict[str, list[Rows]], cost: dict[str, float], target: float, path: Path) -> None:
    """Score over processor time: each seed thin, their mean thick as far as all have come."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(9.5, 4.5), dpi=130)
    colors = ["#0072B2", "#56B4E9", "#009E73", "#D55E00", "#CC79A7"]
    for (arm, seeds), color in zip(runs.items(), colors, strict=False):
        curves = [np.array([(updates * cost[arm], score) for updates, score in smoothed(rows)]).T for rows in seeds]
        for times, values in curves:
            axes.plot(times, values, color=color, linewidth=0.6, alpha=0.45)
        grid = np.linspace(0, min(times[-1] for times, _ in curves), 100)
        axes.plot(grid, np.mean([np.interp(grid, *curve) for curve in curves], axis=0), color=color, lw=2.2, label=arm)
    axes.axhline(target, color="0.4", linewidth=1, linestyle="--")
    axes.set(xlabel="processor time of training, seconds", ylabel="held-out score: soft + 0.5 fidelity")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
