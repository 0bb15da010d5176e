"""The notebooks: as they are committed, and run from top to bottom on fewer images and updates than they print."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from trl_flow.shapes import pipeline_path


NOTEBOOKS = Path(__file__).parents[1] / "examples" / "notebooks"
REAL = "stabilityai/stable-diffusion-3.5-medium"

# Values that replace those of the cell tagged "parameters"
REDUCED = {
    "quickstart": {"rollouts": 1, "prompts_per_rollout": 4, "num_generations": 4, "eval_prompts": 12},
    "your_own_reward": {"max_updates": 4, "eval_every": 2, "eval_prompts": 4},
    "sd35_on_one_gpu": {"updates": 2},
    "three_papers": {"prompts_per_phase": 4, "num_generations": 4, "eval_prompts": 24, "length": 0.1},
    "share_and_judge": {"updates": 1, "num_generations": 2, "eval_prompts": 24},
}
# A file that each leaves
MADE = {
    "quickstart": "quickstart/pytorch_lora_weights.safetensors",
    "your_own_reward": "fixed/pytorch_lora_weights.safetensors",
    "sd35_on_one_gpu": "sd35-ocr/README.md",
    "three_papers": "papers/comparison/comparison.html",
    "share_and_judge": "judged/votes.png",
}
every_notebook = pytest.mark.parametrize("name", REDUCED)


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters_cell(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return cell


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def shown(notebook: nbformat.NotebookNode) -> str:
    """All text that the outputs show."""
    parts = [[output.get("text", ""), output.get("data", {})] for output in outputs(notebook)]
    return "\n".join(
        text + "".join(value for kind, value in data.items() if kind.startswith("text/")) for text, data in parts
    )


def test_every_notebook_is_tested_here():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == REDUCED.keys()


@every_notebook
def test_notebooks_are_short_and_say_how_long_they_take(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert len(notebook.cells) < 40
    assert max(len(cell.source.splitlines()) for cell in notebook.cells) <= 45
    # A line of code that is longer is scrolled on a phone and in Colab
    assert max(len(line) for cell in code_cells(notebook) for line in cell.source.splitlines()) < 120
    first = notebook.cells[0].source
    assert first.startswith("# ") and re.search(r"\d+ minutes?\b|a minute", first)
    install, parameters = code_cells(notebook)[:2]
    assert re.search(r'^if "google.colab" in sys.modules:\n    %pip install -q "?trl_flow', install.source, re.M)
    assert parameters == parameters_cell(notebook)


@every_notebook
def test_notebooks_are_committed_as_they_ran(name):
    notebook = read(name)
    assert [cell.execution_count for cell in code_cells(notebook)] == [*range(1, len(code_cells(notebook)) + 1)]
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) >= 2
    # No bars, no colors of terminals, no folders of the machine, and nothing that makes them heavy
    assert not re.search(r"\r|\x1b|it/s\]|/tmp/|/root/|/home/|/opt/|site-packages", shown(notebook))
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 1.5e6


@every_notebook
def test_links_between_notebooks_lead_somewhere(name):
    text = "".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\((?!https?://)([^)]+)\)", text)
    assert [link for link in links if not (NOTEBOOKS / link).exists()] == []
    files = re.findall(r"`((?:docs|examples)/[\w./]+)`", text)
    assert [file for file in files if not (NOTEBOOKS.parents[1] / file).exists()] == []


@every_notebook
def test_reduced_settings_exist_in_the_notebook(name):
    """A renamed parameter would leave the notebook at its full length."""
    names: dict = {}
    exec(parameters_cell(read(name)).source, names)
    assert REDUCED[name].keys() <= names.keys() and names["real_model"] is False


def run(name: str, folder: Path, monkeypatch, changes: dict[str, str] | None = None, **parameters) -> str:
    """Runs a notebook with other parameters, and `changes` in the text of its cells; what it shows."""
    notebook = read(name)
    values = REDUCED[name] | parameters
    parameters_cell(notebook).source += "".join(f"\n{key} = {value!r}" for key, value in values.items())
    for cell in code_cells(notebook):
        for old, new in (changes or {}).items():
            cell.source = cell.source.replace(old, new)
    # The kernel is a process of its own, which may find the package by its path only
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    assert (folder / MADE[name]).is_file()
    return shown(notebook)


@pytest.mark.slow
@every_notebook
def test_notebook_runs(name, tmp_path, monkeypatch):
    run(name, tmp_path, monkeypatch)


@pytest.mark.slow
@every_notebook
def test_one_variable_switches_to_the_real_model(name, tmp_path, monkeypatch):
    """All that the real model's cells do, with the bundled one in its place, smaller images and no GPU."""
    (tmp_path / "ocr").mkdir()
    for split in ("train", "test"):
        (tmp_path / "ocr" / f"{split}.txt").write_text("".join(f'A sign "{i}"\n' for i in range(32)))
    changes = {
        f'"{REAL}"': repr(pipeline_path()),
        '"cuda"': '"cpu"',
        '"height": 512, "width": 512': '"height": 64, "width": 64',
        '"max_sequence_length": 128': '"max_sequence_length": 1',
        # A card of 24 GB
        "torch.cuda.get_device_properties(0).total_memory": "24e9",
        '"ocr", ': f'"ocr:{tmp_path / "ocr"}", ',
        "eval_num_inference_steps=28 if real_model else 4": "eval_num_inference_steps=2, height=64, width=64",
        "precompute_prompt_embeds=real_model,": "precompute_prompt_embeds=True, max_sequence_length=1,",
        "passes = 96": "passes = 24",
    }
    run(name, tmp_path, monkeypatch, changes, real_model=True)
