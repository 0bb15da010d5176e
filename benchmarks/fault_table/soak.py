"""A long run, watched from outside: whether its memory, open files and threads grow."""

import csv
import json
import math
import time
from collections.abc import Iterator

import psutil

from fault_table.bench import Bench, Row
from fault_table.kill import TRAIN


UPDATES = 500
WARM_UP = 100  # updates that are left out: caches fill, allocators find their size
BLOCKS = 16  # over whose means the line is laid: values next to each other are not independent
# Each may rise by so much in a hundred updates; the log of a run is held in memory, 0.3 MiB for a hundred
LIMITS = (("memory", "MiB", 1.0), ("open files", "", 0.05), ("threads", "", 0.05))
OPTIONS = (
    *("--max_steps", str(UPDATES), "--eval_steps", "10", "--save_steps", "10", "--lora_r", "1"),
    *("--dataset_test_split", "test[:2]", "--over_optimization_patience", str(UPDATES)),
)


def slope(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Of a line through the means of blocks of `(x, y)` in the order of x, and its standard error."""
    size = len(points) / BLOCKS
    blocks = [points[round(i * size) : round((i + 1) * size)] for i in range(BLOCKS)]
    means = [tuple(sum(values) / len(block) for values in zip(*block, strict=True)) for block in blocks]
    mean_x, mean_y = (sum(values) / BLOCKS for values in zip(*means, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in means)
    rise = sum((x - mean_x) * (y - mean_y) for x, y in means) / spread
    left = sum((y - mean_y - rise * (x - mean_x)) ** 2 for x, y in means)
    return rise, math.sqrt(left / (BLOCKS - 2) / spread)


def soak(bench: Bench) -> Iterator[Row]:
    """500 updates with an evaluation and a checkpoint every ten."""
    output = bench.new("soak")
    run = bench.started(output, *OPTIONS, forked=False)
    process, seen = psutil.Process(run.pid), []
    while run.process.poll() is None:
        try:
            update = json.loads((output / "progress.json").read_text())["update"]
            if update < UPDATES:  # not while it ends
                seen.append((update, process.memory_info().rss / 2**20, process.num_fds(), process.num_threads()))
        except (OSError, ValueError, psutil.Error):  # it has not begun, or has ended
            pass
        time.sleep(0.1)
    ended = run.wait()
    with open(bench.folder / "soak.csv", "w", newline="") as file:
        csv.writer(file).writerows([("update", "MiB", "files", "threads"), *seen])
    late = [point for point in seen if point[0] > WARM_UP]
    command = " ".join([TRAIN, *OPTIONS])
    for index, (what, unit, limit) in enumerate(LIMITS, start=1):
        values = [point[index] for point in late]
        rise, error = (100 * value for value in slope([(point[0], point[index]) for point in late]))
        told = f"{values[0]:.0f} {unit} after {WARM_UP} updates, {values[-1]:.0f} at the end"
        told += f", never over {max(values):.0f}; slope {rise:+.2g} ± {error:.1g} {unit} per 100 updates"
        yield Row(f"soak: {what}", command, told, ended.code == 0 and abs(rise) <= limit)
