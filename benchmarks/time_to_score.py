"""
Seconds to a held-out score on the bundled world: Flow-GRPO as published against what the library recommends.

    python benchmarks/time_to_score.py                                  # both, three seeds: about an hour of one core
    python benchmarks/time_to_score.py --arms recommended --seeds 0     # one arm
    python benchmarks/time_to_score.py --table examples/noised_images/results.jsonl benchmarks/time_to_score.jsonl

Each run ends when the mean of two evaluations in a row is at `--target`, or after `--seconds` of processor time. Runs
are kept in `--output`, which is continued. The last line is JSON: for both arms the updates to the score, processor
seconds (updates times the least seconds that one took, so that other programs do not count) and wall seconds of the
run, by seed; null where the score was not reached. `--table` prints the table of docs/faster.md from such files, and
runs nothing.
"""

import argparse
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")

EXAMPLE = Path(__file__).parents[1] / "examples" / "noised_images"
sys.path.insert(0, str(EXAMPLE))
from compare import ARMS, NOISED, WINDOW, Arm, run_missing  # noqa: E402
from curves import Rows, seconds_an_update, smoothed, summary, updates_to  # noqa: E402

from trl_flow import AWMConfig, DiffusionNFTConfig, FlowGRPOConfig  # noqa: E402


def noised(config: type = DiffusionNFTConfig, rate: float = 1e-3, **fields: Any) -> Arm:
    return Arm(config, (rate,), NOISED | fields, updates=1)


AVERAGE, HALF, LEVELS = {"use_ema": True}, {"num_generations_trained": 6}, {"timesteps_per_sample": 2}
# One change each to DiffusionNFT as in examples/noised_images, at the rate 1e-3, unless the name says more
KNOBS = {
    "DiffusionNFT": ARMS["DiffusionNFT"],
    "half of each group, 2 levels": noised(**HALF, **LEVELS),
    "half of each group": noised(**HALF),
    "2 levels": noised(**LEVELS),
    "average": noised(rate=2e-3, **AVERAGE),
    "rate falls to 0": noised(rate=2e-3, lr_scheduler_type="linear", max_steps=50),
    "6 prompts": noised(per_device_train_batch_size=72, eval_steps=8),
    "AWM, average": noised(AWMConfig, rate=2e-3, **AVERAGE),
    "window, common prefix": Arm(
        FlowGRPOConfig, (2e-3,), WINDOW | {"sde_window_range": [1, 5], "share_initial_noise": True}
    ),
    "binary reward": noised(rate=2e-3),
    "binary reward, dynamic_sample": noised(rate=2e-3, dynamic_sample=True),
}
PUBLISHED, RECOMMENDED = "Flow-GRPO, published", "half of each group"
NAMES = {"published": (PUBLISHED, 2e-3), "recommended": (RECOMMENDED, KNOBS[RECOMMENDED].rates[0])}
ALL = {PUBLISHED: ARMS[PUBLISHED]} | KNOBS


def read(paths: list[Path], reward: str) -> dict[tuple[str, float], dict[int, Rows]]:
    """Evaluations by arm and learning rate, and by seed."""
    found: dict[tuple[str, float], dict[int, Rows]] = {}
    for line in (line for path in paths if path.exists() for line in path.read_text().splitlines()):
        row = json.loads(line)
        if row["reward"] == reward:
            found.setdefault((row["arm"], row["rate"]), {})[row["seed"]] = row["evaluations"]
    return found


def seconds_of(arm: str, found: dict[tuple[str, float], dict[int, Rows]]) -> float:
    """Processor seconds of an update: the least that was seen, as other programs slow what runs beside them."""
    return min(seconds_an_update(rows) for (name, _), runs in found.items() if name == arm for rows in runs.values())


def updates_of(runs: dict[int, Rows], target: float) -> dict[int, float]:
    """Updates to the target, by seed; infinity where it was not reached."""
    return {seed: updates_to(rows, target) for seed, rows in sorted(runs.items())}


def at_least(runs: dict[int, Rows], target: float) -> float:
    """Mean updates to the target, as if runs that did not reach it had when they ended."""
    return statistics.mean(min(number, runs[seed][-1]["update"]) for seed, number in updates_of(runs, target).items())


def as_json(found: dict[tuple[str, float], dict[int, Rows]], target: float) -> dict[str, Any]:
    """What the last line says of the two arms, and how many times as long the published settings take, at least: this
    once all seeds of the recommendation have reached the target."""
    result: dict[str, Any] = {"target": target}
    for name, key in NAMES.items():
        runs = found.get(key, {})
        updates = {seed: number for seed, number in updates_of(runs, target).items() if math.isfinite(number)}
        # The evaluation at which the run ended
        walls = {seed: runs[seed][-1]["wall"] for seed in updates if "wall" in runs[seed][-1]}
        cost = seconds_of(key[0], found) if runs else None
        result[name] = {
            "arm": key[0], "learning_rate": key[1],
            "updates": {seed: round(updates[seed], 1) if seed in updates else None for seed in runs},
            "processor_seconds": {s: round(updates[s] * cost, 1) if s in updates else None for s in runs},
            "wall_seconds": {seed: walls.get(seed) for seed in runs},
        }  # fmt: skip
    reached = [math.isfinite(number) for number in updates_of(found.get(NAMES["recommended"], {}), target).values()]
    if found.get(NAMES["published"]) and reached and all(reached):
        slow, fast = (at_least(found[key], target) * seconds_of(key[0], found) for key in NAMES.values())
        result["published_over_recommended_at_least"] = round(slow / fast, 2)
    return result


def print_tables(found: dict[tuple[str, float], dict[int, Rows]], target: float) -> None:
    heads = ["settings, learning rate", "seeds", "s/update", f"updates to {target:g}", "seconds", "best score"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")

    def order(key: tuple[str, float]) -> tuple[float, float]:
        reached = [math.isfinite(number) for number in updates_of(found[key], target).values()]
        return -statistics.mean(reached), at_least(found[key], target) * seconds_of(key[0], found)

    for name, rate in sorted(found, key=order):
        runs = found[name, rate]
        updates, cost = list(updates_of(runs, target).values()), seconds_of(name, found)
        seconds, reached = summary([number * cost for number in updates]), sum(map(math.isfinite, updates))
        if reached < len(updates):
            seconds = f"above {at_least(runs, target) * cost:.0f}"
        best = [max(score for _, score in smoothed(rows)[1:]) for rows in runs.values()]
        cells = [f"{name}, {rate:g}", str(len(runs)), f"{cost:.2f}", summary(updates), seconds, summary(best, 2)]
        print(f"| {' | '.join(cells)} |")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--output", type=Path, default=Path("time_to_score.jsonl"))
    parser.add_argument("--arms", nargs="+", choices=[*NAMES, *ALL], default=list(NAMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--target", type=float, default=1.06, help="Held-out score at which a run ends.")
    parser.add_argument("--seconds", type=float, default=500, help="Processor time of a run at most.")
    parser.add_argument("--every", type=int, default=4, help="Sampling phases between evaluations.")
    parser.add_argument("--reward", choices=("score", "strict"), default="score")
    parser.add_argument("--table", type=Path, nargs="+", metavar="RESULTS")
    given = parser.parse_args(argv)
    if given.table:
        print_tables(read(given.table, given.reward), given.target)
        return
    arms = [NAMES.get(name, (name, None))[0] for name in given.arms]
    rates = {name: NAMES["published"][1] if name == PUBLISHED else ALL[name].rates[0] for name in arms}
    run_missing(ALL, [(name, rates[name], seed) for seed in given.seeds for name in arms], given.output, given)
    print(json.dumps(as_json(read([given.output], given.reward), given.target)))


if __name__ == "__main__":
    main()
