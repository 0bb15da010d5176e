"""Going on from an adapter: the module that is trained, with the weights of a LoRA file."""

import copy
import json
import os
from pathlib import Path

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from transformers.utils import logging

from trl_flow.backbones import Backbone
from trl_flow.lora import LORA_WEIGHT_NAME, PEFT_FILES, check_lora_config, load_lora
from trl_flow.trainer.flow_rl_config import FlowRLConfig
from trl_flow.trainer.run_state import STATE_NAME


logger = logging.get_logger(__name__)

_PREFIX = "base_model.model."  # of PEFT's names


def adapter_of_its_own(init_adapter: str | None, peft_config: LoraConfig | None) -> LoraConfig | None:
    """With an adapter to start from, a config that leaves everything to it, unless there is one."""
    return LoraConfig(r=None, lora_alpha=None) if init_adapter is not None and peft_config is None else peft_config


def with_init_adapter(backbone: Backbone, path: str | os.PathLike, peft_config: LoraConfig) -> PeftModel:
    """
    Wraps the backbone's model by PEFT, with the weights, ranks, alphas and target modules of a LoRA file.

    Args:
        backbone ([`Backbone`]): its pipeline has no adapters.
        path (`str` or `os.PathLike`): file, folder or hub id; see [`trl_flow.lora.load_lora`].
        peft_config ([`~peft.LoraConfig`]): what it says must be what the file has; `r`, `lora_alpha` and
            `target_modules` may be `None`.

    Raises:
        ValueError: if the file cannot be had, some of it would be lost, or `peft_config` contradicts it.
    """
    pipeline, component, model = backbone.pipeline, backbone.component, backbone.model
    path = os.fspath(path)
    _check_no_full_model(path, component, type(model).__name__)
    try:
        try:
            tensors = load_lora(pipeline, path, component)
            own, layers = copy.deepcopy(getattr(model, "peft_config", {}).get("default")), _layers(model)
        finally:
            pipeline.unload_lora_weights()
        check_lora_config(own or LoraConfig())
    # Files and the Hub fail in many ways: errors of the file's format, of its keys, of the network
    except Exception as error:
        cause = str(error).strip(" .\n") or type(error).__name__
        raise ValueError(
            f"init_adapter {path!r} cannot be trained on in this {type(pipeline).__name__}: {cause}. To resume a run "
            "whose init_adapter is gone, give the checkpoint's folder in its place: it has all that is needed."
        ) from error
    if others := sorted(name for name in tensors if not name.startswith(f"{component}.")):
        raise ValueError(
            f"init_adapter {path!r} has {len(others)} tensors for other parts than the {component}, which are not "
            f"trained and would be missing in what is saved, such as {others[0]}. Fuse these into the base model "
            "(pipeline.load_lora_weights, pipeline.fuse_lora(components=['text_encoder'])), save it, and give a file "
            f"with the {component}'s tensors alone."
        )
    weights = {name.removeprefix(f"{component}."): tensor for name, tensor in tensors.items()}
    policy = get_peft_model(model, _filled(peft_config, own, path))
    _check_agrees(_layers(policy), layers, path)
    weights = {f"{_PREFIX}{name}": tensor for name, tensor in weights.items()}
    set_peft_model_state_dict(policy, weights)
    if different := sorted(weights.keys() ^ get_peft_model_state_dict(policy).keys()):
        raise ValueError(f"init_adapter {path!r} could not be loaded whole: {different[0]} is not in both.")
    return policy


def _check_no_full_model(path: str, component: str, kind: str) -> None:
    files = set(os.listdir(path)) if os.path.isdir(path) else set()
    if SAFETENSORS_WEIGHTS_NAME in files and not files & {LORA_WEIGHT_NAME, PEFT_FILES[0]}:
        instead = f"For full fine-tuning load it as a part of model: {component}={kind}.from_pretrained({path!r})."
        raise ValueError(f"init_adapter {path!r} holds all weights of a model, and no adapter. {instead}")


def _layers(model: torch.nn.Module) -> dict[str, dict[str, object]]:
    """By the name of each layer with a LoRA the fields of a config that decide what it does."""
    return {
        name.removeprefix(_PREFIX): {
            "r": layer.r["default"],
            "lora_alpha": layer.lora_alpha["default"],
            "use_rslora": layer.scaling["default"] != layer.lora_alpha["default"] / layer.r["default"],
            "use_dora": layer.use_dora["default"],
            "lora_bias": layer.lora_bias["default"],
        }
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def _filled(given: LoraConfig, own: LoraConfig, path: str) -> LoraConfig:
    """A config with what is left to the adapter taken from it."""
    if given.init_lora_weights is not True:
        what = f"peft_config has init_lora_weights={given.init_lora_weights!r}"
        raise ValueError(f"{what}, but the weights are those of init_adapter {path!r}. Leave it out.")
    config = copy.deepcopy(given)
    config.task_type = None  # PEFT's task types are for language models
    for name, also in (("r", ["rank_pattern"]), ("lora_alpha", ["alpha_pattern"]), ("target_modules", [])):
        if getattr(given, name) is None:
            for each in (name, *also):
                setattr(config, each, getattr(own, each))
    if given.r is None and given.lora_alpha is None:
        for name in ("use_rslora", "use_dora", "lora_bias"):
            setattr(config, name, getattr(given, name) or getattr(own, name))
    return config


def _check_agrees(layers: dict[str, dict], own: dict[str, dict], path: str) -> None:
    instead = "Leave that out, or peft_config altogether: rank, alpha and target modules are the adapter's."
    if different := sorted(layers.keys() ^ own.keys()):
        has = "have" if different[0] in layers else "lack"
        what = f"{different[0]} (and {len(different) - 1} more), unlike init_adapter {path!r}"
        raise ValueError(f"peft_config's target_modules {has} {what}. {instead}")
    for layer, fields in layers.items():
        if wrong := [name for name in fields if fields[name] != own[layer][name]]:
            said, found = (", ".join(f"{name}={values[name]}" for name in wrong) for values in (fields, own[layer]))
            raise ValueError(f"peft_config has {said} for {layer}, but init_adapter {path!r} has {found}. {instead}")


def check_origin(checkpoint: str | os.PathLike, args: FlowRLConfig) -> None:
    """Raises `ValueError` unless the checkpoint's run began where this one does. The adapter's name becomes that
    of the run: the checkpoint may have been given in its place. Another one is warned of."""
    state = json.loads(Path(checkpoint, STATE_NAME).read_text())["parts"].get("policy", {})
    began, reference = state.get("init_adapter"), state.get("reference")
    if (began is None) != (args.init_adapter is None) or (began is not None and reference != args.reference):
        raise ValueError(
            f"the checkpoint is of a run with init_adapter={began!r} and reference={reference!r}, but this one has "
            f"init_adapter={args.init_adapter!r} and reference={args.reference!r}. Use those of the run; if its file "
            "is gone, the checkpoint's folder serves as init_adapter."
        )
    if args.init_adapter not in (began, os.fspath(checkpoint)) and args.process_index == 0:
        what = f"init_adapter is {args.init_adapter!r}, but the run resumed from {checkpoint} began with {began!r}"
        logger.warning(f"{what}: it keeps its own weights. To start from the other one, start a new run.")
    args.init_adapter = began
