"""The recipe by which a model was trained, as its card shows it: what was asked for, and nothing private."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_flow.commands.methods import config_fields
from trl_flow.commands.training_help import SUBJECTS


# Of where and how fast a run was, and not of what
_LEFT_OUT = {"prompt_embeds_dir", "accelerate_config", "model_init_kwargs", "use_cpu"}
_OF_WHERE = ("Saving and the Hub", "Logging")
_PRIVATE = ("hub_", "trackio_", "logging_", "save_", "log_", "dataloader_", "ddp_", "fsdp", "deepspeed", "local_rank")
_SUBJECTS = [subject for subject in SUBJECTS if subject not in _OF_WHERE]
# But evaluations fall on logs where nothing else is said, and the best checkpoint is one of those that are saved
_OF_WHAT = ("logging_strategy", "logging_steps", "save_strategy", "save_steps", "datasets", "test_split_size")
_SERVER = re.compile(r"(https?://)[^\s,#]+", re.IGNORECASE)
_SET = re.compile(r"(\w+:)(?!//)(.+)", re.DOTALL)  # a copy of a prompt set, `ocr:folder`


def shared_recipe(argv: Sequence[str], recipe: Mapping[str, Any], parsed: Iterable[Any]) -> str:
    """The options that `argv` and `recipe` name, as YAML, with the values in `parsed`. Of files and folders only their
    own names are left, of servers nothing but that there is one; `extends` is resolved."""
    import yaml

    values = {name: value for each in parsed for name, value in vars(each).items()}
    given = {token.split("=")[0].removeprefix("--").replace("-", "_") for token in argv if token.startswith("--")}
    given |= {name.removeprefix("no_") for name in given}  # `--no_shuffle_dataset`
    order = ["model_name_or_path", "method", *(name for subject in _SUBJECTS for name in SUBJECTS[subject])]
    order += [name for name in config_fields(values["method"]) if not name.startswith(_PRIVATE)]
    order += _OF_WHAT
    of_where = {name for subject in _OF_WHERE for name in SUBJECTS[subject]} - set(_OF_WHAT) | _LEFT_OUT
    named = [name for name in dict.fromkeys(order) if name in given or name in recipe]
    shown = {name: _public(values[name]) for name in named if name in values and name not in of_where}
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=110)


def _public(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_public(item) for item in value]
    if dataclasses.is_dataclass(value):  # a data set of a mixture
        default = {each.name: each.default for each in dataclasses.fields(value)}
        value = {name: item for name, item in vars(value).items() if item != default.get(name)}
    if isinstance(value, Mapping):
        return {name: _public(item) for name, item in value.items()}
    if isinstance(value, str):
        text = _SERVER.sub(r"\1SERVER", value)
        copy = _SET.fullmatch(text)
        return copy[1] + _file(copy[2]) if copy else _file(text)
    if isinstance(value, (bool, int, float)) or value is None:
        return value
    # A subclass of these, such as an enumeration of transformers
    return str(getattr(value, "value", value))


def _file(text: str) -> str:
    """A path as one of the current folder, and all else as it is. `./` tells a folder from a name."""
    path = Path(text)
    if not (text.startswith("~") or path.is_absolute() or ("/" in text and path.exists())):
        return text
    return path.name if path.suffix else f"./{path.name}"
