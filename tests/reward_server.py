"""
Reward servers for tests, each a process of its own that runs `trl-flow serve-rewards`.

Run as a program it imports the package once and then forks a server for each line that it reads, since importing is
what takes longest.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


class RewardServer:
    """
    A running server.

    Attributes:
        url (`str`): its address.
        pid (`int`): its process.
    """

    def __init__(self, pid: int, log: Path, url: str | None):
        self.pid = pid
        self._log = log
        self.url = url or self._wait_for(self._address, "is not ready")

    def output(self) -> str:
        """What it has written, errors included."""
        return self._log.read_text()

    def kill(self) -> None:
        """At once, as by `kill -9`."""
        os.kill(self.pid, signal.SIGKILL)
        self._wait_for(self.ended, "does not end")

    def terminate(self) -> None:
        """Asks it to end."""
        os.kill(self.pid, signal.SIGTERM)

    def ended(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:  # it has been reaped
            return True
        return False

    def exit_code(self) -> int:
        """Waits for its end."""
        self._wait_for(self.ended, "does not end")
        return int(self._log.with_suffix(".code").read_text())

    def _address(self) -> str | None:
        for line in self.output().splitlines():
            if " is ready with " in line:
                return line.split()[2]
        assert not self.ended(), self.output()
        return None

    def _wait_for(self, condition, complaint: str):
        until = time.monotonic() + 300
        while time.monotonic() < until:
            if value := condition():
                return value
            time.sleep(0.01)
        raise AssertionError(f"The server {complaint}: {self.output()}")


class ServerParent:
    """The process that forks servers, and a folder for what they write."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.number = 0
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=Path(__file__).parent,  # where servers look for `served_rewards`
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self,
        *options: str,
        rewards: str,
        token: str | None = None,
        port: int = 0,
        wait: bool = True,
        cwd: Path | None = None,
    ) -> RewardServer:
        """Starts one with these options, and waits until it is ready (unless told not to) to know its address."""
        self.number += 1
        log = self.folder / f"{self.number}.log"
        log.touch()
        argv = ["serve-rewards", "--rewards", rewards, "--port", str(port), *options]
        asked = {"argv": argv, "log": str(log), "token": token, "cwd": None if cwd is None else str(cwd)}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return RewardServer(int(self._process.stdout.readline()), log, None if wait else f"http://127.0.0.1:{port}")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)


def fork_servers() -> None:
    import served_rewards  # noqa: F401
    import torch

    import trl_flow.rewards.named
    from trl_flow.cli import main
    from trl_flow.serving.command import _import_server

    torch.set_num_threads(1)
    _import_server()
    import trl_flow.serving.app  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the system
    for line in sys.stdin:
        asked = json.loads(line)
        if pid := os.fork():
            print(pid, flush=True)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # Which a parent in the background may have had ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if asked["token"] is not None:
            os.environ["TRL_FLOW_REWARD_TOKEN"] = asked["token"]
        if asked["cwd"] is not None:
            os.chdir(asked["cwd"])
        code = main(asked["argv"])
        Path(asked["log"]).with_suffix(".code").write_text(str(code))
        os._exit(0)


if __name__ == "__main__":
    fork_servers()
    os._exit(0)  # nothing of it needs to be taken down
