"""How long the commands take that only print: processor and wall seconds, beside an import of torch on this machine.

python benchmarks/command_time.py
"""

import json
import resource
import subprocess
import sys
import time


COMMANDS = {
    "trl-flow --help": ["-m", "trl_flow", "--help"],
    "trl-flow train --help": ["-m", "trl_flow", "train", "--help"],
    "trl-flow train --help all": ["-m", "trl_flow", "train", "--help", "all"],
    "trl-flow methods": ["-m", "trl_flow", "methods"],
    "import torch": ["-c", "import torch"],
}
REPEATS = 3


def seconds(arguments: list[str]) -> tuple[float, float]:
    """Processor and wall seconds of one process of Python."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main() -> None:
    found = {name: min(seconds(arguments) for _ in range(REPEATS)) for name, arguments in COMMANDS.items()}
    torch = found["import torch"][0]
    for name, (processor, wall) in found.items():
        print(f"{name:28} {processor:6.2f} s processor {wall:6.2f} s wall {processor / torch:6.2f} x import torch")
    print(json.dumps({name: {"processor": cpu, "wall": wall} for name, (cpu, wall) in found.items()}))


if __name__ == "__main__":
    main()
