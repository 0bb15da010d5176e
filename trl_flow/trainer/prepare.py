"""What a pipeline is before it is trained: frozen but for what is trained, which has an adapter or float32 weights."""

import json

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.training_utils import cast_training_params
from peft import PeftConfig

from trl_flow.backbones import Backbone
from trl_flow.backbones.passed_in import modules_of, prepare_for_training
from trl_flow.trainer.attention import set_attention_backend
from trl_flow.trainer.flow_rl_config import FlowRLConfig
from trl_flow.trainer.init_adapter import with_init_adapter
from trl_flow.trainer.lora_targets import with_adapter
from trl_flow.trainer.trl_compat import disable_dropout_in_model


class TrainerConfigDict(FrozenDict):
    """A diffusers config with the methods that reporting callbacks call on a transformers config."""

    def to_dict(self) -> dict:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(self, indent=2, sort_keys=True, default=str)


def prepare_module(backbone: Backbone, args: FlowRLConfig, peft_config: PeftConfig | None) -> torch.nn.Module:
    """Freezes the pipeline, makes its transformer (or U-Net) trainable, and returns what `Trainer` trains. Raises
    `ValueError` if a module has no values or was changed ([`prepare_for_training`]), the trained one has adapters
    already, or `peft_config` names modules that are not there."""
    pipeline = backbone.pipeline
    prepare_for_training(pipeline, backbone.component, trains_adapter=peft_config is not None)
    model = backbone.model
    for module in modules_of(pipeline).values():
        module.requires_grad_(False).eval()
    if args.enable_vae_slicing:
        pipeline.vae.enable_slicing()
    if args.enable_vae_tiling:
        pipeline.vae.enable_tiling()
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"The pipeline's {backbone.component} already has adapters ({', '.join(model.peft_config)}). "
            "Unload them (pipeline.unload_lora_weights()), and pass a peft_config for a new one. To continue training "
            "one, pass the pipeline without it, and its file as init_adapter."
        )
    config = TrainerConfigDict(model.config)
    vars(config).update(vars(model.config))  # diffusers sets some values as attributes only
    model._internal_dict = config
    set_attention_backend(backbone, args.attention_backend)
    if args.gradient_checkpointing:
        # transformers would call a method that diffusers' models do not have
        model.enable_gradient_checkpointing()
        args.gradient_checkpointing = args.activation_checkpointing = False
    if peft_config is None:
        policy = model.requires_grad_(True)
        backbone.dtype = torch.float32  # what is trained is, see below
    elif args.init_adapter is not None:
        policy = with_init_adapter(backbone, args.init_adapter, peft_config)
    else:
        policy = with_adapter(model, peft_config, backbone.lora_target_modules)
    cast_training_params(policy, dtype=torch.float32)
    if args.disable_dropout:
        disable_dropout_in_model(policy)
    return policy
