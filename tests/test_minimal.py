"""examples/minimal.py: a whole Flow-GRPO from the pure functions, which learns."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from test_examples import load_program

from trl_flow.shapes import pipeline_path


PROGRAM = Path(__file__).parents[1] / "examples" / "minimal.py"


@pytest.fixture
def minimal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield load_program("examples/minimal.py")


def test_it_is_short_and_takes_the_equations_alone():
    text = PROGRAM.read_text(encoding="utf-8")
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    own = {node.module for node in nodes if node.module.startswith("trl_flow")}
    assert own == {"trl_flow.functional", "trl_flow.shapes"}
    assert len(text.splitlines()) <= 150


def test_its_adapter_is_loaded_by_stock_diffusers(minimal, monkeypatch):
    for name, value in {"STEPS": 2, "PROMPTS": 1, "GROUP": 2}.items():
        monkeypatch.setattr(minimal, name, value)
    (reward,) = minimal.train(phases=1)
    assert -1 <= reward <= 1
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_path())
    pipeline.load_lora_weights("minimal")
    assert pipeline.get_active_adapters()


@pytest.mark.slow
def test_it_learns(minimal):
    history = minimal.train(phases=24)
    assert np.mean(history[-6:]) > np.mean(history[:6]) + 0.05
