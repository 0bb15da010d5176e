"""A run that is killed at any moment, and one that a scheduler asks to end."""

import random
from collections.abc import Iterator

from fault_table.bench import AUTO, Bench, Row


PARTS = ("sampling", "rewarding", "updating", "saving", "evaluating", "finishing")
TRAIN = "trl-flow train --config recipe.yaml"


def moment(bench: Bench, part: str, chance: random.Random) -> dict:
    count, seconds = chance.choice(bench.parts()[part])
    return {"at": [part, count], "after": round(chance.uniform(0, seconds), 4)}


def killed(bench: Bench, number: int = 20) -> Iterator[Row]:
    """`kill -9` at random moments of all parts in turn; then the same command goes on."""
    chance = random.Random(0)
    for index in range(number):
        part = PARTS[index % len(PARTS)]
        for _ in range(5):  # it may have gone on to another part, or to the end: the machine's speed changes
            when, output = moment(bench, part, chance), bench.new(f"kill-{index}")
            ended = bench.train(output, *AUTO, faults=[when | {"do": "kill"}])
            during = bench.last_part()
            if ended.code == 137 and during == part:
                break
        kept = max((int(path.name.rsplit("-")[1]) for path in output.glob("checkpoint-*")), default=0)
        again = bench.train(output, *AUTO)
        lost = bench.lost(output, again)
        told = f"exit code {ended.code}, newest checkpoint: update {kept}; {lost or 'then as the unbroken run'}"
        fault = f"kill -9 while {during}"
        passed = ended.code == 137 and not lost
        yield Row(fault, f"{TRAIN} {' '.join(AUTO)}; {when['after'] * 1000:.0f} ms into {part}", told, passed)


def terminated(bench: Bench, parts: tuple[str, ...] = PARTS) -> Iterator[Row]:
    """SIGTERM, once to the command as a shell starts it."""
    chance = random.Random(1)
    for part in parts:
        when, output = moment(bench, part, chance), bench.new(f"sigterm-{part}")
        ended = bench.train(output, *AUTO, faults=[when | {"do": "terminate"}], forked=part != "updating")
        saved = ended.said(r"The run is saved as it was after update \d+") or ended.said("No update had been made")
        again = bench.train(output, *AUTO)
        lost = bench.lost(output, again)
        passed = ended.code == 143 and bool(saved) and not lost
        told = f"exit code {ended.code}; {saved or 'no checkpoint'}; {lost or 'then as the unbroken run'}"
        yield Row(f"SIGTERM while {part}", f"{TRAIN} {' '.join(AUTO)}", told, passed)
    ended = bench.train(output, *AUTO)
    passed = ended.code == 0 and not bench.lost(output, ended)
    told = f"exit code {ended.code}: {ended.said('the run is complete')}"
    yield Row("a scheduler starts a run that is complete", f"{TRAIN} {' '.join(AUTO)}", told, passed)
