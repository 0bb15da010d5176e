"""The table of what the methods change, in docs/papers.md, is what the configs have once they are made."""

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

from trl_flow import FlowGRPOConfig, GuardConfig, SLASConfig, VGPOConfig


PAGE = Path(__file__).parents[2] / "docs" / "papers.md"
CLASSES = {"flow_grpo": FlowGRPOConfig, "guard": GuardConfig, "slas": SLASConfig, "vgpo": VGPOConfig}
HEADING = "| option | " + " | ".join(f"`{name}`" for name in CLASSES) + " |"


def table() -> dict[str, list[str]]:
    """The cells of the presets of Flow-GRPO's config, of the options that it has."""
    rows = PAGE.read_text(encoding="utf-8").partition(HEADING)[2].partition("\n\n")[0].splitlines()[2:]
    cells = ([cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows)
    return {name: values[: len(CLASSES)] for name, *values in cells if values[0] != "-"}


def value(cell: str) -> Any:
    """What a recipe would make of it."""
    words = {"true": True, "false": False}
    return words[cell] if cell in words else ast.literal_eval(cell) if cell[0].isdigit() else cell


def test_the_table_of_the_presets_is_what_they_change(tmp_path):
    configs = [cls(str(tmp_path), use_cpu=True) for cls in CLASSES.values()]
    names = {field.name for field in dataclasses.fields(FlowGRPOConfig)}
    differ = {name for name in names if any(getattr(c, name) != getattr(configs[0], name) for c in configs)}
    rows = table()
    assert differ <= set(rows)
    for name, (first, *others) in rows.items():
        for config, cell in zip(configs, [first, *others], strict=True):
            if cell != "null":  # which follows from other options
                assert getattr(config, name) == value(cell or first), (name, type(config).__name__)
        assert first not in others  # an empty cell is Flow-GRPO's value


def test_the_example_of_all_three_has_what_each_changes(tmp_path):
    """But for DanceGRPO's dynamics, and the standard deviation, about which they disagree."""
    code = re.search(r"args = (GuardConfig\(\n +output_dir=\"guard-slas-vgpo\".*?\n\))", PAGE.read_text(), re.DOTALL)[
        1
    ]
    config = eval(code, {"GuardConfig": lambda **fields: GuardConfig(use_cpu=True, **fields)})
    dynamics = {"sde_type", "noise_level", "timestep_fraction", "timestep_fraction_per_sample"}
    for name, (first, *others) in table().items():
        wanted = {cell for cell in others if cell} if name not in dynamics else {first}
        if wanted and wanted != {"null"}:
            assert [getattr(config, name)] == [value(cell) for cell in wanted], name
