"""The one thread in which a server's reward functions run: they need not be safe to call from several."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar


Result = TypeVar("Result")


class ScoringThread:
    """
    Runs functions one after another, in the order in which they were submitted.

    Unlike an executor's, the thread does not keep the process from ending when a function hangs.
    """

    def __init__(self):
        self._waiting: queue.SimpleQueue[tuple[Future, Callable] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], Result]) -> "Future[Result]":
        """Has `function` called in its turn; if the future is cancelled before that, not at all."""
        future: Future = Future()
        self._waiting.put((future, function))
        return future

    def stop(self, timeout: float) -> bool:
        """Ends the thread after what was submitted. Returns whether it did so within `timeout` seconds."""
        self._waiting.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._waiting.get()) is not None:
            future, function = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)
            except BaseException as error:
                # A reward function that calls sys.exit() may not end the server
                future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))
            del job, future, function  # and with them the images, before waiting for the next
