"""Random LoRAs on the tiny pipeline of each family, and what they add to each layer's weight."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny_flux import tiny_flux_pipeline, tiny_klein_pipeline
from tiny_models import tiny_sd3_pipeline
from tiny_qwen import tiny_qwen_image_pipeline, tiny_z_image_pipeline
from tiny_unets import tiny_sd_pipeline, tiny_sdxl_pipeline
from tiny_wan import tiny_wan_pipeline

from trl_flow.backbones import BACKBONES
from trl_flow.sharing import save_lora


FAMILIES: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd": tiny_sd_pipeline,
    "sdxl": tiny_sdxl_pipeline,
    "sd3": tiny_sd3_pipeline,
    "flux": tiny_flux_pipeline,
    "klein": tiny_klein_pipeline,
    "qwen": tiny_qwen_image_pipeline,
    "z": tiny_z_image_pipeline,
    "wan": tiny_wan_pipeline,
}
# Of each family's default target modules one, with another rank and another alpha than the others
PATTERNS = {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 5}}


def component_of(pipeline: DiffusionPipeline) -> str:
    return BACKBONES[type(pipeline).__name__].component


def random_adapter(model: torch.nn.Module, *, seed: int = 0, **config) -> PeftModel:
    """A LoRA whose every weight is random."""
    peft_model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6} | config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return peft_model


def saved_adapter(family: str, folder: Path, **config) -> dict[str, torch.Tensor]:
    """Writes such a LoRA to `folder`, in diffusers' and PEFT's form, and returns its `deltas`."""
    pipeline = FAMILIES[family]()
    component = component_of(pipeline)
    if "target_modules" not in config:
        config["target_modules"] = list(BACKBONES[type(pipeline).__name__].lora_target_modules)
    model = random_adapter(getattr(pipeline, component), **config)
    save_lora(type(pipeline), model, folder, component=component)
    return deltas(model)


def deltas(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What each layer's LoRA adds to its weight, by the layer's name in the model."""
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(layer.active_adapters[0]).detach()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def assert_same_deltas(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(actual[name], delta, rtol=1e-4, atol=1e-5, msg=name)
