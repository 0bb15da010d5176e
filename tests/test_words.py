"""American English, one spelling and plain idiom, in the documentation, notebooks, docstrings, and messages."""

import json
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.ipynb")),
]
CODE = [*sorted((ROOT / "trl_flow").rglob("*.py")), *sorted((ROOT / "examples").rglob("*.py"))]
BRITISH = (
    r"behaviour|colour|favour|honour|neighbour|labell|modell|travell|cancelling|centre|grey"
    r"|licence|artefact|catalogue|whilst|amongst|analys(?=e[ds]?\b|ing)|defence"
    r"|(?:initial|normal|optim|quant|recogn|maxim|minim|visual|summar|serial|general|organ|real|util|token|penal|regular)"
    r"is(?=e|ing|ation)"
)
UNIDIOMATIC = r"can not|for ever\b|(?:go|goes|going|gone|went) on\b|besides the|one's own|in the place of|anew\b"


def written(path: Path) -> str:
    """A file's text. Of a notebook its cells, without their outputs."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])


def found(pattern: str, files: list[Path]) -> list[str]:
    words = re.compile(rf"\b(?:{pattern})", re.IGNORECASE)
    lines = ((path, line) for path in files for line in written(path).splitlines())
    return [f"{path.relative_to(ROOT)}: {line.strip()[:100]}" for path, line in lines if words.search(line)]


@pytest.mark.parametrize("files", [PAGES, CODE], ids=["pages", "code"])
def test_american_spelling(files):
    assert found(BRITISH, files) == []


def test_pages_are_idiomatic():
    assert found(UNIDIOMATIC, PAGES) == []


def test_the_list_finds_what_it_is_for():
    words = re.compile(rf"\b(?:{BRITISH})", re.IGNORECASE)
    british = "behaviour colour colours optimise normalising quantisation grey centre licence analyse labelled"
    assert all(words.match(word) for word in british.split())
    american = "behavior color colors optimize normalizing gray center license analysis labeled realistic organism"
    assert not any(words.match(word) for word in american.split())
