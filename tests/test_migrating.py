"""docs/migrating.md names fields that exist, and its configurations are what it says; `test_examples.py` runs them."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_flux import tiny_flux_pipeline

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer
from trl_flow.backbones import get_backbone
from trl_flow.commands.options import FlowScriptArguments
from trl_flow.rewards.named import NAMED_REWARDS


PAGE = (Path(__file__).parents[1] / "docs" / "migrating.md").read_text(encoding="utf-8")
FIELDS = {field.name for field in dataclasses.fields(FlowGRPOConfig)}


def tables() -> list[list[list[str]]]:
    """Rows of cells, the head first."""
    found = re.findall(r"(?:^\|.*\|\n)+", PAGE, flags=re.MULTILINE)
    return [[[c.strip() for c in re.split(r"(?<!\\)\|", row)[1:-1]] for row in table.splitlines()] for table in found]


def names_of(cell: str) -> set[str]:
    """What a cell names in code: `name`, `name=value` or `name(...)`; values alone are left out."""
    return {match[1] for code in re.findall(r"`([^`]+)`", cell) if (match := re.match(r"(-*[a-z][\w]*)", code))}


def test_every_field_of_ours_exists():
    known = FIELDS | set(inspect.signature(FlowGRPOTrainer).parameters) | {"train", "config", "scheduler"}
    known |= {f"--{field.name}" for field in dataclasses.fields(FlowScriptArguments)} | {"--accelerate_config"}
    for (theirs, *_), _, *rows in tables():
        expected = set(NAMED_REWARDS) if theirs == "in `reward_fn`" else known
        for _, ours, *_ in rows:
            assert names_of(ours) <= expected | {"VLMJudgeReward"}, ours


# In the page's order, each once: processes that share the tests out must collect the same
CELLS = dict.fromkeys(cell for table in tables() for _, *cells in table for cell in cells if "=" in cell)


@pytest.mark.parametrize("cell", list(CELLS))
def test_every_setting_is_one_that_is_taken(cell, tmp_path):
    given = dict(re.findall(r"`(\w+)=([^`]+)`", cell))
    settings = {name: value for name, value in given.items() if re.fullmatch(r"[\d.]+|True|False|\"\w+\"", value)}
    values = {name: ast.literal_eval(value) for name, value in settings.items()}
    FlowGRPOConfig(**{"num_generations": 2} | values, output_dir=str(tmp_path))
    assert set(given) <= FIELDS


@pytest.fixture(scope="module")
def configs() -> list[FlowGRPOConfig]:
    code, found = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)), []
    exec(re.sub(r"^args = (FlowGRPOConfig\(.*?^\))", r"found.append(\1)", code, flags=re.M | re.S), {"found": found})
    return found


def test_the_configurations_have_the_originals_arithmetic(configs):
    flow_grpo, dance, ddpo = configs
    # 16 prompts of 16 images on four processes, in two updates
    assert (4 * flow_grpo.generation_batch_size, flow_grpo.updates_per_generation) == (16 * 16, 2)
    # int(10 * 0.99) of ten steps, int(15 * 0.6) of 16, 50 of 50
    trained = [args.num_trained_steps(args.num_stochastic_steps) for args in configs]
    assert trained == [int(10 * 0.99), int(15 * 0.6), 50]
    # One prompt of twelve images for a process, an update for each four
    assert (dance.generation_batch_size, dance.updates_per_generation) == (12, 3)
    # 6 x 4 images in batches of three
    assert (ddpo.generation_batch_size, ddpo.updates_per_generation) == (24, 8)


def test_a_shift_of_ones_own_is_dance_grpos_schedule():
    pipeline = tiny_flux_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    backbone = get_backbone(pipeline, height=16, width=16, max_sequence_length=16)
    s = torch.linspace(1, 0, 17)
    torch.testing.assert_close(backbone.schedule(16).sigmas.float().cpu(), 3 * s / (1 + 2 * s))
