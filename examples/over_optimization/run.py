"""The laboratory: what the three papers claim, measured on the bundled world with proxies that are wrong on purpose.

    python examples/over_optimization/run.py                     # all of it, two hours of one core
    python examples/over_optimization/run.py --quick --jobs 2    # every section in small, minutes

A run whose result is there is skipped, so that the same command goes on where it was stopped; a run whose settings
have changed is repeated. A run that fails is reported, and the others go on.
"""

import argparse
import os
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path


# Before torch is loaded, here and in the processes of --jobs: one core each
os.environ.setdefault("OMP_NUM_THREADS", "1")

import report
from experiments import ARMS, FULL, QUICK, RATIO_SEEDS, SECTIONS, Scale
from ratios import measure
from results import ratio_file, ratio_settings, read_ratio
from training import fingerprint, is_finished, run, settings_of

from trl_flow.evaluation.outputs import write_json


HERE = Path(__file__).parent
RATIOS_SECTION = "ratios"


@dataclass(frozen=True)
class Task:
    """A run that is to be done: its folder, and all that it depends on."""

    name: str
    folder: Path
    settings: dict


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing and writes the report; returns the number of runs that failed."""
    args = parse(argv)
    scale = QUICK if args.quick else FULL
    output = Path(args.output_dir)
    sections = args.only or [RATIOS_SECTION, *SECTIONS]
    failed = {}
    if RATIOS_SECTION in sections:
        run_ratios(output, scale, seeds=1 if args.quick else RATIO_SEEDS)
    tasks = unfinished(tasks_of(sections, output, scale, args.seeds, args.quick))
    print(f"{len(tasks)} runs to do.", flush=True)
    for number, (task, error) in enumerate(results(tasks, output, args.jobs), start=1):
        print(f"[{number}/{len(tasks)}] {task.name}: {error or 'done'}", flush=True)
        if error:
            failed[task.name] = error
    command = shlex.join(["python", "examples/over_optimization/run.py", *(sys.argv[1:] if argv is None else argv)])
    folder = Path(args.report_dir) if args.report_dir else report_folder(output, args)
    report.write(output, folder, scale, command, failed, seeds=args.seeds, findings=is_whole(args))
    print(f"Report in {folder / report.TABLE}.")
    for name, error in failed.items():
        print(f"FAILED {name}: {error} (error.txt in its folder)", file=sys.stderr)
    return len(failed)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", default="over_optimization", help="Folder of the runs.")
    parser.add_argument(
        "--report-dir",
        help=(
            "Folder of the table and the figures. Default: docs/results of the repository for the whole laboratory, "
            "`report` in --output-dir with --quick, --only or --seeds."
        ),
    )
    parser.add_argument("--quick", action="store_true", help="Every section in small: one seed, few updates.")
    parser.add_argument("--only", nargs="+", choices=[RATIOS_SECTION, *SECTIONS], help="These sections alone.")
    parser.add_argument("--seeds", type=int, help="Seeds of each arm, instead of each section's own number.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at the same time, each on one core.")
    return parser.parse_args(argv)


def report_folder(output: Path, args: argparse.Namespace) -> Path:
    """Where nothing else is said: only the whole laboratory may replace the results that the documentation shows."""
    return HERE.parents[1] / "docs" / "results" if is_whole(args) else output / "report"


def is_whole(args: argparse.Namespace) -> bool:
    return not (args.quick or args.only or args.seeds)


def tasks_of(sections: list[str], output: Path, scale: Scale, seeds: int | None, quick: bool) -> list[Task]:
    """The runs of sections, each once, seed by seed: what is there after an interruption compares all arms."""
    wanted = []
    for name in sections:
        if name in SECTIONS:
            number = seeds or (1 if quick else SECTIONS[name].seeds)
            wanted += [(seed, arm) for seed in range(number) for arm in SECTIONS[name].arms]
    return [
        Task(f"{arm} seed {seed}", run_folder(output, arm, seed), settings_of(ARMS[arm], seed, scale))
        for seed, arm in dict.fromkeys(wanted)
    ]


def run_folder(output: Path, arm: str, seed: int) -> Path:
    return output / "runs" / arm / f"seed-{seed}"


def unfinished(tasks: list[Task]) -> list[Task]:
    """The runs whose result is not there, or is that of other settings."""
    return [task for task in tasks if not is_finished(task.folder, task.settings)]


def results(tasks: list[Task], output: Path, jobs: int):
    """Yields each task with what went wrong (`None` if nothing did), as they end."""
    if jobs == 1:
        for task in tasks:
            yield task, run(task.folder, task.settings, output)
        return
    # A process that dies (out of memory, killed) takes the pool with it: what is left is reported as failed, and done
    # by the same command the next time
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run, task.folder, task.settings, output): task for task in tasks}
        for future in as_completed(futures):
            error = future.exception()
            yield futures[future], f"{type(error).__name__}: {error}" if error else future.result()


def run_ratios(output: Path, scale: Scale, seeds: int) -> None:
    """The section without training: one file in `ratios` for each measurement that is not there."""
    for settings in ratio_settings(scale, seeds):
        path = ratio_file(output, settings)
        if read_ratio(path, settings) is None:
            print(f"Measuring {path.stem} ...", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            content = {"fingerprint": fingerprint(settings), "settings": settings, "measured": measure(**settings)}
            write_json(path, content)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
