"""Results as a table for people and as JSON for programs."""

import json
import math
import os
import platform
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trl_flow.evaluation.scoring import PairedDifference


_PACKAGES = ("trl_flow", "torch", "diffusers", "transformers", "trl", "peft", "accelerate", "datasets", "numpy")


def score_table(differences: Mapping[str, PairedDifference]) -> str:
    """
    Scores before and after as a table of plain text, one line for each.

    `±` is one standard error of the paired difference, and the last column the difference in units of it.
    """
    header = ("score", "before", "after", "difference", "in std. errors")
    rows = [
        (
            name,
            f"{d.mean_before:.3f}",
            f"{d.mean_after:.3f}",
            f"{d.difference:+.3f} ± {d.standard_error:.3f}",
            "-" if math.isnan(d.standard_errors) else f"{d.standard_errors:+.1f}",
        )
        for name, d in differences.items()
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: tuple[str, ...]) -> str:
        first, *numbers = row
        return "  ".join([first.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True))])

    rule = "-" * len(line(header))
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_json(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """
    Writes a JSON file whole or not at all: what was there before stays until the new content is on disk.

    Raises:
        ValueError: if `content` has a number that JSON does not know (NaN, infinity).
    """
    path = Path(path)
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is its owner's alone; a result is as readable as any other file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
