"""Checkpoints that are cut off, and clocks that jump."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from fault_table.bench import AUTO, Bench, Row
from fault_table.kill import TRAIN


HOUR = 3600.0


def truncated(bench: Bench, quick: bool = False) -> Iterator[Row]:
    """Each file of the last checkpoint is cut off; the run goes on from the one before."""
    stopped = bench.new("stopped")
    bench.train(stopped, faults=[{"at": ["updating", 7], "do": "kill"}])
    names = sorted(path.name for path in (stopped / "checkpoint-6").iterdir())
    for name in ["optimizer.pt"] if quick else names:
        for share in (0.0, 0.5) if name == "optimizer.pt" and not quick else (0.5,):
            output = bench.new("truncated")
            shutil.copytree(stopped, output)
            path = output / "checkpoint-6" / name
            path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
            ended = bench.train(output, *AUTO)
            lost = bench.lost(output, ended)
            said = ended.said("checkpoint-6 is passed over: [^.]*[.][^.]*")
            told = f"{said or 'not noticed'}; exit code {ended.code}; {lost or 'as the unbroken run'}"
            fault = f"checkpoint: {name} {'cut in half' if share else 'empty'}"
            yield Row(fault, f"{TRAIN} {' '.join(AUTO)}", told, bool(said) and not lost)
    if quick:
        return
    output = bench.new("truncated")
    shutil.copytree(stopped, output)
    for checkpoint in output.glob("checkpoint-*"):
        (checkpoint / "optimizer.pt").write_bytes(b"")
    ended = bench.train(output, *AUTO)
    lost = bench.lost(output, ended)
    kept = sorted(str(path.relative_to(output)) for path in output.glob("previous-*/checkpoint-*"))
    told = f"begins again, the old ones are in {', '.join(kept)}; {lost or 'as the unbroken run'}"
    yield Row("checkpoints: all damaged", f"{TRAIN} {' '.join(AUTO)}", told, len(kept) == 2 and not lost)


def clock(bench: Bench, quick: bool = False) -> Iterator[Row]:
    """The clock is set in the middle of a run, which is then killed, or not."""
    jumps = {"an hour back": -HOUR} if quick else {"a day forward": 24 * HOUR, "ten years back": -10 * 8766 * HOUR}
    for words, jump in jumps.items():
        for part, number in (("updating", 5), ("evaluating", 3))[: 1 if quick else 2]:
            output = bench.new("clock")
            fault = {"at": [part, number], "do": "clock", "jump": jump, "folder": str(output)}
            ended = bench.train(output, faults=[fault])
            lost = bench.lost(output, ended)
            told = f"exit code {ended.code}; {lost or 'as the unbroken run'}{_watched(bench, output)}"
            yield Row(f"a clock that is set {words} while {part}", TRAIN, told, not lost)
        if quick:
            return
        output = bench.new("clock")
        fault = {"at": ["updating", 4], "do": "clock", "jump": jump, "folder": str(output)}
        bench.train(output, faults=[fault, {"at": ["updating", 8], "do": "kill"}])
        ended = bench.train(output, *AUTO)
        lost = bench.lost(output, ended)
        told = f"exit code {ended.code}; {lost or 'as the unbroken run'}"
        yield Row(f"a clock that is set {words}, then kill -9", f"{TRAIN} {' '.join(AUTO)}", told, not lost)


def _watched(bench: Bench, output: Path) -> str:
    """Whether the page of a run can be written."""
    page = bench.folder / "page.html"
    ended = bench.start("watch", str(output), "--output", str(page)).wait()
    return "" if ended.code == 0 else f"; watch: exit code {ended.code}"
