"""[`FlowRLConfig`]: what every algorithm needs. Those of the algorithms are beside it."""

import contextlib
import json
import math
import os
from dataclasses import dataclass
from fractions import Fraction
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers.utils import is_torch_bf16_gpu_available

from trl_flow.descriptions import described
from trl_flow.images import Frame
from trl_flow.trainer.compilation import check_compile_fields
from trl_flow.trainer.sharding import shard_on_cpus
from trl_flow.trainer.trl_compat import _BaseConfig


# Schedules that lower the learning rate when a metric of the evaluations stops improving
WATCHING_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


class Derived:
    """Marks a field's value that follows from other fields: a copy with `dataclasses.replace` derives it anew."""


class _DerivedInt(Derived, int): ...


class _DerivedStr(Derived, str): ...


class _DerivedList(Derived, list): ...


def derived(value: int | str | list) -> Any:
    """`value`, marked as [`Derived`] and otherwise the same."""
    return {int: _DerivedInt, str: _DerivedStr, list: _DerivedList}[type(value)](value)


@described
@dataclass
class FlowRLConfig(_BaseConfig):
    r"""
    Configuration of [`FlowRLTrainer`]: model, memory, data, sampling, rewards, advantages and logging.

    All of [`~transformers.TrainingArguments`] can be set. Other defaults: `learning_rate` 3e-4, `lr_scheduler_type`
    `"constant"`, `weight_decay` 1e-4, `max_grad_norm` 1.0 (Flow-GRPO's published settings for LoRA), `bf16` `True` on
    GPUs that have it and `False` elsewhere, and `remove_unused_columns` (other columns reach the rewards),
    `ddp_find_unused_parameters` and `dataloader_pin_memory` are off. `metric_for_best_model` is `"reward"`, also for
    the schedules that watch evaluations (`"reduce_lr_on_plateau"`, `"greedy"`), for which rising is better.

    Parameters:
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~diffusers.DiffusionPipeline.from_pretrained`], where `model` is a string. By
            default the frozen parts are loaded in the dtype that is trained in (`bf16`, `fp16`), the VAE and a fully
            trained transformer in float32. `{"dtype": ...}` decides for all parts, or for each with a dictionary.
        init_adapter (`str`, *optional*):
            LoRA to start from: a folder, a `.safetensors` file or a hub id, in diffusers', PEFT's or kohya's form.
            Rank, alpha and target modules come from it; a `peft_config` that contradicts it is refused.
        reference (`str`, *optional*, defaults to `"initial"`):
            What the KL of `beta` pulls back to, and what gold scores are relative to: `"initial"`, the model as it was
            before training, with `init_adapter`'s adapter, or `"base"`, without it. Without an `init_adapter` both are
            the same.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout in the trained model, LoRA's included. With dropout the training forward differs
            from the rollout, so that the importance ratio is not 1 before the first update.
        use_ema (`bool`, *optional*, defaults to `False`):
            Whether to keep an exponential moving average of the trained weights. Evaluation, the saved adapter in
            diffusers' format and what is pushed then use the average.
        ema_decay (`float`, *optional*, defaults to `0.9`):
            Decay of the average at each of its updates, in [0, 1).
        ema_update_every (`int`, *optional*, defaults to `1`):
            Updates of the weights per update of the average; Flow-GRPO's released runs use 8.

        enable_vae_slicing (`bool`, *optional*, defaults to `False`):
            Whether the VAE decodes one image at a time.
        enable_vae_tiling (`bool`, *optional*, defaults to `False`):
            Whether the VAE decodes images larger than it was trained on in overlapping tiles.
        precompute_prompt_embeds (`bool`, *optional*, defaults to `False`):
            Whether to encode all prompts of the training and evaluation sets before training, keep their embeddings on
            disk, and take the text encoders off the device. They return while later prompts are encoded.
        prompt_embeds_dir (`str`, *optional*):
            Folder for these embeddings, which later runs with the same encoders and settings reuse; `None`:
            `trl_flow/prompt_embeds` in `HF_HOME`. Needs `precompute_prompt_embeds`.
        use_regional_compilation (`bool`, *optional*, defaults to `True`):
            Whether `torch_compile` compiles a transformer's blocks, each by itself, which takes a fraction of the
            time. As a whole, a small model runs somewhat faster. U-Nets are always compiled as a whole.
        attention_backend (`str`, *optional*):
            One of diffusers' attention backends for the trained model, such as `"flash_hub"` or `"native"`, in
            sampling and updates alike; `None`: the model's own. Not every model has the choice.

        num_generations (`int`, *optional*, defaults to `8`):
            Images per prompt, which form a group (`G` in the papers). `generation_batch_size` must be divisible by it.
        num_generations_trained (`int`, *optional*):
            The images of each group that are trained on: those whose rewards have the largest variance, which are the
            highest and the lowest (PODS, arXiv:2504.13818). Advantages compare these alone. `None`: all.
            Micro-batches have the same share of `per_device_train_batch_size` images.
        dynamic_sample (`bool`, *optional*, defaults to `False`):
            Whether groups whose rewards have no spread, and so no advantages, are replaced by groups of other prompts,
            which are sampled and scored in their places (DAPO, arXiv:2503.14476). For rewards of few values.
        max_resample_times (`int`, *optional*):
            How often groups of one sampling phase are replaced at most; what is left without spread stays. `None`: 3.
            Needs `dynamic_sample`.
        num_generations_eval (`int`, *optional*, defaults to `1`):
            Images per prompt in evaluation.
        generation_batch_size (`int`, *optional*):
            Images sampled before they are trained on, over all processes. `None`: `per_device_train_batch_size *
            num_processes * steps_per_generation`.
        steps_per_generation (`int`, *optional*):
            Micro-batches that one sampling phase provides. `None`: `2 * gradient_accumulation_steps`, and so two
            updates: in the first one every importance ratio is 1, and nothing can be clipped. Of methods that learn
            on noised images, `gradient_accumulation_steps`, and so one update.
        num_iterations (`int`, *optional*, defaults to `1`):
            How often each sampled batch is trained on (μ in the GRPO paper).
        shuffle_dataset (`bool`, *optional*, defaults to `True`):
            Whether to shuffle the training prompts.

        num_inference_steps (`int`, *optional*, defaults to `10`):
            Sampling steps while training (`T`).
        guidance_scale (`float`, *optional*, defaults to `4.5`):
            Classifier-free guidance, as the pipeline defines it; 1 (for Z-Image 0) turns it off.
        negative_prompt (`str`, *optional*):
            Prompt to steer away from; `None`: the pipeline's own (empty) one.
        height (`int`, *optional*, defaults to `512`), width (`int`, *optional*, defaults to `512`):
            Size of the images in pixels.
        num_frames (`int`, *optional*):
            Frames of each video; `None`: the pipeline's own number. Models of images take none.
        max_sequence_length (`int`, *optional*, defaults to `128`):
            Prompt tokens for the pipelines that take this argument (T5 in Stable Diffusion 3).
        component (`str`, *optional*):
            In Wan 2.2 with two experts the one that is trained: `"transformer"`, which takes the noisier steps (and is
            the default), or `"transformer_2"`. The other one takes its own steps as it is.
        guidance_scale_2 (`float`, *optional*):
            Guidance in the steps of `transformer_2`; `None` means `guidance_scale`.
        share_initial_noise (`bool`, *optional*, defaults to `False`):
            Whether all images of a group start from the same noise.
        eval_num_inference_steps (`int`, *optional*):
            Sampling steps in evaluation, which follows the ODE. `None`: the pipeline's own number, or for a model that
            draws in a few steps (distilled, as its config tells, or the bundled one) that of training.
        eval_guidance_scale (`float`, *optional*):
            Guidance in evaluation; `None` means `guidance_scale`.

        reward_weights (`list[float]`, *optional*):
            Weight of each reward function; `None`: 1 each. A function with weight 0 is only logged.
        reward_frame (`str`, *optional*, defaults to `"middle"`):
            The frame of a video, `"first"`, `"middle"`, or `"last"`, that reward functions get as its image.
        reward_timeout (`float`, *optional*):
            Seconds after which training ends if a reward function has not returned; `None`: wait forever.
        overlap_rewards (`bool`, *optional*, defaults to `True`):
            Whether to compute rewards in a thread while the rest of the sampling phase is sampled, group by group, in
            every phase but the first. The results are the same. Nothing overlaps where `steps_per_generation` is 1,
            and with `disable_dropout=False`. Switch it off if a reward function and sampling together need more memory
            than the accelerator has, or a function needs the main thread.
        scale_rewards (`str` or `bool`, *optional*, defaults to `"batch"`):
            Which standard deviation divides: `"batch"`, that of the batch's rewards (Flow-GRPO, and TRL's `"batch"`),
            `"batch_centered"`, of these less their group's mean (with which SLAS's power amplifies large advantages
            rather than shrink all), `"group"` (GRPO, GRPO-Guard) or `"none"`.
            Always the group's with `dense_rewards`, at each step (VGPO, Eq. 14), and for each reward with
            `multi_objective_aggregation="normalize_then_sum"`, then the batch's for their sum, as in TRL.
        multi_objective_aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            How several rewards make one advantage. `"sum_then_normalize"`: their weighted sum is compared within the
            group. `"normalize_then_sum"`: each is normalized within the group by itself, the weighted sum of the
            results within the batch (GDPO, arXiv:2601.05242): units do not count. Not with `dense_rewards`.
        advantage_clip (`float`, *optional*, defaults to `5.0`):
            Advantages are clamped to ± this value before SLAS's shaping.
        advantage_power (`float` or `"auto"`, *optional*, defaults to `0.0`):
            SLAS's γ: advantages become `sign(A) |A|^(1 + γ)`; 0 is linear. With `"auto"` it begins at 0 and changes
            while training, so that the KL to the sampling policy after a phase's first update stays at `target_kl`.
            Needs two or more updates a sampling phase.
        target_kl (`float`, *optional*):
            For `advantage_power="auto"`: that KL, a mean over the latent's dimensions. `None`: the first one.

        diagnostics_steps (`int`, *optional*, defaults to `0`):
            Log the gradient norm of each trained step (`grad_norm/step_{i}`) every this many updates; 0: never.
            Costs a second backward pass of each step in those updates.
        log_images (`bool`, *optional*, defaults to `True`):
            Whether to write a grid of the latest images with their prompts and rewards to `output_dir/images` whenever
            metrics are logged, and to the trackers of `report_to` that take images.
        num_images_to_log (`int`, *optional*, defaults to `16`):
            Images in such a grid.

    Example:

    ```pycon
    >>> from trl_flow import FlowRLConfig
    >>> args = FlowRLConfig("outputs/run", num_generations=12, per_device_train_batch_size=12, use_cpu=True)
    >>> args.generation_batch_size
    24
    ```
    """

    _VALID_DICT_FIELDS = _BaseConfig._VALID_DICT_FIELDS + ["model_init_kwargs"]
    _DEFAULT_UPDATES = 2  # updates that are made with the samples of one phase

    # Defaults of TrainingArguments that do not fit
    learning_rate: float = 3e-4
    weight_decay: float = 1e-4
    lr_scheduler_type: str = "constant"
    remove_unused_columns: bool | None = False
    dataloader_pin_memory: bool = False
    ddp_find_unused_parameters: bool | None = False

    model_init_kwargs: dict | str | None = None
    init_adapter: str | None = None
    reference: Literal["initial", "base"] = "initial"
    disable_dropout: bool = True
    use_ema: bool = False
    ema_decay: float = 0.9
    ema_update_every: int = 1
    enable_vae_slicing: bool = False
    enable_vae_tiling: bool = False
    precompute_prompt_embeds: bool = False
    prompt_embeds_dir: str | None = None
    use_regional_compilation: bool = True
    attention_backend: str | None = None
    num_generations: int = 8
    num_generations_trained: int | None = None
    dynamic_sample: bool = False
    max_resample_times: int | None = None
    num_generations_eval: int = 1
    generation_batch_size: int | None = None
    steps_per_generation: int | None = None
    num_iterations: int = 1
    shuffle_dataset: bool = True
    num_inference_steps: int = 10
    guidance_scale: float = 4.5
    negative_prompt: str | None = None
    height: int = 512
    width: int = 512
    num_frames: int | None = None
    max_sequence_length: int = 128
    component: str | None = None
    guidance_scale_2: float | None = None
    share_initial_noise: bool = False
    eval_num_inference_steps: int | None = None
    eval_guidance_scale: float | None = None
    reward_weights: list[float] | None = None
    reward_frame: Frame = "middle"
    reward_timeout: float | None = None
    overlap_rewards: bool = True
    scale_rewards: Literal["group", "batch", "batch_centered", "none"] = "batch"
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    advantage_clip: float = 5.0
    # HfArgumentParser has one type for each option: of a union with None it takes the second, and so reads "auto"
    advantage_power: float | str | None = 0.0
    target_kl: float | None = None
    diagnostics_steps: int = 0
    log_images: bool = True
    num_images_to_log: int = 16

    def __post_init__(self):
        if self.bf16 is None:
            # bfloat16 autocast is slower than float32 on most CPUs
            self.bf16 = not self.fp16 and is_torch_bf16_gpu_available()
        if getattr(self, "activation_checkpointing", self) is None:
            self.activation_checkpointing = self.gradient_checkpointing  # TRL sets the old name
        self._read_yaml()
        self._read_compilation()
        watches = self.lr_scheduler_type in WATCHING_SCHEDULES
        if (self.load_best_model_at_end or watches) and self.metric_for_best_model is None:
            self.metric_for_best_model = "reward"  # transformers would look for a loss
        super().__post_init__()
        if self.torch_compile:
            check_compile_fields(self)
        shard_on_cpus(self)
        if watches:  # by default they expect a loss
            best = {"mode": "max" if self.greater_is_better else "min"}
            self.lr_scheduler_kwargs = best | (self.lr_scheduler_kwargs or {})
        self.scale_rewards = {True: "group", False: "none"}.get(self.scale_rewards, self.scale_rewards)
        if self.init_adapter is not None:
            self.init_adapter = os.fspath(self.init_adapter)
        self._check_types()
        self._check_advantage_power()
        counts = ("num_inference_steps", "height", "width", "max_sequence_length")
        for name in (*counts, "num_iterations", "ema_update_every", "num_generations_eval", "num_images_to_log"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("eval_num_inference_steps", "num_frames"):
            self._check(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1, or None")
        self._check("num_generations", self.num_generations >= 2, "at least 2: advantages compare a prompt's images")
        self._check("guidance_scale", self.guidance_scale >= 0, "0 or more")
        self._check("guidance_scale_2", (self.guidance_scale_2 or 0) >= 0, "0 or more, or None")
        self._check("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")
        self._check("advantage_clip", self.advantage_clip > 0, "above 0")
        self._check("reward_timeout", self.reward_timeout is None or self.reward_timeout > 0, "above 0, or None")
        self._check("diagnostics_steps", self.diagnostics_steps >= 0, "0 or more")
        weights = [] if self.reward_weights is None else self.reward_weights
        is_list = isinstance(weights, list | tuple) and all(isinstance(weight, int | float) for weight in weights)
        ok = is_list and all(map(math.isfinite, weights)) and (any(weights) or not weights)
        self._check("reward_weights", ok, "a list of finite numbers that are not all 0 (one of 0 is not trained on)")
        if self.prompt_embeds_dir is not None and not self.precompute_prompt_embeds:
            raise ValueError(
                f"prompt_embeds_dir is {self.prompt_embeds_dir!r}, but precompute_prompt_embeds is False: nothing is "
                "written. Set precompute_prompt_embeds=True, or leave prompt_embeds_dir out."
            )
        if self.auto_find_batch_size:
            instead = "Set it to False and lower per_device_train_batch_size."
            raise ValueError(f"auto_find_batch_size is set, but smaller batches would break groups apart. {instead}")
        self._resolve_batches()
        self._resolve_resampling()

    def _read_yaml(self) -> None:
        """What TRL's parser makes of YAML files: False of a bare `no`, text of 1e-1 in a list."""
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            if getattr(self, name) is False:
                setattr(self, name, "no")
        if isinstance(self.reward_weights, list):
            with contextlib.suppress(ValueError):
                self.reward_weights = [float(w) if isinstance(w, str) else w for w in self.reward_weights]

    def _read_compilation(self) -> None:
        """What `accelerate launch` says, and the precision: transformers would switch TF32 on."""
        launched = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
        if launched != "no" and not self.torch_compile and self.torch_compile_backend is None:
            self.torch_compile_backend = launched
        asked = self.torch_compile or self.torch_compile_backend is not None or self.torch_compile_mode is not None
        if asked and self.tf32 is None:
            self.tf32 = False

    def _resolve_trained(self, size: int) -> None:
        number, trained = self.num_generations, self.group_size
        wanted = f"from 2 to num_generations ({number}), or None for all of them"
        self._check("num_generations_trained", 2 <= trained <= number, wanted)
        if size * trained % number != 0:
            multiple = number // math.gcd(trained, number)
            raise ValueError(
                f"num_generations_trained is {trained} of num_generations={number}, so that a micro-batch has "
                f"{trained}/{number} of per_device_train_batch_size ({size}) images, which is no whole number. Set "
                f"per_device_train_batch_size to a multiple of {multiple}."
            )
        own = size * self.steps_per_generation
        if self.world_size > 1 and own % number != 0 and (trained < number or self.dynamic_sample):
            what = f"num_generations_trained is {trained} of num_generations={number}"
            if self.dynamic_sample:
                what = f"dynamic_sample is True, with num_generations={number}"
            raise ValueError(
                f"{what}, but each of {self.world_size} processes samples {own} images (per_device_train_batch_size x "
                "steps_per_generation), which splits groups over processes: they would train on, or sample, unequal "
                f"numbers. Make that a multiple of {number}."
            )

    def _resolve_resampling(self) -> None:
        times = self._given("max_resample_times")
        if times is not None and not self.dynamic_sample:
            unused = f"max_resample_times is {times}, but dynamic_sample is False: nothing is sampled again"
            raise ValueError(f"{unused}. Set dynamic_sample=True, or leave max_resample_times out.")
        self.max_resample_times = derived(3) if times is None and self.dynamic_sample else times
        ok = self.max_resample_times is None or self.max_resample_times >= 1
        self._check("max_resample_times", ok, "at least 1, or None for 3")

    @property
    def group_size(self) -> int:
        """Images of each group that are trained on, which advantages compare."""
        return self.num_generations if self.num_generations_trained is None else self.num_generations_trained

    @property
    def trained_batch_size(self) -> int:
        """Images in a micro-batch of the update: the share of `per_device_train_batch_size` that is trained on."""
        return self.per_device_train_batch_size * self.group_size // self.num_generations

    @property
    def updates_per_generation(self) -> Fraction:
        """Updates for each sampling phase; below 1 if an update takes several phases."""
        return Fraction(self.num_iterations * self.steps_per_generation, self.gradient_accumulation_steps)

    @property
    def num_kept_latents(self) -> int:
        """Latents kept for each image of a sampling phase, for the memory estimate."""
        return 1

    def kept_weights(self, *, half_precision: bool, is_adapter: bool) -> dict[str, int]:
        """How many more sets of the trained weights are kept on the device, for the memory estimate."""
        return {}

    @classmethod
    def why_not(cls, name: str) -> str | None:
        """Why a setting of another method does not exist here, if there is something to say."""
        return None

    def shown(self) -> str:
        """The configuration as JSON, without the token for loading the model: checkpoints may be published."""
        content = self.to_dict()
        if isinstance(content.get("model_init_kwargs"), dict) and "token" in content["model_init_kwargs"]:
            content["model_init_kwargs"] = content["model_init_kwargs"] | {"token": "<TOKEN>"}
        return json.dumps(content, indent=2, default=str)

    def _given(self, name: str) -> Any:
        """The value of a field, `None` for one that was not given but derived in the config that this is a copy of."""
        value = getattr(self, name)
        return None if isinstance(value, Derived) else value

    def _check(self, name: str, ok: bool, wanted: str) -> None:
        if not ok:
            raise ValueError(f"{name} is {getattr(self, name)!r}, but must be {wanted}.")

    def _check_types(self) -> None:
        """Holds the values of this class's fields, and its subclasses', against their annotations."""
        hints = get_type_hints(type(self))  # HfArgumentParser changes the types of the fields
        for name in set(type(self).__dataclass_fields__) - set(_BaseConfig.__dataclass_fields__):
            hint, value = hints[name], getattr(self, name)
            options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            if value is None and type(None) in options:
                continue
            choices = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
            if choices:
                self._check(name, value in choices, f"one of {', '.join(choices)}")
            elif int in options or (float in options and str not in options):
                kind, noun = (int, "whole number") if int in options else (int | float, "number")
                if isinstance(value, bool) or not isinstance(value, kind):
                    raise TypeError(f"{name} is {value!r} of type {type(value).__name__}, but must be a {noun}.")
                self._check(name, math.isfinite(value), "finite")
            elif bool in options and not isinstance(value, bool):
                raise TypeError(f"{name} is {value!r} of type {type(value).__name__}, but must be True or False.")

    def _read_number(self, name: str) -> None:
        """Makes a number of a field that may be `"auto"`, too: command lines give text."""
        if getattr(self, name) != "auto":
            try:
                if isinstance(getattr(self, name), bool):
                    raise TypeError
                setattr(self, name, float(getattr(self, name)))
            except (TypeError, ValueError):
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must be a number or 'auto'.") from None

    def _check_advantage_power(self) -> None:
        self._read_number("advantage_power")
        if self.advantage_power == "auto":
            self._check("target_kl", self.target_kl is None or self.target_kl > 0, "above 0, or None")
            return
        ok = math.isfinite(self.advantage_power) and self.advantage_power >= 0
        self._check("advantage_power", ok, "finite and 0 or more, or 'auto'")
        if self.target_kl is not None:
            unused = f"target_kl is {self.target_kl}, but advantage_power is {self.advantage_power:g}, without use"
            raise ValueError(f"{unused} for it. Set advantage_power='auto', or leave target_kl out.")

    def _resolve_batches(self) -> None:
        # The arithmetic of TRL's GRPOConfig, with what to change in the messages
        size, global_batch = self.per_device_train_batch_size, self.per_device_train_batch_size * self.world_size
        sizes = f"per_device_train_batch_size ({size}) x processes ({self.world_size}) = {global_batch}"
        generation_batch, steps = self._given("generation_batch_size"), self._given("steps_per_generation")
        if generation_batch is not None and steps is not None and generation_batch != global_batch * steps:
            raise ValueError(
                f"generation_batch_size ({generation_batch}) and steps_per_generation ({steps}) cannot both be set: "
                f"{sizes}. Remove one."
            )
        if generation_batch is None:
            if steps is None:
                steps = self.steps_per_generation = derived(self._DEFAULT_UPDATES * self.gradient_accumulation_steps)
            self._check("steps_per_generation", steps >= 1, "at least 1")
            self.generation_batch_size = derived(global_batch * steps)
        if self.generation_batch_size < 1 or self.generation_batch_size % global_batch != 0:
            raise ValueError(f"generation_batch_size ({self.generation_batch_size}) must be a multiple of {sizes}.")
        if steps is None:
            self.steps_per_generation = derived(self.generation_batch_size // global_batch)
        if self.generation_batch_size % self.num_generations != 0:
            raise ValueError(
                f"generation_batch_size is {self.generation_batch_size} = {sizes} x steps_per_generation "
                f"({self.steps_per_generation}), which is not divisible by num_generations ({self.num_generations}): "
                "groups must be complete. Change num_generations, one of these, or gradient_accumulation_steps."
            )
        self._resolve_trained(size)
        updates = self.updates_per_generation
        if updates.denominator != 1 and updates.numerator != 1:
            raise ValueError(
                f"steps_per_generation ({self.steps_per_generation}) x num_iterations ({self.num_iterations}) = "
                f"{self.steps_per_generation * self.num_iterations} micro-batches are trained on in each sampling "
                f"phase, and an update takes gradient_accumulation_steps ({self.gradient_accumulation_steps}). One "
                "must be a multiple of the other, or an update would end in the middle of the next phase."
            )
