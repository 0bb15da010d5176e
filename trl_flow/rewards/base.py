"""What the reward functions of this package have in common: a card, and for those with a model its loading."""

import asyncio
import dataclasses
import io
import json
import math
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import torch
from PIL import Image

from trl_flow.images import to_rgb
from trl_flow.rewards.checks import reward_name


Result = TypeVar("Result")
Images = list[Image.Image]
Columns = dict[str, list]

_CARDS = json.loads(Path(__file__).with_name("cards.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class RewardInfo:
    """
    What to know of a reward before training on it: the smallest and largest value that it can return (infinite where
    there is no bound), the values that images of current models get, the license of the weights or rules that it
    loads, as their authors state it, where it was published, and whether what it measures is better when higher.
    """

    range: tuple[float, float]
    typical: str
    license: str
    paper: str
    higher_is_better: bool = True

    @classmethod
    def of(cls, name: str) -> "RewardInfo":
        """That of one of the package's rewards, from `cards.json`."""
        return cls.from_json(_CARDS[name])

    @classmethod
    def from_json(cls, card: dict[str, Any]) -> "RewardInfo":
        low, high = card["range"]  # None where there is no bound
        return cls(**{**card, "range": (-math.inf if low is None else low, math.inf if high is None else high)})

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "range": [end if math.isfinite(end) else None for end in self.range]}


class CheckpointError(OSError):
    """Weights of a reward model that cannot be found, read or fitted to the model.

    Example:

    ```pycon
    >>> from PIL import Image
    >>> from trl_flow.rewards import CheckpointError, PickScoreReward
    >>> try:
    ...     PickScoreReward(model="no/such-model")(prompts=["a cat"], images=[Image.new("RGB", (8, 8))])
    ... except CheckpointError as error:
    ...     print("not loaded:", "no/such-model" in str(error))
    ...
    not loaded: True
    ```
    """


@dataclass(eq=False)
class ModelReward(ABC):
    """
    A reward function with a model of its own, which is loaded at the first call and freed by `close()`.

    Subclasses load in `_load` and score in `_score`; dataclasses add their arguments as fields. The object may be used
    from several threads, and as a context manager that closes it.

    Args:
        device (`str` or `torch.device`, *optional*): where the model runs; by default the process's accelerator if
            there is one at the first call, else the CPU.
        dtype (`torch.dtype`, defaults to `torch.float32`): of the model's weights and activations.
        batch_size (`int`, defaults to 16): images at a time.

    Raises:
        ValueError: if `batch_size` is below 1.
        TypeError: if `dtype` is no floating-point `torch.dtype`.
        ValueError: at the first call, before anything is downloaded, if `device` cannot be used here.
    """

    info: ClassVar[RewardInfo]
    # Whether images that are not finished can be scored
    dense: ClassVar[bool] = True

    _: KW_ONLY
    device: str | torch.device | None = None
    dtype: torch.dtype = torch.float32
    batch_size: int = 16

    def __post_init__(self):
        check_whole_number("batch_size", self.batch_size, 1)
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise TypeError(f"dtype is {self.dtype!r}, but must be a floating-point torch.dtype: torch.bfloat16, say.")
        self.device = None if self.device is None else torch.device(self.device)
        self._loaded: Any = None
        # A second thread would otherwise load a second model, or find it closed half-way
        self._lock = threading.RLock()

    @abstractmethod
    def _load(self, device: torch.device) -> Any:
        """Loads the model, in evaluation mode, on `device` and in `self.dtype`; what it returns `_score` is given."""

    @abstractmethod
    def _score(
        self, loaded: Any, prompts: list[str], images: Images, columns: Columns
    ) -> Sequence[float | None] | torch.Tensor:
        """Scores one batch of at most `batch_size` RGB images, without gradients."""

    def load(self) -> None:
        """Loads the model now instead of at the first call; a second time does nothing."""
        with self._lock:
            if self._loaded is None:
                try:
                    self._loaded = self._load(self._target_device())
                except CheckpointError as error:
                    error.args = (f"{reward_name(self)}: {error}",)
                    raise

    def close(self) -> None:
        """Frees the model. Another call loads it again."""
        with self._lock:
            self._loaded = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def __call__(self, prompts: list[str], images: Images, **kwargs: Any) -> list[float | None]:
        """
        `N` scores for `N` prompts and images of any size and mode; `kwargs` are the data set's other columns, lists of
        `N` entries, and whatever else the trainer passes. A `ValueError` if there are not as many prompts as images.
        """
        if len(prompts) != len(images):
            raise ValueError(f"There are {len(prompts)} prompts for {len(images)} images. Give one for each image.")
        columns = {name: value for name, value in kwargs.items() if isinstance(value, list | tuple)}
        scores: list[float | None] = []
        with self._lock, torch.inference_mode():
            if images:
                self.load()
            for first in range(0, len(images), self.batch_size):
                part = slice(first, first + self.batch_size)
                converted = [to_rgb(image) for image in images[part]]
                of_part = {name: list(value[part]) for name, value in columns.items()}
                batch = self._score(self._loaded, list(prompts[part]), converted, of_part)
                scores += batch.float().tolist() if isinstance(batch, torch.Tensor) else list(batch)
        return scores

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _target_device(self) -> torch.device:
        if self.device is None:
            here = torch.accelerator.current_accelerator(check_available=True)
            return torch.device(here.type, torch.accelerator.current_device_index()) if here else torch.device("cpu")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            problem = f"is to run on {self.device}, which cannot be used here ({error})"
            advice = 'Leave device out for what there is, or give device="cpu"'
            raise ValueError(f"The reward {reward_name(self)} {problem}. {advice}.") from error
        return self.device


@dataclass(eq=False)
class HubReward(ModelReward):
    """
    A [`ModelReward`] with weights from the Hub, a folder or a file: for subclasses with a field `model`.

    Args:
        revision (`str`, *optional*): branch, tag or commit of the model on the Hub.
        token (`str` or `bool`, *optional*): for private and gated repositories, as in `huggingface_hub`.
        device, dtype, batch_size: as in [`ModelReward`].

    Raises:
        CheckpointError: on the first call, if something cannot be found, read or fitted to the model.
    """

    _: KW_ONLY
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)


def model_of(func: Any) -> ModelReward | None:
    """The model that a reward function has: itself, or what it asks about the frames of videos."""
    func = getattr(func, "reward", func)
    return func if isinstance(func, ModelReward) else None


def check_whole_number(name: str, value: Any, least: int) -> None:
    """Raises a `ValueError` if the argument `name` is not a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}, but must be a whole number of at least {least}.")


def check_choice(name: str, value: Any, choices: Any, owner: str) -> None:
    """Raises a `ValueError` if the argument `name` of `owner` is none of `choices`, a `Literal`."""
    if value not in get_args(choices):
        raise ValueError(f"{name}={value!r} is not a {name} of {owner}: give one of {get_args(choices)}.")


def check_callable(name: str, value: Any, signature: str) -> None:
    """Raises a `TypeError` if the argument `name` is neither a function nor an object that can be called."""
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name} is {value!r}, but must be a function{signature} or an object with __call__.")


def png_file(image: Image.Image) -> bytes:
    """`image` as a PNG file, in RGB."""
    file = io.BytesIO()
    # Fast instead of small: a file is sent once, mostly over a fast network. Run lengths suit PNG's filtered rows
    to_rgb(image).save(file, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return file.getvalue()


async def all_at_once(requests: Iterable[Awaitable[Result]]) -> list[Result]:
    """Awaits all, in their order. The first that fails ends the others: most would fail in the same way."""
    tasks = [asyncio.ensure_future(request) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def require(*packages: str, reward: str, extra: str) -> Any:
    """Imports optional packages and returns the last. An `ImportError` names the `extra` that `reward` needs."""
    try:
        return [import_module(package) for package in packages][-1]
    except ImportError as error:
        advice = f'Install it: pip install "trl_flow[{extra}]".'
        raise ImportError(f"{reward} needs a package that is not installed ({error}). {advice}") from error
