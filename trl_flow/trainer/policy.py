"""The trained model and all that its forward needs. Autocast, unwrapping, FSDP and DeepSpeed are known here only."""

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from peft import PeftModel, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from trl_flow import sharing
from trl_flow.backbones import Backbone
from trl_flow.trainer.compilation import compiled
from trl_flow.trainer.flow_rl_config import FlowRLConfig
from trl_flow.trainer.loading import is_quantized
from trl_flow.trainer.old_policy import OldPolicy
from trl_flow.trainer.prompt_cache import PromptCache
from trl_flow.trainer.sharding import forget_gathered, is_zero3, local_part, part_of, whole


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Condition:
    """What the model is told besides latents and timestep, for a batch: of the prompts and of the negative prompts
    (`None`: no guidance) tensors `(B, ...)`."""

    positive: dict[str, torch.Tensor]
    negative: dict[str, torch.Tensor] | None
    guidance_scale: float


class Policy:
    """The trained model, its conditions, and the named sets of its weights. `wrapped` gives the module as the trainer
    has wrapped it (DDP, FSDP, DeepSpeed). With `keep_reference`, `at("reference")` can be asked for: an adapter is
    switched off for it, or has the weights that `init_adapter` gave it, as `reference` says; of a model whose weights
    are all trained a frozen copy is made. With `keep_old`, `at("old")` can: a second set of the adapter's weights, or
    a frozen copy. Raises `ValueError` for what cannot be done with sharded weights."""

    def __init__(
        self,
        backbone: Backbone,
        args: FlowRLConfig,
        accelerator: Accelerator,
        wrapped: Callable[[], torch.nn.Module],
        conditions: PromptCache,
        *,
        keep_reference: bool,
        keep_old: bool = False,
    ):
        self.backbone, self.args, self.accelerator, self.conditions = backbone, args, accelerator, conditions
        # All set by the loop: the number of the sampling phase, optimizer steps since, and the trained weights then
        self.generation = self.updates_since_sampling = 0
        self.sampling_weights: list[torch.Tensor] = []
        self._wrapped = wrapped
        self.is_sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self._goes_on = args.init_adapter is not None and args.reference == "initial"
        self._check_sharding()
        for name, module in backbone.pipeline.components.items():
            # The prompt cache moves text encoders whose embeddings are on disk
            elsewhere = module is backbone.model or (name.startswith("text_encoder") and args.precompute_prompt_embeds)
            if isinstance(module, torch.nn.Module) and not elsewhere and not is_quantized(module):
                module.to(accelerator.device)
        is_whole = not self.is_sharded
        copied = keep_reference and not self.is_adapter
        self._reference = copy.deepcopy(self.module).requires_grad_(False).eval() if copied and is_whole else None
        # The weights before training, where they are a reference; of sharded ones there are parts later on
        self._keeps_initial, self._initial = self._goes_on or (copied and self.is_sharded), None
        if self._keeps_initial and is_whole:
            self._initial = self._copies_of(self.local_weights())
        self.old = OldPolicy(self) if keep_old else None
        self.ema = self._new_average() if is_whole else None
        self._num_updates = 0
        self._gradients_checked = False
        self._forced: torch.nn.Module | None = None
        # Whether forwards without gradients run the graph of those with them
        self._one_graph = False

    def _check_sharding(self) -> None:
        if not self.is_sharded:
            return
        ddp = "processes without sharding (--accelerate_config multi_gpu)"
        if is_quantized(self.backbone.model):
            raise ValueError(
                "A quantized model cannot be sharded: its packed weights have a format of their own, which FSDP and "
                f"DeepSpeed do not split. It is small: use {ddp}. Or leave the quantization out."
            )
        if self.args.torch_compile and is_zero3(self.accelerator):
            raise ValueError(
                "torch_compile is on, but under ZeRO-3 torch would trace DeepSpeed's code around each layer, which "
                f"takes minutes and gives no faster model. Set torch_compile=False, or use fsdp2, ZeRO-2 or {ddp}."
            )
        is_zero2 = self.accelerator.distributed_type == DistributedType.DEEPSPEED and not is_zero3(self.accelerator)
        if self.args.diagnostics_steps and not is_zero2:
            raise ValueError(
                "diagnostics_steps measures the gradient of one step, but under FSDP and ZeRO-3 weights are whole "
                "only while a layer is at work, and gradients are at once those of all processes. Leave it out, or "
                f"use {ddp} or ZeRO-2."
            )

    def begin(self) -> None:
        """Takes what is kept of sharded weights as they are: once the model is wrapped, before a checkpoint is loaded.
        To be called on all processes."""
        if not self.is_sharded:
            return
        if self._keeps_initial and self._initial is None:
            self._initial = self._copies_of(self.local_weights())
        self.ema = self._new_average()
        if self.old is not None:
            self.old.weights()

    # ---- The module ----

    @property
    def module(self) -> torch.nn.Module:
        """What is trained, unwrapped: a `PeftModel`, or the transformer (or U-Net) itself."""
        return self.accelerator.unwrap_model(self._wrapped(), keep_torch_compile=False)

    @property
    def is_adapter(self) -> bool:
        return isinstance(self.module, PeftModel)

    @property
    def has_reference(self) -> bool:
        """Whether the reference can still be had when training has begun."""
        return self.is_adapter or self._reference is not None or self._keeps_initial

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
        return self._wrapped() if self.is_sharded else self.accelerator.unwrap_model(self._wrapped())

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
        keeps_grad = torch.is_grad_enabled()
        # Gradients are reduced over processes by the wrapped module
        module = self._wrapped() if keeps_grad else self.sampling_module
        told = condition.positive, condition.negative, condition.guidance_scale
        # Others have autocast in their forward, FSDP2's module has none
        autocast = self.accelerator.autocast() if self.is_sharded else contextlib.nullcontext()
        # torch compiles a forward with gradients to other kernels than one without, which round differently
        with torch.set_grad_enabled(keeps_grad or self._one_graph), autocast:
            prediction = self.backbone.guided_prediction(module, latents, timestep, *told)
        return prediction if keeps_grad else prediction.detach()

    @contextlib.contextmanager
    def compiled(self, on_compile: Callable[[bool], None]) -> Iterator[int]:
        """With `torch_compile` the models run compiled; gives the number of parts that are compiled. `on_compile` is
        told when a compilation begins (`True`) and when it ends."""
        models = [*self.backbone.sampled_models, self._reference, None if self.old is None else self.old.module]
        divided = self.backbone.compiled_parts if self.args.use_regional_compilation else lambda model: [model]
        parts = [part for model in models if model is not None for part in divided(model)]
        # Of other batches there are other graphs, and with gradients they need more memory than an update. FSDP
        # expects a backward pass of every forward with gradients
        same_batches = self.args.trained_batch_size == self.args.per_device_train_batch_size
        self._one_graph = same_batches and not self.is_sharded
        try:
            with compiled(parts, self.args, on_compile):
                yield len(parts)
        finally:
            self._one_graph = False

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
        or, as the config's `reference` says, without any adapter; `"old"`, a policy that follows the trained one
        slowly; `"probe"`, the weights `scale` times as far from those of sampling as they are; and `"trained"`; all
        for forwards without gradients; or `"average"`, the moving average, without `use_ema` the trained weights."""
        if name == "trained":
            with self.sampling():
                yield
        elif name == "old":
            with self.sampling(), self._old_in_place():
                yield
        elif name == "reference":
            with self.sampling(), self._as_reference():
                yield
        elif name == "probe":
            with self.sampling(), self._moved(self.sampling_weights, scale):
                yield
        elif name != "average":
            others = "'trained', 'old', 'reference', 'probe' and 'average'"
            raise ValueError(f"There are no weights called {name!r}, only {others}.")
        elif self.ema is None:
            yield
        else:
            with self._replaced(self.local_weights(), self.ema.shadow_params):
                yield

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[None]:
        if self._keeps_initial:
            # Beside an update's own forward: a second one with gradients would double its memory
            one_graph, self._one_graph = self._one_graph, False
            try:
                # Without the copies training has not begun
                with contextlib.nullcontext() if self._initial is None else self._moved(self._initial, 0.0):
                    yield
            finally:
                self._one_graph = one_graph
            return
        if self._reference is None:
            # PEFT switches gradients off and on for the weights that it finds: it must not be gathered ones
            self._reshard()
            with self.module.disable_adapter():
                try:
                    yield
                finally:
                    self._reshard()
            return
        with self._forcing(self._reference):
            yield

    @contextlib.contextmanager
    def _moved(self, origin: list[torch.Tensor], scale: float) -> Iterator[None]:
        """The trained weights, `scale` times as far from `origin` as they are."""
        own = self.local_weights()
        pairs = zip(own, origin, strict=True)
        moved = (start.to(weights.device, torch.float32).lerp(weights.float(), scale) for weights, start in pairs)
        with self._replaced(own, moved):
            yield

    @contextlib.contextmanager
    def _old_in_place(self) -> Iterator[None]:
        if self.old.module is None:
            with self._replaced(self.local_weights(), self.old.weights()):
                yield
            return
        with self._forcing(self.old.module):
            yield

    @contextlib.contextmanager
    def _forcing(self, module: torch.nn.Module) -> Iterator[None]:
        """A frozen copy in place of the trained model."""
        self._forced = module
        try:
            yield
        finally:
            self._forced = None

    @contextlib.contextmanager
    def _replaced(self, own: list[torch.Tensor], others: Iterable[torch.Tensor]) -> Iterator[None]:
        before = self._copies_of(own)
        try:
            for weights, other in zip(own, others, strict=True):
                weights.copy_(other)
            yield
        finally:
            for weights, kept in zip(own, before, strict=True):
                weights.copy_(kept)
            self._forget_copies()

    # ---- Weights ----

    @torch.no_grad()
    def local_weights(self) -> list[torch.Tensor]:
        """The trained weights, of sharded ones this process's part; what is written into them counts."""
        self._forget_copies()
        return [local_part(p) for p in self.trained_parameters]

    def _forget_copies(self) -> None:
        """Of weights that were written to: autocast's in half precision, and those that have been gathered."""
        torch.clear_autocast_cache()
        self._reshard()

    def _reshard(self) -> None:
        if self.is_sharded:
            forget_gathered(self._wrapped(), self.trained_parameters)

    def gathered(self, name: str, parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of another set of [`local_weights`] whole tensors, as `{name}.{i}`: of sharded ones in the processes that
        save, in the host's memory. To be called on all processes."""
        if not self.is_sharded:
            return {f"{name}.{i}": part for i, part in enumerate(parts)}
        found = {}
        for i, (weight, part) in enumerate(zip(self.trained_parameters, parts, strict=True)):
            tensor = whole(weight, part.to(local_part(weight).device))
            if self.args.should_save:
                found[f"{name}.{i}"] = tensor.to("cpu", copy=True)
        return found

    def parts_of(self, name: str, state: dict[str, Any]) -> list[torch.Tensor]:
        """What this process has of what [`gathered`] gave. To be called on all processes."""
        return [part_of(weight, state[f"{name}.{i}"]) for i, weight in enumerate(self.trained_parameters)]

    def copy_weights(self) -> list[torch.Tensor]:
        """Copies of the trained weights, for `at("probe")`; of sharded ones this process's part."""
        return self._copies_of(self.local_weights())

    def _copies_of(self, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        # An adapter's are few; two more copies of a whole model are for the host's memory. To ask for each weight
        # would unwrap the model each time, which takes longer than the copies
        is_adapter = self.is_adapter
        return [w.clone() if is_adapter else w.to("cpu", copy=True) for w in weights]

    def _new_average(self) -> EMAModel | None:
        return EMAModel(self._averaged_weights(), decay=self.args.ema_decay) if self.args.use_ema else None

    def _averaged_weights(self) -> list[torch.Tensor]:
        # Of those without gradients EMAModel takes no average
        return [weights.detach().requires_grad_() for weights in self.local_weights()]

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
        if not self._gradients_checked:
            self._gradients_checked = True
            self._warn_of_unreached()
        self._num_updates += 1
        if self.ema is not None and self._num_updates % self.args.ema_update_every == 0:
            self.ema.step(self._averaged_weights())

    def _warn_of_unreached(self) -> None:
        """Names the trained parameters that the first update's backward passes have not reached. One whose gradient is
        0, as of a LoRA's first matrix, has been reached."""
        if self.is_sharded or not self.accelerator.is_main_process:
            return  # gradients of shards are kept elsewhere
        trained = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        unreached = [name.removeprefix("base_model.model.") for name, p in trained if p.grad is None]
        if unreached:
            shown = ", ".join(unreached[:4]) + (", …" if len(unreached) > 4 else "")
            logger.warning(
                f"{len(unreached)} of {len(trained)} trained parameters got no gradient in the first update, and stay "
                f"as they are: {shown}. The model's output does not depend on them: other modules stand in for them, "
                "or the model leaves them unused. Name other target_modules, or ignore this if you know of it."
            )

    # ---- Saving ----

    def save(self, folder: str | os.PathLike, *, base_model: str | None, state_dict: dict | None) -> None:
        """Writes the adapter in diffusers' format and in PEFT's, which resuming needs, or the full model; of the
        average, where there is one, but in a folder `checkpoint-...` the trained weights for resuming. `base_model` is
        the pipeline's hub id or folder, `state_dict` that of sharded weights, gathered. To be called on all processes:
        those that should save do."""
        is_checkpoint = Path(folder).name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
        averaged, at_average = state_dict, self.at("average")
        if self.is_sharded:
            averaged, at_average = self._with_average(state_dict), contextlib.nullcontext()
        if not self.args.should_save:
            return
        if not self.is_adapter:
            with contextlib.nullcontext() if is_checkpoint else at_average:
                sharing.save_full(self.module, folder, state_dict=state_dict if is_checkpoint else averaged)
            return
        pipeline_class, component = type(self.backbone.pipeline), self.backbone.component
        common = {"base_model": base_model, "revision": (self.args.model_init_kwargs or {}).get("revision")}
        with at_average:
            sharing.save_lora(pipeline_class, self.module, folder, component=component, state_dict=averaged, **common)
        if is_checkpoint and self.ema is not None:
            sharing.save_adapter(self.module, folder, state_dict=state_dict, **common)

    def _with_average(self, state_dict: dict) -> dict:
        """The gathered weights of a sharded model with the average in place of the trained ones."""
        if self.ema is None:
            return state_dict
        average = self.gathered("average", self.ema.shadow_params)
        names = [name for name, p in self.module.named_parameters() if p.requires_grad]
        return (state_dict or {}) | dict(zip(names, average.values(), strict=False))  # `None` where nothing is saved

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
        """The moving average, the old policy and where training began; the trained weights themselves are the
        trainer's to save. To be called on all processes."""
        state = {"init_adapter": self.args.init_adapter, "reference": self.args.reference}
        if self._goes_on and self._initial is not None:
            state |= self.gathered("initial", self._initial)
        if self.old is not None:
            state |= self.old.state_dict()
        if self.ema is None:
            return state
        average = self.gathered("average", self.ema.shadow_params)
        return state | {"ema_step": self.ema.optimization_step, "num_updates": self._num_updates, **average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what [`state_dict`] gave; of `{}` the average and the old policy begin at the weights as they are."""
        if "initial.0" in state:
            self._initial = self.parts_of("initial", state)
        if self.old is not None:
            self.old.load_state_dict(state)
        self._num_updates = state.get("num_updates", 0)
        if not state and self.is_sharded:
            self.ema = None  # until `begin`
            return
        self.ema = self._new_average()
        if self.ema is not None and "ema_step" in state:
            self.ema.optimization_step = state["ema_step"]
            self.ema.shadow_params = self.parts_of("average", state)
