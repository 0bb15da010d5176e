"""A LoRA on a model, whose config names modules that are there: PEFT leaves out in silence what it does not find."""

import copy
import difflib
import re
from collections.abc import Iterable

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn


def with_adapter(model: nn.Module, peft_config: PeftConfig, default_targets: list[str]) -> PeftModel:
    """The model with an adapter, on `default_targets` if the config names none. Raises `ValueError` if it names
    modules that are not there."""
    peft_config = copy.deepcopy(peft_config)
    peft_config.task_type = None  # PEFT's task types are for language models
    if getattr(peft_config, "target_modules", None) is None:
        peft_config.target_modules = list(default_targets)
    else:
        check_lora_targets(peft_config, [name for name, _ in model.named_modules() if name])
    return get_peft_model(model, peft_config)


def check_lora_targets(config: LoraConfig, names: list[str]) -> None:
    """Raises `ValueError` if a part of `target_modules`, `exclude_modules`, `layers_to_transform`, `layers_pattern`,
    `rank_pattern` or `alpha_pattern` has no effect on a model with modules of these names."""
    if config.target_modules == "all-linear":  # PEFT's name for every linear layer
        targeted = names
    else:
        _check_names("target_modules", config.target_modules, names)
        targeted = [name for name in names if check_target_module_exists(config, name)]
    if config.exclude_modules:
        _check_names("exclude_modules", config.exclude_modules, names)
    layers, patterns = _listed(config.layers_to_transform), _listed(config.layers_pattern)
    blocks = sorted({name.split(".")[0] for name in names if re.fullmatch(r"[^.]+\.\d+", name)})
    for pattern in patterns:
        if not any(re.search(rf"(^|\.){pattern}\.\d+(\.|$)", name) for name in names):
            raise _no_such("layers_pattern", pattern, blocks)
    if layers and not patterns and blocks:
        raise ValueError(
            f"peft_config has layers_to_transform={config.layers_to_transform} without layers_pattern, and PEFT would "
            f"count other layers than this model's blocks. Set layers_pattern to one of {blocks}."
        )
    for layer in layers:
        if not any(re.search(rf"(^|\.)({'|'.join(patterns) or '[^.]+'})\.{layer}\.", name) for name in names):
            raise ValueError(
                f"peft_config has layers_to_transform={config.layers_to_transform}, but there is no layer {layer} "
                f"of {patterns or 'any kind'} in the model. Remove it."
            )
    entries = [] if isinstance(config.target_modules, str) else config.target_modules
    if left_out := [entry for entry in entries if not any(_is_named(name, entry) for name in targeted)]:
        raise ValueError(
            f"peft_config has {left_out} in target_modules, but exclude_modules or layers_to_transform leaves every "
            "module of this name out. Remove one of the two."
        )
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in targeted):
                raise _no_such(option, pattern, targeted, " for targeted modules")


def _listed(value: list | str | int | None) -> list:
    return [] if value is None else [value] if isinstance(value, str | int) else list(value)


def _is_named(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _check_names(option: str, given: str | Iterable[str], names: list[str]) -> None:
    """Of a list each entry, and of a regular expression the whole and each of its words must name something."""
    if not isinstance(given, str):
        for entry in sorted(given):
            if not any(_is_named(name, entry) for name in names):
                raise _no_such(option, entry, names)
        return
    words = re.findall(r"(?<![\\\w])[A-Za-z]\w*(?![\w?*{])", given) if "(?" not in given else []
    for word in words:
        if len(word) > 1 and not any(word in name for name in names):
            raise _no_such(option, word, names, f" (of the regular expression {given!r})")
    if not any(re.fullmatch(given, name) for name in names):
        raise _no_such(option, given, names, " (a text is a regular expression for whole names; give a list for ends)")


def _no_such(option: str, entry: str, names: list[str], about: str = "") -> ValueError:
    length = entry.count(".") + 1
    # As long as the entry
    ends = dict.fromkeys(".".join(name.split(".")[-length:]) for name in names)
    near = difflib.get_close_matches(entry, ends, n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return ValueError(
        f"peft_config has {entry!r} in {option}{about}, which names nothing in the model: it would have no "
        f"effect.{hint} Correct it, or remove it."
    )
