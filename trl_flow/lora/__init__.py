"""LoRA files: diffusers' format, and those of other tools, in and out."""

from trl_flow.lora.diffusers_format import LORA_WEIGHT_NAME, PEFT_FILES, check_lora_config, write_diffusers_file
from trl_flow.lora.files import find_lora, load_lora, lora_layers


__all__ = ["LORA_WEIGHT_NAME", "PEFT_FILES", "check_lora_config", "find_lora", "load_lora", "lora_layers"]
__all__ += ["write_diffusers_file"]
