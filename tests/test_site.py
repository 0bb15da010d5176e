"""The site: every public name and field is on it, and it builds without a warning."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from test_docstrings import NAMES


ROOT = Path(__file__).parents[1]
LISTED = re.findall(r"^::: (\S+)", "\n".join(p.read_text() for p in (ROOT / "docs/api").glob("*.md")), re.MULTILINE)


# The fields that DiffusionNFTConfig and AWMConfig share
NOT_PUBLIC = {"trl_flow.trainer.forward_process_config.ForwardProcessConfig"}


def test_every_public_name_is_in_the_reference_once():
    """By the name that it is imported by; the rewards, which are loaded when they are used, by their module."""
    values = {
        path: getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in LISTED
    }
    wanted = Counter((path.rpartition(".")[2], id(value)) for path, value in NAMES.items())
    assert Counter((path.rpartition(".")[2], id(values[path])) for path in LISTED if path not in NOT_PUBLIC) == wanted


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built as CI builds it: a warning is an error."""
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip('needs pip install -e ".[docs]"')
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True)
    assert ended.returncode == 0, ended.stderr.decode()
    return folder


def test_every_field_and_metric_is_found_by_search(site):
    from dataclasses import fields

    from trl_flow import AWMConfig, DiffusionNFTConfig, FlowGRPOConfig

    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    names = {field.name for cls in (FlowGRPOConfig, DiffusionNFTConfig, AWMConfig) for field in fields(cls)}
    rows = re.findall(r"^\| (`.+?) \|", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"), re.MULTILINE)
    names |= {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert len(names) > 200
    assert [name for name in names if name not in index] == []


def test_links_and_images_of_the_site_lead_somewhere(site):
    broken = []
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r'(?:href|src)="([^"]+)"', text):
            path, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target) or page.name == "404.html":
                continue
            file = page if not path else (page.parent / path).resolve()
            file = file / "index.html" if file.is_dir() else file
            if not file.is_file() or (anchor and f'id="{anchor}"' not in file.read_text(encoding="utf-8")):
                broken.append(f"{page.relative_to(site)}: {target}")
    assert broken == []


def test_the_site_asks_nobody_else(site):
    """Pages work without a network: no font, script or style comes from elsewhere."""
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]+)', page.read_text()
        )
        assert loaded == [], page
