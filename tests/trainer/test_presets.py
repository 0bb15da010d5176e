"""The table of what the presets change, in docs/papers.md, is what the classes have."""

import ast
import dataclasses
import re
from pathlib import Path

from trl_flow import FlowGRPOConfig, GuardConfig, SLASConfig, VGPOConfig


PAGE = Path(__file__).parents[2] / "docs" / "papers.md"
CLASSES = (FlowGRPOConfig, GuardConfig, SLASConfig, VGPOConfig)
TEXT = PAGE.read_text(encoding="utf-8")
HEADING = "| field | " + " | ".join(f"`{cls.__name__}`" for cls in CLASSES) + " |"


def table() -> dict[str, list[str]]:
    rows = TEXT.partition(HEADING)[2].strip().partition("\n\n")[0].splitlines()[1:]
    cells = ([cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows)
    return {name: values for name, *values in cells}


def test_the_table_of_the_presets_is_what_they_change(tmp_path):
    configs = [cls(str(tmp_path), use_cpu=True) for cls in CLASSES]
    names = {field.name for field in dataclasses.fields(FlowGRPOConfig)}
    differ = {name for name in names if any(getattr(c, name) != getattr(configs[0], name) for c in configs)}
    rows = table()
    assert set(rows) == differ
    for name, (first, *others) in rows.items():
        for config, cell in zip(configs, [first, *others], strict=True):
            assert getattr(config, name) == ast.literal_eval(cell or first), (name, type(config).__name__)
        assert any(others) and first not in others  # an empty cell is Flow-GRPO's value


def test_the_example_of_all_three_has_what_each_changes(tmp_path):
    """But for DanceGRPO's dynamics, and the standard deviation, about which they disagree."""
    code = re.search(r"args = (GuardConfig\(\n +output_dir=\"guard-slas-vgpo\".*?\n\))", PAGE.read_text(), re.DOTALL)[
        1
    ]
    config = eval(code, {"GuardConfig": lambda **fields: GuardConfig(use_cpu=True, **fields)})
    dynamics = {"sde_type", "noise_level", "timestep_fraction", "timestep_fraction_per_sample"}
    for name, (first, *others) in table().items():
        wanted = {cell for cell in others if cell} if name not in dynamics else {first}
        assert [getattr(config, name)] == [ast.literal_eval(cell) for cell in wanted], name
