"""What stands in a recipe is read by the type of its option. YAML 1.1 guesses: `no` becomes False where a strategy is
meant, 1e-4 text, 010 eight, 1:30 ninety, 2024-01-01 a date, and a revision of digits a number."""

import dataclasses
import re
from collections.abc import Hashable
from enum import Enum
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml


BOOLEANS = dict.fromkeys(("yes", "true", "on"), True) | dict.fromkeys(("no", "false", "off"), False)
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
# Of the keyword arguments of `from_pretrained`, whose types are not known here
_TEXTS = ("revision", "variant", "subfolder", "token", "custom_revision", "cache_dir")


class Plain(str):
    """A value without quotation marks, as it stands in the file."""


class Loader(yaml.SafeLoader):
    """Reads plain values as [`Plain`], but for null. `file` of a subclass names it in messages: YAML would
    take the last of several values of a key, and not say so."""

    file = ""
    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [str(key.value).replace("-", "_") for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            line = node.value[len(keys) - 1 - keys[::-1].index(twice)][0].start_mark.line + 1
            raise ValueError(f"{self.file} has {twice} twice, for the second time in line {line}. Remove one.")
        return super().construct_mapping(node, deep)


def _text(loader: Loader, node: yaml.ScalarNode) -> str:
    return node.value if node.style else Plain(node.value)


Loader.add_constructor("tag:yaml.org,2002:str", _text)


def guessed(value: Any) -> Any:
    """`value` where no type is known: YAML's words for truth values and decimal numbers count, all else is text."""
    if isinstance(value, list):
        return [guessed(item) for item in value]
    if isinstance(value, dict):
        texts = {key for key, item in value.items() if key in _TEXTS and isinstance(item, Plain)}
        return {_key(key): str(item) if key in texts else guessed(item) for key, item in value.items()}
    if not isinstance(value, Plain):
        return value
    if value.lower() in BOOLEANS and value in (value.lower(), value.upper(), value.title()):
        return BOOLEANS[value.lower()]
    number = _number(value)
    return str(value) if number is None else number


def meant(value: Any, hint: Any) -> Any:
    """`value` for an option of type `hint`. What does not fit is left as text, which the parser then refuses."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    choices = [choice for kind in kinds for choice in _choices(kind)]
    lists = [get_args(kind) or (Any,) for kind in kinds if kind is list or get_origin(kind) is list]
    if isinstance(value, list):
        return [meant(item, lists[0][0]) for item in value] if lists else guessed(value)
    if isinstance(value, dict):
        of = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        hints = get_type_hints(of) if of else {}
        return guessed(value) | {str(key): meant(item, hints[key]) for key, item in value.items() if key in hints}
    if not isinstance(value, Plain) or str(value) in choices:
        return str(value) if isinstance(value, Plain) else value
    if value == "None" and type(None) in kinds:
        return None  # Python's null
    if lists and str not in kinds and not choices:
        return [meant(value, lists[0][0])]
    if (bool in kinds or choices) and value.lower() in BOOLEANS:
        truth = BOOLEANS[value.lower()]
        return "no" if not truth and "no" in choices else truth
    if (int in kinds or float in kinds) and (number := _number(value)) is not None:
        if float in kinds or isinstance(number, int):
            return number
        return int(number) if number.is_integer() else str(value)  # 1e3
    return str(value) if str in kinds or choices or {bool, int, float} & set(kinds) else guessed(value)


def _choices(kind: Any) -> tuple:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return tuple(item.value for item in kind)
    return get_args(kind) if get_origin(kind) is Literal else ()


def _key(key: Hashable) -> Hashable:
    number = _number(key) if isinstance(key, Plain) else None
    return number if number is not None else str(key) if isinstance(key, Plain) else key


def _number(text: str) -> int | float | None:
    if _HEX.fullmatch(text):
        return int(text, 16)
    if not _NUMBER.fullmatch(text):
        return None
    plain = text.replace("_", "").lower()
    return int(plain) if plain.lstrip("+-").isdecimal() else float(plain.replace(".inf", "inf").replace(".nan", "nan"))
