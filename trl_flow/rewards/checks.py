"""Reward functions: what they are called, and what is refused of them and of what they return.

A reward function is any callable, sync or async, that takes keywords and returns one number (or None) per image:

    def my_reward(prompts: list[str], images: list[PIL.Image.Image], **kwargs) -> list[float | None]: ...
"""

import functools
import inspect
import itertools
import math
import numbers
import reprlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch


RewardFunc = Callable[..., Any]

# What every reward function is given besides the columns of the data set
RESERVED_COLUMNS = ("prompts", "images", "videos", "trainer_state", "log_metric", "log_extra")

_LARGEST = torch.finfo(torch.float32).max

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


class RewardError(RuntimeError):
    """A reward function raised, did not answer in time, or returned something other than one number per image."""


def _unwrap(func: RewardFunc) -> RewardFunc:
    while isinstance(func, functools.partial):
        func = func.func
    return func


def is_async(func: RewardFunc) -> bool:
    """Whether `func`, the function inside a `functools.partial`, or an object's `__call__` is an `async def`."""
    func = _unwrap(func)
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(type(func).__call__)


def reward_name(func: RewardFunc) -> str:
    """What metrics call `func`, as in TRL: its `__name__`, that of the function inside a partial, or its class's."""
    func = _unwrap(func)
    return getattr(func, "__name__", type(func).__name__)


def reward_names(funcs: Iterable[RewardFunc]) -> list[str]:
    """One name per function, all different: the second function called `name` becomes `name_2`, the third `name_3`."""
    names: list[str] = []
    for func in funcs:
        base = reward_name(func)
        numbered = (base if number == 1 else f"{base}_{number}" for number in itertools.count(1))
        names.append(next(name for name in numbered if name not in names))
    return names


def is_dense(func: RewardFunc) -> bool:
    """
    Whether `func` can score unfinished images: unless it, or the function inside a `functools.partial`, has an
    attribute `dense = False`. A `TypeError` if that is neither True nor False.
    """
    return _flag(func, "dense", True, "True, or False if it cannot score unfinished images")


def needs_group(func: RewardFunc) -> bool:
    """
    Whether `func` compares the images of a group, and so must get whole ones: if it, or the function inside a
    `functools.partial`, has an attribute `needs_group = True`. A `TypeError` if that is neither True nor False.
    """
    return _flag(func, "needs_group", False, "False, or True if it compares the images of a group")


def takes_videos(func: RewardFunc) -> bool:
    """Whether `func` looks at all frames of videos: if it has a parameter `videos`, unless its attribute
    `takes_videos` is False."""
    try:
        named = "videos" in inspect.signature(func).parameters
    except (TypeError, ValueError):
        named = False
    return named and getattr(func, "takes_videos", True)


def _flag(func: RewardFunc, name: str, default: bool, expected: str) -> bool:
    value = getattr(func, name, getattr(_unwrap(func), name, default))
    if not isinstance(value, bool):
        which = f"The attribute `{name}` of the reward function '{reward_name(func)}'"
        raise TypeError(f"{which} is {value!r}, but must be {expected}.")
    return value


def check_reward_func(func: RewardFunc, columns: Iterable[str], *, videos: bool | None = None) -> None:
    """
    Refuses a reward function that could not be called with a data set of these columns, of which `prompt` is passed as
    `prompts`, all others under their own names, and `videos` if the model draws such (`None`: that is not known yet).
    One without a readable signature (some built in C) is let through.

    Raises:
        TypeError: if `func` is no callable, is a class, does not take the keywords it is called with, or has an
            attribute `dense` or `needs_group` that is not True or False.
        ValueError: if `func` needs a column that is missing, or videos of a model that draws images, or a column has
            the name of something that every reward function is given.
    """
    if inspect.isclass(func):
        advice = f"pass {func.__name__}(...) instead of {func.__name__}"
        raise TypeError(f"The reward function {func.__name__} is a class, and an object of it is needed: {advice}.")
    if not callable(func):
        raise TypeError(
            f"A reward function must be a callable, but {_short.repr(func)} is of type {type(func).__name__}. Pass a "
            "function `def reward(prompts, images, **kwargs)` that returns one number per image, or an object with "
            "such a `__call__`."
        )
    is_dense(func), needs_group(func)
    columns = [column for column in columns if column != "prompt"]
    if taken := [column for column in columns if column in RESERVED_COLUMNS]:
        raise ValueError(
            f"The data set's columns {taken} have the names of arguments that every reward function is given "
            f"({', '.join(RESERVED_COLUMNS)}). Rename them: dataset.rename_column({taken[0]!r}, 'my_{taken[0]}')."
        )

    try:
        parameters, filled = inspect.signature(func).parameters.values(), _filled(func)
    except (TypeError, ValueError):
        return
    name, given = reward_name(func), [name for name in [*RESERVED_COLUMNS, *columns] if videos or name != "videos"]
    if taken := [column for column in given if column in filled]:
        what = f"is called with '{taken[0]}', which is filled already, by the object itself or by a partial"
        rename = f"Rename the column: dataset.rename_column({taken[0]!r}, 'my_{taken[0]}')."
        advice = rename if taken[0] in columns else "Give a partial its arguments by keyword."
        raise ValueError(f"The reward function '{name}' {what}. {advice}")
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for p in (p for p in named if p.default is p.empty):
        if p.kind is p.POSITIONAL_ONLY:
            why = "reward functions are called by keyword: reward(prompts=..., images=..., ...)"
            advice = "Remove the '/' from its signature."
            raise TypeError(f"The reward function '{name}' takes '{p.name}' by position only, but {why}. {advice}")
        if p.name == "videos" and videos is False:
            raise ValueError(
                f"The reward function '{name}' needs videos, but this model draws images, which are passed as images. "
                "Score images by another one, give its parameter a default (videos=None), or take a model that draws "
                "videos."
            )
        if p.name not in given and p.name != "videos":
            raise ValueError(
                f"The reward function '{name}' needs a column '{p.name}', which the data set does not have. "
                f"Its columns besides 'prompt' are {columns}. Add the column, or give the parameter a default."
            )
    keywords = {p.name for p in named if p.kind is not p.POSITIONAL_ONLY}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not takes_any and (refused := [key for key in given if key not in keywords]):
        advice = "End its parameters with **kwargs: def reward(prompts, images, **kwargs)."
        raise TypeError(f"The reward function '{name}' does not accept {refused}, which it is called with. {advice}")


def _filled(func: RewardFunc) -> set[str]:
    """The names of parameters that cannot be passed any more: `self`, and what a partial gives by position."""
    if inspect.isfunction(func):
        return set()
    is_partial = isinstance(func, functools.partial)
    inner = func.func if is_partial else getattr(func, "__func__", type(func).__call__)
    parameters = inspect.signature(inner).parameters
    keywords = {name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    return keywords - set(inspect.signature(func).parameters) | (_filled(inner) if is_partial else set())


def check_rewards(result: Any, name: str, prompts: list[str]) -> list[float]:
    """
    What the reward function `name` returned for `prompts`, as one float per image: NaN where it returned None. A
    `RewardError` if it is anything but a list, tuple, array or tensor of one finite number (or None) per prompt.
    """
    if isinstance(result, torch.Tensor | np.ndarray):
        result = result.tolist()
    if not isinstance(result, list | tuple):
        raise RewardError(
            f"The reward function '{name}' returned {_short.repr(result)} of type {type(result).__name__}. Return a "
            f"list (or a 1-dimensional array or tensor) of one number or None per image, {len(prompts)} in this call."
        )
    if len(result) != len(prompts):
        raise RewardError(
            f"The reward function '{name}' returned {len(result)} rewards for {len(prompts)} images. Return exactly "
            "one per image, in the order of the images, and None for those that it cannot judge."
        )
    return [_number(value, name, prompt, i) for i, (value, prompt) in enumerate(zip(result, prompts, strict=True))]


def _number(value: Any, name: str, prompt: str, index: int) -> float:
    if value is None:
        return math.nan
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, numbers.Real):
        problem, advice = f"of type {type(value).__name__}, not a number", "Return an int or a float"
    elif abs(value) > _LARGEST:
        problem, advice = "beyond the range of float32", "Look for a division by 0 or an overflow in it"
    elif math.isnan(value):
        problem = "not a number"
        advice = (
            "Look for 0/0 in it, or for a model that overflows in its precision (try dtype=torch.bfloat16 or "
            "torch.float32), or return None for images that it cannot judge"
        )
    else:
        return float(value)
    raise RewardError(
        f"The reward function '{name}' returned {_short.repr(value)} for image {index}, prompt {prompt!r}: that is "
        f"{problem}. {advice}."
    )
