"""The methods, and what each changes: known before the libraries are loaded, from the configs' source."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from trl_flow.commands.fields import Field, dataclass_fields
from trl_flow.commands.recipe import did_you_mean, option


# The class of each method's config, which `trl_flow` exports
METHODS = {"flow_grpo": "FlowGRPOConfig", "guard": "GuardConfig", "slas": "SLASConfig", "vgpo": "VGPOConfig"}
METHODS |= {"nft": "DiffusionNFTConfig", "awm": "AWMConfig"}
BUNDLED_MODELS = ("bundled", "shapes")

DESCRIPTION = """\
What each method changes of Flow-GRPO's defaults. An empty cell is Flow-GRPO's value, and "-" an option that the method
does not have; null follows from other options (guard's timestep_weighting is inverse_dt, or what its sde_type needs).
`trl-flow train --method NAME --help` says what the options are.
"""


def method_of(argv: Sequence[str], recipe: Mapping[str, Any]) -> str:
    """The method that is asked for; `ValueError` if there is no such."""
    method = option(argv, recipe, "method") or "flow_grpo"
    if method not in METHODS:
        near = did_you_mean(str(method), METHODS)
        raise ValueError(f"method is {method!r}, but must be one of {', '.join(METHODS)}.{near}")
    return method


def changed_defaults(argv: Sequence[str], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults that are others than the classes', by what `argv` and `recipe` say of the model."""
    # The trainer chooses dtypes and turns dropout off; TRL's defaults are for language models
    defaults = {"dtype": None, "lora_dropout": 0.0, "lora_task_type": None}
    if option(argv, recipe, "init_adapter") is not None:  # whose own they are
        defaults |= {"use_peft": True, "lora_r": None, "lora_alpha": None}
    if (option(argv, {}, "model") or option(argv, recipe, "model_name_or_path")) in BUNDLED_MODELS:
        from trl_flow.shapes import IMAGE_SIZE
        from trl_flow.shapes.bundled import T5_TOKENS

        defaults |= {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "max_sequence_length": T5_TOKENS}
    return defaults


def config_fields(method: str) -> dict[str, Field]:
    """The fields of the method's config."""
    return dataclass_fields("trl_flow", METHODS[method])


def changes() -> dict[str, dict[str, Any]]:
    """The options in which methods differ, in the methods' order and by their own: for each the default of every
    method that has it."""
    found = {method: config_fields(method) for method in METHODS}
    names = dict.fromkeys(name for fields in found.values() for name in fields)
    by_name = {n: {method: fields[n].default for method, fields in found.items() if n in fields} for n in names}
    return {n: own for n, own in by_name.items() if len(own) < len(METHODS) or len(set(map(repr, own.values()))) > 1}


def methods_table(*, markdown: bool = False) -> str:
    """What each method changes of Flow-GRPO's defaults, as text or as a Markdown table."""
    # What only Flow-GRPO's family has is listed where one of its presets changes it
    found = changes().items()
    rows = {n: own for n, own in found if "flow_grpo" not in own or len(set(map(repr, own.values()))) > 1}
    cells = [["option", *METHODS]]
    for name, own in rows.items():
        base = own.get("flow_grpo", KeyError)
        line = [shown(own[m]) if m in own and (m == "flow_grpo" or own[m] != base) else "" for m in METHODS]
        cells.append([name, *(cell if m in own else "-" for m, cell in zip(METHODS, line, strict=True))])
    if markdown:
        quoted = [[f"`{cell}`" if cell not in ("", "-", "option") else cell for cell in row] for row in cells]
        lines = [quoted[0], ["---"] * len(cells[0]), *quoted[1:]]
        return "\n".join(f"| {' | '.join(row)} |" for row in lines)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in padded)


def shown(value: Any) -> str:
    """A default as one writes it in a recipe."""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    if isinstance(value, float) and 0 < abs(value) < 1e-2:
        mantissa, exponent = f"{value:.6e}".split("e")
        return re.sub(r"\.?0+$", "", mantissa) + f"e{int(exponent)}"
    if isinstance(value, (list, tuple)):
        return " ".join(map(shown, value)) or "null"
    return str(value) if str(value) else '""'
