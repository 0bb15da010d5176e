"""Disks that are full, and folders that are read-only."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from fault_table.bench import AUTO, Bench, Row
from fault_table.kill import TRAIN


# Files that Python opens, by a part of their path, and which of the times that one is opened
OPENED = {
    "the log": (r"/log_history\.jsonl", 6),
    "where the run stands": (r"/\.progress\.json", 6),
    "a table": (r"/diagnostics\.md", 5),
    "a grid of images": (r"/images/step-", 2),
    "a grid of an evaluation": (r"/images/eval-", 2),
    "a sample of an evaluation": (r"/images/samples/", 6),
    "the samples of a phase": (r"/checkpoint-3/rollouts-0\.json", 1),
    "the state of a run": (r"/checkpoint-6/\.run_state\.json", 1),
    "transformers' state": (r"/checkpoint-6/trainer_state\.json", 1),
    "the result of an evaluation": (r"/checkpoint-8/\.trainer_state\.json", 1),
    "settings": (r"/checkpoint-8/training_args\.json", 1),
    "the best model": (r"/best_gold/_saving", 1),
    "the best model's settings": (r"/best_gold/training_args\.json", 1),
    "the best model's scores": (r"/best_gold/\.scores\.json", 1),
    "the adapter at the end": (r"/out/_saving", 1),
    "the settings at the end": (r"/out/training_args\.json", 1),
    "the state at the end": (r"/out/trainer_state\.json", 1),
}
# Of the checkpoint's other files, which are written from C++ and Rust: what is left when its writing begins
LEFT = {"the second checkpoint": (2, (80, 240, 400)), "the last checkpoint": (3, (200,))}


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "12m") -> Iterator[Path]:
    """A file system of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full(bench: Bench) -> Iterator[Row]:
    """The disk is full from one write on; once there is room the same command goes on."""
    faults = {what: {"open": pattern, "count": count} for what, (pattern, count) in OPENED.items()}
    for what, (number, left) in LEFT.items():
        for kilobytes in left:
            faults[f"{what} ({kilobytes} kB fit)"] = {"at": ["saving", number], "leave": kilobytes * 1024}
    for index, (what, when) in enumerate(faults.items()):
        with small_disk(bench.folder / f"disk-{index}") as disk:
            output, ballast = disk / "out", disk / "ballast"
            ended = bench.train(output, *AUTO, faults=[when | {"do": "fill", "ballast": str(ballast)}])
            if not ballast.exists():
                yield Row(f"full disk: {what}", f"{TRAIN} {' '.join(AUTO)}", "it was never full", False)
                continue
            ballast.unlink()
            # PyTorch knows no reason when it cannot write
            is_told = bool(ended.said("No space left|; 0 MiB are free there")) and "Traceback" not in ended.output
            again = bench.train(output, *AUTO)
            lost = bench.lost(output, again)
        told = (
            f"exit code {ended.code}, {'says so' if is_told else 'a traceback'}; {lost or 'then as the unbroken run'}"
        )
        yield Row(f"full disk: {what}", f"{TRAIN} {' '.join(AUTO)}", told, is_told and not lost)


def read_only(bench: Bench) -> Iterator[Row]:
    """A folder in which this user may not write, at the start and from some moment on."""
    user = {"user": 65534} if os.getuid() == 0 else {}
    home = bench.folder / "home-of-nobody"
    home.mkdir(exist_ok=True)
    how = user | {"env": {"HF_HOME": str(home), "HOME": str(home)}}
    for folder in (home, *home.rglob("*")):
        os.chown(folder, user.get("user", -1), -1)
    for what, mode in (("cannot be written", 0o555), ("is on a read-only disk", None)):
        if mode is None and not user:
            continue
        output = bench.new("read-only")
        output.mkdir()
        with small_disk(output, "1m") if mode is None else contextlib.nullcontext():
            if mode is None:
                subprocess.run(["mount", "-o", "remount,ro", str(output)], check=True)
            else:
                output.chmod(mode)
            ended = bench.train(output, **(how if mode else {}))
        said = ended.said("output_dir .* cannot be written to .[^)]*.").replace(str(output), "out")
        told = f"exit code {ended.code}: {said}, before anything is drawn"
        passed = ended.code == 2 and "cannot be written" in ended.output and "update 0" not in ended.output
        yield Row(f"a folder that {what}", TRAIN, told, passed)
    for part, number in (("updating", 5), ("evaluating", 3)):
        output = bench.new("read-only")
        output.mkdir()
        os.chown(output, user.get("user", -1), -1)
        ended = bench.train(output, faults=[{"at": [part, number], "do": "lock", "folder": str(output)}], **how)
        for folder, _, _ in os.walk(output):
            os.chmod(folder, 0o755)
        is_told = "Permission denied" in ended.output and "Traceback" not in ended.output
        again = bench.train(output, *AUTO, **how)
        lost = bench.lost(output, again)
        told = (
            f"exit code {ended.code}, {'says so' if is_told else 'a traceback'}; {lost or 'then as the unbroken run'}"
        )
        yield Row(f"a folder that becomes read-only while {part}", TRAIN, told, is_told and not lost)
