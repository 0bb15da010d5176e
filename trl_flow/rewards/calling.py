"""The calls of before `scorer.py`, for those that have not moved to it yet."""

import asyncio
import atexit
import functools
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any

import torch
from PIL import Image

from trl_flow.rewards.checks import (  # noqa: F401
    RewardError,
    RewardFunc,
    check_reward_func,
    check_rewards,
    is_dense,
    reward_name,
    reward_names,
)
from trl_flow.rewards.checks import (
    is_async as _is_async,
)
from trl_flow.rewards.scorer import _failed


# Seconds that calls which are running in threads are given when the process ends
_LAST_MOMENT = 5.0
_threads: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()


def call_reward_func(
    func: RewardFunc,
    name: str,
    prompts: list[str],
    images: list[Image.Image],
    kwargs: dict[str, Any],
    timeout: float | None,
) -> list[float]:
    """
    Calls one reward function, `func(prompts=..., images=..., **kwargs)`, and checks what it returns.

    The function receives lists and images of its own, so that what it sorts, empties or draws on reaches no one else.

    Args:
        func (`Callable`):
            Reward function, sync or async.
        name (`str`):
            What error messages call it.
        prompts (`list[str]`), images (`list[PIL.Image.Image]`):
            One of each per sample.
        kwargs (`dict[str, Any]`):
            Everything else to pass: columns with one entry per sample, and `trainer_state`, `log_metric`, `log_extra`.
        timeout (`float` or `None`):
            Seconds to wait for the answer; `None` waits for ever. With a limit a sync function runs in a thread of its
            own, without one in the caller's. A thread can not be stopped: a function that hangs is left behind, but
            does not keep the process from ending for more than five seconds.

    Returns:
        `list[float]`: one reward per sample, NaN where the function returned None.

    Raises:
        RewardError: if the function raises, does not answer in time, or returns anything but a list, tuple, array or
            tensor of one finite number (or None) per sample. True and False count as 1 and 0.
    """
    if _is_async(func):
        future = _start_async(func, name, prompts, images, kwargs)
        return _finish_async([future], [name], prompts, timeout)[0]
    return _run_sync(func, name, prompts, images, kwargs, timeout)


def call_reward_funcs(
    funcs: list[RewardFunc],
    names: list[str],
    prompts: list[str],
    images: list[Image.Image],
    columns: dict[str, list],
    *,
    timeout: float | None,
    **extras: Any,
) -> torch.Tensor:
    """
    Calls every reward function as [`call_reward_func`] does: the async ones all at once and, while those wait for
    their answers, the sync ones one after another.

    Args:
        funcs (`list[Callable]`), names (`list[str]`):
            Reward functions and what error messages call them.
        prompts (`list[str]`), images (`list[PIL.Image.Image]`):
            One of each per sample.
        columns (`dict[str, list]`):
            The data set's further columns, one entry per sample each.
        timeout (`float` or `None`):
            Seconds to wait for each sync function and then, from the end of the last, for all async ones.
        extras:
            Passed to every function as they are: `trainer_state`, `log_metric`, `log_extra`.

    Returns:
        `torch.Tensor`: float32 of shape `(N, len(funcs))`, NaN where a function returned None.

    Raises:
        RewardError: as [`call_reward_func`]. Async functions that have not ended by then are cancelled.
    """
    kwargs = {**columns, **extras}
    is_async = [_is_async(func) for func in funcs]
    started = {i: _start_async(func, names[i], prompts, images, kwargs) for i, func in enumerate(funcs) if is_async[i]}
    rewards: dict[int, list[float]] = {}
    try:
        for i, func in enumerate(funcs):
            if not is_async[i]:
                rewards[i] = _run_sync(func, names[i], prompts, images, kwargs, timeout)
        async_names = [names[i] for i in started]
        rewards.update(zip(started, _finish_async(list(started.values()), async_names, prompts, timeout), strict=True))
    finally:
        for future in started.values():
            future.cancel()
    by_func = torch.tensor([rewards[i] for i in range(len(funcs))], dtype=torch.float32)
    return by_func.reshape(len(funcs), len(prompts)).T.contiguous()


def for_another_thread(function: Callable[[], Any]) -> Callable[[], Any]:
    """
    `function`, to be called in another thread with the settings that PyTorch keeps for each one as they are in this:
    whether gradients are computed, inference mode, and the current accelerator. A new thread starts without them.
    """
    grad_enabled, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    device = _device_index()

    def run() -> Any:
        _set_device(device)
        with torch.inference_mode(inference), torch.set_grad_enabled(grad_enabled):
            return function()

    return run


def start_thread(function: Callable[[], Any], name: str) -> threading.Thread:
    """
    Calls `function` in a thread that does not keep the process from ending: one that hangs is left behind.

    What has not ended then is given five seconds. Python tears threads that it leaves behind out of what they do, and
    the process is aborted if that was one of PyTorch's operations.
    """
    thread = threading.Thread(target=function, name=name, daemon=True)
    _threads.add(thread)
    thread.start()
    return thread


@atexit.register
def _wait_for_threads() -> None:
    until = time.monotonic() + _LAST_MOMENT
    for thread in list(_threads):
        thread.join(max(0.0, until - time.monotonic()))


def _own_arguments(prompts: list[str], images: list[Image.Image], kwargs: dict) -> dict[str, Any]:
    kwargs = {key: list(value) if isinstance(value, list) else value for key, value in kwargs.items()}
    return {"prompts": list(prompts), "images": [image.copy() for image in images], **kwargs}


def _run_sync(
    func: RewardFunc, name: str, prompts: list[str], images: list[Image.Image], kwargs: dict, timeout: float | None
) -> list[float]:
    future: Future = Future()
    arguments = _own_arguments(prompts, images, kwargs)
    run = for_another_thread(lambda: func(**arguments))

    def call() -> None:
        try:
            future.set_result(run())
        except Exception as error:
            failure = _failed(name, error)
            failure.__cause__ = error
            future.set_exception(failure)
        except BaseException as error:  # Ctrl-C and sys.exit() belong to the thread that asked
            future.set_exception(error)

    if timeout is None:
        call()
        return _checked(future, name, prompts)

    start_thread(call, f"reward {name}")
    wait([future], timeout)
    if not future.done():
        raise _late([name], timeout)
    return _checked(future, name, prompts)


def _start_async(func: RewardFunc, name: str, prompts: list[str], images: list[Image.Image], kwargs: dict) -> Future:
    device = _device_index()
    arguments = _own_arguments(prompts, images, kwargs)

    async def call() -> Any:
        _set_device(device)
        try:
            return await func(**arguments)
        except Exception as error:
            # Raised here and not where the result is asked for: on the way asyncio replaces a TimeoutError by a copy
            # without traceback.
            raise _failed(name, error) from error

    return asyncio.run_coroutine_threadsafe(call(), _event_loop())


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    # One loop for the life of the process: clients that a reward keeps open from call to call are bound to their loop.
    # It runs in a thread of its own because notebooks already have a running one in the main thread.
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async rewards", daemon=True).start()
    return loop


def _device_index() -> int | None:
    return torch.accelerator.current_device_index() if torch.accelerator.device_count() > 1 else None


def _set_device(index: int | None) -> None:
    if index is not None:
        torch.accelerator.set_device_index(index)


def _finish_async(
    futures: list[Future], names: list[str], prompts: list[str], timeout: float | None
) -> list[list[float]]:
    ended, running = wait(futures, timeout, return_when=FIRST_EXCEPTION)
    # What failed is reported before what is late, for it may be the reason.
    rewards = [_checked(f, name, prompts) for f, name in zip(futures, names, strict=True) if f in ended]
    if running:
        for future in running:
            future.cancel()
        # One of them may be blocking the loop for good, so the next call is given another.
        _event_loop.cache_clear()
        raise _late([name for future, name in zip(futures, names, strict=True) if future in running], timeout)
    return rewards


def _late(names: list[str], timeout: float) -> RewardError:
    message = f"{_called(names)} had not answered after {timeout:g} seconds, the time limit for rewards. "
    if len(names) > 1:
        message += "They are async and share one event loop: one that computes without awaiting holds up the others. "
    return RewardError(message + "Find out what it waits for, or raise the limit (reward_timeout).")


def _checked(future: Future, name: str, prompts: list[str]) -> list[float]:
    return check_rewards(future.result(), name, prompts)


def _called(names: list[str]) -> str:
    quoted = ", ".join(f"'{name}'" for name in names)
    return f"The reward function{'s' if len(names) > 1 else ''} {quoted}"
