"""LoRA files, this program's and other tools': read whole, by diffusers' own converters, or refused."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from huggingface_hub import hf_hub_download, model_info
from huggingface_hub.errors import OfflineModeIsEnabled
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trl_flow.lora.diffusers_format import (
    LORA_WEIGHT_NAME,
    PEFT_FILES,
    check_lora_config,
    file_component,
    write_diffusers_file,
)


# Ends of the names of a layer's tensors, as diffusers, PEFT, kohya and others write them
_DOWN = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight", "_lora.down.weight")
_PEFT_PREFIX = "base_model.model."


def find_lora(path: str | os.PathLike) -> Path:
    """The `.safetensors` file of a LoRA: `path` itself, that of a folder, or that of a hub id. `ValueError` if there
    is none, or there are several; errors of the Hub's client are left as they are.

    Example:

    ```pycon
    >>> from peft import LoraConfig, get_peft_model
    >>> from trl_flow.lora import LORA_WEIGHT_NAME, find_lora
    >>> from trl_flow.shapes import load_pipeline
    >>> from trl_flow.sharing import save_lora
    >>> pipeline = load_pipeline()
    >>> model = get_peft_model(pipeline.transformer, LoraConfig(r=4, target_modules=["attn.to_q"]))
    >>> _ = save_lora(type(pipeline), model, "adapter")
    >>> find_lora("adapter").name == LORA_WEIGHT_NAME
    True
    ```
    """
    path = os.fspath(path)
    if os.path.isfile(path):
        if not path.endswith(".safetensors"):
            raise ValueError(f"{path!r} is not a .safetensors file. Files of other formats are not loaded.")
        return Path(path)
    if os.path.isdir(path):
        return Path(path, _chosen(os.listdir(path), path))
    try:
        names = [file.rfilename for file in model_info(path).siblings]
    except OfflineModeIsEnabled:
        names = [LORA_WEIGHT_NAME]
    name = _chosen(names, path)
    if PEFT_FILES[1] in names:
        hf_hub_download(path, PEFT_FILES[1])
    return Path(hf_hub_download(path, name))


def _chosen(names: list[str], path: str) -> str:
    found = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    for name in (LORA_WEIGHT_NAME, PEFT_FILES[0], *(found if len(found) == 1 else ())):
        if name in found:
            return name
    what = f"several: {sorted(found)[:10]}. Name one" if found else f"none, but {sorted(names)[:10]}"
    raise ValueError(f"{path!r} has no {LORA_WEIGHT_NAME}, and of other .safetensors files {what}.")


def adapter_config(path: str | os.PathLike) -> dict[str, Any]:
    """What `adapter_config.json` beside an adapter says, of a hub id too: its base model and that one's revision
    among others. Empty where there is none.

    Example:

    ```pycon
    >>> from peft import LoraConfig, get_peft_model
    >>> from trl_flow.lora import PEFT_FILES, adapter_config
    >>> from trl_flow.shapes import load_pipeline
    >>> from trl_flow.sharing import save_lora
    >>> pipeline = load_pipeline()
    >>> model = get_peft_model(pipeline.transformer, LoraConfig(r=4, target_modules=["attn.to_q"]))
    >>> _ = save_lora(type(pipeline), model, "adapter")
    >>> adapter_config("adapter")["r"], PEFT_FILES[1]
    (4, 'adapter_config.json')
    ```
    """
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / PEFT_FILES[1]
    with suppress(Exception):  # errors of the network, of a hub id that is none
        if not path.exists():
            file = Path(hf_hub_download(os.fspath(path), PEFT_FILES[1]))
    return json.loads(file.read_text()) if file.is_file() else {}


def load_lora(
    pipeline: DiffusionPipeline, path: str | os.PathLike, component: str, adapter_name: str | None = "default"
) -> dict[str, torch.Tensor]:
    """
    Loads a LoRA as the pipeline's own `load_lora_weights` does, and sees that all of it arrives: that leaves out what
    it has no place for, and some alphas that differ from layer to layer.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): without adapters; it has this one afterwards.
        path (`str` or `os.PathLike`): as for [`find_lora`]; in diffusers', PEFT's, kohya's or ComfyUI's form.
        component (`str`): the pipeline's module that is trained, whose names PEFT's form has.
        adapter_name (`str`, *optional*): what it is called in the pipeline; `None`: as diffusers calls it.

    Returns:
        `dict[str, torch.Tensor]`: the tensors as the file has them, but for alphas that are multiplied in, by PEFT's
            names with the component's before them.

    Raises:
        ValueError: if a tensor or an alpha of the file would be lost, or the file changes more than weights.

    Example:

    ```pycon
    >>> from peft import LoraConfig, get_peft_model
    >>> from trl_flow.lora import load_lora
    >>> from trl_flow.shapes import load_pipeline
    >>> from trl_flow.sharing import save_lora
    >>> pipeline = load_pipeline()
    >>> model = get_peft_model(pipeline.transformer, LoraConfig(r=4, target_modules=["attn.to_q"]))
    >>> _ = save_lora(type(pipeline), model, "adapter")
    >>> fresh = load_pipeline()
    >>> tensors = load_lora(fresh, "adapter", "transformer")
    >>> sorted(tensors)[0]
    'transformer.transformer_blocks.0.attn.to_q.lora_A.weight'
    ```
    """
    file = find_lora(path)
    with _readable(file, pipeline, component) as readable:
        tensors = _converted(pipeline, readable, file)
        options = {"adapter_name": adapter_name, "use_safetensors": True} | loading_options(component)
        pipeline.load_lora_weights(str(readable), **options)
    if getattr(getattr(pipeline, component), "_overwritten_params", None):
        raise ValueError(f"{file.name} widens the model's input (a control LoRA), which this pipeline does not fill")
    unet = {name: tensor for name, tensor in tensors.items() if name.startswith("unet.") and ".lora_" not in name}
    tensors = {n: t for n, t in tensors.items() if n not in unet} | convert_unet_state_dict_to_peft(unet)
    if (saved_as := f"{file_component(component)}.") != f"{component}.":
        tensors = {f"{component}.{n.removeprefix(saved_as)}": tensor for n, tensor in tensors.items()}
    layers = dict(lora_layers(pipeline))
    arrived = sum("base_layer" not in name for layer in layers.values() for name in layer.state_dict())
    if arrived != len(tensors):
        others = [name for name in tensors if name.partition(".lora_")[0] not in layers] or list(tensors) or ["none"]
        what = f"only {arrived} of the {len(tensors)} tensors in {file.name} belong to this {type(pipeline).__name__}"
        raise ValueError(f"{what}, not {others[0]}")
    return tensors


def loading_options(component: str) -> dict[str, bool]:
    """With which `load_lora_weights` loads into the pipeline's module `component`."""
    return {"load_into_transformer_2": True} if component == "transformer_2" else {}


def lora_layers(pipeline: DiffusionPipeline) -> Iterator[tuple[str, LoraLayer]]:
    """The layers of a pipeline that have a LoRA, by their names.

    Example:

    ```pycon
    >>> from peft import LoraConfig, get_peft_model
    >>> from trl_flow.lora import load_lora, lora_layers
    >>> from trl_flow.shapes import load_pipeline
    >>> from trl_flow.sharing import save_lora
    >>> pipeline = load_pipeline()
    >>> model = get_peft_model(pipeline.transformer, LoraConfig(r=4, target_modules=["attn.to_q"]))
    >>> _ = save_lora(type(pipeline), model, "adapter")
    >>> fresh = load_pipeline()
    >>> _ = load_lora(fresh, "adapter", "transformer")
    >>> len(dict(lora_layers(fresh))) == len(load_pipeline().transformer.transformer_blocks)  # one `to_q` a block
    True
    ```
    """
    for name, component in sorted(pipeline.components.items()):
        if isinstance(component, torch.nn.Module):
            for layer, module in component.named_modules(prefix=name):
                if isinstance(module, LoraLayer):
                    yield layer, module


@contextmanager
def _readable(file: Path, pipeline: DiffusionPipeline, component: str) -> Iterator[Path]:
    """The file, or where diffusers would not read it, or not rightly, one beside it that says the same."""
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    modules = dict(getattr(pipeline, component).named_modules())
    named = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in tensors.items()}
    is_peft = all(name.startswith(_PEFT_PREFIX) for name in tensors)
    changed = _with_alphas(tensors, component)
    with tempfile.TemporaryDirectory() as folder:
        if is_peft and any(name.partition(".lora_")[0] in modules for name in named):
            config = _peft_config(file)
            yield write_diffusers_file(type(pipeline), Path(folder), config, named, component)
        elif changed is not tensors:
            save_file(changed, Path(folder, file.name), metadata)
            yield Path(folder, file.name)
        else:
            yield file


def _peft_config(file: Path) -> LoraConfig:
    if not (file.parent / PEFT_FILES[1]).is_file():
        raise ValueError(f"{file.name} is in PEFT's form, but {PEFT_FILES[1]}, which has its alpha, is not beside it")
    config = LoraConfig.from_pretrained(str(file.parent))
    check_lora_config(config)
    return config


def _with_alphas(tensors: dict[str, torch.Tensor], component: str) -> dict[str, torch.Tensor]:
    """With alpha / rank multiplied into each layer's down projection, unless diffusers honors alphas itself: in a
    U-Net it does only where all layers have the same, and elsewhere it forgets those of single layers."""
    alphas = {name.removesuffix(".alpha"): alpha for name, alpha in tensors.items() if name.endswith(".alpha")}
    layers = sum(name.endswith(_DOWN) for name in tensors)
    are_same = len(alphas) == layers and len({alpha.item() for alpha in alphas.values()}) == 1
    if not alphas or (component == "unet" and are_same):
        return tensors
    tensors = dict(tensors)
    for layer, alpha in alphas.items():
        for name in (f"{layer}{end}" for end in _DOWN if f"{layer}{end}" in tensors):
            rank = len(tensors[name])
            if alpha != rank:
                tensors[name] = tensors[name].float() * (alpha.item() / rank)
            del tensors[f"{layer}.alpha"]
            if layer.startswith(("lora_transformer_", "lora_unet_blocks_")):  # forms whose converters ask for one
                tensors[f"{layer}.alpha"] = torch.tensor(float(rank))
    return tensors


def _converted(pipeline: DiffusionPipeline, readable: Path, file: Path) -> dict[str, torch.Tensor]:
    """What diffusers makes of a file. Which of its tensors are in that is asked of autograd: converters rename, split
    and scale them, and leave out in silence what they do not know."""
    options = {"unet_config": pipeline.unet.config} if isinstance(pipeline, StableDiffusionXLLoraLoaderMixin) else {}
    leaves = {name: t.requires_grad_(t.is_floating_point()) for name, t in load_file(readable).items()}
    with torch.enable_grad():
        try:
            state = pipeline.lora_state_dict({name: tensor.clone() for name, tensor in leaves.items()}, **options)
        except KeyError as error:  # Wan's, of which diffusers reads adapters of all layers alone
            raise ValueError(f"diffusers' converter of this form needs {error}, which {file.name} lacks.") from error
        state = state[0] if isinstance(state, tuple) else state
        results = [tensor for tensor in state.values() if tensor.requires_grad]
        asked = [name for name, leaf in leaves.items() if leaf.requires_grad]
        ones, own = [torch.ones_like(result) for result in results], [leaves[name] for name in asked]
        found = torch.autograd.grad(results, own, ones, allow_unused=True) if results else [None] * len(asked)
    used = {name for name, gradient in zip(asked, found, strict=True) if gradient is not None}
    # An alpha is read as a number, with its layer
    used |= {name for name in leaves if any(name.replace(".alpha", end) in used for end in _DOWN)}
    if lost := [name for name in leaves if name not in used] + [name for name in state if "lora" not in name]:
        hint = (
            " dora_scale is kohya's and LyCORIS's form of DoRA." if any("dora_scale" in name for name in lost) else ""
        )
        raise ValueError(
            f"diffusers has no place for {len(lost)} of the {len(leaves)} tensors in {file.name}, such as "
            f"{', '.join(sorted(lost)[:3])}: without them it would draw other images.{hint} Merge it into the model "
            "with the tool that it was made with, or have that write a plain LoRA"
        )
    return {name: tensor.detach() for name, tensor in state.items()}
