"""diffusers' LoRA format: what it can hold, and how it is written."""

from dataclasses import fields
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftConfig


LORA_WEIGHT_NAME = "pytorch_lora_weights.safetensors"
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")  # what PEFT needs to go on training

# Fields of LoraConfig that the exported adapter reproduces exactly (the choice of modules is written out name by
# name), or that have no use after training. Any other field, of this PEFT or a later one, must be at its default.
_HELD_FIELDS = {
    *("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "lora_dropout"),
    *("init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config"),
}

# The other initializations (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base weights, which the adapter's user
# does not have; EVA needs a pass over data first.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")


def check_lora_config(peft_config: PeftConfig) -> None:
    """
    Refuses an adapter that a stock diffusers pipeline could not load with the same result, before it is trained:
    `ValueError` if `peft_config` is no `LoraConfig`, or has an option that diffusers' LoRA format cannot hold.
    """
    if not isinstance(peft_config, LoraConfig):
        raise ValueError(
            f"peft_config is a {type(peft_config).__name__}. Adapters are saved in diffusers' LoRA format, which only "
            "holds a LoRA: pass a peft.LoraConfig, or none at all for full fine-tuning."
        )
    defaults, names = LoraConfig(), [field.name for field in fields(peft_config) if field.name not in _HELD_FIELDS]
    lost = [name for name in names if getattr(peft_config, name) != getattr(defaults, name, None)]
    if peft_config.init_lora_weights not in _INITIALISATIONS:
        lost.append("init_lora_weights")
    if lost:
        options = ", ".join(f"{name}={getattr(peft_config, name)!r}" for name in lost)
        raise ValueError(
            f"peft_config has {options}. diffusers' LoRA format cannot hold this: the adapter would not load in a "
            "diffusers pipeline, or would draw other images than it did here. Leave these options at their defaults; "
            f"init_lora_weights may be any of {', '.join(map(repr, _INITIALISATIONS))}."
        )


def file_component(component: str) -> str:
    """The name that files have for the pipeline's module `component`: Wan's second transformer is saved as the first
    one is, and whoever loads it says which it is for."""
    return "transformer" if component == "transformer_2" else component


def write_diffusers_file(
    pipeline_class: type[DiffusionPipeline], folder: Path, config: LoraConfig, weights: dict[str, torch.Tensor],
    component: str,
) -> Path:  # fmt: skip
    """Writes an adapter's tensors, by PEFT's names in its module, as the file that `load_lora_weights` reads."""
    name = file_component(component)
    given = {f"{name}_lora_layers": weights, f"{name}_lora_adapter_metadata": _metadata(config, weights)}
    pipeline_class.save_lora_weights(folder, weight_name=LORA_WEIGHT_NAME, **given)
    return folder / LORA_WEIGHT_NAME


def _metadata(config: LoraConfig, weights: dict[str, torch.Tensor]) -> dict[str, object]:
    """What `LoraConfig` needs to rebuild the adapter, and no more: a key that another release of PEFT does not know
    makes `load_lora_weights` fail there. Without metadata diffusers takes alpha to be the rank."""
    return {
        **{name: getattr(config, name) for name in ("r", "lora_alpha")},
        **{name: dict(getattr(config, name)) for name in ("rank_pattern", "alpha_pattern")},
        # Sorted: a set comes in another order in each process
        "target_modules": sorted({name.partition(".lora_")[0] for name in weights}),
        **{name: True for name in ("use_rslora", "use_dora", "lora_bias") if getattr(config, name)},
    }
