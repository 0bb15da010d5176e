"""
Where the weights of reward models come from: the Hub, a folder or a file. Whatever goes wrong is one `CheckpointError`
that names the source and the way out.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from trl_flow.rewards.base import CheckpointError


Pretrained = TypeVar("Pretrained")
Module = TypeVar("Module", bound=nn.Module)

# `ignore_mismatched_sizes`: mismatches are then listed with the rest, and refused here
_MODEL_OPTIONS = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}

# How many names of parameters an error lists
_NAMES = 6


def find_file(source: str, filename: str, *, revision: str | None, token: str | bool | None) -> Path:
    """
    The local path of a file of weights, downloaded if it is not in the Hub's cache. `source` is a Hub id, a folder
    with `filename` in it, or the file itself, whatever its name.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / filename).is_file():
            return path / filename
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:_NAMES]) or "nothing"
        advice = "Put the file there, or give its path instead of the folder's."
        raise CheckpointError(f"the folder {source} has no file {filename} (it has {found}). {advice}")
    try:
        return Path(hf_hub_download(source, filename, revision=revision, token=token))
    except Exception as error:
        raise _explained(error, str(source), revision, filename) from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """
    The tensors in a torch or safetensors file, on the CPU, from under `state_dict` or `model` where training scripts
    put them. Nothing but tensors is unpickled.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different one for every kind of damage
        raise CheckpointError(
            f"{path} cannot be read as a file of tensors ({_short(error)}). It is only partly downloaded, or holds "
            "other objects, which are not loaded because they could run any code: download it again, or save its "
            "state dict alone, torch.save(checkpoint['state_dict'], path)."
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content or not all(map(torch.is_tensor, content.values())):
        names = f" with {_listed([*map(str, content)]) or 'nothing in it'}" if isinstance(content, dict) else ""
        problem = f"a {type(content).__name__}{names} instead of a state dict, names with tensors"
        raise CheckpointError(f"{path} holds {problem}. Give the file of weights that the reward's authors published.")
    return dict(content)


def load_pretrained(
    cls: type[Pretrained], source: str, *, revision: str | None, token: str | bool | None
) -> Pretrained:
    """
    `cls.from_pretrained` for models (in float32 and evaluation mode, on the CPU), tokenizers and image processors, of
    a Hub id or folder. Where transformers would only warn and leave parameters random, this raises.
    """
    is_model = issubclass(cls, PreTrainedModel)
    options = {"revision": revision, "token": token, **(_MODEL_OPTIONS if is_model else {})}
    folder = Path(source).expanduser()
    try:
        with _without_report():
            loaded = cls.from_pretrained(folder if folder.is_dir() else source, **options)
    except Exception as error:
        raise _explained(error, str(source), revision) from error
    if not is_model:
        return loaded
    model, info = loaded
    _check_fit(source, {**info, "unexpected_keys": ()})
    return model.eval()


def build_pretrained(
    cls: type[Pretrained], config: PreTrainedConfig, tensors: dict[str, torch.Tensor], *, source: str, **kwargs: Any
) -> Pretrained:
    """
    The model of class `cls` with `config` and `tensors`, a state dict of any dtype, in float32 and evaluation mode, on
    the CPU. None may be missing, of another shape or left over. `source` is for errors.
    """
    with _without_report():
        model, info = cls.from_pretrained(None, config=config, state_dict=tensors, **_MODEL_OPTIONS, **kwargs)
    _check_fit(source, info)
    return model.eval()


def fill(module: Module, tensors: dict[str, torch.Tensor], *, source: str) -> Module:
    """Loads `tensors` into `module`, in evaluation mode; errors as from [`build_pretrained`]."""
    expected = module.state_dict()
    both = [(name, tensors[name].shape, expected[name].shape) for name in expected.keys() & tensors.keys()]
    info = {
        "missing_keys": expected.keys() - tensors.keys(),
        "mismatched_keys": [(name, got, want) for name, got, want in both if got != want],
        "unexpected_keys": tensors.keys() - expected.keys(),
    }
    _check_fit(source, info)
    module.load_state_dict(tensors)
    return module.eval()


@contextmanager
def sizes_read_from(tensors: dict[str, torch.Tensor], *, source: str, kind: str, file: str) -> Iterator[None]:
    """Within it sizes are read from shapes. A `CheckpointError` says that `source` is no `kind`, give `file`."""
    try:
        yield
    except (KeyError, ValueError) as error:
        found = f"{error} is missing or misshapen. It begins with {', '.join(list(tensors)[:3])}"
        raise CheckpointError(f"{source} is not an {kind}: {found}. Give {file} its authors published.") from error


def number_of(pattern: str, tensors: dict[str, torch.Tensor]) -> int:
    """How many different values the first group of `pattern` has at the beginning of the names: layers, say."""
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})


def rename(name: str, patterns: dict[str, str]) -> str:
    """A parameter's name with every regular expression in `patterns` replaced, in their order."""
    for pattern, replacement in patterns.items():
        name = re.sub(pattern, replacement, name)
    return name


@contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' table of weights that are left over. What matters in it is an error here."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _check_fit(source: str, info: dict[str, Any]) -> None:
    """`info` is transformers' loading info, with names, or name, shape and expected shape."""
    mismatched = [f"{name} {tuple(got)} instead of {tuple(want)}" for name, got, want in info["mismatched_keys"]]
    faults = ("misses", "has another shape for", "has the unknown")
    names = (info["missing_keys"], mismatched, info["unexpected_keys"])
    if found := [f"it {fault} {_listed(sorted(some))}" for fault, some in zip(faults, names, strict=True) if some]:
        advice = "Give the checkpoint that the reward's authors published, or one of the same architecture."
        raise CheckpointError(f"{source} does not have the layout that was expected: {'; '.join(found)}. {advice}")


def _explained(error: Exception, source: str, revision: str | None, filename: str = "") -> CheckpointError:
    if Path(source).expanduser().exists():
        reason = "lacks a file that is needed, or has a damaged one. Copy all that the reward's authors published"
    elif source.startswith((".", "/", "~")) or source.count("/") != 1:
        reason = "is neither an existing file or folder nor the id of a repository on the Hub. Check the path"
    else:
        at = "" if revision is None else f" at the revision {revision!r}"
        reason = (
            f"cannot be loaded{f' (its file {filename})' if filename else ''} from the Hub{at}. Check the name. For a "
            "private or gated repository accept its terms and log in (hf auth login) or give token=. Without a "
            f"network download it where there is one (hf download {source}), or give the path of a local copy"
        )
    return CheckpointError(f"{source} {reason}. ({_short(error)})")


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more
