"""Who scores for a reward server: one thread of its own process, or processes besides it."""

import atexit
import contextlib
import functools
import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

import torch
from fastapi import HTTPException

from trl_flow.rewards.checks import RewardFunc
from trl_flow.rewards.scorer import RewardScorer
from trl_flow.serving.form import ScoreRequest
from trl_flow.serving.scoring import Scored, decoded, score


# Seconds between two looks at whether an idle process still lives, and until a start that has failed is tried again
_LOOK, _REST = 1.0, 5.0
# Seconds that a worker is waited for once it has been told to end
_STOP = 1.0

logger = logging.getLogger(__name__)


class WorkerDied(Exception):
    """A process has ended while it scored. The message is for the client, who may ask again."""


class OwnProcess:
    """Reward functions in the thread that enters it, where their models are loaded; they are freed when it leaves."""

    alive = True

    def __init__(self, scorer: RewardScorer):
        self._scorer = scorer

    def __enter__(self) -> "OwnProcess":
        self._scorer.load()
        return self

    def __call__(self, names: list[str], asked: ScoreRequest) -> Scored:
        """Scores a request that is decoded."""
        return score(self._scorer, names, asked)

    def __exit__(self, *exception: Any) -> None:
        self._scorer.close()

    def kill(self) -> None:
        """Nothing: a function that hangs is left behind with its model."""


class ScoringProcess:
    """
    Reward functions in a process of their own, which is started on entering and killed on leaving.

    `make_rewards` (picklable) makes them there, `max_pixels` is the limit of an image, and `environment` is added to
    its environment. A `RuntimeError` with the reason if the models cannot be loaded.
    """

    # The environment is the whole process's: it is changed for one start at a time
    _starting = threading.Lock()

    def __init__(self, make_rewards: Callable[[], Sequence[RewardFunc]], max_pixels: int, environment: dict[str, str]):
        # Not by fork: neither CUDA nor the threads of this process would survive it
        context = multiprocessing.get_context("spawn")
        self._connection, self._its_end = context.Pipe()
        arguments = self._its_end, make_rewards, max_pixels
        self._process = context.Process(target=_main, args=arguments, name="scoring")
        self._environment = environment

    def __enter__(self) -> "ScoringProcess":
        with self._starting:
            before = os.environ.copy()
            os.environ.update(self._environment)
            try:
                self._process.start()
            finally:
                for name in self._environment:
                    os.environ.pop(name)
                    if name in before:
                        os.environ[name] = before[name]
        self._its_end.close()  # so that its death ends the connection
        try:
            failure = self._connection.recv()
        except EOFError:
            failure = self._death()
        if failure is not None:
            self.kill()
            raise RuntimeError(failure)
        return self

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def __call__(self, names: list[str], asked: ScoreRequest) -> Scored:
        """Has a request scored, whose images are PNG files. `HTTPException` if one of them is refused."""
        try:
            self._connection.send((names, asked))
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied(self._death()) from error
        if isinstance(answer, tuple):
            raise HTTPException(*answer)
        return answer

    def _death(self) -> str:
        self._process.join(_STOP)
        code = self._process.exitcode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        return f"The process that scores ended {how}, perhaps for lack of memory."

    def __exit__(self, *exception: Any) -> None:
        self._connection.close()  # upon which it ends by itself
        self._process.join(_STOP)
        self.kill()

    def kill(self) -> None:
        """Ends the process at once, if it has been started."""
        if self._process.pid is not None:
            self._process.kill()
            self._process.join(_STOP)


def _main(connection: Connection, make_rewards: Callable[[], Sequence[RewardFunc]], max_pixels: int) -> None:
    """What the process of [`ScoringProcess`] does: scores one request after another, until the server is gone."""
    # Both may be sent to all processes at once. The server then ends by itself, and finishes its requests before
    for sent in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sent, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):
        try:
            scorer = RewardScorer(make_rewards())
            scorer.load()
        except BaseException as error:
            connection.send(str(error) or type(error).__name__)
            return
        connection.send(None)
        while True:
            names, asked = connection.recv()
            try:
                answer = score(scorer, names, decoded(asked, max_pixels))
            except HTTPException as error:
                answer = error.status_code, error.detail
            connection.send(answer)
            del asked  # and with it the images, before waiting for the next


def _end_with_the_server() -> None:
    """Also if this process is busy, perhaps for ever, when the server is killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def pool(
    make_rewards: Callable[[], Sequence[RewardFunc]], max_pixels: int, number: int, device: str | None
) -> list[Callable[[], ScoringProcess]]:
    """
    What starts each of `number` processes. They share the CPU's threads, unless `OMP_NUM_THREADS` is set, and take
    the CUDA devices in turn, unless `device` is another or has a number.
    """
    threads = max(torch.get_num_threads() // number, 1)
    shared = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
    gpus: list[str] = []
    if device is None or torch.device(device) == torch.device("cuda"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    environments = [shared | ({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {}) for i in range(number)]
    return [functools.partial(ScoringProcess, make_rewards, max_pixels, own) for own in environments]


_Worker = OwnProcess | ScoringProcess


class Workers:
    """
    Gets requests scored in the order in which they come, by whoever of the `workers` is free. One that dies is started
    again. `on_ready` is called when all have loaded their models, `on_failure` instead if one of them fails to.
    """

    def __init__(
        self, workers: Sequence[Callable[[], _Worker]], on_ready: Callable[[], None] | None,
        on_failure: Callable[[BaseException], None] | None,
    ):  # fmt: skip
        self._on_ready, self._on_failure = on_ready, on_failure
        self._jobs: queue.SimpleQueue[tuple[Future, list[str], ScoreRequest] | None] = queue.SimpleQueue()
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._current: dict[int, _Worker] = {}
        self._up, self._loading = 0, len(workers)
        # A reward function runs in one of them only: it need not be safe to call from several. Not an executor's, for
        # which Python waits at the end of the process even if a function hangs
        self._threads = [
            threading.Thread(target=self._keep, args=(index, make), name="scoring", daemon=True)
            for index, make in enumerate(workers)
        ]

    @property
    def up(self) -> int:
        """How many can score now."""
        return 0 if self._stopped.is_set() else self._up

    def start(self) -> None:
        """Loads the models, in the background."""
        # Python waits for its processes at the end, and a second Ctrl-C ends a server at once
        atexit.register(self.stop)
        for thread in self._threads:
            thread.start()

    def submit(self, names: list[str], asked: ScoreRequest) -> Future:
        """Its result is [`Scored`]. It raises [`WorkerDied`], and what a worker raises when it is called."""
        future: Future = Future()
        self._jobs.put((future, names, asked))
        return future

    def stop(self) -> None:
        """Ends the workers. One that is still busy then is killed if it is a process, and else left behind."""
        atexit.unregister(self.stop)
        self._stopped.set()
        for _ in self._threads:
            self._jobs.put(None)
        until = time.monotonic() + _STOP
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0.0))
        for worker in tuple(self._current.values()):
            worker.kill()

    def _keep(self, index: int, make: Callable[[], _Worker]) -> None:
        """Keeps one worker up, and what is submitted scored by it."""
        loaded = False
        while not self._stopped.is_set():
            try:
                self._current[index] = make()
                with self._current[index] as worker:
                    self._count(1, first=not loaded)
                    loaded = True
                    try:
                        self._attend(worker)
                    finally:
                        self._count(-1)
            except BaseException as error:
                if self._stopped.is_set():
                    return
                logger.error("The reward functions could not be loaded.", exc_info=error)
                if not loaded:
                    if self._on_failure is not None:
                        self._on_failure(error)
                    return
                self._stopped.wait(_REST)

    def _count(self, change: int, first: bool = False) -> None:
        with self._lock:
            self._up += change
            self._loading -= first
            ready = first and not self._loading
        if ready and self._on_ready is not None:
            self._on_ready()

    def _attend(self, worker: _Worker) -> None:
        """Does what is submitted, but for what has been cancelled by then, until the end or the worker's."""
        while worker.alive:
            try:
                job = self._jobs.get(timeout=_LOOK)
            except queue.Empty:
                continue
            if job is None:
                return
            future, *asked = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(worker(*asked))
                except BaseException as error:
                    future.set_exception(error)
            del job, future, asked  # and with them the images, before waiting for the next
        if not self._stopped.is_set():
            logger.error("A process that scores has ended. Another one is started.")
