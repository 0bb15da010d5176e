"""Docstrings in Hugging Face's style, made into Markdown for mkdocstrings, and the page of inherited fields.

mkdocstrings knows Google's style, where an argument has one name and a type that Python can read. Here `Args:`,
`Attributes:` and `Raises:` become lists, `Parameters:` of a config a table, and [`Name`] a link to that name.
"""

import inspect
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File


_SECTION = re.compile(r"^(Args|Parameters|Attributes|Raises|Returns):\n((?:[ ]{4}.*\n|\n(?=[ ]{4}))+)", re.MULTILINE)
_ENTRY = re.compile(r"^ {4}(\S.*?):(?:\s|$)((?:.*)\n(?:(?: {8}.*)?\n)*)", re.MULTILINE)
_HEAD = re.compile(r"(\w+) \(((?:[^()]|\([^()]*\))*)\)")
_LINK = re.compile(r"\[`(~?)([\w.]+)`\]")
_SESSION = re.compile(r"^```pycon\n(.*?)\n```", re.MULTILINE | re.DOTALL)
_DIRECTIVE = re.compile(r"^::: (\S+)", re.MULTILINE)
_DEFAULT = re.compile(r",? ?\*optional\*(?:, defaults to (.*))?$")

# The last part of a public name -> its path; what is not here is set as code, without a link
PATHS = {
    path.rpartition(".")[2]: path
    for page in Path(__file__).parent.glob("api/*.md")
    for path in _DIRECTIVE.findall(page.read_text(encoding="utf-8"))
}


def _linked(match: re.Match) -> str:
    short, name = match.groups()
    shown = name.rpartition(".")[2] if short else name
    owner, _, member = name.rpartition(".")
    path = PATHS.get(name.rpartition(".")[2]) or (PATHS.get(owner) and f"{PATHS[owner]}.{member}")
    return f"[`{shown}`][{path}]" if path else f"`{shown}`"


def _joined(text: str) -> str:
    return " ".join(text.split())


def _rows(fields: list[tuple[str, str, str, str]]) -> str:
    """A table of name, type, default, and text. The first three share a column, so that it fits on a phone."""
    rows = ["| field, type, default | what it does |", "| --- | --- |"]
    for name, kind, default, text in fields:
        cells = (f"`{name}`<br>{kind} = {default}", text)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _table(entries: list[tuple[str, str]]) -> str:
    fields = []
    for head, text in entries:
        for name, kind in _HEAD.findall(head):
            default = _DEFAULT.search(kind)
            shown = "required" if default is None else default[1] or "`None`"
            fields.append((name, _DEFAULT.sub("", kind), shown, _joined(text)))
    return _rows(fields)


def _list(entries: list[tuple[str, str]]) -> str:
    lines = []
    for head, text in entries:
        names = ", ".join(f"**{name}** ({kind})" for name, kind in _HEAD.findall(head))
        names = names or ", ".join(f"**{name}**" for name in head.split(", "))
        lines.append(f"- {names}: {_joined(text)}")
    return "\n".join(lines)


def _copyable(match: re.Match) -> str:
    """A session without its prompts, what it prints as comments: the copy button then gives code that runs."""
    lines = match[1].splitlines()
    return "```python\n" + "\n".join(x[4:] if x[:3] in (">>>", "...") else f"# {x}" for x in lines) + "\n```"


def markdown(docstring: str) -> str:
    """A docstring as Markdown."""

    def section(match: re.Match) -> str:
        title, body = match.groups()
        entries = _ENTRY.findall(body + "\n")
        if title == "Parameters":
            content = _table(entries)
        elif title == "Returns" or not entries:
            content = inspect.cleandoc(body)
        else:
            content = _list(entries)
        return f"**{title}**\n\n{content}\n\n"

    text = _SECTION.sub(section, docstring + "\n").replace("\nExample:\n", "\n**Example**\n")
    return _LINK.sub(_linked, _SESSION.sub(_copyable, text))


def _preset(cls: griffe.Class) -> str:
    """The defaults that a config without fields of its own changes."""
    values = {
        name: each.value for name, each in cls.attributes.items() if not name.startswith("_") and each.annotation
    }
    rows = "".join(f"| `{name}` | `{value}` |\n" for name, value in values.items())
    return f"\n\n**Defaults that it changes**\n\n| field | default |\n| --- | --- |\n{rows}" if rows else ""


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites the docstrings of the package once it is collected."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        self._visit(pkg)

    def _visit(self, obj: griffe.Object) -> None:
        if obj.is_class:  # a private base, such as TRL's of all configs, says nothing
            obj.bases = [base for base in obj.bases if not str(base).rpartition(".")[2].startswith("_")]
        if obj.docstring is not None:
            text = obj.docstring.value
            preset = obj.is_class and obj.name.endswith("Config") and "Parameters:" not in text
            obj.docstring.value = markdown(text) + (_preset(obj) if preset else "")
        for member in obj.members.values():
            if not member.is_alias and (member.docstring or member.is_module or member.is_class):
                self._visit(member)


def inherited_fields() -> str:
    """A table of transformers' fields, with the defaults that they have here."""
    from dataclasses import MISSING, fields

    from trl_flow import FlowRLConfig

    described = set(re.findall(r"(\w+) \(", re.search(r"Parameters:(.*)", FlowRLConfig.__doc__, re.DOTALL)[1]))
    rows = []
    for field in fields(FlowRLConfig):
        if field.name not in described:
            default = field.default if field.default is not MISSING else getattr(field.default_factory, "__name__", "")
            text = _joined(str(field.metadata.get("help", ""))).replace("%%", "%").replace("<", "&lt;")
            kind = getattr(field.type, "__name__", None) or str(field.type).replace("typing.", "")
            rows.append((field.name, f"`{kind}`", f"`{default!r}`", text))
    return _rows(sorted(rows))


def on_files(files, config):
    """mkdocs' hook: the page of the fields that every config has from transformers."""
    page = Path(__file__).with_name("inherited_fields.template").read_text(encoding="utf-8")
    files.append(File.generated(config, "api/inherited_fields.md", content=page + inherited_fields() + "\n"))
    return files
