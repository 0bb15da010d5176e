"""
Runs `trl-flow` commands for the fault table, each in a process of its own.

Reads a JSON object a line: `argv`, `cwd`, `env` (added), `log` (a path, for what it prints), and if wished `user` (a
number) and `cgroup` (a folder). The processes are forked off from this one, which has imported the library: that is
what takes longest. Beside the log, `.pid` and `.code` are written, the code as `waitpid` gives it.
"""

import codecs
import gc
import json
import os
import signal
import sys
from pathlib import Path


def write(path: Path, text: str) -> None:
    """At once, for others wait for the file."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(text)
    temporary.rename(path)


def become(order: dict) -> None:
    if "cgroup" in order:
        Path(order["cgroup"], "cgroup.procs").write_text(str(os.getpid()))
    output = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    sys.path.insert(0, order["cwd"])
    if "user" in order:
        os.setgid(order["user"])
        os.setuid(order["user"])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def main() -> list[str]:
    """Returns in each new process, with its arguments."""
    import matplotlib.pyplot  # noqa: F401
    import uvicorn  # noqa: F401

    import trl_flow.commands.options
    import trl_flow.serving.app
    import trl_flow.trainer  # noqa: F401

    for encoding in ("unicode-escape", "latin1", "ascii", "idna"):  # another user may not be able to import them
        codecs.lookup(encoding)
    gc.collect()
    gc.freeze()  # so that new processes need not look at all this again
    signal.signal(signal.SIGCHLD, lambda *_: None)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        log = Path(order["log"])
        if os.fork() > 0:  # the watchers are not waited for: few, and they end with the table
            continue
        if (pid := os.fork()) > 0:
            write(log.with_suffix(".pid"), str(pid))
            _, status = os.waitpid(pid, 0)
            write(log.with_suffix(".code"), str(os.waitstatus_to_exitcode(status)))
            os._exit(0)
        become(order)
        return order["argv"]
    os._exit(0)


if __name__ == "__main__":
    arguments = main()
    from trl_flow.cli import main as command

    sys.exit(command(arguments))
