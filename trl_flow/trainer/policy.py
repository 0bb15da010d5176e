"""The trained model and all that its forward needs. Autocast, unwrapping, FSDP and DeepSpeed are known here only."""

import contextlib
import copy
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.configuration_utils import FrozenDict
from diffusers.training_utils import EMAModel, cast_training_params
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_flow import sharing
from trl_flow.backbones import Backbone
from trl_flow.trainer.flow_rl_config import FlowRLConfig
from trl_flow.trainer.init_adapter import check_origin, with_adapter
from trl_flow.trainer.loading import is_quantized
from trl_flow.trainer.prompt_cache import PromptCache
from trl_flow.trainer.trl_compat import disable_dropout_in_model


class TrainerConfigDict(FrozenDict):
    """A diffusers config with the methods that reporting callbacks call on a transformers config."""

    def to_dict(self) -> dict:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(self, indent=2, sort_keys=True, default=str)


@dataclass(frozen=True)
class Condition:
    """What the model is told besides latents and timestep, for a batch: of the prompts and of the negative prompts
    (`None`: no guidance) tensors `(B, ...)`."""

    positive: dict[str, torch.Tensor]
    negative: dict[str, torch.Tensor] | None
    guidance_scale: float


def prepare_module(backbone: Backbone, args: FlowRLConfig, peft_config: PeftConfig | None) -> torch.nn.Module:
    """Freezes the pipeline, makes its transformer (or U-Net) trainable, and returns what `Trainer` trains. Raises
    `ValueError` if a module has no values, or the trained one has adapters already."""
    pipeline, model = backbone.pipeline, backbone.model
    pipeline.remove_all_hooks()  # offloading would take the trained weights away between two forwards
    for name, module in pipeline.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        if any(p.is_meta for p in module.parameters()):
            what = f"The pipeline's {name} has weights on the meta device, which hold no values"
            raise ValueError(f"{what}. Pass it as from_pretrained loads it, or its hub id or folder.")
        module.requires_grad_(False).eval()
    if args.enable_vae_slicing:
        pipeline.vae.enable_slicing()
    if args.enable_vae_tiling:
        pipeline.vae.enable_tiling()
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"The pipeline's {backbone.component} already has adapters ({', '.join(model.peft_config)}). Fuse "
            "and unload them (pipeline.fuse_lora(), unload_lora_weights()), and pass a peft_config for a new one. "
            "To go on training one, pass the pipeline without it, and its file as init_adapter."
        )
    model._internal_dict = TrainerConfigDict(model.config)
    if args.gradient_checkpointing:
        # transformers would call a method that diffusers' models do not have
        model.enable_gradient_checkpointing()
        args.gradient_checkpointing = args.activation_checkpointing = False
    if peft_config is None:
        policy = model.requires_grad_(True)
        backbone.dtype = torch.float32  # what is trained is, see below
    elif args.init_adapter is not None:
        policy = with_adapter(backbone, args.init_adapter, peft_config)
    else:
        peft_config = copy.deepcopy(peft_config)
        peft_config.task_type = None  # PEFT's task types are for language models
        if getattr(peft_config, "target_modules", None) is None:
            peft_config.target_modules = list(backbone.lora_target_modules)
        policy = get_peft_model(model, peft_config)
    cast_training_params(policy, dtype=torch.float32)
    if args.disable_dropout:
        disable_dropout_in_model(policy)
    return policy


class Policy:
    """The trained model, its conditions, and the named sets of its weights. `wrapped` gives the module as the trainer
    has wrapped it (DDP, FSDP, DeepSpeed). With `keep_reference`, `at("reference")` can be asked for: an adapter is
    switched off for it, or has the weights that `init_adapter` gave it, as `reference` says; of a model whose weights
    are all trained a frozen copy is made. Raises `ValueError` for what
    cannot be done with sharded weights."""

    def __init__(
        self,
        backbone: Backbone,
        args: FlowRLConfig,
        accelerator: Accelerator,
        wrapped: Callable[[], torch.nn.Module],
        conditions: PromptCache,
        *,
        keep_reference: bool,
    ):
        self.backbone, self.args, self.accelerator, self.conditions = backbone, args, accelerator, conditions
        # All set by the loop: the number of the sampling phase, optimizer steps since, and the trained weights then
        self.generation = self.updates_since_sampling = 0
        self.sampling_weights: list[torch.Tensor] = []
        self._wrapped = wrapped
        self.is_sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        copied = keep_reference and not self.is_adapter
        self._goes_on = args.init_adapter is not None and args.reference == "initial"
        not_sharded = {"use_ema": args.use_ema, "diagnostics_steps": args.diagnostics_steps}
        not_sharded |= {"a quantized model": is_quantized(backbone.model), "beta > 0 with full fine-tuning": copied}
        not_sharded |= {"beta > 0 with init_adapter and reference='initial'": keep_reference and self._goes_on}
        for name, used in not_sharded.items():
            if used and self.is_sharded:
                instead = "Leave it out, or use processes without sharding (--accelerate_config multi_gpu)."
                raise ValueError(f"{name} is not supported with FSDP or DeepSpeed, which shard the weights. {instead}")
        for name, module in backbone.pipeline.components.items():
            # The prompt cache moves text encoders whose embeddings are on disk
            elsewhere = module is backbone.model or (name.startswith("text_encoder") and args.precompute_prompt_embeds)
            if isinstance(module, torch.nn.Module) and not elsewhere and not is_quantized(module):
                module.to(accelerator.device)
        self._reference = copy.deepcopy(self.module).requires_grad_(False).eval() if copied else None
        # An adapter's weights before training, where they are a reference
        self._initial = self._copies_of(self._local_weights()) if self._goes_on and not self.is_sharded else None
        self.ema = EMAModel(self.trained_parameters, decay=args.ema_decay) if args.use_ema else None
        self._num_updates = 0
        self._forced: torch.nn.Module | None = None

    # ---- The module ----

    @property
    def module(self) -> torch.nn.Module:
        """What is trained, unwrapped: a `PeftModel`, or the transformer (or U-Net) itself."""
        return self.accelerator.unwrap_model(self._wrapped())

    @property
    def is_adapter(self) -> bool:
        return isinstance(self.module, PeftModel)

    @property
    def has_reference(self) -> bool:
        """Whether the reference can still be had when training has begun."""
        if self._goes_on:
            return self._initial is not None
        return self.is_adapter or self._reference is not None

    @property
    def starts_at_reference(self) -> bool:
        return self.args.init_adapter is None or self._goes_on

    @property
    def trained_parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]

    @property
    def sampling_module(self) -> torch.nn.Module:
        """What forwards without gradients run. Sharded weights are only whole inside the wrapped forward."""
        if self._forced is not None:
            return self._forced
        return self._wrapped() if self.is_sharded else self.module

    # ---- Forwards ----

    def condition(
        self, prompts: list[str], images: list[Image.Image] | None = None, guidance_scale: float | None = None
    ) -> Condition:
        """The condition of `B` prompts, and of the images to be edited; `guidance_scale` defaults to training's."""
        scale = self.args.guidance_scale if guidance_scale is None else guidance_scale
        negative = None
        if self.backbone.uses_guidance(scale):
            negative = self.conditions([self.args.negative_prompt or ""] * len(prompts), images)
        return Condition(self.conditions(prompts, images), negative, scale)

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The prediction for latents `(B, ...)` at a value of the schedule's `timesteps`, guidance included: the
        velocity of flow models, noise or `v` of U-Nets, float32, `(B, ...)`."""
        # Gradients are reduced over processes by the wrapped module
        module = self._wrapped() if torch.is_grad_enabled() else self.sampling_module
        told = condition.positive, condition.negative, condition.guidance_scale
        return self.backbone.guided_prediction(module, latents, timestep, *told)

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """For forwards without gradients, in the precision of training."""
        with torch.no_grad(), self.accelerator.autocast():
            yield

    @contextlib.contextmanager
    def evaluating(self, *, base: bool = False) -> Iterator[None]:
        """Evaluation mode, without gradients, with the averaged weights, or with `base` those of the reference.
        Autocast is left to [`sampling`]: rewards and decoding have a precision of their own."""
        was_training = self.module.training
        self.module.eval()
        weights = self._as_reference() if base and self.has_reference else self.at("average")
        try:
            with torch.no_grad(), weights:
                yield
        finally:
            self.module.train(was_training)

    @contextlib.contextmanager
    def at(self, name: str, scale: float = 1.0) -> Iterator[None]:
        """Another set of the weights in place of the trained ones: `"reference"`, the model as it was before training
        or, as the config's `reference` says, without any adapter; `"probe"`, the weights `scale` times as far from
        those of sampling as they are; both for forwards without gradients; or `"average"`, the moving average, without
        `use_ema` the trained weights."""
        if name == "reference":
            with self.sampling(), self._as_reference():
                yield
        elif name == "probe":
            with self.sampling(), self._moved(self.sampling_weights, scale):
                yield
        elif name != "average":
            raise ValueError(f"There are no weights called {name!r}, only 'reference', 'probe' and 'average'.")
        elif self.ema is None:
            yield
        else:
            parameters = self.trained_parameters
            self.ema.store(parameters)
            self.ema.copy_to(parameters)
            try:
                yield
            finally:
                self.ema.restore(parameters)

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[None]:
        self._forced = self._reference
        try:
            if self._initial is not None:
                weights = self._moved(self._initial, 0.0)
            else:
                weights = self.module.disable_adapter() if self._forced is None else contextlib.nullcontext()
            with weights:
                yield
        finally:
            self._forced = None

    @contextlib.contextmanager
    def _moved(self, origin: list[torch.Tensor], scale: float) -> Iterator[None]:
        """The trained weights, `scale` times as far from `origin` as they are."""
        own = self._local_weights()
        before = self._copies_of(own)
        try:
            for weights, start in zip(own, origin, strict=True):
                weights.copy_(start.to(weights.device, torch.float32).lerp(weights.float(), scale))
            yield
        finally:
            for weights, kept in zip(own, before, strict=True):
                weights.copy_(kept)
            self._forget_copies()

    @torch.no_grad()
    def _local_weights(self) -> list[torch.Tensor]:
        """The trained weights, of sharded ones this process's part; what is written into them counts."""
        self._forget_copies()  # FSDP's gathered weights would stand in their place
        return [p.to_local() if isinstance(p, DTensor) else p.data for p in self.trained_parameters]

    def _forget_copies(self) -> None:
        """Of weights that were written to: autocast's in half precision, and those that FSDP has gathered."""
        torch.clear_autocast_cache()
        for module in self._wrapped().modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def copy_weights(self) -> list[torch.Tensor]:
        """Copies of the trained weights, for `at("probe")`. Raises `ValueError` where no process has them whole."""
        if self._is_split:
            raise ValueError(
                "The ratio's probe moves all trained weights, which DeepSpeed's ZeRO-3 splits over processes. Set "
                "ratio_probe=0, or use ZeRO-2 or FSDP2."
            )
        return self._copies_of(self._local_weights())

    def _copies_of(self, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        # An adapter's are few; two more copies of a whole model are for the host's memory. To ask for each weight
        # would unwrap the model each time, which takes longer than the copies
        is_adapter = self.is_adapter
        return [w.clone() if is_adapter else w.to("cpu", copy=True) for w in weights]

    @property
    def _is_split(self) -> bool:
        plugin = self.accelerator.state.deepspeed_plugin
        return plugin is not None and plugin.zero_stage == 3

    @property
    def can_probe(self) -> bool:
        """Whether `at("probe")` costs little: for an adapter, whose weights are few, that is not split."""
        return self.is_adapter and self.can_measure

    @property
    def can_measure(self) -> bool:
        """Whether `at("probe")` can be asked for."""
        return not self._is_split

    # ---- Updates ----

    @contextlib.contextmanager
    def deferred_sync(self, *, defer: bool) -> Iterator[None]:
        """Holds back the gradients' reduction over processes. The forward belongs inside: DDP prepares it there."""
        if not defer:
            yield
        elif self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            # DeepSpeed's engine steps after each backward pass that it takes for the last
            state = self.accelerator.gradient_state
            sync = state.sync_gradients
            state._set_sync_gradients(False)
            try:
                yield
            finally:
                state._set_sync_gradients(sync)
        else:
            with self.accelerator.no_sync(self._wrapped()):
                yield

    def backward(self, loss: torch.Tensor) -> None:
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if is_deepspeed else {}))

    def gradient_norm(self, loss: torch.Tensor) -> float:
        """Norm of the gradient of `loss` in this process. What has been accumulated is neither read nor changed."""
        gradients = torch.autograd.grad(loss, self.trained_parameters, retain_graph=True, allow_unused=True)
        return torch.stack([g.square().sum() for g in gradients if g is not None]).sum().sqrt().item()

    def after_update(self) -> None:
        self._num_updates += 1
        if self.ema is not None and self._num_updates % self.args.ema_update_every == 0:
            self.ema.step(self.trained_parameters)

    # ---- Saving ----

    def save(self, folder: str | os.PathLike, *, base_model: str | None, state_dict: dict | None) -> None:
        """Writes the adapter in diffusers' format and in PEFT's, which resuming needs, or the full model; of the
        average, where there is one, but in a folder `checkpoint-...` the trained weights for resuming. `base_model` is
        the pipeline's hub id or folder, `state_dict` that of sharded weights, gathered."""
        is_checkpoint = Path(folder).name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
        if not self.is_adapter:
            with contextlib.nullcontext() if is_checkpoint else self.at("average"):
                sharing.save_full(self.module, folder, state_dict=state_dict)
            return
        pipeline_class, component = type(self.backbone.pipeline), self.backbone.component
        revision = (self.args.model_init_kwargs or {}).get("revision")
        common = {"state_dict": state_dict, "base_model": base_model, "revision": revision}
        with self.at("average"):
            sharing.save_lora(pipeline_class, self.module, folder, component=component, **common)
        if is_checkpoint and self.ema is not None:
            sharing.save_adapter(self.module, folder, **common)

    def load(self, checkpoint: str) -> None:
        """Takes a checkpoint's weights; `ValueError` if it holds no adapter where one is trained, or another one."""
        if not self.is_adapter:
            sharing.load_full(self.module, checkpoint)
            return
        # Into the adapter that is there: PEFT's load_adapter would add a second one with a config of its own
        path = Path(checkpoint, "adapter_model.safetensors")
        if not path.is_file():
            instead = "Resume without a peft_config, or from a checkpoint of an adapter."
            raise ValueError(f"{checkpoint!r} holds no adapter, but the trainer trains one. {instead}")
        try:
            set_peft_model_state_dict(self.module, load_file(path))
        except RuntimeError as error:
            what = f"The adapter in {checkpoint!r} does not fit the trainer's: another rank or other target modules."
            raise ValueError(f"{what} Resume with its own peft_config (adapter_config.json there).") from error

    # ---- State ----

    def state_dict(self) -> dict[str, Any]:
        """The moving average, and where training began; the trained weights themselves are the trainer's to save."""
        origin = {"init_adapter": self.args.init_adapter, "reference": self.args.reference}
        origin |= {f"initial.{i}": weights for i, weights in enumerate(self._initial or [])}
        if self.ema is None:
            return origin
        average = {f"average.{i}": parameter for i, parameter in enumerate(self.ema.shadow_params)}
        return origin | {"ema_step": self.ema.optimization_step, "num_updates": self._num_updates, **average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what [`state_dict`] gave; of `{}` the average begins at the weights as they are. `ValueError` if the
        run had another reference."""
        if state:
            check_origin(state, self.args)
        if state and self._initial is not None:
            self._initial = [state[f"initial.{i}"].to(weights.device) for i, weights in enumerate(self._initial)]
        self._num_updates = state.get("num_updates", 0)
        if self.ema is None:
            return
        self.ema = EMAModel(self.trained_parameters, decay=self.args.ema_decay)
        if "ema_step" in state:
            averages = [state[f"average.{i}"].to(self.accelerator.device) for i in range(len(self.ema.shadow_params))]
            self.ema.optimization_step, self.ema.shadow_params = state["ema_step"], averages
