"""From a pipeline without weights and a plan of the training to bytes on the device."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import torch
from diffusers.training_utils import cast_training_params
from peft import PeftConfig, get_peft_model

from trl_flow.backbones import Backbone, get_backbone
from trl_flow.memory.configs import EmptyModel, empty_model
from trl_flow.memory.dry_run import GPUKernels, checkpoint, peak_bytes
from trl_flow.trainer import FlowGRPOConfig
from trl_flow.trainer.loading import component_dtypes


# What the driver and torch take before the first tensor, and what the allocator can not use of the rest
CONTEXT = 2**29
FRAGMENTATION = 0.05
# Images that the trainer decodes at once
DECODED_AT_ONCE = 16
SHARDINGS = ("none", "gradients", "weights")


@dataclass(frozen=True)
class Plan:
    """
    What of a training run decides on its memory.

    Attributes:
        args ([`FlowGRPOConfig`]): the run's settings.
        peft_config ([`~peft.PeftConfig`] or `None`): the adapter; `None` trains all weights.
        sharding (`str`): `"none"`, `"gradients"` (with the optimizer's state: ZeRO-2) or `"weights"` (all: FSDP,
            ZeRO-3), over the processes of `args`.
        changes (`dict`): fields of `args` with another value, beside `load_in_4bit` and `batch_divisor`; for what-if
            questions.
    """

    args: FlowGRPOConfig
    peft_config: PeftConfig | None
    sharding: str = "none"
    changes: dict = field(default_factory=dict)

    def __getattr__(self, name: str):
        # Of the configuration, unless it is changed
        if name in self.changes:
            return self.changes[name]
        return getattr(self.args, name)

    def changed(self, **changes) -> "Plan":
        return replace(self, changes=self.changes | changes)

    @property
    def batch_size(self) -> int:
        return max(1, self.args.per_device_train_batch_size // self.changes.get("batch_divisor", 1))

    @property
    def half(self) -> torch.dtype | None:
        """Dtype of autocast."""
        return torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None

    @property
    def quantization(self) -> dict | None:
        if self.changes.get("load_in_4bit"):
            return {"load_in_4bit": True}
        return (self.args.model_init_kwargs or {}).get("quantization_config")

    @property
    def trained_steps(self) -> int:
        steps = self.sde_window_size or self.args.num_stochastic_steps
        return max(1, round(self.args.timestep_fraction * steps))


@dataclass(frozen=True)
class Estimate:
    """
    Bytes on one device.

    Attributes:
        parameters (`dict[str, int]`): of each part of the pipeline, exact.
        trained_parameters (`int`): exact.
        resident (`dict[str, int]`): what is there all the time, by what it is.
        phases (`dict[str, int]`): the most that each phase of a step takes beside that.
        allowance (`int`): for the driver and for what the allocator can not use; a rule of thumb.
    """

    parameters: dict[str, int]
    trained_parameters: int
    resident: dict[str, int]
    phases: dict[str, int]
    allowance: int

    @property
    def total(self) -> int:
        return sum(self.resident.values()) + max(self.phases.values()) + self.allowance


def estimate(folder: str | Path, plan: Plan) -> Estimate:
    """
    Estimates the memory on one device of training the pipeline in `folder` as planned.

    Weights, gradients, optimizer state and stored samples are counted exactly; activations by running the modules
    without data, see [`trl_flow.memory.dry_run`].

    Raises:
        ValueError: if the pipeline can not be built from its configuration files, or can not be trained so.
    """
    model = _typed_model(str(folder), tuple(sorted(_dtypes(plan).items(), key=lambda item: item[0])))
    backbone = _backbone(model, plan)
    # Before an adapter is added
    numbers = {name: sum(p.numel() for p in module.parameters()) for name, module in model.modules.items()}
    policy, trained = _policy(backbone, plan)

    shards = plan.args.world_size if plan.sharding != "none" else 1
    weight_shards = shards if plan.sharding == "weights" else 1
    base = _quantized_bytes(backbone.model, plan.quantization) if plan.quantization else _bytes(backbone.model)
    adapter = 0
    if plan.peft_config is not None:
        adapter = 4 * trained
    resident = {f"{backbone.component} weights": base // weight_shards}
    if adapter:
        resident["adapter weights"] = adapter // weight_shards
    resident["gradients"] = 4 * trained // shards
    if plan.args.world_size > 1 and plan.sharding == "none":
        resident["buckets of DDP"] = 4 * trained
    resident[f"optimizer state ({_optimizer_name(plan)})"] = _optimizer_bytes(plan, trained) // shards
    if plan.use_ema:
        resident["moving average"] = 4 * trained
    if plan.beta > 0 and plan.peft_config is None:
        resident["reference model"] = base
    encoders = 0
    for name, module in model.modules.items():
        if name == backbone.component:
            continue
        if name.startswith("text_encoder") and plan.precompute_prompt_embeds:
            encoders += _bytes(module)
        else:
            resident[f"{name} weights"] = _bytes(module)
    resident["stored samples"] = _stored_bytes(backbone, plan)

    phases = {}
    if encoders:
        # Before the model is moved to the device, and before there is anything else
        others = sum(resident.values()) - resident["vae weights"] - (base if plan.quantization else 0)
        phases["encoding the prompts"] = max(0, encoders - others)
    gathered = 2 * _largest_block(backbone.model) if plan.sharding == "weights" else 0
    unpacked = _largest_linear(backbone.model) * 2 if plan.quantization else 0
    sampling, updating = _dry_runs(str(folder), backbone, policy, plan)
    phases["sampling"] = sampling + gathered + unpacked
    phases["decoding"] = _decoding_bytes(backbone, plan)
    phases["updating"] = updating + gathered + unpacked
    used = sum(resident.values()) + max(phases.values())
    return Estimate(
        parameters=numbers,
        trained_parameters=trained,
        resident=resident,
        phases=phases,
        allowance=CONTEXT + int(FRAGMENTATION * used),
    )


# ---- The model ----


def _dtypes(plan: Plan) -> dict[str, torch.dtype]:
    args = copy.copy(plan.args)
    args.model_dtype = plan.model_dtype
    return component_dtypes(args, trains_adapter=plan.peft_config is not None)


@cache
def _empty_model(folder: str) -> EmptyModel:
    return empty_model(folder)


def _typed_model(folder: str, dtypes: tuple[tuple[str, torch.dtype], ...]) -> EmptyModel:
    """The pipeline with its parts in the dtypes in which they are loaded; a copy, to be changed at will."""
    model = copy.deepcopy(_empty_model(folder))
    by_name = dict(dtypes)
    for name, module in model.modules.items():
        dtype = by_name.get(name, by_name.get("default", torch.float32))
        # Both libraries load some modules in float32 all the same; transformers only in place of float16
        kept = getattr(module, "_keep_in_fp32_modules", None) or ()
        is_diffusers = hasattr(module, "register_to_config")
        for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
            keeps = (is_diffusers or dtype == torch.float16) and any(part in kept for part in key.split("."))
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.float32 if keeps else dtype)
    return model


def _backbone(model: EmptyModel, plan: Plan) -> Backbone:
    # It reads the schedule's device from the VAE
    return get_backbone(
        model.pipeline,
        height=plan.height,
        width=plan.width,
        max_sequence_length=plan.max_sequence_length,
    )


def _policy(backbone: Backbone, plan: Plan) -> tuple[torch.nn.Module, int]:
    """What is trained, as the trainer makes it, and the number of its trained parameters."""
    model = backbone.model.requires_grad_(False)
    if plan.gradient_checkpointing:
        model.enable_gradient_checkpointing(partial(checkpoint, half=plan.half))
    if plan.peft_config is None:
        policy = model.requires_grad_(True)
        backbone.dtype = torch.float32
    else:
        peft_config = copy.deepcopy(plan.peft_config)
        peft_config.task_type = None
        if getattr(peft_config, "target_modules", None) is None:
            peft_config.target_modules = list(backbone.lora_target_modules)
        policy = get_peft_model(model, peft_config)
        policy.to("meta")
    cast_training_params(policy, dtype=torch.float32)
    return policy.train(), sum(p.numel() for p in policy.parameters() if p.requires_grad)


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers but for those of an adapter."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return [tensor for name, tensor in named if ".lora_" not in name]


def _bytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in _tensors(module))


def _linear_weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [
        part.weight
        for name, part in module.named_modules()
        if isinstance(part, torch.nn.Linear) and ".lora_" not in name and "lora_" not in name.split(".")[0]
    ]


def _quantized_bytes(module: torch.nn.Module, settings: dict) -> int:
    """
    Bytes with the weights of all `Linear` layers as bitsandbytes keeps them: 4 bits and a float32 scale for each block
    of 64 (nested: 8 bits, and a float32 for 256 of these), or 8 bits and a float32 for each row.
    """
    total = _bytes(module)
    for weight in _linear_weights(module):
        total -= weight.nbytes
        if settings.get("load_in_8bit"):
            total += weight.numel() + 4 * weight.shape[0]
        else:
            blocks = math.ceil(weight.numel() / 64)
            nested = settings.get("bnb_4bit_use_double_quant", False)
            total += math.ceil(weight.numel() / 2) + (blocks + 4 * math.ceil(blocks / 256) if nested else 4 * blocks)
    return total


def _largest_linear(module: torch.nn.Module) -> int:
    return max((weight.numel() for weight in _linear_weights(module)), default=0)


def _largest_block(module: torch.nn.Module) -> int:
    """Bytes of the largest of the blocks that sharded weights are gathered by."""
    lists = [part for part in module.modules() if isinstance(part, torch.nn.ModuleList)]
    return max((_bytes(block) for blocks in lists for block in blocks), default=_bytes(module))


def _optimizer_name(plan: Plan) -> str:
    return str(getattr(plan.optim, "value", plan.optim))


def _optimizer_bytes(plan: Plan, trained: int) -> int:
    """Adam's two moments in the dtype of the trained weights, float32; of the others a rough figure."""
    name = _optimizer_name(plan)
    if "8bit" in name:
        return 2 * trained
    if name.startswith(("sgd", "adafactor", "lion")):
        return 4 * trained if name.startswith("lion") else 0
    return 8 * trained


def _stored_bytes(backbone: Backbone, plan: Plan) -> int:
    """Latents, next latents and means of each trained step and the initial noise of this process's images, float32."""
    images = plan.args.generation_batch_size // plan.args.world_size
    return images * (3 * plan.trained_steps + 1) * math.prod(backbone.latent_shape()) * 4


# ---- Activations ----


def _dry_runs(folder: str, backbone: Backbone, policy: torch.nn.Module, plan: Plan) -> tuple[int, int]:
    """The peaks of a forward without gradients and of one with a backward pass."""
    guided = backbone.uses_guidance(plan.guidance_scale)
    batch = plan.args.per_device_train_batch_size  # of other batch sizes the memory is in proportion
    key = (folder, plan.height, plan.width, plan.max_sequence_length, batch, guided, plan.gradient_checkpointing)
    key += (plan.half, repr(plan.peft_config), backbone.dtype)
    if key not in _DRY_RUNS:
        _DRY_RUNS[key] = (
            peak_bytes(_forward(backbone, policy, batch, guided, backward=False), [policy], plan.half),
            peak_bytes(_forward(backbone, policy, batch, guided, backward=True), [_with_gradients(policy)], plan.half),
        )
    sampling, updating = _DRY_RUNS[key]
    if not plan.backward_per_timestep:
        updating *= plan.trained_steps  # one graph over all of them
    return sampling * plan.batch_size // batch, updating * plan.batch_size // batch


# Of the models of one command
_DRY_RUNS: dict[tuple, tuple[int, int]] = {}


def _with_gradients(policy: torch.nn.Module) -> torch.nn.Module:
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    return policy


def _forward(
    backbone: Backbone, policy: torch.nn.Module, batch: int, guided: bool, *, backward: bool
) -> Callable[[GPUKernels], None]:
    def run(kernels: GPUKernels) -> None:
        condition = _condition(backbone, batch)
        negative = _condition(backbone, batch) if guided else None
        latents = torch.empty(batch, *backbone.latent_shape(), device="meta")
        timestep = torch.empty((), device="meta")
        with torch.set_grad_enabled(backward):
            velocity = backbone.guided_prediction(policy, latents, timestep, condition, negative, 2.0)
            kernels.forget()
            if backward:
                velocity.square().mean().backward()

    return run


def _condition(backbone: Backbone, batch: int) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(batch, *shape, dtype=dtype, device="meta")
        for name, (shape, dtype) in backbone.condition_shapes().items()
    }


def _decoding_bytes(backbone: Backbone, plan: Plan) -> int:
    vae, factor = backbone.pipeline.vae, backbone.pipeline.vae_scale_factor
    if plan.enable_vae_slicing:
        vae.enable_slicing()
    if plan.enable_vae_tiling:
        vae.enable_tiling()
    channels = vae.config.get("latent_channels") or vae.config.get("z_dim")
    frames = [1] if "z_dim" in vae.config else []
    batch = min(plan.batch_size, DECODED_AT_ONCE)
    shape = (batch, channels, *frames, plan.height // factor, plan.width // factor)

    @torch.no_grad()
    def run(kernels: GPUKernels) -> None:
        vae.decode(torch.empty(shape, dtype=vae.dtype, device="meta"), return_dict=False)

    return peak_bytes(run, [vae], None)
