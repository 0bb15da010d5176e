"""
Faults inside a training run, and its reward functions. Imported by the command, as `fault_table.hooks.reward`.

The environment variable `FAULTS` holds a JSON object: `marks` is a file for a line `seconds part count` at each part
of the run (sampling, rewarding, updating, saving, evaluating, finishing ...), and `faults` a list of

* `{"at": [part, count], "after": seconds, "do": action}`: when a part has been entered so many times,
* `{"open": pattern, "count": n, "do": action}`: when a file whose path has the pattern is opened to write,
* `{"reward": kind, "update": n}`: in the first call of the reward function of that update or a later one.

Actions are the functions `do_*` below, which take the fault.
"""

import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from trl_flow.rewards import RemoteReward, ShapesReward
from trl_flow.trainer import FlowRLTrainer
from trl_flow.trainer.progress import Clock


PLAN = json.loads(os.environ.get("FAULTS", "{}"))
FAULTS = PLAN.get("faults", [])

_soft = ShapesReward("soft")
_counts: Counter = Counter()
_now = None
_opened: Counter = Counter()


# ---- What happens ----


def do_kill(fault: dict) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def do_terminate(fault: dict) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def do_fill(fault: dict) -> None:
    """Fills the disk of `fault["ballast"]`, a file, but for `leave` bytes."""
    ballast = Path(fault["ballast"])
    free = shutil.disk_usage(ballast.parent).free - fault.get("leave", 0)
    with open(ballast, "ab", buffering=0) as file:
        while free > 0:
            free -= file.write(bytes(min(free, 2**16)))


def do_lock(fault: dict) -> None:
    """Makes a folder and those in it read-only, for a user that is not root."""
    for folder, _, _ in os.walk(fault["folder"]):
        os.chmod(folder, 0o555)


def do_clock(fault: dict) -> None:
    """The clock jumps by `fault["jump"]` seconds. The system's own is left alone: that of Python is set, and to files
    that are there already the time is given that they would have before the new one."""
    before, jump = time.time, fault["jump"]
    time.time = lambda: before() + jump
    for path in Path(fault["folder"]).rglob("*"):
        then = path.stat().st_mtime - jump
        os.utime(path, (then, then))


def _act(fault: dict) -> None:
    globals()[f"do_{fault['do']}"](fault)


# ---- When ----


def enter(part: str | None) -> None:
    global _now
    if part == _now or part is None:
        return
    _now = part
    _counts[part] += 1
    if "marks" in PLAN:
        with open(PLAN["marks"], "a") as file:
            file.write(f"{time.perf_counter():.4f} {part} {_counts[part]}\n")
    for fault in FAULTS:
        if fault.get("at") == [part, _counts[part]]:
            timer = threading.Timer(fault.get("after", 0), _act, [fault])
            timer.daemon = True
            timer.start()
            if not fault.get("after"):
                timer.join()


def _opening(event: str, arguments: tuple) -> None:
    if event != "open" or not isinstance(arguments[0], str) or not arguments[2] & (os.O_WRONLY | os.O_RDWR):
        return
    for number, fault in enumerate(FAULTS):
        if "open" in fault and re.search(fault["open"], arguments[0]):
            _opened[number] += 1
            if _opened[number] == fault.get("count", 1):
                _act(fault)


def _install() -> None:
    of_clock, of_trainer = Clock.enter, FlowRLTrainer.save_model

    def clock_enter(self, part):
        enter(part)
        of_clock(self, part)

    def save_model(self, output_dir=None, _internal_call=False):
        if output_dir is None:
            enter("finishing")
        of_trainer(self, output_dir, _internal_call)

    Clock.enter, FlowRLTrainer.save_model = clock_enter, save_model
    sys.addaudithook(_opening)


# ---- Rewards ----


def reward(prompts, images, trainer_state=None, **columns):
    """The soft score of the bundled world, slow enough to be interrupted, with what `FAULTS` says."""
    update = trainer_state.global_step if trainer_state is not None else 0
    for fault in FAULTS:
        if "reward" in fault and update >= fault["update"] and not fault.get("done"):
            fault["done"] = True
            return _faulty(fault["reward"], len(prompts))
    before = _now
    enter("rewarding")
    time.sleep(0.05)
    scores = _soft(prompts=prompts, images=images, **columns)
    if before is not None and _now == "rewarding":
        enter(before)
    return scores


reward.__name__ = "shapes_soft"


def _faulty(kind: str, number: int):
    if kind == "raises":
        raise ConnectionError("the model's server is away")
    if kind == "hangs":
        time.sleep(3600)
    if kind == "NaN":
        return [math.nan] * number
    if kind == "too few":
        return [0.5] * (number - 1)
    if kind == "exits":
        sys.exit(3)
    if kind == "memory":
        _limit(64 * 2**20)
        held = []
        while True:  # as one that keeps what it has seen
            held.append(bytearray(2**16))
    raise ValueError(kind)


def _limit(more: int) -> None:
    """From now on the process can have so many bytes more."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.RLIM_INFINITY))


def hungry(prompts, images, **columns):
    """For a reward server: takes memory without end once the file `HUNGRY` is there."""
    held = []
    while os.path.exists(os.environ["HUNGRY"]):
        held.append(bytearray(b"1" * 2**20))
    return _soft(prompts=prompts, images=images, **columns)


hungry.__name__ = "shapes_soft"


def __getattr__(name: str):
    if name == "remote":  # a server that is tried again soon, so that the table does not take all day
        retries = int(os.environ.get("REWARD_RETRIES", 3))
        return RemoteReward(os.environ["REWARD_SERVER"], timeout=2.0, retries=retries, backoff=0.2)
    raise AttributeError(name)


if PLAN:
    _install()
