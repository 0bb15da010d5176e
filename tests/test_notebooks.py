"""The notebooks run from top to bottom, on fewer images and rollouts than they print."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


NOTEBOOKS = Path(__file__).parents[1] / "examples" / "notebooks"

# Values that replace those of the cell tagged "parameters"
REDUCED = {
    "quickstart.ipynb": {
        "rollouts": 1,
        "prompts_per_rollout": 2,
        "num_generations": 4,
        "num_inference_steps": 3,
        "noisy_steps": 2,
        "eval_prompts": 12,
    },
}


def parameters_cell(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return cell


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_notebook_is_executed_here():
    assert {path.name for path in NOTEBOOKS.glob("*.ipynb")} == REDUCED.keys()


@pytest.mark.parametrize("name", REDUCED)
def test_notebooks_are_shipped_without_outputs(name):
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    nbformat.validate(notebook)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code_cells(notebook))


@pytest.mark.parametrize("name", REDUCED)
def test_reduced_settings_exist_in_the_notebook(name):
    """A renamed parameter would leave the notebook at its full length."""
    names: dict = {}
    exec(parameters_cell(nbformat.read(NOTEBOOKS / name, as_version=4)).source, names)
    assert REDUCED[name].keys() <= names.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", REDUCED)
def test_notebook_runs(name, tmp_path, monkeypatch):
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    parameters_cell(notebook).source += "".join(f"\n{key} = {value!r}" for key, value in REDUCED[name].items())
    # The kernel is a process of its own, which may find the package by its path only
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert any("shapes_soft" in output.get("text", "") for output in outputs)
    # The model before, the reward's curve, before and after
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert (tmp_path / "quickstart-adapter" / "pytorch_lora_weights.safetensors").is_file()
