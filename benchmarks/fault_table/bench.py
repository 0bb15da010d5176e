"""The commands of the fault table: how they are run, and how a run is compared with one that nothing happened to."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file


HERE = Path(__file__).parent
RECIPE = HERE / "recipe.yaml"
AUTO = ("--resume_from_checkpoint", "auto")
# Logged values that a run has again if nothing is lost; others are times
_LOGGED = ("reward", "reward_std", "grad_norm", "loss", "eval_reward", "eval_gold/average")


@dataclass
class Row:
    """One line of the table."""

    fault: str
    command: str
    result: str
    passed: bool
    seconds: float = 0.0


@dataclass
class Ended:
    """How a command ended: its exit code (of a shell: 128 and the signal that killed it), and what it printed."""

    code: int
    output: str

    def said(self, pattern: str) -> str:
        found = re.search(pattern, self.output)
        return found[0] if found else ""


@dataclass
class Command:
    log: Path
    process: subprocess.Popen | None = None  # of one that was not forked off

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else int(wait_for(self.log.with_suffix(".pid")).read_text())

    def wait(self, seconds: float = 300) -> Ended:
        if self.process:
            code = self.process.wait(seconds)
        else:
            code = int(wait_for(self.log.with_suffix(".code"), seconds).read_text())
        return Ended(128 - code if code < 0 else code, self.log.read_text())

    def kill(self) -> Ended:
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    @property
    def runs(self) -> bool:
        return self.process.poll() is None if self.process else not self.log.with_suffix(".code").exists()


def wait_for(path: Path, seconds: float = 300) -> Path:
    until = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > until:
            raise TimeoutError(f"{path} has not appeared for {seconds} s.")
        time.sleep(0.02)
    return path


@dataclass
class Bench:
    """Runs commands in `folder`, which is made anew."""

    folder: Path
    _commands: list[Command] = field(default_factory=list)
    _forker: subprocess.Popen | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> "Bench":
        self.folder.mkdir(parents=True, exist_ok=True)
        self.environment = {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "HF_HOME": str(self.folder / "home"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)]),
            "MPLBACKEND": "agg",
        }
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        script = [sys.executable, str(HERE / "child.py")]
        self._forker = subprocess.Popen(script, env=os.environ | self.environment, **options)
        if self._forker.stdout.readline() != "ready\n":
            raise RuntimeError("The library cannot be imported.")
        self._run_whole()
        return self

    def __exit__(self, *_) -> None:
        for command in self._commands:  # servers, and what has taken too long
            if command.runs:
                command.kill()
        self._forker.stdin.close()
        self._forker.wait()

    def start(self, *argv: str, faults: list[dict] = (), forked: bool = True, **how) -> Command:
        """`how` may have `user`, `cgroup` and `env`."""
        log = self.folder / f"command-{len(self._commands) + 1:03d}.log"
        for suffix in (".log", ".pid", ".code", ".marks"):
            log.with_suffix(suffix).unlink(missing_ok=True)
        marks = log.with_suffix(".marks")
        marks.touch()
        marks.chmod(0o666)  # for a user that may not write elsewhere
        plan = {"marks": str(marks), "faults": list(faults)}
        env = self.environment | {"FAULTS": json.dumps(plan)} | how.pop("env", {})
        if not forked:
            with open(log, "w") as file:
                command = [sys.executable, "-m", "trl_flow", *argv]
                options = {"cwd": self.folder, "env": os.environ | env, "stdout": file, "stderr": file}
                self._commands.append(Command(log, subprocess.Popen(command, **options)))
        else:
            order = {"argv": argv, "cwd": str(self.folder), "env": env, "log": str(log), **how}
            self._forker.stdin.write(json.dumps(order) + "\n")
            self._forker.stdin.flush()
            self._commands.append(Command(log))
        return self._commands[-1]

    def train(self, output: Path, *options: str, **how) -> Ended:
        return self.started(output, *options, **how).wait()

    def started(self, output: Path, *options: str, **how) -> Command:
        return self.start("train", "--config", str(RECIPE), "--output_dir", str(output), *options, **how)

    def new(self, name: str) -> Path:
        """A folder that is not there yet, for a run."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        return path

    @property
    def whole(self) -> Path:
        """A run to which nothing happens."""
        return self.folder / "whole"

    def _run_whole(self) -> None:
        ended = self.train(self.new("whole"))
        if ended.code != 0:
            raise RuntimeError(ended.output)
        shutil.copy(self._commands[-1].log.with_suffix(".marks"), self.whole / "marks")

    def parts(self) -> dict[str, list[tuple[int, float]]]:
        """Of the whole run: of each part which time it was, and how long that took."""
        lines = [line.split() for line in (self.whole / "marks").read_text().splitlines()]
        found: dict[str, list[tuple[int, float]]] = {}
        for (since, part, count), (until, *_) in zip(lines, [*lines[1:], [float(lines[-1][0]) + 0.05]], strict=True):
            found.setdefault(part, []).append((int(count), float(until) - float(since)))
        return found

    def last_part(self) -> str:
        """Of the command that was started last."""
        marks = self._commands[-1].log.with_suffix(".marks").read_text().splitlines()
        return marks[-1].split()[1] if marks else "starting"

    def lost(self, output: Path, ended: Ended) -> str:
        """What a run that has ended lacks of the whole one; `""` for nothing."""
        if ended.code != 0:
            return f"exit code {ended.code}: {ended.output.strip().splitlines()[-1:]}"
        found = []
        for name in ("pytorch_lora_weights.safetensors", "best_gold/pytorch_lora_weights.safetensors"):
            pairs = [load_file(folder / name) for folder in (self.whole, output)]
            if (by := max((pairs[0][key] - pairs[1][key]).abs().max().item() for key in pairs[0])) > 0:
                found.append(f"{name} differs by {by:.1e}")
        whole, own = (files(folder) for folder in (self.whole, output))
        found += [f"no {', '.join(sorted(whole - own))}"] * bool(whole - own)
        found += [f"left over: {', '.join(sorted(own - whole))}"] * bool(own - whole)
        if (logs := logged(self.whole)) != logged(output):
            found.append(f"{len(logged(output))} logs instead of {len(logs)}, or others")
        return "; ".join(found)


def files(output: Path) -> set[str]:
    """What is in a run's folder, without what was there before it."""
    names = (str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    return {name for name in names if not name.startswith("previous-") and name not in ("marks", ".lock")}


def logged(output: Path) -> list[tuple]:
    logs = map(json.loads, (output / "log_history.jsonl").read_text().splitlines())
    logs = [(log["step"], *(log.get(name) for name in _LOGGED)) for log in logs if "train_runtime" not in log]
    return logs


def timed(rows: Callable[["Bench"], Iterator[Row]], bench: Bench) -> Iterator[Row]:
    since = time.monotonic()
    for row in rows(bench):
        row.seconds, since = time.monotonic() - since, time.monotonic()
        yield row
