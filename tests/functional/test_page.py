"""docs/functional.md: the loop there is complete, and learns."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch


PAGE = (Path(__file__).parents[2] / "docs" / "functional.md").read_text(encoding="utf-8")


def train(phases: int, **constants: int) -> list[float]:
    scope = {"__name__": "page"}
    exec(re.search(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[1], scope)
    scope |= constants
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return scope["train"](phases)


def test_the_loop_runs():
    history = train(1, STEPS=2, PROMPTS=1, GROUP=2)
    assert len(history) == 1 and -1 <= history[0] <= 1


@pytest.mark.slow
def test_the_loop_learns():
    history = train(12)
    assert np.mean(history[-3:]) > np.mean(history[:3]) + 0.03
