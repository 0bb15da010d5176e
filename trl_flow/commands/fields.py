"""The fields of dataclasses, read from their source: transformers' training arguments import torch, which takes
seconds that nobody waits for to read a help text. What is read is what is installed, and so never out of date."""

import ast
import builtins
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

from trl_flow.descriptions import first_sentence, first_sentences


@dataclass(frozen=True)
class Field:
    """A field of a dataclass: its default, the first sentence of its description, and its choices if it has some."""

    name: str
    default: Any
    help: str
    choices: tuple[Any, ...] = ()


@cache
def dataclass_fields(module: str, name: str) -> dict[str, Field]:
    """The fields of the dataclass `name`, which is defined in `module` or imported there, with those of its bases, by
    their names and in their order."""
    source = _class(module, name)
    if source is None:  # `object`, a mixin of the standard library
        return {}
    module, node = source
    fields: dict[str, Field] = {}
    for base in reversed([base.id for base in node.bases if isinstance(base, ast.Name)]):
        fields |= dataclass_fields(module, base)
    described, scope = first_sentences(ast.get_docstring(node)), _Scope(module, node)
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and not ast.unparse(each.annotation).startswith("ClassVar"):
            found = scope.field(each)
            if found is None:
                continue
            default, own = found
            text = own or described.get(each.target.id) or getattr(fields.get(each.target.id), "help", "")
            text = first_sentence(text).replace("%%", "%")
            fields[each.target.id] = Field(each.target.id, default, text, tuple(scope.choices(each.annotation)))
    # A docstring may describe what a base defines
    return {n: f if f.help else Field(n, f.default, described.get(n, ""), f.choices) for n, f in fields.items()}


class _Scope:
    """What names mean in a class of a module."""

    def __init__(self, module: str, node: ast.ClassDef):
        self.names = {**_assigned(_tree(module)), **_assigned(node)}

    def field(self, node: ast.AnnAssign) -> tuple[Any, str | None] | None:
        """Default and help of a field; None of one that is not an argument."""
        call = node.value
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "field"):
            return self.value(call), None
        options = {keyword.arg: keyword.value for keyword in call.keywords}
        if "init" in options and self.value(options["init"]) is False:
            return None
        metadata = options.get("metadata")
        texts = dict(zip(metadata.keys, metadata.values, strict=True)) if isinstance(metadata, ast.Dict) else {}
        help = next((value for key, value in texts.items() if self.value(key) == "help"), None)
        factory = options.get("default_factory")
        default = self.made(factory) if factory is not None else self.value(options.get("default"))
        return default, None if help is None else self.value(help)

    def made(self, factory: ast.expr) -> Any:
        """What a factory makes of nothing: `list` or `dict`."""
        known = isinstance(factory, ast.Name) and factory.id in ("list", "dict")
        return getattr(builtins, factory.id)() if known else None

    def value(self, node: ast.expr | None) -> Any:
        """A literal, a name of one, or texts joined with +; what else there is is None."""
        if isinstance(node, ast.Name) and node.id in self.names:
            return self.value(self.names[node.id])
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            parts = self.value(node.left), self.value(node.right)
            return "".join(parts) if all(isinstance(part, str) for part in parts) else None
        try:
            return None if node is None else ast.literal_eval(node)
        except ValueError:
            return None

    def choices(self, annotation: ast.expr) -> Iterator[Any]:
        """The values of a `Literal`."""
        for node in ast.walk(annotation):
            if isinstance(node, ast.Name) and node.id in self.names:
                yield from self.choices(self.names[node.id])
            if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal":
                value = self.value(node.slice)
                yield from value if isinstance(value, tuple) else (value,)


def _assigned(node: ast.Module | ast.ClassDef) -> dict[str, ast.expr]:
    """What was last assigned to each name in the body, also under an `if`."""
    found = {}
    for each in node.body:
        for part in ast.walk(each) if isinstance(each, ast.If) else [each]:
            if isinstance(part, ast.Assign) and len(part.targets) == 1 and isinstance(part.targets[0], ast.Name):
                found[part.targets[0].id] = part.value
    return found


def _class(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """Where a class is defined: the module's name and the definition. Imports are followed, also those for type
    checkers, which is how transformers and TRL say what they load late."""
    tree = _tree(module)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    package = module if _path(module).name == "__init__.py" else module.rpartition(".")[0]
                    return _class(resolve_name("." * node.level + (node.module or ""), package), alias.name)
    return None


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_path(module).read_text(encoding="utf-8"))


@cache
def _path(module: str) -> Path:
    top, *rest = module.split(".")
    # Of a package at the top, whose specification is found without importing it
    path = Path(find_spec(top).submodule_search_locations[0], *rest)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
