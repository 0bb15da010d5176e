"""Adapters for ComfyUI and for kohya's scripts, which read alphas from `.alpha` keys alone, by names of their own."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from trl_flow.lora.files import find_lora, load_lora, lora_layers


FORMATS = ("comfyui", "kohya")
"""The formats that [`export_lora`] writes."""

# By the model's class: names in the code that it was first released with, for modules of each of diffusers' blocks,
# with diffusers' names of their parts. ComfyUI knows both; sd-scripts (and musubi-tuner for FLUX.2) knows these.
_ORIGINAL = json.loads(Path(__file__).with_name("names.json").read_text(encoding="utf-8"))
# Modules that have diffusers' names there, too
_QWEN = r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|(img|txt)_(mlp|mod)\..+)$"
_QWEN_ENDS = r"|(img_in|txt_in|proj_out|norm_out\.linear|time_text_embed\..+)$"
_Z_IMAGE = r"(layers|\w+_refiner)\.\d+\.(attention\.to_([qkv]|out\.0)|feed_forward\.w\d|adaLN_modulation\.0)$"
_Z_IMAGE_ENDS = r"|(cap_embedder\.1|t_embedder\.mlp\.[02]|all_x_embedder\.2-1|all_final_layer\.2-1\..+)$"
_UNET = r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(attentions|resnets|downsamplers|upsamplers)\."
_UNET_ENDS = r"|(conv_in|conv_out|(time|add)_embedding\.linear_[12])$"
_SAME = {
    "kohya": {
        "QwenImageTransformer2DModel": _QWEN,
        "ZImageTransformer2DModel": _Z_IMAGE,
        "UNet2DConditionModel": _UNET,
    },
    "comfyui": {
        "QwenImageTransformer2DModel": _QWEN + _QWEN_ENDS,
        "ZImageTransformer2DModel": _Z_IMAGE + _Z_IMAGE_ENDS,
        "UNet2DConditionModel": _UNET + _UNET_ENDS,
    },
}
# Of these ComfyUI knows names with underscores alone
_UNDERSCORED = ("UNet2DConditionModel", "WanTransformer3DModel")
# What no network of sd-scripts and musubi-tuner reaches
_NOT_IN_KOHYA = {"FluxTransformer2DModel": r"final_layer", "Flux2Transformer2DModel": r"final_layer|img_in|txt_in"}


@dataclass(frozen=True)
class Layer:
    """One layer's LoRA: `down` `(r, in, ...)`, `up` `(out, r, ...)`, and what `up @ down` is multiplied by."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def alpha(self) -> float:
        return self.scale * len(self.down)


def export_lora(
    pipeline: DiffusionPipeline, component: str, adapter: str | os.PathLike, format: str, output: str | os.PathLike
) -> int:
    """
    Writes an adapter as other tools read it.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): of the adapter's base model; may be on the meta device.
        component (`str`): the pipeline's module that the adapter is for.
        adapter (`str` or `os.PathLike`): as for [`load_lora`].
        format (`str`): `"comfyui"` or `"kohya"`.
        output (`str` or `os.PathLike`): the `.safetensors` file to write.

    Returns:
        `int`: how many modules the file has.

    Raises:
        ValueError: if the adapter does not fit the pipeline, or the format cannot hold it.

    Example:

    ```pycon
    >>> from peft import LoraConfig, get_peft_model
    >>> from trl_flow.lora import FORMATS, export_lora
    >>> from trl_flow.shapes import load_pipeline
    >>> from trl_flow.sharing import save_lora
    >>> pipeline = load_pipeline()
    >>> model = get_peft_model(pipeline.transformer, LoraConfig(r=4, target_modules=["attn.to_q"]))
    >>> _ = save_lora(type(pipeline), model, "adapter")
    >>> [export_lora(load_pipeline(), "transformer", "adapter", name, f"{name}.safetensors") for name in FORMATS]
    [3, 3]
    ```
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}, but must be one of {', '.join(FORMATS)}.")
    if Path(output).exists() and Path(adapter).exists() and Path(output).samefile(find_lora(adapter)):
        raise ValueError(f"output is {os.fspath(output)!r}, the adapter itself, which would be lost. Name another.")
    try:
        layers, model = _layers(pipeline, component, adapter), getattr(pipeline, component)
    finally:
        pipeline.unload_lora_weights()
    places = {name: _place(name, model, format) for name in layers}
    if unknown := [name for name, place in places.items() if place is None]:
        raise ValueError(
            f"{format} has no names for {len(unknown)} of the {len(layers)} modules that {os.fspath(adapter)} changes "
            f"in a {type(model).__name__}, such as {unknown[0]}: without them it would draw other images. Train the "
            "modules of the blocks alone (target_modules), or use the adapter with diffusers."
        )
    tensors: dict[str, Tensor] = {}
    if format == "comfyui" and type(model).__name__ not in _UNDERSCORED:
        for name, layer in layers.items():
            key = f"{component}.{name}"
            tensors |= {f"{key}.lora_A.weight": layer.down, f"{key}.lora_B.weight": layer.up}
            tensors[f"{key}.alpha"] = torch.tensor(layer.alpha)
    else:
        for target, members in {place[0]: place[1] for place in places.values()}.items():
            layer = _joined(target, members, layers, model)
            key = f"lora_unet_{target.replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": layer.down, f"{key}.lora_up.weight": layer.up}
            tensors[f"{key}.alpha"] = torch.tensor(layer.alpha)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output, {"format": "pt"})
    return sum(name.endswith(".alpha") for name in tensors)


def _layers(pipeline: DiffusionPipeline, component: str, adapter: str | os.PathLike) -> dict[str, Layer]:
    """By the module's name in the component."""
    try:
        tensors = load_lora(pipeline, adapter, component)
    # Files and the Hub fail in many ways: errors of the file's format, of its keys, of the network
    except Exception as error:
        cause = str(error).strip(" .\n").partition("\n\tsize mismatch")[0] or type(error).__name__
        raise ValueError(f"{os.fspath(adapter)} is not a LoRA for this {type(pipeline).__name__}: {cause}.") from error
    pair = (".lora_A.weight", ".lora_B.weight")
    if others := [name for name in tensors if not name.startswith(f"{component}.") or not name.endswith(pair)]:
        raise ValueError(
            f"{os.fspath(adapter)} has {len(others)} tensors that are not a plain LoRA of the {component}, such as "
            f"{others[0]}: DoRA, biases and text encoders are not exported. Use the adapter with diffusers."
        )
    scales = {name: layer.scaling["default"] for name, layer in lora_layers(pipeline)}
    return {
        name.removeprefix(f"{component}."): Layer(*(tensors[f"{name}{end}"] for end in pair), scales[name])
        for name in scales
    }


def _place(name: str, model: nn.Module, format: str) -> tuple[str, list[str]] | None:
    """The module's name in the format, and diffusers' names of all that is this one module there."""
    kind = type(model).__name__
    if kind in _ORIGINAL:
        target, members = _original(name, _ORIGINAL[kind]) or (None, [])
        lacks = _NOT_IN_KOHYA.get(kind) if format == "kohya" else None
        return None if target is None or (lacks and re.match(lacks, target)) else (target, members)
    if kind == "UNet2DConditionModel" and format == "kohya" and model.config.addition_embed_type is not None:
        target = _sdxl_name(name, model)
        return target and (target, [name])
    pattern = _SAME[format].get(kind)
    return (name, [name]) if pattern and re.match(pattern, name) else None


def _original(name: str, table: dict[str, dict[str, list[str]]]) -> tuple[str, list[str]] | None:
    for prefix, modules in table.items():
        found = re.match(re.escape(prefix).replace(r"\{\}", r"(\d+)"), name)
        for target, members in modules.items() if found else ():
            if name[found.end() :] in members:
                number = found.groups()
                return target.format(*number), [f"{found.group()}{member}" for member in members]
    return None


def _sdxl_name(name: str, unet: nn.Module) -> str | None:
    """Of a module in one of the blocks, which are numbered through there; `None` of others."""
    found = re.match(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|\w+samplers)\.(\d+)\.(.+)", name)
    if found is None:
        return None
    part, kind, rest = found.group(1), found.group(3), found.group(5)
    block, index, depth = int(found.group(2) or 0), int(found.group(4)), unet.config.layers_per_block
    if kind == "resnets":
        inner = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
        rest = (inner | {"conv_shortcut": "skip_connection"}).get(rest)
    place = int(kind == "attentions")
    if part == "mid":
        return rest and f"middle_block.{1 if place else 2 * index}.{rest}"
    if part == "down":
        number = (depth + 1) * (block + 1) if kind == "downsamplers" else 1 + (depth + 1) * block + index
        return rest and f"input_blocks.{number}.{place}.{'op' if kind == 'downsamplers' else rest}"
    if kind == "upsamplers":
        index, place = depth, 2 if hasattr(unet.up_blocks[block], "attentions") else 1
    return rest and f"output_blocks.{(depth + 1) * block + index}.{place}.{rest}"


def _joined(target: str, members: list[str], layers: dict[str, Layer], model: nn.Module) -> Layer:
    """The LoRA of a module that is made of several, of which some may have none: `up` is block-diagonal."""
    parts = [(model.get_submodule(name), layers.get(name)) for name in members]
    if len(parts) == 1:
        layer = parts[0][1]
        if _is_swapped(target, members[0], model):
            layer = Layer(layer.down, torch.cat(layer.up.chunk(2)[::-1]), layer.scale)
        return layer
    present = [layer for _, layer in parts if layer is not None]
    scale = present[0].scale if len({layer.scale for layer in present}) == 1 else 1.0
    up = torch.zeros(sum(module.out_features for module, _ in parts), sum(len(layer.down) for layer in present))
    row = column = 0
    for module, layer in parts:
        if layer is not None:
            place = slice(row, row + module.out_features), slice(column, column + len(layer.down))
            up[place] = layer.up.float() * (layer.scale / scale)
            column += len(layer.down)
        row += module.out_features
    return Layer(torch.cat([layer.down for layer in present]), up, scale)


def _is_swapped(target: str, name: str, model: nn.Module) -> bool:
    """Whether shift stands before scale there, and after it in diffusers."""
    if target == "final_layer.adaLN_modulation.1":
        return True
    block = model.get_submodule(".".join(name.split(".")[:2])) if "context_block.adaLN" in target else None
    return getattr(block, "context_pre_only", False)
