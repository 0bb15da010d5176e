"""
Seconds to a held-out score on the bundled world: Flow-GRPO as published against what the library recommends.

    python benchmarks/time_to_score.py                                  # both, three seeds: about an hour of one core
    python benchmarks/time_to_score.py --arms recommended --seeds 0     # one arm
    python benchmarks/time_to_score.py --table examples/noised_images/results.jsonl benchmarks/time_to_score.jsonl

Each run ends when the mean of two evaluations in a row is at `--target`, or after `--seconds` of processor time. Runs
are kept in `--output`, which is continued. The last line is JSON: for each arm its updates, processor seconds (updates
times the least seconds that one took) and wall seconds, seed by seed, null where the score was not reached. `--table`
prints the tables of docs/faster.md from such files, and runs nothing.
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
from report import Rows, seconds_an_update, summary, updates_to  # noqa: E402

from trl_flow import AWMConfig, DiffusionNFTConfig, FlowGRPOConfig  # noqa: E402


def noised(config: type = DiffusionNFTConfig, rate: float = 1e-3, **fields: Any) -> Arm:
    return Arm(config, (rate,), NOISED | fields, updates=1)


AVERAGE = {"use_ema": True}
HALF = {"num_generations_trained": 6}
# One change each to DiffusionNFT as in examples/noised_images, unless the name says more
KNOBS = {
    "DiffusionNFT": ARMS["DiffusionNFT"],
    "average": noised(**AVERAGE),
    "average, rate 2e-3": noised(rate=2e-3, **AVERAGE),
    "half of each group": noised(**HALF),
    "2 levels": noised(timesteps_per_sample=2),
    "6 prompts": noised(per_device_train_batch_size=72, eval_steps=8),
    "rate 2e-3 to 0": noised(rate=2e-3, lr_scheduler_type="linear", max_steps=50),
    "AWM, average": noised(AWMConfig, rate=2e-3, **AVERAGE),
    "window, common prefix": Arm(
        FlowGRPOConfig, (2e-3,), WINDOW | {"sde_window_range": [1, 5], "share_initial_noise": True}
    ),
    "binary reward": noised(rate=2e-3),
    "binary reward, dynamic_sample": noised(rate=2e-3, dynamic_sample=True),
}
PUBLISHED, RECOMMENDED = "Flow-GRPO, published", "average, rate 2e-3"
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


def measured(runs: dict[int, Rows], target: float) -> dict[str, dict[int, float]]:
    """Updates, processor seconds and wall seconds to the target of each seed; infinity where it was not reached."""
    cost = min(seconds_an_update(rows) for rows in runs.values())
    updates = {seed: updates_to(rows, target) for seed, rows in sorted(runs.items())}
    walls = {}
    for seed, number in updates.items():
        rows = [row for row in runs[seed] if row["update"] <= number]
        walls[seed] = rows[-1].get("wall", math.nan) if math.isfinite(number) else math.inf
    return {"updates": updates, "processor_seconds": {s: n * cost for s, n in updates.items()}, "wall_seconds": walls}


def as_json(found: dict[tuple[str, float], dict[int, Rows]], target: float) -> dict[str, Any]:
    """What the last line says of the two arms, and how many times longer the published settings take, at least: where
    a run of theirs did not come to the score, as if it had when it ended."""
    result: dict[str, Any] = {"target": target}
    for name, key in NAMES.items():
        values = measured(found[key], target) if key in found else {}
        listed = {
            what: {seed: round(n, 1) if math.isfinite(n) else None for seed, n in by_seed.items()}
            for what, by_seed in values.items()
        }
        result[name] = {"arm": key[0], "learning_rate": key[1], **listed}
    if all(key in found for key in NAMES.values()):
        means = {}
        for name, key in NAMES.items():
            seconds, cost = measured(found[key], target)["processor_seconds"], 0.0
            for seed, rows in found[key].items():
                cost = min(seconds_an_update(own) for own in found[key].values()) * rows[-1]["update"]
                seconds[seed] = min(seconds[seed], cost)
            means[name] = statistics.mean(seconds.values())
        result["published_over_recommended_at_least"] = round(means["published"] / means["recommended"], 2)
    return result


def print_tables(found: dict[tuple[str, float], dict[int, Rows]], target: float, reward: str) -> None:
    heads = ["settings", "learning rate", "seeds", "seconds an update", f"updates to {target:g}", "seconds"]
    print(f"| {' | '.join([*heads, 'best mean of two evaluations, by seed'])} |\n|{' --- |' * (len(heads) + 1)}")
    for (name, rate), runs in found.items():
        values, cost = measured(runs, target), min(map(seconds_an_update, runs.values()))
        best = [max((a["reward"] + b["reward"]) / 2 for a, b in zip(r, r[1:], strict=False)) for r in runs.values()]
        cells = [summary(list(values[what].values())) for what in ("updates", "processor_seconds")]
        seeds, numbers = ", ".join(map(str, sorted(runs))), ", ".join(f"{score:.2f}" for score in best)
        print(f"| {' | '.join([name, f'{rate:g}', seeds, f'{cost:.2f}', *cells, numbers])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--output", type=Path, default=Path("time_to_score.jsonl"))
    parser.add_argument("--arms", nargs="+", choices=[*NAMES, *ALL], default=list(NAMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--target", type=float, default=1.06, help="Held-out score at which a run ends.")
    parser.add_argument("--seconds", type=float, default=500, help="Processor time of a run at most.")
    parser.add_argument("--every", type=int, default=4, help="Sampling phases between evaluations.")
    parser.add_argument("--reward", choices=("score", "strict"), default="score")
    parser.add_argument("--table", type=Path, nargs="+", metavar="RESULTS")
    given = parser.parse_args()
    if given.table:
        print_tables(read(given.table, given.reward), given.target, given.reward)
        return
    arms = [NAMES.get(name, (name, None))[0] for name in given.arms]
    rates = {name: NAMES["published"][1] if name == PUBLISHED else ALL[name].rates[0] for name in arms}
    run_missing(ALL, [(name, rates[name], seed) for seed in given.seeds for name in arms], given.output, given)
    print(json.dumps(as_json(read([given.output], given.reward), given.target)))


if __name__ == "__main__":
    main()
