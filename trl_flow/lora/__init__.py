"""LoRA files: diffusers' format, and those of other tools, in and out."""

from trl_flow.lora.diffusers_format import LORA_WEIGHT_NAME, PEFT_FILES, check_lora_config, write_diffusers_file
from trl_flow.lora.export import FORMATS, export_lora
from trl_flow.lora.files import adapter_config, find_lora, load_lora, lora_layers


__all__ = [
    "FORMATS", "LORA_WEIGHT_NAME", "PEFT_FILES", "adapter_config", "check_lora_config", "export_lora",
    "find_lora", "load_lora", "lora_layers", "write_diffusers_file",
]  # fmt: skip
