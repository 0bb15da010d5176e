"""The one way in which reward functions are called: by the trainer, the evaluation and the reward server."""

import asyncio
import atexit
import functools
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import torch

from trl_flow.images import Frame, Sample, frame_of
from trl_flow.rewards.base import Columns, model_of
from trl_flow.rewards.chat import JudgeError
from trl_flow.rewards.checks import RewardError, RewardFunc, check_reward_func, check_rewards, is_async, reward_names


# Seconds that a call which was not waited for is given when the process ends
_LAST_MOMENT = 5.0


class RewardLogs:
    """
    What reward functions have logged, by `log_metric` and `log_extra`, which are handed to them: every value of each
    metric in `metrics`, and the samples' values of each column by their index in `columns`.
    """

    def __init__(self):
        self.metrics: dict[str, list[float]] = defaultdict(list)
        self.columns: dict[str, dict[int, Any]] = defaultdict(dict)

    def log_metric(self, name: str, value: float) -> None:
        """Logs a scalar, averaged over calls and processes until the next log."""
        self.metrics[name].append(float(value))

    def log_extra(self, column: str, values: list) -> None:
        """Adds one value for each image to the captions of the logged grid."""
        held = self.columns[column]
        held.update(enumerate(values, start=len(held)))

    def add(self, part: "RewardLogs", first: int, number: int) -> None:
        """Adds the logs of one part, which is the `number` samples from index `first` on."""
        for name, values in part.metrics.items():
            self.metrics[name] += values
        for column, values in part.columns.items():
            if len(values) >= number:  # else it is not known which image has none
                self.columns[column].update((first + i, values[i]) for i in range(number))


@dataclass
class Scores:
    """
    `rewards` are `(N, K)` for `N` samples and `K` reward functions, float32 on the CPU, NaN where one does not apply
    or was not asked; `values` what each that was asked returned, by its index, to the last digit.
    """

    rewards: torch.Tensor
    logs: RewardLogs
    values: dict[int, list[float]] = field(default_factory=dict)


class RewardScorer:
    """
    Calls reward functions: the async ones all at once and, while those wait for their answers, the sync ones one after
    another. Each receives lists and images of its own, so that what it sorts, empties or draws on reaches no other.

    Args:
        reward_funcs (`Iterable[Callable]`): Reward functions, sync or async.
        timeout (`float`, *optional*): Seconds to wait for each sync function and then, from the end of the last, for
            all async ones; `None` waits forever. With a limit a sync function runs in a thread of its own: one that
            hangs is left behind, and keeps the process from ending for at most five seconds.
        names (`list[str]`, *optional*): What they are called, all different; by default [`reward_names`].
        frame (`str`): Which frame of a video they get as its image: `"first"`, `"middle"` or `"last"`.
    """

    def __init__(
        self, reward_funcs: Iterable[RewardFunc], *, timeout: float | None = None, names: list[str] | None = None,
        frame: Frame = "middle",
    ):  # fmt: skip
        self.reward_funcs = list(reward_funcs)
        self.timeout, self.frame = timeout, frame
        self.names = reward_names(self.reward_funcs) if names is None else list(names)
        self._models = [model for model in map(model_of, self.reward_funcs) if model is not None]

    def check(self, columns: Iterable[str], *, videos: bool | None = None) -> None:
        """Refuses functions that cannot be called with these columns: see [`check_reward_func`]."""
        columns = list(columns)
        for func in self.reward_funcs:
            check_reward_func(func, columns, videos=videos)

    def load(self) -> None:
        """Loads the models of all reward functions that have one, now instead of at the first call."""
        for func in self._models:
            func.load()

    def close(self) -> None:
        """Frees the models again. A later call loads them."""
        for func in self._models:
            func.close()

    def score(
        self, prompts: list[str], samples: Sequence[Sample], columns: Columns, *, trainer_state: Any = None,
        only: Sequence[int] | None = None,
    ) -> Scores:  # fmt: skip
        """
        Scores `N` samples: as many `prompts`, images or videos, and entries of each of the data set's other `columns`.
        The functions are handed `images`, of videos one frame each, and then `videos`, the lists of all frames, and
        `trainer_state`; `only` has the indices of those that are asked, by default all.

        Raises:
            RewardError: if a function raises, does not answer in time, or returns anything but one finite number or
                None per sample. Async functions that have not ended by then are cancelled.
        """
        chosen = range(len(self.reward_funcs)) if only is None else only
        collected, logs = RewardLogs(), RewardLogs()

        def arguments() -> dict[str, Any]:
            own = {name: list(values) for name, values in columns.items()}
            images = [frame_of(sample, self.frame).copy() for sample in samples]
            own.update(prompts=list(prompts), images=images, trainer_state=trainer_state)
            if any(isinstance(sample, list) for sample in samples):
                own["videos"] = [[frame.copy() for frame in sample] for sample in samples]
            return {**own, "log_metric": collected.log_metric, "log_extra": collected.log_extra}

        started: dict[int, Future] = {}
        values: dict[int, list[float]] = {}
        try:
            for i in chosen:
                if is_async(self.reward_funcs[i]):
                    started[i] = _start_async(self.reward_funcs[i], self.names[i], arguments())
            for i in chosen:
                if i not in started:
                    result = _run_sync(self.reward_funcs[i], self.names[i], arguments(), self.timeout)
                    values[i] = check_rewards(result, self.names[i], prompts)
            self._finish_async(started, values, prompts)
        finally:
            for future in started.values():
                future.cancel()
        rewards = torch.full((len(prompts), len(self.reward_funcs)), torch.nan)
        for i, by_sample in values.items():
            rewards[:, i] = torch.tensor(by_sample, dtype=torch.float32)
        logs.add(collected, 0, len(prompts))
        return Scores(rewards, logs, values)

    def session(self, *, background: bool, trainer_state: Any = None) -> "ScoringSession":
        """Scores samples part by part."""
        return ScoringSession(self, background=background, trainer_state=trainer_state)

    def _finish_async(self, started: dict[int, Future], values: dict[int, list[float]], prompts: list[str]) -> None:
        ended, running = wait(started.values(), self.timeout, return_when=FIRST_EXCEPTION)
        # What failed is reported before what is late, for it may be the reason
        for i, future in started.items():
            if future in ended:
                try:
                    result = future.result()
                except CancelledError as error:  # by the function itself
                    raise _failed(self.names[i], error) from error
                values[i] = check_rewards(result, self.names[i], prompts)
        if running:
            # One of them may be blocking the loop for good, so the next call is given another
            _event_loop.cache_clear()
            raise _late([self.names[i] for i, future in started.items() if future in running], self.timeout)


class ScoringSession:
    """
    Scores parts one after another, in the order in which they are submitted: at once or, with `background=True`, in
    one thread besides the caller's. Either way the same calls are made in the same order, so that what they return is
    the same. After one has failed no further one is made.

    A context manager. When it is left by an error, parts that have not begun are dropped, and the one that is being
    scored is waited for. Ctrl-C does not wait here, but Python does when the process ends.
    """

    def __init__(self, scorer: RewardScorer, *, background: bool, trainer_state: Any = None):
        self.background = background
        self._scorer = scorer
        self._trainer_state = trainer_state
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="rewards") if background else None
        self._calls: list[Future] = []
        self._parts: list[Scores] = []
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a call in the background has not ended yet."""
        return any(not call.done() for call in self._calls)

    def submit(self, prompts: list[str], samples: Sequence[Sample], columns: Columns) -> None:
        """
        Scores a part, or has it scored when those before it have been. Errors are kept for [`raise_error`] and
        [`result`]; without a thread those that are no `RewardError`, such as Ctrl-C, are raised at once.
        """
        call = functools.partial(self._score, prompts, samples, columns)
        if self._executor is None:
            call()
        else:
            self._calls.append(self._executor.submit(_with_this_threads_settings(call)))

    def raise_error(self) -> None:
        """Raises the error of the part that failed, if one has."""
        if self._error is not None:
            raise self._error

    def result(self) -> Scores:
        """The scores of all parts in their order. Waits for them; raises the error of the one that failed."""
        wait(self._calls)
        self.raise_error()
        rewards, logs = torch.empty(0, len(self._scorer.reward_funcs)), RewardLogs()
        for part in self._parts:
            logs.add(part.logs, len(rewards), len(part.rewards))
            rewards = torch.cat([rewards, part.rewards])
        return Scores(rewards, logs)

    def _score(self, prompts: list[str], samples: Sequence[Sample], columns: Columns) -> None:
        if self._error is not None:
            return
        try:
            self._parts.append(self._scorer.score(prompts, samples, columns, trainer_state=self._trainer_state))
        except BaseException as error:
            self._error = error
            if self.background and isinstance(error.__cause__, torch.OutOfMemoryError):
                self._error = RewardError(
                    f"{error} It was called while images were sampled, so that both needed memory: set "
                    "overlap_rewards=False, or lower per_device_train_batch_size or the function's own batch size."
                )
                self._error.__cause__ = error
            if not self.background and not isinstance(error, RewardError):
                raise

    def __enter__(self) -> "ScoringSession":
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: Any) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=kind is None or issubclass(kind, Exception), cancel_futures=True)


def print_failure(error: RewardError) -> None:
    """Prints where in a reward function the error was raised, without what called it. For commands, whose users need
    not see more."""
    cause: BaseException | None = error
    while isinstance(cause, RewardError):
        cause = cause.__cause__
    if cause is not None:
        step = cause.__traceback__
        while step is not None and step.tb_frame.f_code.co_filename == __file__:
            step = step.tb_next
        traceback.print_exception(type(cause), cause, step, chain=False)


# ---- Calls ----


def _with_this_threads_settings(function: Callable[[], Any]) -> Callable[[], Any]:
    """`function` for another thread, with the settings that PyTorch keeps for each as they are in this one."""
    grad_enabled, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    device = _device_index()

    def run() -> Any:
        with torch.accelerator.device_index(device), torch.inference_mode(inference):
            with torch.set_grad_enabled(grad_enabled):
                return function()

    return run


def _device_index() -> int | None:
    return torch.accelerator.current_device_index() if torch.accelerator.device_count() > 1 else None


def _run_sync(func: RewardFunc, name: str, arguments: dict[str, Any], timeout: float | None) -> Any:
    def call() -> Any:
        try:
            return func(**arguments)
        except Exception as error:
            raise _failed(name, error) from error

    if timeout is None:
        return call()
    run, future = _with_this_threads_settings(call), Future()

    def fulfil() -> None:
        try:
            future.set_result(run())
        except BaseException as error:  # Ctrl-C and sys.exit() belong to the thread that asked
            future.set_exception(error)

    # Not an executor's: Python waits for those when the process ends, forever if the function hangs
    thread = threading.Thread(target=fulfil, name=f"reward {name}", daemon=True)
    thread.start()
    try:
        wait([future], timeout)
    finally:
        if not future.done():
            # Python aborts when it tears a daemon thread out of one of PyTorch's operations
            atexit.register(thread.join, _LAST_MOMENT)
    if not future.done():
        raise _late([name], timeout)
    return future.result()


def _start_async(func: RewardFunc, name: str, arguments: dict[str, Any]) -> Future:
    device = _device_index()

    async def call() -> Any:
        if device is not None:
            torch.accelerator.set_device_index(device)
        try:
            return await func(**arguments)
        except Exception as error:
            # Raised here, since asyncio replaces a TimeoutError on its way by a copy without traceback
            raise _failed(name, error) from error

    return asyncio.run_coroutine_threadsafe(call(), _event_loop())


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    # One for the life of the process: clients that a reward keeps open are bound to their loop. In a thread of its own
    # because notebooks already have a running one in the main thread
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async rewards", daemon=True).start()
    return loop


def _late(names: list[str], timeout: float) -> RewardError:
    called = f"The reward function{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}"
    message = f"{called} had not answered after {timeout:g} seconds, the time limit for rewards. "
    if len(names) > 1:
        message += "They are async and share one event loop: one that computes without awaiting holds up the others. "
    return RewardError(message + "Find out what it waits for, or raise the limit (reward_timeout).")


def _failed(name: str, error: Exception) -> RewardError:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        # What the function held would be kept by the traceback, and the run needs memory to be saved
        traceback.clear_frames(error.__traceback__)
    raised = f"The reward function '{name}' raised {type(error).__name__}: {error}".rstrip(".")
    advice = "Fix it, or have it return None for samples that it cannot judge."
    if isinstance(error, ConnectionError | TimeoutError | JudgeError):
        advice = "See to it that what it asks is there."
    return RewardError(f"{raised}. Its traceback is above. {advice}")
