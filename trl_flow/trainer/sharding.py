"""What FSDP2 and DeepSpeed's ZeRO do to the trained weights: which part of them a process has, and their precision."""

import os
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


# ---- A weight: whole, a DTensor (FSDP2), or a flat part with padding (ZeRO-3) ----


def local_part(weight: torch.Tensor) -> torch.Tensor:
    """What this process has of a weight, of which nothing is gathered; what is written into it counts."""
    if isinstance(weight, DTensor):
        return weight.to_local()
    return weight.ds_tensor if hasattr(weight, "ds_tensor") else weight.data


def whole(weight: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """What all processes have in place of a weight, put together. To be called on all processes."""
    if isinstance(weight, DTensor):
        where = weight.device_mesh, weight.placements
        return DTensor.from_local(part, *where, shape=weight.shape, stride=weight.stride()).full_tensor()
    if hasattr(weight, "ds_tensor"):
        parts = [torch.empty_like(part) for _ in range(weight.ds_process_group.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=weight.ds_process_group)
        return torch.cat(parts)[: weight.ds_numel].view(weight.ds_shape)
    return part


def part_of(weight: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Of a whole tensor what this process has in place of a weight. To be called on all processes."""
    tensor = tensor.to(local_part(weight).device)
    if isinstance(weight, DTensor):
        return distribute_tensor(tensor, weight.device_mesh, weight.placements).to_local()
    if hasattr(weight, "ds_tensor"):
        size, rank = weight.ds_tensor.numel(), weight.ds_process_group.rank()
        own = tensor.flatten()[rank * size : (rank + 1) * size]
        return torch.nn.functional.pad(own, (0, size - own.numel()))
    return tensor


def forget_gathered(model: torch.nn.Module, weights: Iterable[torch.nn.Parameter]) -> None:
    """Frees the whole weights that are left of a forward: their parts are read or written next."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for weight in weights:
        if hasattr(weight, "ds_tensor"):
            weight.partition()  # does nothing where nothing is gathered


def is_zero3(accelerator: Accelerator) -> bool:
    plugin = accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


# ---- Setting up ----


def shard_on_cpus(args: TrainingArguments) -> None:
    """With `use_cpu` and a launcher's configuration that shards, accelerate would not shard, and not say so."""
    state = args.distributed_state
    wanted = {
        kind: os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true" for kind in ("FSDP", "DEEPSPEED")
    }
    if state.distributed_type == DistributedType.MULTI_CPU and any(wanted.values()):
        # What accelerate asks for, before it takes FSDP; the device is the CPU already
        state.distributed_type = DistributedType.DEEPSPEED if wanted["DEEPSPEED"] else DistributedType.MULTI_GPU
    if args.deepspeed_plugin is not None:
        _leave_other_models_whole()
        if args.use_cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
            import deepspeed

            # An operator that would be compiled first, with a compiler that may be missing; gloo does without
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def set_precision(accelerator: Accelerator, args: TrainingArguments, *, trains_adapter: bool) -> None:
    """
    Before the model is wrapped: mixed precision under sharding means what it means without, trained weights and their
    gradients in float32, and autocast.

    By default DeepSpeed casts all weights to half precision, an adapter's among them, and saves them so: an update of
    1e-5 to a weight of 1e-2 is then lost in the forward. FSDP2 reduces gradients in half precision, and rounds what
    the model is called with, such as time steps.
    """
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    if (fsdp := getattr(accelerator.state, "fsdp_plugin", None)) is not None:
        if fsdp.fsdp_version != 2:
            raise ValueError("FSDP's first version is not supported. Set fsdp_version: 2 in the accelerate config.")
        # An adapter is float32 beside a base model in half precision, which autocast knows to handle
        gathered = None if trains_adapter else dtype
        fsdp.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    if (deepspeed := accelerator.state.deepspeed_plugin) is not None:
        _leave_other_models_whole()
        config = deepspeed.deepspeed_config
        config["bf16"] = config["fp16"] = {"enabled": False}
        if dtype is not None:
            name = str(dtype).removeprefix("torch.")
            # Of no module are gradients reduced in half precision
            autocast = {"enabled": True, "dtype": name, "lower_precision_safe_modules": []}
            config["torch_autocast"] = autocast
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True


def _leave_other_models_whole() -> None:
    """transformers would split each model that it loads from now on by ZeRO-3: text encoders, rewards."""
    unset_hf_deepspeed_config()
