"""What was done to a pipeline before it was passed in: taken back where that changes no image, refused otherwise."""

import torch
from accelerate.utils import extract_model_from_parallel, is_compiled_module
from diffusers import DiffusionPipeline
from diffusers.hooks.group_offloading import (
    _GROUP_OFFLOADING,
    _LAYER_EXECUTION_TRACKER,
    _LAZY_PREFETCH_GROUP_OFFLOADING,
    _get_group_onload_device,
    _is_group_offload_enabled,
)
from diffusers.hooks.layerwise_casting import _is_layerwise_casting_active
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.utils import logging


logger = logging.get_logger(__name__)

# What diffusers' two ways of fusing the query, key and value projections add to an attention
_FUSED = ("to_qkv", "to_kv", "to_added_qkv")
_GROUP_HOOKS = (_GROUP_OFFLOADING, _LAYER_EXECUTION_TRACKER, _LAZY_PREFETCH_GROUP_OFFLOADING)
# Wrappers that hold a part of the weights only
_SHARDING = ("FullyShardedDataParallel", "DeepSpeedEngine")


def modules_of(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The pipeline's modules by their names."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def unwrap(pipeline: DiffusionPipeline, component: str) -> None:
    """
    Gives the pipeline its modules as they were loaded: not compiled, not wrapped (DDP), and the attention of the one
    that is trained, `component`, unfused. Weights are the same, and so are images.

    Raises:
        ValueError: if the trained module is sharded, has an IP-Adapter, or stays fused.
    """
    compiled = []
    for name, module in modules_of(pipeline).items():
        if (kind := type(module).__name__) in _SHARDING:
            raise ValueError(
                f"The pipeline's {name} is a {kind}, whose weights are split over processes. Pass it as it was "
                "loaded: the launcher's configuration shards it (trl-flow train --accelerate_config)."
            )
        own, was_compiled = _unwrapped(module)
        if own is not module:
            setattr(pipeline, name, own)
        if was_compiled:
            compiled.append(name)
    if compiled:
        logger.warning(
            f"The pipeline's {', '.join(compiled)} came from torch.compile, and will run uncompiled: adapters and "
            "saved weights have the names of the module inside. To train compiled, set torch_compile=True."
        )
    model = getattr(pipeline, component)
    _unfuse_projections(model, component)
    if any("IPAdapter" in type(processor).__name__ for processor in _processors(model)):
        raise ValueError(
            f"The pipeline's {component} has an IP-Adapter, which takes an image in addition to the prompt. "
            "This is not supported: call pipeline.unload_ip_adapter() first. An adapter trained without it can "
            "be used together with it afterwards."
        )


def _unwrapped(module: nn.Module) -> tuple[nn.Module, bool]:
    """The module inside, with unwrapped children, and whether any of them was compiled."""
    was_compiled = False
    options = {"keep_fp32_wrapper": False, "keep_torch_compile": False}
    while (inner := extract_model_from_parallel(module, **options)) is not module:
        was_compiled |= hasattr(module, "_orig_mod")
        module = inner
    for part in list(module.modules()):
        for name, child in part.named_children():
            if is_compiled_module(child):
                setattr(part, name, child._orig_mod)
                was_compiled = True
        if part._compiled_call_impl is not None:  # Module.compile(), in place
            part._compiled_call_impl, was_compiled = None, True
        if hasattr(vars(part).get("forward"), "_torchdynamo_orig_callable"):
            # part.forward = torch.compile(part.forward): copies of the module would go on calling this one's
            del part.forward
            was_compiled = True
    return module, was_compiled


def _processors(model: nn.Module) -> list:
    return [module.processor for module in model.modules() if hasattr(module, "processor")]


def _unfuse_projections(model: nn.Module, component: str) -> None:
    fused = [module for module in model.modules() if getattr(module, "fused_projections", False)]
    if not fused:
        return
    model.unfuse_qkv_projections()
    if any(type(processor).__name__.startswith("Fused") for processor in _processors(model)):
        # Fused twice, it has forgotten the processors that it had before
        raise ValueError(
            f"The pipeline's {component} has fused query, key and value projections (fuse_qkv_projections), which "
            "cannot be taken back: an adapter of to_q, to_k and to_v would have no effect. Load the pipeline again, "
            "and do not fuse them."
        )
    for module in fused:
        for name in _FUSED:
            if hasattr(module, name):  # U-Nets and Stable Diffusion 3 keep them, with weights that nobody reads
                delattr(module, name)
        module.fused_projections = False


def check_weights(pipeline: DiffusionPipeline) -> None:
    """Raises `ValueError` if a module has no values, unless it is offloaded: then it gets them when it runs."""
    for name, module in modules_of(pipeline).items():
        if not hasattr(module, "_hf_hook") and any(parameter.is_meta for parameter in module.parameters()):
            raise ValueError(
                f"The pipeline's {name} has weights on the meta device, which hold no values. Pass it as "
                "from_pretrained loads it (without offloading to disk), or its hub id or folder."
            )


def prepare_for_training(pipeline: DiffusionPipeline, component: str, *, trains_adapter: bool) -> None:
    """
    Takes offloading away, which would move the trained weights between two forwards.

    Raises:
        ValueError: for what would make the trained weights useless in a pipeline that is loaded anew.
    """
    unwrap(pipeline, component)  # a backbone may have been made before
    pipeline.remove_all_hooks()
    for name, module in modules_of(pipeline).items():
        for hooked in module.modules():
            registry = getattr(hooked, "_diffusers_hook", None)
            hook = None if registry is None else registry.get_hook(_GROUP_OFFLOADING)
            if hook is not None and getattr(hook.config, "offload_to_disk_path", None):
                raise ValueError(
                    f"The pipeline's {name} is offloaded to disk in groups, and has no weights in memory. Load the "
                    "pipeline again without apply_group_offloading(offload_to_disk_path=...)."
                )
            for kind in _GROUP_HOOKS if registry is not None else ():
                registry.remove_hook(kind, recurse=False)
    check_weights(pipeline)
    model = getattr(pipeline, component)
    changed = {
        "FreeU": (any(getattr(b, "b1", None) is not None for b in getattr(model, "up_blocks", ())), "disable_freeu()"),
        "a cache between steps": (getattr(model, "is_cache_enabled", False), f"{component}.disable_cache()"),
    }
    for what, (is_on, remedy) in changed.items():
        if is_on:
            raise ValueError(
                f"The pipeline's {component} has {what} switched on, with which it computes something else: the "
                f"trained weights would draw other images without it. Switch it off first: pipeline.{remedy}."
            )
    if not trains_adapter and _is_layerwise_casting_active(model):
        raise ValueError(
            f"The pipeline's {component} keeps its weights in a smaller dtype between forwards "
            "(enable_layerwise_casting), in which updates would be lost. Train an adapter (peft_config), or load the "
            "pipeline without it."
        )
    for name, module in modules_of(pipeline).items():
        if name != component and any(isinstance(part, BaseTunerLayer) for part in module.modules()):
            raise ValueError(
                f"The pipeline's {name} has adapters, which would not be saved with what is trained: the {component} "
                "alone is. Take them out: pipeline.unload_lora_weights()."
            )
    if getattr(pipeline, "num_fused_loras", 0) and not getattr(model, "peft_config", None):
        raise ValueError(
            f"A LoRA has been fused into the pipeline's weights ({', '.join(pipeline.fused_loras)}), and what is "
            "trained on them would draw other images on the model that they were loaded from. Make them a model of "
            "their own, pipeline.save_pretrained('folder') and model='folder', or load the pipeline without the LoRA."
        )


def device_of(pipeline: DiffusionPipeline) -> torch.device:
    """Where the pipeline's VAE runs, which of an offloaded one is not where it is."""
    vae = pipeline.vae
    if _is_group_offload_enabled(vae):
        return _get_group_onload_device(vae)
    hooks = [getattr(module, "_hf_hook", None) for module in (vae.modules() if hasattr(vae, "_hf_hook") else ())]
    devices = [getattr(hook, "execution_device", None) for hook in hooks]
    return next((torch.device(device) for device in devices if device is not None), vae.device)
