"""From a pipeline without weights, built from its configuration files, and a plan of the training to bytes."""

import copy
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.training_utils import cast_training_params
from huggingface_hub import snapshot_download
from peft import PeftConfig

from trl_flow.backbones import BACKBONES, Backbone, get_backbone
from trl_flow.backbones.base import BACKBONE_SETTINGS
from trl_flow.backbones.model_files import loading_hint
from trl_flow.evaluation.outputs import read_json
from trl_flow.memory.dry_run import GPUKernels, checkpoint, peak_bytes
from trl_flow.trainer import FlowRLConfig
from trl_flow.trainer.checks import check_sampling
from trl_flow.trainer.init_adapter import with_init_adapter
from trl_flow.trainer.loading import component_dtypes
from trl_flow.trainer.lora_targets import with_adapter


INDEX = "model_index.json"
CONTEXT = 2**29  # what the driver and torch take before the first tensor
FRAGMENTATION = 0.05  # what the allocator cannot use of the rest


@dataclass(frozen=True)
class Plan:
    """
    What decides on a training run's memory.

    Attributes:
        args ([`FlowRLConfig`]): the run's settings.
        peft_config ([`~peft.PeftConfig`] or `None`): the adapter; `None` trains all weights.
        sharding (`str`): `"none"`, `"gradients"` (with the optimizer's state: ZeRO-2) or `"weights"` (all: FSDP,
            ZeRO-3), over the processes of `args`.
        dry_runs (`dict`): peaks of activations that were found for this plan and those that were changed from it.

    Example:

    ```pycon
    >>> from peft import LoraConfig
    >>> from trl_flow import GuardConfig
    >>> from trl_flow.memory import Plan
    >>> plan = Plan(GuardConfig("run", bf16=False, use_cpu=True), LoraConfig(r=32))
    >>> plan.changed(gradient_checkpointing=False).args.gradient_checkpointing
    False
    ```
    """

    args: FlowRLConfig
    peft_config: PeftConfig | None
    sharding: str = "none"
    dry_runs: dict = field(default_factory=dict, repr=False, compare=False)

    def changed(self, **fields) -> "Plan":
        """The same with other values of fields of `args`, for what-if questions; `ValueError` if they do not go
        together."""
        if "gradient_checkpointing" in fields and hasattr(self.args, "activation_checkpointing"):
            # transformers' newer name for it, which wins and would keep the old value
            fields["activation_checkpointing"] = fields["gradient_checkpointing"]
        return replace(self, args=replace(self.args, **fields))

    @property
    def half(self) -> torch.dtype | None:
        """Dtype of autocast."""
        return torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None

    @property
    def quantization(self) -> dict | None:
        return (self.args.model_init_kwargs or {}).get("quantization_config")

    @property
    def kept_weights(self) -> dict[str, int]:
        """Sets of the trained weights that are kept on the device besides these."""
        kind = {"half_precision": self.half is not None, "is_adapter": self.peft_config is not None}
        return self.args.kept_weights(**kind)


@dataclass(frozen=True)
class Estimate:
    """
    Bytes on one device.

    Attributes:
        parameters (`dict[str, int]`): of each part of the pipeline, exact.
        trained_parameters (`int`): exact.
        resident (`dict[str, int]`): what is there all the time, by what it is.
        phases (`dict[str, int]`): the most that each phase of a step takes in addition.
        allowance (`int`): for the driver and for what the allocator cannot use; a rule of thumb.

    Example:

    ```pycon
    >>> from trl_flow.memory import GIB, Estimate
    >>> found = Estimate(
    ...     parameters={"transformer": 2 * 10**9}, trained_parameters=10**7, resident={"transformer weights": 4 * GIB},
    ...     phases={"sampling": 12 * GIB, "updating": 20 * GIB}, allowance=GIB,
    ... )
    >>> found.total / GIB  # the largest phase counts
    25.0
    ```
    """

    parameters: dict[str, int]
    trained_parameters: int
    resident: dict[str, int]
    phases: dict[str, int]
    allowance: int

    @property
    def total(self) -> int:
        return sum(self.resident.values()) + max(self.phases.values()) + self.allowance


def estimate(model: str | Path | Backbone, plan: Plan) -> Estimate:
    """
    Estimates the memory on one device of training a model as planned. Weights, gradients, optimizer state and stored
    samples are counted exactly; activations by running the modules without data, see [`trl_flow.memory.dry_run`].

    Args:
        model (`str`, `Path` or [`Backbone`]): folder with a pipeline's configuration files, see
            [`~trl_flow.memory.fetch_configs`]; or a backbone, whose pipeline may be of any class. It is left as it is;
            its size, prompt length and dtypes count instead of the plan's.

    Raises:
        ValueError: if the pipeline cannot be built from its configuration files, or cannot be trained so.

    Example:

    ```pycon
    >>> from peft import LoraConfig
    >>> from trl_flow import GuardConfig
    >>> from trl_flow.memory import GIB, Plan, estimate
    >>> from trl_flow.shapes import pipeline_path
    >>> args = GuardConfig("run", height=64, width=64, max_sequence_length=16, bf16=False, use_cpu=True)
    >>> plan = Plan(args, LoraConfig(r=4))
    >>> found = estimate(pipeline_path(), plan)
    >>> found.trained_parameters, found.total < 2 * GIB
    (17664, True)
    ```
    """
    backbone = _without_data(model) if isinstance(model, Backbone) else _from_configs(str(model), plan)
    modules, base_model = _modules(backbone.pipeline), backbone.model
    numbers = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    base_model.requires_grad_(plan.peft_config is None)
    if plan.peft_config is None:
        cast_training_params(base_model, dtype=torch.float32)
        backbone.dtype = torch.float32
    # Before an adapter is added
    base = _quantized_bytes(base_model, plan.quantization) if plan.quantization else _bytes(base_model.parameters())
    # What is put together or unpacked to be computed with
    whole = 2 * _largest_block(base_model) if plan.sharding == "weights" else 0
    if plan.quantization:
        whole += 2 * max((w.numel() for w in _linear_weights(base_model)), default=0)
    policy = _policy(backbone, plan)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)

    shards = plan.args.world_size if plan.sharding != "none" else 1
    weight_shards = shards if plan.sharding == "weights" else 1
    resident = {f"{backbone.component} weights": base // weight_shards}
    if plan.peft_config is not None:
        resident["adapter weights"] = 4 * trained // weight_shards
    resident["gradients"] = 4 * trained // shards
    if plan.args.world_size > 1 and plan.sharding == "none":
        resident["buckets of DDP"] = 4 * trained
    optimizer = str(getattr(plan.args.optim, "value", plan.args.optim))
    resident[f"optimizer state ({optimizer})"] = _optimizer_bytes(optimizer, trained) // shards
    if plan.args.use_ema:
        resident["moving average"] = 4 * trained
    for name, number in plan.kept_weights.items():
        resident[name] = number * 4 * trained // weight_shards
    if plan.args.init_adapter is not None and plan.args.reference == "initial":
        resident["weights of init_adapter"] = 4 * trained // weight_shards
    if plan.args.beta > 0 and plan.peft_config is None:
        resident["reference model"] = base
    encoders = buffers = 0
    for name, module in modules.items():
        weights, own_buffers = _bytes(module.parameters()), _bytes(module.buffers())
        if name.startswith("text_encoder") and plan.args.precompute_prompt_embeds:
            encoders += weights + own_buffers
            continue
        buffers += own_buffers
        if name != backbone.component:
            resident[f"{name} weights"] = weights
    if buffers:
        resident["buffers"] = buffers
    # With the initial noise, of this process's images, float32
    images = plan.args.generation_batch_size // plan.args.world_size
    resident["stored samples"] = images * (plan.args.num_kept_latents + 1) * math.prod(backbone.latent_shape()) * 4

    phases = {}
    if encoders:
        # Before the model is moved to the device, and before there is anything else
        others = sum(resident.values()) - resident.get("vae weights", 0) - (base if plan.quantization else 0)
        phases["encoding the prompts"] = max(0, encoders - others)
    sampling, updating = _dry_runs(model, backbone, policy, plan)
    decoding = _decoding_bytes(backbone, plan)
    phases |= {"sampling": sampling + whole, "decoding": decoding, "updating": updating + whole}
    used = sum(resident.values()) + max(phases.values())
    return Estimate(numbers, trained, resident, phases, allowance=CONTEXT + int(FRAGMENTATION * used))


# ---- The model ----


def fetch_configs(model: str | os.PathLike, revision: str | None = None, token: str | None = None) -> Path:
    """The folder with the configuration files of a pipeline, `model`, which is a hub id or a folder. Of a model on the
    Hub only these are downloaded; `ValueError` if there is none, it is gated, or the Hub cannot be reached.

    Example:

    ```pycon
    >>> from trl_flow.memory import fetch_configs
    >>> from trl_flow.shapes import pipeline_path
    >>> (fetch_configs(pipeline_path()) / "model_index.json").is_file()
    True
    ```
    """
    folder, name = Path(model), os.fspath(model)
    if folder.is_file():
        raise ValueError(
            f"{name!r} is a file. Give the folder of a diffusers pipeline, or a hub id.{loading_hint(name)}"
        )
    if not folder.is_dir():
        patterns = [INDEX, "*/config.json", "*/scheduler_config.json"]
        try:
            folder = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=patterns))
        except Exception as error:  # without a connection the client raises errors of several libraries
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(
                f"{name!r} is neither a folder nor a hub id, or its configuration files could not be fetched ({reason}"
                "). Check name and network, log in by `hf auth login`, or give a folder that holds the files."
            ) from error
    if not (folder / INDEX).is_file():
        raise ValueError(f"{name!r} is not a diffusers pipeline: it has no {INDEX}.{loading_hint(name)}")
    return folder


def empty_pipeline(folder: str | os.PathLike) -> DiffusionPipeline:
    """
    Builds a pipeline on the meta device, where modules have shapes and dtypes but no data, from a folder with
    `model_index.json`, and `config.json` in a folder for each part. It has no tokenizers. `ValueError` if a file is
    missing or unfit, or the pipeline is not a supported one of diffusers.

    Example:

    ```pycon
    >>> from trl_flow.memory import empty_pipeline
    >>> from trl_flow.shapes import pipeline_path
    >>> pipeline = empty_pipeline(pipeline_path())
    >>> pipeline.transformer.device.type
    'meta'
    ```
    """
    index = read_json(Path(folder, INDEX))
    class_name = index.get("_class_name")
    if class_name not in BACKBONES:
        raise ValueError(
            f"{class_name} is not supported. Supported pipelines: {', '.join(sorted(BACKBONES))}. For a pipeline with "
            "a backbone of your own, estimate from the backbone: trl_flow.memory.estimate(backbone, plan)."
        )
    pipeline_class = getattr(diffusers, class_name)
    arguments = {
        name: None if parameter.default is parameter.empty else parameter.default
        for name, parameter in signature(pipeline_class).parameters.items()
    }
    for name, value in index.items():
        if name in arguments:
            arguments[name] = _part(Path(folder, name), *value) if isinstance(value, list) else value
    if (checker := arguments.get("safety_checker")) is None:
        return pipeline_class(**arguments)
    # Which the pipeline takes only together with its feature extractor
    pipeline = pipeline_class(**arguments | {"safety_checker": None, "requires_safety_checker": False})
    pipeline.register_modules(safety_checker=checker)
    return pipeline


def _part(folder: Path, library: str | None, class_name: str | None) -> Any:
    """A scheduler, or a module on the meta device; `None` for what has no weights (tokenizers, processors)."""
    if library is None:
        return None
    libraries = {"diffusers": diffusers, "transformers": transformers}
    # Or one of the classes that live beside a pipeline
    cls = getattr(libraries.get(library) or getattr(diffusers.pipelines, library, None), class_name, None)
    if cls is None and (folder / "config.json").is_file():
        what = f"a {class_name} of {library}, which the installed libraries do not have"
        raise ValueError(f"{folder} is {what}. Install a newer diffusers or transformers.")
    if cls is None or not issubclass(cls, (SchedulerMixin, torch.nn.Module)):
        return None
    if issubclass(cls, SchedulerMixin):
        return cls.from_config(read_json(folder / "scheduler_config.json"))
    config, is_diffusers = read_json(folder / "config.json"), issubclass(cls, ModelMixin)
    try:
        with torch.device("meta"):
            module = cls.from_config(config) if is_diffusers else cls(cls.config_class.from_dict(config))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} does not make a {class_name}: {error}.") from error
    return module.to("meta").eval()  # what is computed with numpy comes into being on the CPU


_empty_pipeline = cache(empty_pipeline)


def _modules(pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def _from_configs(folder: str, plan: Plan) -> Backbone:
    """The backbone of a pipeline without data, with its parts in the dtypes in which they are loaded."""
    args, pipeline = plan.args, copy.deepcopy(_empty_pipeline(folder))
    dtypes = component_dtypes(args, trains_adapter=plan.peft_config is not None)
    for name, module in _modules(pipeline).items():
        dtype = dtypes.get(name, dtypes.get("default", torch.float32))
        # Both libraries load some modules in float32 all the same; transformers only in place of float16
        kept = getattr(module, "_keep_in_fp32_modules", None) or ()
        is_diffusers = hasattr(module, "register_to_config")
        for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
            keeps = (is_diffusers or dtype == torch.float16) and any(part in kept for part in key.split("."))
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.float32 if keeps else dtype)
    backbone = get_backbone(pipeline, **{name: getattr(args, name) for name in BACKBONE_SETTINGS})
    check_sampling(backbone, args)
    return backbone


def _without_data(backbone: Backbone) -> Backbone:
    """A copy whose modules have shapes and dtypes but no data; tokenizers and the like are those of `backbone`."""
    memo = {id(part): part for part in backbone.pipeline.components.values()}
    for module in _modules(backbone.pipeline).values():
        memo.pop(id(module), None)
        for tensor in module.buffers():
            memo[id(tensor)] = torch.empty_like(tensor, device="meta")
        for tensor in module.parameters():
            memo[id(tensor)] = torch.nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)
    return copy.deepcopy(backbone, memo)


def _policy(backbone: Backbone, plan: Plan) -> torch.nn.Module:
    """What is trained, as the trainer makes it."""
    policy = backbone.model
    if plan.args.gradient_checkpointing:
        policy.enable_gradient_checkpointing(partial(checkpoint, half=plan.half))
    if plan.args.init_adapter is not None:
        policy = with_init_adapter(backbone, plan.args.init_adapter, plan.peft_config).to("meta")
        cast_training_params(policy, dtype=torch.float32)
    elif plan.peft_config is not None:
        policy = with_adapter(policy, plan.peft_config, backbone.lora_target_modules).to("meta")
        cast_training_params(policy, dtype=torch.float32)
    return policy.train()


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _linear_weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [part.weight for part in module.modules() if isinstance(part, torch.nn.Linear)]


def _quantized_bytes(module: torch.nn.Module, settings: dict) -> int:
    """Bytes with the weights of all `Linear` layers as bitsandbytes keeps them: 4 bits and a float32 scale for each
    block of 64 (nested: 8 bits, and a float32 for 256 of these), or 8 bits and a float32 for each row."""
    total = _bytes(module.parameters())
    for weight in _linear_weights(module):
        number, blocks = weight.numel(), math.ceil(weight.numel() / 64)
        if settings.get("load_in_8bit"):
            quantized = number + 4 * weight.shape[0]
        else:
            nested = settings.get("bnb_4bit_use_double_quant", False)
            quantized = math.ceil(number / 2) + (blocks + 4 * math.ceil(blocks / 256) if nested else 4 * blocks)
        total += quantized - weight.nbytes
    return total


def _largest_block(module: torch.nn.Module) -> int:
    """Bytes of the largest of the blocks that sharded weights are gathered by."""
    lists = [part for part in module.modules() if isinstance(part, torch.nn.ModuleList)]
    blocks = [block for blocks in lists for block in blocks] or [module]
    return max(_bytes(block.parameters()) for block in blocks)


def _optimizer_bytes(name: str, trained: int) -> int:
    """Adam's two moments in the dtype of the trained weights, float32; of the others a rough figure."""
    if "8bit" in name:
        return 2 * trained
    return (0 if name.startswith(("sgd", "adafactor")) else 4 if name.startswith("lion") else 8) * trained


# ---- Activations ----


def _dry_runs(
    model: str | Path | Backbone, backbone: Backbone, policy: torch.nn.Module, plan: Plan
) -> tuple[int, int]:
    """The peaks of a forward without gradients and of one with a backward pass."""
    batch, empty = plan.args.per_device_train_batch_size, partial(torch.empty, device="meta")

    def condition() -> dict[str, torch.Tensor]:
        shapes = backbone.condition_shapes().items()
        return {name: empty(batch, *shape, dtype=dtype) for name, (shape, dtype) in shapes}

    def run(kernels: GPUKernels, backward: bool) -> None:
        positive = condition()
        negative = condition() if backbone.uses_guidance(plan.args.guidance_scale) else None
        latents = empty(batch, *backbone.latent_shape())
        with torch.set_grad_enabled(backward):
            prediction = backbone.guided_prediction(policy, latents, empty(()), positive, negative, 2.0)
            kernels.forget()
            if backward:
                prediction.square().mean().backward()

    key = (model, plan.args.gradient_checkpointing, plan.args.guidance_scale, backbone.dtype, repr(plan.peft_config))
    if key not in plan.dry_runs:
        sampling = peak_bytes(partial(run, backward=False), [policy], plan.half)
        for parameter in policy.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        plan.dry_runs[key] = batch, sampling, peak_bytes(partial(run, backward=True), [policy], plan.half)
    ran, sampling, updating = plan.dry_runs[key]
    # Of other batch sizes the memory is in proportion
    return sampling * batch // ran, updating * plan.args.trained_batch_size // ran


def _decoding_bytes(backbone: Backbone, plan: Plan) -> int:
    vae = getattr(backbone.pipeline, "vae", None)
    if plan.args.enable_vae_slicing:
        vae.enable_slicing()
    if plan.args.enable_vae_tiling:
        vae.enable_tiling()
    latents_shape = (min(plan.args.per_device_train_batch_size, backbone.decoded_at_once), *backbone.latent_shape())

    @torch.no_grad()
    def run(kernels: GPUKernels) -> None:
        try:
            backbone.decode(torch.empty(latents_shape, device="meta"))
        except NotImplementedError as error:
            # Finished images leave the device, which those without data cannot
            if "Cannot copy out of meta tensor" not in str(error):
                raise

    return peak_bytes(run, [] if vae is None else [vae], None)
