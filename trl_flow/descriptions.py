"""What the docstring of a dataclass says of its fields."""

import inspect
import re
from dataclasses import fields


# An entry of a docstring's list of parameters: its head, which may name several, and its text
_ENTRY = re.compile(r"^ {4}(\w+ \(.*\)):\n((?: {8}.*\n?)+)", re.MULTILINE)


def first_sentence(text: str) -> str:
    """The first sentence of `text`, on one line."""
    return re.split(r"(?<!Eq)(?<!e\.g)(?<!i\.e)\. (?=[A-Z`])", " ".join(text.split()))[0]


def first_sentences(docstring: str | None) -> dict[str, str]:
    """The first sentence about each parameter, by its name."""
    found: dict[str, str] = {}
    for names, text in _ENTRY.findall(inspect.cleandoc(docstring or "")):
        found |= dict.fromkeys(re.findall(r"(\w+) \(", names), first_sentence(text))
    return found


def described(cls: type) -> type:
    """Gives each field of a dataclass the first sentence of its description in the docstring, or in that of a base, as
    its `help` on command lines."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= first_sentences(base.__dict__.get("__doc__"))
    for each in fields(cls):
        if each.name in found and "help" not in each.metadata:
            each.metadata = {**each.metadata, "help": found[each.name].replace("%", "%%")}
    return cls
