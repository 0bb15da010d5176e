"""Rewards that fail, in the process of the run and on a server."""

import contextlib
import os
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fault_table.bench import AUTO, Bench, Command, Row
from fault_table.kill import TRAIN


KINDS = ("raises", "hangs", "NaN", "too few", "memory", "exits")
WORDS = {"NaN": "returns NaN", "too few": "returns too few numbers", "memory": "takes all memory", "exits": "exits"}


def failing(bench: Bench, kinds: tuple[str, ...] = KINDS) -> Iterator[Row]:
    """A reward function that fails once, in the middle of a run."""
    for kind in kinds:
        output, options = bench.new(f"reward-{kind}".replace(" ", "-")), []
        if kind == "hangs":
            options = ["--reward_timeout", "3"]
        ended = bench.train(output, *options, faults=[{"reward": kind, "update": 4}])
        saved = ended.said(r"The run is saved as it was after update \d+")
        again = bench.train(output, *AUTO, *options)
        lost = bench.lost(output, again)
        expected = 3 if kind == "exits" else 2
        told = f"exit code {ended.code}; {saved or 'not saved'}; {lost or 'then as the unbroken run'}"
        command = " ".join([TRAIN, *options])
        yield Row(f"a reward that {WORDS.get(kind, kind)}", command, told,
                  ended.code == expected and bool(saved) and not lost)  # fmt: skip


# ---- Servers ----

PATIENT = {"REWARD_RETRIES": "9"}  # until a server has been started again


class Proxy(ThreadingHTTPServer):
    """Stands before a reward server: the requests for scores with these numbers go wrong, as `kind` says."""

    daemon_threads = True

    def __init__(self, url: str, kind: str, wrong: range):
        self.target, self.kind, self.wrong, self.asked = url, kind, wrong, 0
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_) -> None:
        """Clients that have gone away are what is wanted."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self._pass_on()

    def do_POST(self) -> None:
        self.server.asked += 1
        if self.server.asked not in self.server.wrong:
            return self._pass_on()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.kind == "answers after the timeout":
            time.sleep(3.0)
            return self._pass_on(body)
        status, answer = {
            "answers 500": (500, b"Internal Server Error"),
            "answers garbage": (200, b"<html>It works!</html>"),
            "answers with one score too few": (
                200,
                b'{"rewards": {"shapes_soft": [0.5]}, "cards": {"shapes_soft": {}}}',
            ),
        }.get(self.server.kind, (None, b""))
        if status is None:  # closes the connection without an answer
            return self.connection.close()
        self._answer(status, answer)

    def _pass_on(self, body: bytes | None = None) -> None:
        if body is None and (length := self.headers.get("Content-Length")):
            body = self.rfile.read(int(length))
        kept = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        request = urllib.request.Request(self.server.target + self.path, body, kept, method=self.command)
        with urllib.request.urlopen(request) as response:
            self._answer(response.status, response.read())

    def _answer(self, status: int, content: bytes) -> None:
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)


def serve(bench: Bench, reward: str = "shapes_soft", port: int = 0, **how) -> tuple[Command, str]:
    command = bench.start("serve-rewards", "--rewards", reward, "--port", str(port), **how)
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if command.log.exists() and " is ready with " in (said := command.log.read_text()):
            return command, next(line for line in said.splitlines() if " is ready with " in line).split()[2]
        time.sleep(0.05)
    raise TimeoutError(command.log.read_text())


def servers(bench: Bench, kinds: tuple[str, ...] | None = None) -> Iterator[Row]:
    """A reward server that fails twice, and goes on; and one that fails for good, with a run that goes on later."""
    bad = ("closes the connection", "answers 500", "answers garbage", "answers with one score too few",
           "answers after the timeout")  # fmt: skip
    options = ("--reward_funcs", "fault_table.hooks.remote")
    command = f"{TRAIN} --reward_funcs http://localhost:8000"
    server, url = serve(bench)
    for kind in kinds or bad:
        for how_long, wrong in (("twice", range(3, 5)), ("from then on", range(3, 10**6))):
            output, proxy = bench.new("server"), Proxy(url, kind, wrong)
            env = {"REWARD_SERVER": proxy.url}
            ended = bench.train(output, *options, env=env)
            told, passed = f"exit code {ended.code}", True
            if how_long == "twice":
                passed = ended.code == 0 and "It is left alone for a while" in ended.output
                told += ", with a warning"
            else:
                saved = ended.said(r"The run is saved as it was after update \d+")
                told, passed = f"{told}; {saved or 'not saved'}", ended.code == 2 and bool(saved)
                proxy.wrong = range(0)
                ended = bench.train(output, *options, *AUTO, env=env)
            lost = bench.lost(output, ended)
            proxy.shutdown()
            told += f"; {lost or 'as the unbroken run'}"
            yield Row(f"a server that {kind}, {how_long}", command, told, passed and not lost)
    if kinds is None:
        yield _dies(bench, server, url, options, command)
        yield from _out_of_memory(bench, options)


def _dies(bench: Bench, server: Command, url: str, options: tuple[str, ...], command: str) -> Row:
    """kill -9 in the middle of a run, and another server on its port once that has been noticed."""
    output = bench.new("server")
    run = bench.started(output, *options, env={"REWARD_SERVER": url, **PATIENT})
    _until(run, "updating")
    server.kill()
    _until_in(run.log, "It is left alone for a while")
    another, _ = serve(bench, port=int(url.rsplit(":", 1)[1]))
    ended = run.wait()
    lost = bench.lost(output, ended)
    another.kill()
    told = f"exit code {ended.code}, with a warning; {lost or 'as the unbroken run'}"
    passed = ended.code == 0 and "It is left alone for a while" in ended.output and not lost
    return Row("a server that is killed, and started again", command, told, passed)


def _out_of_memory(bench: Bench, options: tuple[str, ...]) -> Iterator[Row]:
    """The kernel ends a server that takes more memory than its group may have; a supervisor starts it again."""
    group, hungry = Path("/sys/fs/cgroup/memory/trl-flow-faults"), bench.folder / "hungry"
    if os.getuid() != 0 or not group.parent.is_dir():
        return
    group.mkdir(exist_ok=True)
    hungry.unlink(missing_ok=True)
    how = {"env": {"HUNGRY": str(hungry)}, "cgroup": str(group)}
    server, url = serve(bench, "fault_table.hooks.hungry", **how)
    (group / "memory.limit_in_bytes").write_text(str(256 * 2**20))
    output = bench.new("server")
    run = bench.started(output, *options, env={"REWARD_SERVER": url, **PATIENT})
    _until(run, "updating")
    hungry.touch()
    died = server.wait()
    hungry.unlink()
    another, _ = serve(bench, "fault_table.hooks.hungry", int(url.rsplit(":", 1)[1]), **how)
    ended = run.wait()
    lost = bench.lost(output, ended)
    another.kill()
    group.rmdir()
    told = f"server: exit code {died.code}; run: exit code {ended.code}; {lost or 'as the unbroken run'}"
    command = f"{TRAIN} --reward_funcs http://localhost:8000"
    yield Row("a server that the kernel ends for its memory, and started again", command, told,
              died.code == 137 and ended.code == 0 and not lost)  # fmt: skip


def _until(run: Command, part: str) -> None:
    """Until a run has come to this part."""
    _until_in(run.log.with_suffix(".marks"), f" {part} ")


def _until_in(path: Path, text: str) -> None:
    until = time.monotonic() + 300
    while text not in path.read_text():
        if time.monotonic() > until:
            raise TimeoutError(f"{path} does not say {text!r}.")
        time.sleep(0.01)
