"""The laboratory: what the three papers claim, measured on the bundled world with proxies that are wrong on purpose.

    python examples/over_optimization/run.py --jobs 2                # all of it, hours; continues where it stopped
    python examples/over_optimization/run.py --jobs 2 --hours 2.5    # the most important first, as far as it gets
    python examples/over_optimization/run.py --quick                 # every arm in small, minutes

Results are kept in a file with a line for each run. A run whose line is there is skipped; one whose settings, or whose
bundled model, have changed is repeated. A run that fails is reported, and the others go on. report.py writes the page.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any


# Before torch is loaded, here and in the processes of --jobs: one core each
os.environ.setdefault("OMP_NUM_THREADS", "1")

import report
import training
from analysis import read
from experiments import ARMS, CLAIMS, MEASUREMENTS, SEEDS
from work import done, seconds_of_unit, units


@dataclass(frozen=True)
class Task:
    """A run that is to be done: its name, the claim it is first needed for, and all that it depends on."""

    arm: str
    seed: int
    claim: str
    settings: dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing and writes the report; returns the number of runs that failed."""
    args = parse(argv)
    output = Path(args.output or f"over_optimization/{'quick' if args.quick else 'results'}.jsonl")
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = read(output)
    tasks = [task for task in tasks_of(args) if training.fingerprint(task.settings) not in rows]
    print_budget(tasks, seconds_of_unit(rows), args.jobs)
    if args.estimate:
        return 0
    if any(task.settings.get("proxy") == "learned" for task in tasks):
        training.PROXIES["learned"](output.parent)  # trained here, once
    failed, end = 0, time.monotonic() + 3600 * args.hours
    for number, (task, result) in enumerate(results(tasks, output.parent, args.jobs, end), start=1):
        error = f"{type(result).__name__}: {result}" if isinstance(result, BaseException) else None
        if error:
            failed += 1
        else:
            row = {"arm": task.arm, "seed": task.seed, "units": units(done(task.settings, result)), **result}
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            error = f"{row['seconds']:.0f} s"
        print(f"[{number}/{len(tasks)}] {task.claim}, {task.arm}, seed {task.seed}: {error}", flush=True)
    report.write(output, output.parent / "report", quick=args.quick)
    print(f"Report in {output.parent / 'report' / report.PAGE}.")
    return failed


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="File of the results; default: over_optimization/results.jsonl.")
    parser.add_argument("--quick", action="store_true", help="Every arm in small: one seed, few updates.")
    parser.add_argument("--only", nargs="+", choices=CLAIMS, help="The runs of these claims alone.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at the same time, each on one core.")
    parser.add_argument("--hours", type=float, default=float("inf"), help="After these no run is begun.")
    parser.add_argument("--estimate", action="store_true", help="Only say what there is to do, and how long it takes.")
    return parser.parse_args(argv)


def tasks_of(args: argparse.Namespace) -> list[Task]:
    """Each run once, the most important claims first, seed by seed: an interrupted claim compares all its arms."""
    seeds = range(1 if args.quick else SEEDS)
    wanted = [(arm, seed, "measured") for arm in MEASUREMENTS for seed in seeds if not args.only]
    wanted += [(arm, seed, name) for name in args.only or CLAIMS for seed in seeds for arm in CLAIMS[name].arms]
    first = {}
    for arm, seed, claim in wanted:
        first.setdefault((arm, seed), claim)
    return [Task(arm, seed, claim, ARMS[arm].settings(seed, args.quick)) for (arm, seed), claim in first.items()]


def print_budget(tasks: list[Task], unit: float, jobs: int) -> None:
    """Runs to do and what they are estimated to take, by claim and in all."""
    hours: dict[str, list[float]] = {}
    for task in tasks:
        hours.setdefault(task.claim, []).append(units(task.settings) * unit / 3600)
    print(f"{len(tasks)} runs to do.")
    for claim, each in hours.items():
        print(f"  {claim:16} {len(each):4} runs {sum(each):6.2f} core-hours")
    total = sum(map(sum, hours.values()))
    print(f"  {'in all':16} {len(tasks):4} runs {total:6.2f} core-hours, {total / jobs:.2f} hours", flush=True)


def results(tasks: list[Task], shared: Path, jobs: int, end: float) -> Iterator[tuple[Task, Any]]:
    """Yields each task with its result, or the exception that ended it, as they come."""
    if jobs == 1:
        for task in tasks:
            if time.monotonic() < end:
                try:
                    yield task, training.run(task.settings, shared)
                except Exception as error:
                    yield task, error
        return
    # A process that dies (out of memory, killed) takes the pool with it: what is left is reported as failed, and done
    # by the same command the next time
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting, running = list(reversed(tasks)), {}
        while waiting or running:
            while waiting and len(running) < jobs and time.monotonic() < end:
                task = waiting.pop()
                running[pool.submit(training.run, task.settings, shared)] = task
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.exception() or future.result()


if __name__ == "__main__":
    sys.exit(min(main(), 1))
