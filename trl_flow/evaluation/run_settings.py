"""How the runs that adapters come from were evaluated, by the settings that stand beside their weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_flow.backbones.base import SAMPLING_SETTINGS
from trl_flow.evaluation.adapters import Adapter
from trl_flow.evaluation.outputs import read_json
from trl_flow.images import Frame


RUN_SETTINGS = "training_args.json"


def run_settings(adapter: Adapter) -> dict[str, Any]:
    """Settings of a run's evaluations, by the names of drawing options; empty if nothing says them (an adapter of the
    Hub's or of another program)."""
    if not (args := _args(adapter)):
        return {}
    found = {name: args.get(name) for name in SAMPLING_SETTINGS} | {"num_inference_steps": None}
    for name in ("num_inference_steps", "guidance_scale"):
        if args.get(f"eval_{name}") is not None:
            found[name] = args[f"eval_{name}"]
    return {name: value for name, value in found.items() if value not in (None, "")}


def _args(adapter: Adapter) -> dict[str, Any]:
    path = Path(adapter.path)
    path = (path.parent if path.is_file() else path) / RUN_SETTINGS
    return read_json(path) if path.is_file() else {}


def trained_component(adapters: Sequence[Adapter]) -> str | None:
    """The pipeline's module that the adapters are for, as their runs say; `None` is the family's own. `ValueError` if
    they are for several."""
    found = {adapter.name: _args(adapter).get("component") for adapter in adapters}
    if len(set(found.values())) > 1:
        said = ", ".join(f"{name}: {value or 'the first'}" for name, value in found.items())
        raise ValueError(f"the adapters are for different modules of the pipeline ({said}). Compare those of one.")
    return next(iter(found.values()), None)


def trained_frame(adapters: Sequence[Adapter]) -> Frame:
    """The frame of a video that the first run's rewards got as its image."""
    return next(filter(None, (_args(adapter).get("reward_frame") for adapter in adapters)), "middle")


def differences(
    runs: Mapping[str, Mapping[str, Any]], drawn: Mapping[str, Any], given: Mapping[str, Any]
) -> list[str]:
    """What is drawn otherwise than runs evaluated, one sentence for each, and which of them say nothing; by the
    settings of each run by its name. `given` was asked for."""
    sentences = []
    for name, own in runs.items():
        other = {key: value for key, value in own.items() if drawn[key] != value}
        if own and drawn["negative_prompt"] and "negative_prompt" not in own:
            other["negative_prompt"] = None
        if other:
            named = ", ".join(f"{key} {value!r}" for key, value in other.items())
            sentences.append(f"The run of {name} evaluated with {named}.")
        elif not own and not {"num_inference_steps", "guidance_scale"} <= set(given):
            sentences.append(f"How the run of {name} evaluated is not known: it has no {RUN_SETTINGS} beside it.")
    return sentences
