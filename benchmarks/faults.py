"""
What a training run loses by a fault, tried on the real commands; prints a table.

    python benchmarks/faults.py            # all, about ten minutes
    python benchmarks/faults.py --quick    # one of each kind, about a minute
    python benchmarks/faults.py --rows killed full

Each row does something to a small run of the bundled model (fault_table/recipe.yaml), lets it go on by the same
command if it has ended, and compares it with a run to which nothing happened: weights to the last bit, the best model
by gold, logs, and files. Full disks are small file systems of their own, for which one has to be root; so has one for
memory limits. Ends with exit code 1 if something was lost.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from fault_table import disk, kill, others, rewards, soak
from fault_table.bench import Bench, timed


ROWS = {
    "killed": kill.killed,
    "terminated": kill.terminated,
    "full": disk.full,
    "read_only": disk.read_only,
    "failing": rewards.failing,
    "servers": rewards.servers,
    "truncated": others.truncated,
    "clock": others.clock,
    "soak": soak.soak,
}
QUICK = {
    "killed": lambda bench: kill.killed(bench, 6),
    "terminated": lambda bench: kill.terminated(bench, ("updating",)),
    "failing": lambda bench: rewards.failing(bench, ("raises",)),
    "servers": lambda bench: rewards.servers(bench, ("answers 500",)),
    "truncated": lambda bench: others.truncated(bench, quick=True),
    "clock": lambda bench: others.clock(bench, quick=True),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="one row of each kind")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary one")
    parser.add_argument("--output", type=Path, help="a file to add the rows to, one JSON object a line")
    options = parser.parse_args()
    chosen = QUICK if options.quick else {name: ROWS[name] for name in options.rows}
    failed = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        with Bench((options.folder or Path(temporary)).resolve()) as bench:
            print("| fault | command | result | |\n| --- | --- | --- | --- |")
            for name, rows in chosen.items():
                for row in timed(rows, bench):
                    failed += not row.passed
                    cells = row.fault, f"`{row.command}`", row.result, "ok" if row.passed else "**lost**"
                    print(f"| {' | '.join(cells)} |", flush=True)
                    if options.output is not None:
                        with open(options.output, "a") as file:
                            file.write(json.dumps({"kind": name, **vars(row)}) + "\n")
    print(f"\n{failed} rows failed." if failed else "\nNothing was lost.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
