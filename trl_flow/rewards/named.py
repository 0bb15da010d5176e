"""The names by which reward functions of this package, and others, may be given instead of themselves."""

import difflib
import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from trl_flow import rewards


# The class in `trl_flow.rewards` of each name, since loading one may take seconds, and its positional arguments
NAMED_REWARDS: dict[str, tuple[str, ...]] = {
    name: (cls, *arguments) for cls, (_, names) in rewards.PUBLIC.items() for name, arguments in names.items()
}

_FRAMES = "frames:"


def named_reward(name: str) -> Any:
    """
    The reward function that `name` stands for: a key of `NAMED_REWARDS`, for a judge also with the address of its
    server (and a model of several), as in `deqa@http://localhost:8000/v1#my-deqa`; a dotted import path such as
    `my_rewards.brightness`, looked for in the current folder too (a class is called without arguments), or the address
    of a reward server: of several separated by commas, and with a reward's name behind a `#` if they offer more than
    one, as in `http://one:8000,http://two:8000#pickscore`. With `frames:` before it, as in `frames:pickscore`, it is
    that reward's mean over the frames of a video, a [`~trl_flow.rewards.FrameReward`].

    Raises:
        ValueError: if there is no such function, naming the nearest that there is.
        ImportError: if it needs an optional package that is missing.
    """
    if name.startswith(_FRAMES):
        return rewards.FrameReward(named_reward(name.removeprefix(_FRAMES)))
    known, at, _ = name.partition("@")
    if known in NAMED_REWARDS:
        cls, *arguments = NAMED_REWARDS[known]
        return getattr(rewards, cls)(*arguments, **(_server(name, cls) if at else {}))
    if name.startswith(("http://", "https://")):
        urls, _, reward = name.partition("#")
        return rewards.RemoteReward([url.strip() for url in urls.split(",")], reward=reward or None)
    if "." in name:
        return _imported(name)
    hint = _nearest(name) or f" There are {', '.join(NAMED_REWARDS)}."
    raise ValueError(f"there is no reward function {name!r}.{hint} Others are given by a dotted import path.")


def named_rewards(names: Sequence[str] | str | None, option: str = "reward_funcs") -> list[Any]:
    """The reward functions that `names` stand for, each as [`named_reward`]; there must be at least one."""
    if not names:
        known = ", ".join(NAMED_REWARDS)
        raise ValueError(f"{option} is missing. Name at least one of {known}, or a dotted import path.")
    return as_rewards(names)


def as_rewards(funcs: Any) -> list[Any]:
    """None, one or several reward functions as a list, with those that are given by name as from [`named_reward`]."""
    is_several = isinstance(funcs, Iterable) and not isinstance(funcs, str) and not callable(funcs)
    several = list(funcs) if is_several else [] if funcs is None else [funcs]
    return [named_reward(func) if isinstance(func, str) else func for func in several]


def _server(name: str, cls: str) -> dict[str, Any]:
    """Where `name@address#model` asks."""
    from trl_flow.rewards.judge import Question

    known, _, address = name.partition("@")
    if not issubclass(getattr(rewards, cls), Question) or not address.startswith(("http://", "https://")):
        example = "unifiedreward@http://localhost:8000/v1"
        raise ValueError(f"there is no reward function {name!r}. Judges have an address behind an @, as {example}.")
    base_url, _, model = address.partition("#")
    return {"base_url": base_url, "model": model or None}


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, NAMED_REWARDS, n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _imported(name: str) -> Any:
    module_name, attribute = name.rsplit(".", 1)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        # A name may look like a path: hpsv2.1
        raise ValueError(f"the reward function {name!r} cannot be imported: {error}.{_nearest(name)}") from error
    if not hasattr(module, attribute):
        raise ValueError(f"the reward function {name!r} does not exist: {module.__file__} has no {attribute!r}.")
    func = getattr(module, attribute)
    return func() if isinstance(func, type) else func
