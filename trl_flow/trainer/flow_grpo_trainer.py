"""[`FlowGRPOTrainer`]: GRPO for flow-matching text-to-image pipelines, on TRL's base trainer.

The method names and their order are those of TRL's `GRPOTrainer`, so that a reader of one finds the way in the other.
"""

import contextlib
import copy
import json
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import DistributedType, gather_object
from datasets import Dataset
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel, cast_training_params
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from trl_flow import sharing
from trl_flow.backbones import Backbone, get_backbone
from trl_flow.evaluation.diversity import mean_pairwise_distance, pixel_features, thumbnails
from trl_flow.evaluation.pictures import image_grid
from trl_flow.functional import (
    Transition,
    clipped_loss,
    cumulative_values,
    dual_advantages,
    gaussian_kl,
    group_advantages,
    log_ratio,
    normalize_then_sum,
    super_linear,
    timestep_weight,
)
from trl_flow.functional.grpo import STD_EPSILON
from trl_flow.rewards.base import ModelReward
from trl_flow.rewards.calling import RewardError, call_reward_funcs, check_reward_func, is_dense, reward_names
from trl_flow.rollout import Dynamics, draw_noise, rollout, sample_generator
from trl_flow.trainer.advantage_power import (
    FISHER_SAMPLES,
    KL_SAMPLES,
    AdvantagePower,
    AdvantagePowerCallback,
    Transitions,
)
from trl_flow.trainer.callbacks import BaseScoresCallback, EMACallback, FlowProgressCallback, RunLogCallback
from trl_flow.trainer.checkpoints import (
    STATE_NAME,
    MicroBatch,
    is_complete,
    last_complete_checkpoint,
    load_micro_batches,
    save_micro_batches,
)
from trl_flow.trainer.checks import (
    check_backbone,
    check_dataset,
    check_eval_reward_funcs,
    check_images,
    check_output_dir,
    check_over_optimization,
    checked_stochastic_steps,
    named_eval_datasets,
    probe_output_dir,
)
from trl_flow.trainer.dealing import DealtSamples, deal
from trl_flow.trainer.diffusers_compat import make_trainable
from trl_flow.trainer.evaluating import EvaluatingMixin
from trl_flow.trainer.flow_grpo_config import REFERENCE_DIM, FlowGRPOConfig
from trl_flow.trainer.gold_evaluation import BaseScores
from trl_flow.trainer.last_update import LastUpdate, LastUpdateCallback, RandomStates
from trl_flow.trainer.loading import is_quantized, load_pipeline
from trl_flow.trainer.ordered_calls import OrderedCalls
from trl_flow.trainer.over_optimization import BEST_FOLDER, OverOptimizationCallback
from trl_flow.trainer.prompt_cache import PromptCache
from trl_flow.trainer.prompt_files import PromptFiles, default_folder, encoding_fingerprint
from trl_flow.trainer.publishing import PublishingMixin
from trl_flow.trainer.ratio_statistics import RatioStatistics
from trl_flow.trainer.reward_notes import RewardNotes, ScoredPart
from trl_flow.trainer.trl_compat import (
    EpochRepeatSampler,
    _BaseTrainer,
    disable_dropout_in_model,
    identity,
)


logger = logging.get_logger(__name__)

RewardFunc = Callable[..., list[float | None]]


class FlowGRPOTrainer(EvaluatingMixin, PublishingMixin, _BaseTrainer):
    """
    Trainer for Flow-GRPO and, by its configuration, DanceGRPO, GRPO-Guard, SLAS, VGPO and their combinations.

    Example:

    ```python
    from datasets import Dataset
    from peft import LoraConfig
    from PIL import ImageStat
    from trl_flow import FlowGRPOTrainer, GuardConfig


    def darkness(prompts, images, **kwargs):
        return [1 - ImageStat.Stat(image.convert("L")).mean[0] / 255 for image in images]


    trainer = FlowGRPOTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        reward_funcs=darkness,
        args=GuardConfig(output_dir="sd35-dark", per_device_train_batch_size=8),
        train_dataset=Dataset.from_dict({"prompt": ["a street at night", "a cat on a sofa"]}),
        peft_config=LoraConfig(r=32, lora_alpha=64),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            Hub id or folder of a pipeline, or a loaded one, whose transformer (or U-Net) is trained in place.
        reward_funcs (`Callable` or `list[Callable]`):
            Called by keyword as `func(prompts=..., images=..., **columns, trainer_state=..., log_metric=...,
            log_extra=...)`, with lists of one entry for each image; returns a list of numbers, `None` where the
            function does not apply. May be `async`.
        args ([`FlowGRPOConfig`], *optional*):
            Configuration; defaults to `FlowGRPOConfig("{name of the model}-Flow-GRPO")`.
        train_dataset ([`~datasets.Dataset`]):
            A column `"prompt"` of non-empty strings, and with a pipeline that edits pictures a column `"image"` of
            them; all columns but the prompt reach the reward functions under their own names.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Prompts to evaluate on: always the same seeds, along the ODE.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*): further callbacks.
        optimizers (`tuple`, *optional*): an optimizer and a scheduler, as in [`~transformers.Trainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            Trains an adapter; without it all weights of the transformer are trained.
        backbone ([`Backbone`], *optional*):
            Instead of the one chosen by the pipeline's class, for pipelines of your own. Any object that has what
            [`Backbone`] has and the trainer uses; it need not be a subclass.
        eval_reward_funcs (`Callable` or `list[Callable]`, *optional*):
            Functions as `reward_funcs` that are never optimised: evaluations score by them too, and divide by what
            the base model scores on the same prompts from the same seeds, which is measured before the first update
            (`eval_gold/{name}` and `eval_gold/average`, where 1 is the base model). Need an `eval_dataset`, and a
            positive mean for the base model.

    Raises:
        TypeError, ValueError: for anything that would make training fail later; nothing has been written then.
    """

    loss_is_scaled_for_ga = True
    _tag_names = ["trl_flow"]
    _name = "Flow-GRPO"

    def __init__(
        self,
        model: str | os.PathLike | DiffusionPipeline,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: FlowGRPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
        backbone: Backbone | None = None,
        eval_reward_funcs: RewardFunc | list[RewardFunc] | None = None,
    ):
        # Args
        if not isinstance(model, str | os.PathLike | DiffusionPipeline):
            raise TypeError(
                f"model is a {type(model).__name__}, but must be the hub id or folder of a diffusers pipeline, or "
                "a loaded DiffusionPipeline."
            )
        if args is None:
            name = model if isinstance(model, str | os.PathLike) else model.config.get("_name_or_path") or "model"
            args = FlowGRPOConfig(f"{Path(name).name}-Flow-GRPO")
        if not isinstance(args, FlowGRPOConfig):
            raise TypeError(
                f"args is a {type(args).__name__}, but must be a FlowGRPOConfig (or GuardConfig, SLASConfig, "
                "VGPOConfig)."
            )
        # Some fields are changed for transformers below; the caller's object may serve a second trainer
        args = copy.copy(args)

        # Data and rewards first: they are cheap to check, a model is not cheap to load
        self.reward_funcs = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        if not self.reward_funcs:
            raise ValueError("reward_funcs is empty. Pass at least one reward function.")
        self.eval_reward_funcs = (
            list(eval_reward_funcs)
            if isinstance(eval_reward_funcs, list | tuple)
            else [func for func in [eval_reward_funcs] if func is not None]
        )
        check_dataset(train_dataset, "train_dataset")
        for func in self.reward_funcs:
            check_reward_func(func, [] if args.remove_unused_columns else train_dataset.column_names)
        for name, dataset in named_eval_datasets(eval_dataset):
            check_dataset(dataset, name)
            for func in [*self.reward_funcs, *self.eval_reward_funcs]:
                try:
                    check_reward_func(func, dataset.column_names)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{name}: {error}") from error
        names = reward_names([*self.reward_funcs, *self.eval_reward_funcs])
        self.reward_func_names = names[: len(self.reward_funcs)]
        self.eval_reward_func_names = names[len(self.reward_funcs) :]
        check_eval_reward_funcs(self.eval_reward_func_names, eval_dataset)
        check_over_optimization(callbacks or [], self.eval_reward_func_names, eval_dataset, args)
        weights = args.reward_weights if args.reward_weights is not None else [1.0] * len(self.reward_funcs)
        if len(weights) != len(self.reward_funcs):
            raise ValueError(
                f"reward_weights has {len(weights)} entries, but there are {len(self.reward_funcs)} reward functions: "
                f"{', '.join(self.reward_func_names)}. Give one weight for each."
            )
        self.reward_weights = torch.tensor(weights, dtype=torch.float32)
        # The functions that score unfinished images: those that can, and whose scores count
        self._dense_funcs = [
            i for i, func in enumerate(self.reward_funcs) if args.dense_rewards and is_dense(func) and weights[i] != 0
        ]
        check_output_dir(args)
        if peft_config is not None:
            sharing.check_lora_config(peft_config)

        if getattr(backbone, "pipeline", model) is not model:
            raise ValueError(
                "backbone was made for another pipeline than model: the one would be trained, and the other prepared "
                "for it. Pass one and the same: model=backbone.pipeline."
            )

        # Model. A LoRA draws its initial weights at random, so the seed comes first.
        set_seed(args.seed)
        pipeline = load_pipeline(model, args, peft_config) if isinstance(model, str | os.PathLike) else model
        self.pipeline = pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        self.backbone = backbone or get_backbone(
            pipeline, height=args.height, width=args.width, max_sequence_length=args.max_sequence_length
        )
        self.model_id = str(model) if isinstance(model, str | os.PathLike) else pipeline.config.get("_name_or_path")
        check_backbone(self.backbone, args, peft_config)
        for name, dataset in [("train_dataset", train_dataset), *named_eval_datasets(eval_dataset)]:
            check_images(dataset, name, self.backbone)
        policy = self._prepare_model(args, peft_config)
        probe_output_dir(args, sum(p.numel() for p in policy.parameters() if p.requires_grad))

        # A set smaller than one sampling phase would give TRL's sampler no full batch at all
        prompts_per_generation = args.generation_batch_size // args.num_generations
        if len(train_dataset) < prompts_per_generation:
            copies = math.ceil(prompts_per_generation / len(train_dataset))
            logger.warning(
                f"The data set has {len(train_dataset)} prompts, but each sampling phase takes "
                f"{prompts_per_generation} (generation_batch_size / num_generations): it is repeated {copies} times."
            )
            train_dataset = datasets.concatenate_datasets([train_dataset] * copies)

        # Multi-step
        self.num_generations = args.num_generations
        self.num_iterations = args.num_iterations
        # The spread of a mean over D dimensions falls with sqrt(D), and with it the clip range that does the same
        scale = math.sqrt(REFERENCE_DIM / math.prod(self.backbone.latent_shape())) if args.scale_epsilon else 1.0
        self.epsilon_low = args.epsilon * scale
        self.epsilon_high = self.epsilon_low if args.epsilon_high is None else args.epsilon_high * scale
        self.beta = args.beta
        # Micro-batches so far, over all accumulation cycles; with it comes the buffer of sampled ones
        self._step = 0
        self._buffered_inputs: list[MicroBatch] | None = None
        self._ratio_checked = False
        self._first_deviation = 0.0

        # Before the model goes to the device: the text encoders may need the room there
        self.prompt_cache = self._make_prompt_cache(args)
        self._encode_ahead(args, [train_dataset, *(dataset for _, dataset in named_eval_datasets(eval_dataset))])

        super().__init__(
            model=policy,
            args=args,
            data_collator=identity,  # rows stay dictionaries
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, and nn.DataParallel is not supported. Launch with "
                "`accelerate launch` or `torchrun`, or show one GPU with CUDA_VISIBLE_DEVICES."
            )
        if not args.disable_tqdm:
            self.remove_callback(DEFAULT_PROGRESS_CALLBACK)
            self.add_callback(FlowProgressCallback())
        self._place_frozen_modules()
        self.ref_model = self._make_reference(policy)
        refused = {"use_ema": args.use_ema, "diagnostics_steps": args.diagnostics_steps}
        refused["advantage_power='auto'"] = args.advantage_power == "auto"
        refused["a quantised model"] = is_quantized(self.backbone.model)
        for name, used in refused.items():
            if used and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                raise ValueError(
                    f"{name} is not supported with FSDP or DeepSpeed, which shard the weights. Leave it out, or use "
                    "several processes without sharding (--accelerate_config multi_gpu)."
                )
        self.ema: EMAModel | None = None
        if args.use_ema:
            self.ema = EMAModel(self._trained_parameters(), decay=args.ema_decay)
            self.add_callback(EMACallback(self.ema, self._trained_parameters()))

        # The schedules of training and evaluation, and the random streams' root. The same on all processes: each
        # sample's generator is made from its place in the global batch.
        self.seed = args.seed
        self.dynamics = Dynamics(
            schedule=self.backbone.schedule(args.num_inference_steps),
            sde_type=args.sde_type,
            noise_level=args.noise_level,
            # Flow-CPS publishes its clip ranges for a log-probability without the variance; RatioNorm needs the latter
            variance_free=args.sde_type == "cps" and args.importance_ratio == "standard",
        )
        self.eval_dynamics = replace(self.dynamics, schedule=self.backbone.schedule(args.eval_num_inference_steps))
        self._stochastic_steps = checked_stochastic_steps(self.dynamics, args)

        self.add_callback(RunLogCallback())
        # What the base model scores on each evaluation set, and whether the weights are still those it was given
        self._base_scores: dict[str, BaseScores] = {}
        self._is_untrained = True
        if self.eval_reward_funcs:
            self.add_callback(BaseScoresCallback(self._measure_base_scores))

        # SLAS's power, where it adapts itself
        self.advantage_power: AdvantagePower | None = None
        if args.advantage_power == "auto":
            self.advantage_power = AdvantagePower(
                self.accelerator.unwrap_model(self.model),
                self.accelerator,
                target_kl=args.target_kl,
                max_kl=args.max_kl,
                fisher_steps=args.fisher_steps,
                seed=args.seed,
                log=lambda name, value: self._metrics["train"][name].append(value),
            )
            self.add_callback(AdvantagePowerCallback(self.advantage_power, self._last_transitions))

        # Where to go back to when a reward fails, and the step at which the run was last saved, or resumed
        self._last_update: LastUpdate | None = None
        self._saved: tuple[int, str] | None = None
        self.add_callback(LastUpdateCallback(self._note_update))

        # Uploads that go on in the background
        self._uploads: list[Future] = []

        # Metrics
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}
        self._ratio_statistics = RatioStatistics(args.num_inference_steps, self.accelerator.device)
        self._current_train_step_time = 0.0
        self._logs: dict[str, list] = {"images": [], "captions": []}
        self._notes = RewardNotes()
        self._has_scored = False

    # ---- Construction ----

    def _prepare_model(self, args: FlowGRPOConfig, peft_config: PeftConfig | None) -> torch.nn.Module:
        """Freezes the pipeline and makes its transformer (or U-Net) trainable; returns what `Trainer` trains."""
        # Offloading would take the trained weights away between two forwards
        self.pipeline.remove_all_hooks()
        for name, module in self.pipeline.components.items():
            if isinstance(module, torch.nn.Module):
                if any(p.is_meta for p in module.parameters()):
                    raise ValueError(
                        f"The pipeline's {name} has weights on the meta device, which hold no values. Load the "
                        "pipeline with from_pretrained and pass it as it is, or pass its hub id or folder."
                    )
                module.requires_grad_(False).eval()
        if args.enable_vae_slicing:
            self.pipeline.vae.enable_slicing()
        if args.enable_vae_tiling:
            self.pipeline.vae.enable_tiling()
        model = self.backbone.model
        if getattr(model, "peft_config", None):
            raise ValueError(
                f"The pipeline's {self.backbone.component} already has adapters ({', '.join(model.peft_config)}). "
                "Fuse them with pipeline.fuse_lora() and pipeline.unload_lora_weights(), or unload them, and pass a "
                "peft_config to train a new one."
            )
        make_trainable(model)
        if args.gradient_checkpointing:
            # transformers would call a method that diffusers' models do not have
            model.enable_gradient_checkpointing()
            args.gradient_checkpointing = False
            args.activation_checkpointing = False
        if peft_config is None:
            model.requires_grad_(True)
            policy = model
            self.backbone.dtype = torch.float32  # what is trained is, see below
        else:
            peft_config = copy.deepcopy(peft_config)
            peft_config.task_type = None  # PEFT's task types are for language models
            if getattr(peft_config, "target_modules", None) is None:
                peft_config.target_modules = list(self.backbone.lora_target_modules)
            policy = get_peft_model(model, peft_config)
        cast_training_params(policy, dtype=torch.float32)
        if args.disable_dropout:
            disable_dropout_in_model(policy)
        return policy

    def _place_frozen_modules(self) -> None:
        trained = self.backbone.model
        for name, module in self.pipeline.components.items():
            # The prompt cache moves the text encoders where their embeddings are on disk
            elsewhere = name.startswith("text_encoder") and self.args.precompute_prompt_embeds
            if isinstance(module, torch.nn.Module) and module is not trained and not elsewhere:
                if not is_quantized(module):
                    module.to(self.accelerator.device)

    def _make_prompt_cache(self, args: FlowGRPOConfig) -> PromptCache:
        if not args.precompute_prompt_embeds:
            return PromptCache(self.backbone)
        self.pipeline.vae.to(args.device)  # where the backbone encodes, too
        folder = default_folder() if args.prompt_embeds_dir is None else args.prompt_embeds_dir
        return PromptCache(self.backbone, files=PromptFiles(folder, encoding_fingerprint(self.backbone)))

    def _encode_ahead(self, args: FlowGRPOConfig, data: list[Dataset]) -> None:
        """With `precompute_prompt_embeds`, writes the embeddings of all prompts of `data` that are not on disk yet."""
        if self.prompt_cache.files is None:
            return
        scales = [args.guidance_scale, args.eval_guidance_scale]
        guided = any(scale is not None and self.backbone.uses_guidance(scale) for scale in scales)
        negative = [args.negative_prompt or ""] if guided else []

        def pairs() -> Iterator[tuple[str, Image.Image | None]]:
            for dataset in data:
                if not self.backbone.takes_image:
                    yield from ((prompt, None) for prompt in [*negative, *dataset["prompt"]])
                else:
                    for row in dataset:
                        (image,) = self._images_to_edit([row])
                        yield from ((prompt, image) for prompt in [*negative, row["prompt"]])

        rank, number = args.process_index, args.world_size
        progress = args.local_process_index == 0 and not args.disable_tqdm
        self.prompt_cache.write(pairs, rank=rank, num_processes=number, progress=progress)
        if number > 1:
            # Those of the other processes too, should each machine have a folder of its own
            args.distributed_state.wait_for_everyone()
            self.prompt_cache.write(pairs, progress=progress)

    def _make_reference(self, policy: torch.nn.Module) -> torch.nn.Module | None:
        """A frozen copy for the KL of full fine-tuning; an adapter is switched off instead."""
        if self.beta == 0 or isinstance(policy, PeftModel):
            return None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "beta > 0 with full fine-tuning under FSDP or DeepSpeed would need a second sharded model, which is "
                "not supported. Train an adapter (peft_config), or set beta=0."
            )
        return copy.deepcopy(policy).requires_grad_(False).eval()

    def _send_telemetry(self) -> None:
        """None: TRL's would be sent under TRL's name, and fails on diffusers' configs."""

    def _trained_parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.accelerator.unwrap_model(self.model).parameters() if p.requires_grad]

    # ---- Data ----

    def _set_signature_columns_if_needed(self):
        # Only used with `remove_unused_columns=True`
        if self._signature_columns is None:
            self._signature_columns = ["prompt", *(["image"] if self.backbone.takes_image else [])]

    # As in TRL, the loader yields whole generation batches, each as often as there are micro-batches in it: they are
    # sampled from at the first time and buffered, see `_prepare_inputs`.
    def get_train_dataloader(self):
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self._train_batch_size * self.args.steps_per_generation,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, dataset: Dataset | None = None) -> torch.utils.data.Sampler:
        return EpochRepeatSampler(
            self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.args.shuffle_dataset,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    # ---- Training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        Trains, then saves the adapter (or model) and the trainer's state to `output_dir` unless `save_strategy` is
        `"no"`.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint's folder, or `True` for the last complete one in `output_dir`.

        Raises:
            ValueError: if there is no complete checkpoint to resume from.
            OSError: if a reward's model can not be loaded; nothing has been sampled then.
            RewardError: if a reward function fails. With at least one update behind it the run is saved first, as it
                was after the last update, whatever `save_strategy` is; the message says where.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        elif isinstance(resume_from_checkpoint, str | os.PathLike):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
            if not is_complete(resume_from_checkpoint):
                raise ValueError(
                    f"{resume_from_checkpoint!r} is not a complete checkpoint of this trainer. Pass True to resume "
                    "from the last complete one in output_dir."
                )
        self._step = 0
        self._buffered_inputs = None
        self._ratio_checked = False
        self._first_deviation = 0.0
        # Those that were added after the constructor, too
        check_over_optimization(
            self.callback_handler.callbacks, self.eval_reward_func_names, self.eval_dataset, self.args
        )
        for callback in self._over_optimization_callbacks:
            callback.reset()
        if self.advantage_power is not None:
            self.advantage_power.reset()
        self._last_update = None
        self._saved = None
        if resume_from_checkpoint:
            state = json.loads(Path(resume_from_checkpoint, "trainer_state.json").read_text())
            self._saved = state["global_step"], resume_from_checkpoint
        # A model that can not be loaded is found out now, and not after the first sampling phase
        for func in [*self.reward_funcs, *self.eval_reward_funcs]:
            if isinstance(func, ModelReward):
                func.load()
        try:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except RewardError as error:
            saved = self._save_after_failure()
            raise RewardError(f"{error} {saved}") from error
        if self.args.save_strategy != "no":
            self.save_model(_internal_call=True)
            self.save_state()
        return output

    def training_step(self, model, inputs, num_items_in_batch=None):
        start = time.perf_counter()
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        batch = self._prepare_inputs(inputs)
        self._show_stage("updating")
        loss = self._backward(model, batch)
        self._check_ratio()
        self._step += 1
        self._current_train_step_time += time.perf_counter() - start
        if self.accelerator.sync_gradients:
            self._metrics["train"]["step_time"].append(self._current_train_step_time)
            self._current_train_step_time = 0.0
        return loss

    def _backward(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        """Forward and backward over the trained steps of one micro-batch; returns its loss, detached, a scalar."""
        condition, negative_condition = self._conditions(batch.prompts, self.args.guidance_scale, batch.images)
        scale = len(batch.steps) * self.current_gradient_accumulation_steps
        kwargs = {}
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            kwargs["scale_wrt_gas"] = False
        measure = self.args.diagnostics_steps and self.state.global_step % self.args.diagnostics_steps == 0
        total = torch.zeros((), device=self.accelerator.device)
        graph: torch.Tensor | float = 0.0
        for index in range(len(batch.steps)):
            last = index == len(batch.steps) - 1
            # The forward belongs inside: DDP makes ready for the reduction there
            with self._defer_sync(model, defer=self.args.backward_per_timestep and not last):
                with self.compute_loss_context_manager():
                    loss, policy_loss = self._compute_loss(model, batch, index, condition, negative_condition)
                    loss = loss / scale
                total += loss.detach()
                if measure:
                    norm = self._gradient_norm(policy_loss)
                    self._metrics["train"][f"grad_norm/step_{batch.steps[index]}"].append(norm)
                if self.args.backward_per_timestep:
                    self.accelerator.backward(loss, **kwargs)
                else:
                    graph = graph + loss
        if not self.args.backward_per_timestep:
            self.accelerator.backward(graph, **kwargs)
        return total

    @contextlib.contextmanager
    def _defer_sync(self, model: torch.nn.Module, defer: bool) -> Iterator[None]:
        """Holds back the gradients' reduction over processes until the last trained step."""
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
            with self.accelerator.no_sync(model):
                yield

    def _gradient_norm(self, loss: torch.Tensor) -> float:
        """Norm of the gradient of `loss` in this process. What has been accumulated is neither read nor changed."""
        gradients = torch.autograd.grad(loss, self._trained_parameters(), retain_graph=True, allow_unused=True)
        squares = [gradient.square().sum() for gradient in gradients if gradient is not None]
        return torch.stack(squares).sum().sqrt().item()

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> MicroBatch:
        # The local part of a generation batch comes in; it is sampled from once, and its micro-batches are handed out
        # one by one, `num_iterations` times.
        if self._step % self._generate_every == 0 or self._buffered_inputs is None:
            self._buffered_inputs = None  # what has been trained on makes room
            self._buffered_inputs = self._generate_and_score(generation_batch)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    @property
    def _generate_every(self) -> int:
        return self.args.steps_per_generation * self.num_iterations

    def _conditions(
        self, prompts: list[str], guidance_scale: float, images: list[Image.Image] | None
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
        condition = self.prompt_cache(prompts, images)
        if not self.backbone.uses_guidance(guidance_scale):
            return condition, None
        return condition, self.prompt_cache([self.args.negative_prompt or ""] * len(prompts), images)

    def _images_to_edit(self, rows: list[dict[str, Any]]) -> list[Image.Image] | None:
        """The rows' pictures, RGB, where the backbone takes one."""
        return [row["image"].convert("RGB") for row in rows] if self.backbone.takes_image else None

    def _choose_steps(self, generation: int) -> tuple[list[int], list[int]]:
        """The stochastic and the trained steps of one generation batch, equal on all processes."""
        rng = np.random.default_rng([self.seed, generation, 1])
        stochastic = self._stochastic_steps
        if self.args.sde_window_size is not None:
            first, end = self.args.sde_window_range
            last = min(end, len(stochastic)) - self.args.sde_window_size
            if self.args.sde_window_schedule == "progressive":
                moves = generation // self.args.sde_window_interval
                start = min(first + moves * self.args.sde_window_stride, last)
            else:
                start = int(rng.integers(first, last + 1))
            stochastic = stochastic[start : start + self.args.sde_window_size]
        number = max(1, round(self.args.timestep_fraction * len(stochastic)))
        trained = sorted(rng.choice(stochastic, size=number, replace=False).tolist())
        return stochastic, trained

    @property
    def _sampling_model(self) -> torch.nn.Module:
        # Sharded weights are only whole inside the wrapped forward; DDP's wrapper would only add synchronisation
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return self.model_wrapped
        return self.accelerator.unwrap_model(self.model)

    def _generate_and_score(self, inputs: list[dict[str, Any]]) -> list[MicroBatch]:
        """Samples the local part of a generation batch, scores it, and deals it to micro-batches."""
        generation = self._step // self._generate_every
        stochastic, trained = self._choose_steps(generation)
        edited = self._images_to_edit(inputs)
        number = self.args.steps_per_generation
        updates = max(1, number // self.args.gradient_accumulation_steps)
        samples = DealtSamples(deal(len(inputs), number, updates))
        with OrderedCalls[ScoredPart](background=self._scores_in_background) as scoring:
            images, projections = self._sample(inputs, edited, generation, stochastic, trained, samples, scoring)
            if self.advantage_power is not None:
                own = samples.hands[0]
                self.advantage_power.estimate_if_due(
                    self._measured_transitions(
                        FISHER_SAMPLES,
                        [inputs[i]["prompt"] for i in own],
                        trained,
                        samples.latents(0),
                        None if edited is None else [edited[i] for i in own],
                    )
                )
            advantages = self._score(inputs, images, projections, trained, scoring)
        return samples.micro_batches(inputs, edited, advantages)

    def _sample(
        self,
        inputs: list[dict[str, Any]],
        edited: list[Image.Image] | None,
        generation: int,
        stochastic: list[int],
        trained: list[int],
        samples: DealtSamples,
        scoring: OrderedCalls[ScoredPart],
    ) -> tuple[list[Image.Image], list[torch.Tensor]]:
        """
        Samples `inputs` in parts of one forward's size into `samples`, and has the groups scored that are complete.

        Returns:
            `tuple[list[PIL.Image.Image], list[torch.Tensor]]`: the images and, with dense rewards, the projected
                latents of each sample, `(T - trained[0], ...)`, on the host.
        """
        images: list[Image.Image] = []
        projections: list[torch.Tensor] = []
        model, size = self._sampling_model, self.args.per_device_train_batch_size
        offset = self.accelerator.process_index * len(inputs)
        total = len(inputs) // size * self.args.num_inference_steps
        scored = 0
        first_step, starts = self._starts(generation, inputs, stochastic)
        for first in range(0, len(inputs), size):
            part = slice(first, first + size)
            prompts = [row["prompt"] for row in inputs[part]]
            condition, negative_condition = self._conditions(
                prompts, self.args.guidance_scale, None if edited is None else edited[part]
            )
            places = range(offset + first, offset + first + size)
            with self._memory_shared_with(scoring), self.accelerator.autocast():
                trajectory = rollout(
                    self.backbone,
                    model,
                    self.dynamics,
                    condition,
                    negative_condition,
                    guidance_scale=self.args.guidance_scale,
                    initial_noise=starts[part],
                    generators=[sample_generator(self.seed, generation, 3, place) for place in places],
                    stochastic_steps=stochastic,
                    trained_steps=trained,
                    keep_projections=bool(self._dense_funcs),
                    first_step=first_step,
                    on_step=lambda step, done=first // size * self.args.num_inference_steps: self._show_stage(
                        f"sampling {done + step + 1}/{total}"
                    ),
                )
            if not trajectory.final.isfinite().all():
                raise FloatingPointError(
                    f"Sampling gave NaN or infinite latents for the prompts {prompts[:3]} at update "
                    f"{self.state.global_step}. If it is the first, noise_level ({self.args.noise_level:g}) or the "
                    "precision is at fault; later, training has diverged: lower learning_rate and resume from an "
                    "earlier checkpoint."
                )
            self._show_stage("decoding")
            with self._memory_shared_with(scoring):
                images += self._decode(trajectory.final)
            if self._dense_funcs:
                # On the host, and as latents: the pictures of all steps at once would take gigabytes
                projections += trajectory.projections.cpu().unbind()
            samples.add(first, trajectory)

            # Groups are never cut: a reward may compare a group's images with each other. What this process has of a
            # group that is split over processes is complete when its own images are.
            end = len(images)
            if end < len(inputs):
                end = max(0, (offset + end) // self.num_generations * self.num_generations - offset)
            if end > scored:
                if not scoring.background:
                    self._show_stage("rewards")
                scoring.add(partial(self._score_part, inputs[scored:end], images[scored:end], scored))
                scored = end
            if self.accelerator.num_processes == 1:
                # Several processes raise at a common point, so that none waits for the others
                scoring.raise_error()
        return images, projections

    @contextlib.contextmanager
    def _memory_shared_with(self, scoring: OrderedCalls[ScoredPart]) -> Iterator[None]:
        """Says so, should the accelerator's memory not be enough for sampling and the rewards at the same time."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            if not scoring.busy:
                raise
            raise torch.OutOfMemoryError(
                f"{error} Rewards were being computed while images were sampled: set overlap_rewards=False, or lower "
                "per_device_train_batch_size."
            ) from error

    def _starts(
        self, generation: int, inputs: list[dict[str, Any]], stochastic: list[int]
    ) -> tuple[int, torch.Tensor]:
        """
        Where the local samples of a generation batch begin: a step, and the latents there, `(N, ...)`.

        With `share_initial_noise` the images of a group are one and the same up to the first stochastic step: the ODE
        steps before it are taken once for each group.
        """
        number, first_step = len(inputs), min(stochastic)
        offset = self.accelerator.process_index * number
        places = [offset + i for i in range(number)]
        if not self.args.share_initial_noise:
            return 0, self._initial_noise(generation, places)
        groups = [place // self.num_generations for place in places]
        distinct = sorted(set(groups))
        latents = self._initial_noise(generation, distinct)
        if first_step > 0:
            # A process may have the end of one group and the beginning of another, and so one group more than others:
            # all take as many forwards, so that sharded ones stay in step
            world = range(self.accelerator.num_processes)
            most = (
                max(
                    ((rank + 1) * number - 1) // self.num_generations - rank * number // self.num_generations
                    for rank in world
                )
                + 1
            )
            rows = [inputs[groups.index(group)] for group in distinct]
            rows += rows[-1:] * (most - len(rows))
            padded = latents[[min(i, len(distinct) - 1) for i in range(most)]]
            latents = self._ode_prefix(rows, padded, first_step)
        return first_step, latents[[distinct.index(group) for group in groups]]

    def _ode_prefix(self, rows: list[dict[str, Any]], noise: torch.Tensor, num_steps: int) -> torch.Tensor:
        """The latents of `rows` after `num_steps` ODE steps from `noise`, both `(M, ...)`."""
        size = self.args.per_device_train_batch_size
        parts = []
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            condition, negative_condition = self._conditions(
                [row["prompt"] for row in part], self.args.guidance_scale, self._images_to_edit(part)
            )
            with self.accelerator.autocast():
                trajectory = rollout(
                    self.backbone,
                    self._sampling_model,
                    self.dynamics,
                    condition,
                    negative_condition,
                    guidance_scale=self.args.guidance_scale,
                    initial_noise=noise[first : first + size],
                    generators=[],
                    stochastic_steps=[],
                    trained_steps=[],
                    num_steps=num_steps,
                    on_step=lambda step: self._show_stage(f"sampling the groups' common steps {step + 1}/{num_steps}"),
                )
            parts.append(trajectory.final)
        return torch.cat(parts)

    def _initial_noise(self, generation: int, places: list[int]) -> torch.Tensor:
        """`x_1` for samples at `places` of the global generation batch, or with `share_initial_noise` for groups."""
        generators = [sample_generator(self.seed, generation, 2, place) for place in places]
        return draw_noise(self.backbone.latent_shape(), generators, self.accelerator.device)

    @torch.inference_mode()
    def _decode(self, latents: torch.Tensor) -> list[Image.Image]:
        # Small parts: decoding takes far more memory than a step, and gains nothing from a large batch
        return [
            image for part in latents.split(16) for image in self.backbone.decode(part.to(self.accelerator.device))
        ]

    # ---- Rewards and advantages ----

    @property
    def _scores_in_background(self) -> bool:
        """
        Whether rewards are computed while images are sampled.

        Not in the first sampling phase: the functions load their models then, and while one loads, the default dtype
        of the whole process is the model's. Nor with dropout, which draws from the global random generators, as the
        functions may: both would get other numbers at each run.
        """
        return self.args.overlap_rewards and self.args.disable_dropout and self._has_scored

    def _score_part(self, inputs: list[dict[str, Any]], images: list[Image.Image], first: int) -> ScoredPart:
        """Rewards of the samples from place `first` on, and what the functions logged."""
        notes = RewardNotes()
        try:
            return ScoredPart(first, self._calculate_rewards(inputs, images, notes=notes), notes)
        except RewardError as error:
            if not (self._scores_in_background and isinstance(error.__cause__, torch.OutOfMemoryError)):
                raise
            raise RewardError(
                f"{error} It was called while images were sampled, so that both needed memory: set "
                "overlap_rewards=False, or lower per_device_train_batch_size or the function's own batch size."
            ) from error

    def _calculate_rewards(
        self,
        inputs: list[dict[str, Any]],
        images: list[Image.Image],
        chosen: list[int] | None = None,
        notes: RewardNotes | None = None,
    ) -> torch.Tensor:
        """
        Rewards of local samples by every function, or the chosen ones; what they log goes into `notes`.

        Returns:
            `torch.Tensor`: `(N, number of functions)`, float32, on the CPU, NaN where a function does not apply or is
                not chosen.
        """
        chosen = list(range(len(self.reward_funcs))) if chosen is None else chosen
        notes = self._notes if notes is None else notes
        columns = {key: [row[key] for row in inputs] for key in inputs[0] if key != "prompt"}
        rewards = torch.full((len(inputs), len(self.reward_funcs)), torch.nan)
        rewards[:, chosen] = call_reward_funcs(
            [self.reward_funcs[i] for i in chosen],
            [self.reward_func_names[i] for i in chosen],
            [row["prompt"] for row in inputs],
            images,
            columns,
            timeout=self.args.reward_timeout,
            trainer_state=self.state,
            log_metric=notes.log_metric,
            log_extra=notes.log_extra,
        )
        return rewards

    def _warn_of_unscored(self, inputs: list[dict[str, Any]], rewards_per_func: torch.Tensor) -> None:
        unscored = self._combine(rewards_per_func).isnan()
        if unscored.any():
            row = int(unscored.nonzero()[0])
            logger.warning(
                f"Every reward function that counts returned None for {inputs[row]['prompt']!r}: the sample is left "
                "out of its group."
            )

    def _gathered_rewards(
        self, inputs: list[dict[str, Any]], images: list[Image.Image], chosen: list[int] | None = None
    ) -> torch.Tensor:
        """`_calculate_rewards` of all processes. An error in one of them is raised in all, so that none waits."""

        def score() -> torch.Tensor:
            rewards = self._calculate_rewards(inputs, images, chosen)
            if chosen is None:
                self._warn_of_unscored(inputs, rewards)
            return rewards

        return self._gathered(score)

    def _collected(self, inputs: list[dict[str, Any]], scoring: OrderedCalls[ScoredPart]) -> torch.Tensor:
        """Rewards of the local samples, as `_calculate_rewards`, when all parts have been scored."""
        parts = scoring.results()
        for part in parts:
            self._notes.take(part.notes, part.first, len(part.rewards))
        self._has_scored = True
        rewards = torch.cat([part.rewards for part in parts])
        self._warn_of_unscored(inputs, rewards)
        return rewards

    def _gathered(self, score: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `score` gives in all processes, one after another. An error in one is raised in all."""
        error, rewards = None, None
        try:
            rewards = score()
        except RewardError as reward_error:
            error = reward_error
        if self.accelerator.num_processes > 1:
            errors = [e for e in gather_object([None if error is None else str(error)]) if e is not None]
            if errors and error is None:
                raise RewardError(f"On another process: {errors[0]}")
        if error is not None:
            raise error
        return self.accelerator.gather(rewards.to(self.accelerator.device))

    def _combine(self, rewards_per_func: torch.Tensor) -> torch.Tensor:
        """Weighted sum over the functions that apply; NaN where none does. `(..., functions)` to `(...)`."""
        weights = self.reward_weights.to(rewards_per_func.device)
        rewards = (rewards_per_func * weights).nansum(dim=-1)
        # A function that is only watched, with a weight of 0, gives a sample no reward
        return rewards.masked_fill((rewards_per_func.isnan() | (weights == 0)).all(dim=-1), torch.nan)

    def _score(
        self,
        inputs: list[dict[str, Any]],
        images: list[Image.Image],
        projections: list[torch.Tensor],
        trained: list[int],
        scoring: OrderedCalls[ScoredPart],
    ) -> torch.Tensor:
        """
        Rewards, their metrics, and the advantages of the local samples, `(N, S)`.

        Args:
            inputs (`list[dict[str, Any]]`): the local rows, `N`.
            images (`list[PIL.Image.Image]`): the finished images.
            projections (`list[torch.Tensor]`): for dense rewards the projected latents of each sample, from the first
                trained step on, `(T - trained[0], ...)`, on the host.
            trained (`list[int]`): the trained steps.
            scoring ([`OrderedCalls`]): by which the finished images are scored.
        """
        self._show_stage("rewards")
        rewards_per_func = self._gathered(lambda: self._collected(inputs, scoring))
        rewards = self._combine(rewards_per_func)
        if not self.args.dense_rewards:
            advantages = self._shape(self._advantages(rewards_per_func, rewards))[:, None].expand(-1, len(trained))
        else:
            instant = self._instant_rewards(inputs, projections, rewards_per_func, trained[0])
            advantages = self._shape(self._dense_advantages(instant)[:, [step - trained[0] for step in trained]])
        self._log_rewards(rewards_per_func, rewards)
        self._metrics["train"]["diversity"].append(self._diversity(images, self.num_generations, len(rewards)))
        self._log_samples(inputs, images, rewards_per_func)
        local = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        return advantages[local].contiguous()

    def _instant_rewards(
        self, inputs: list[dict[str, Any]], projections: list[torch.Tensor], terminal: torch.Tensor, first: int
    ) -> torch.Tensor:
        """
        VGPO's reward of every step from `first` on (Eq. 10), of all processes' samples: `(N, T - first)`.

        One step's projections are decoded, scored and dropped before the next, so that no more images are held than
        the finished ones. Functions that can not judge an unfinished image count with their terminal reward.
        """
        number = self.args.num_inference_steps - first
        steps = []
        for t in range(number):
            by_func = terminal
            if self._dense_funcs and t < number - 1:
                self._show_stage(f"rewards of step {t + 1}/{number}")
                latents = torch.stack([own[t] for own in projections])
                by_func = terminal.clone()
                scored = self._gathered_rewards(inputs, self._decode(latents), self._dense_funcs)
                by_func[:, self._dense_funcs] = scored[:, self._dense_funcs]
            self._check_sign(by_func, first + t)
            steps.append(self._combine(by_func))
            present = steps[-1][~steps[-1].isnan()]
            if len(present) > 1:
                self._metrics["train"][f"instant_reward/mean_step_{first + t}"].append(present.mean().item())
                self._metrics["train"][f"instant_reward/std_step_{first + t}"].append(present.std().item())
        return torch.stack(steps, dim=1)

    def _check_sign(self, rewards_per_func: torch.Tensor, step: int) -> None:
        """VGPO's weights (Eq. 12) are shares of a sample's values, which must not be negative."""
        total = self._combine(rewards_per_func).nan_to_num(0.0)
        if total.min() >= 0:
            return
        row = rewards_per_func[total.argmin()] * self.reward_weights.to(rewards_per_func.device)
        parts = {name: value for name, value in zip(self.reward_func_names, row.tolist(), strict=True) if value < 0}
        # What a negative weight turns around needs an offset that is turned around, too
        positive = self.reward_weights[self.reward_func_names.index(next(iter(parts)))] > 0
        raise RewardError(
            "With dense_rewards, VGPO's weights need rewards of one sign, but "
            + " and ".join(f"the reward function {name!r} gave {value:g}" for name, value in parts.items())
            + f" (weight included) for an image as it stands after step {step}. Add an offset to it that makes all "
            f"its values {'positive' if positive else 'negative, as its weight is'}, such as `lambda prompts, images, "
            f"**kwargs: [value {'+' if positive else '-'} 5 for value in reward(prompts=prompts, images=images, "
            "**kwargs)]`, or set dense_rewards=False."
        )

    def _advantages(self, rewards_per_func: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
        """Advantages of all processes' samples, `(N,)`, from their rewards by each function and the weighted sum."""
        if self.args.multi_objective_aggregation == "sum_then_normalize":
            return self._group_advantages(rewards)
        weights = self.reward_weights.to(rewards_per_func.device)
        return normalize_then_sum(rewards_per_func, weights, self.num_generations)

    def _group_advantages(self, rewards: torch.Tensor) -> torch.Tensor:
        """Advantages from rewards `(N,)` of all processes; a NaN is left out of its group and gets 0, as in TRL."""
        missing = rewards.isnan()
        if not missing.any():
            return group_advantages(rewards, self.num_generations, scale_rewards=self.args.scale_rewards)
        groups = rewards.view(-1, self.num_generations)
        # At its group's mean a sample has no advantage and changes no other; only the spread must leave it out
        filled = torch.where(groups.isnan(), groups.nanmean(dim=1, keepdim=True).nan_to_num(0.0), groups)
        centred = group_advantages(filled.flatten(), self.num_generations, scale_rewards="none").view_as(groups)
        if self.args.scale_rewards == "group":
            number = (~groups.isnan()).sum(dim=1, keepdim=True)
            std = (centred.square().sum(dim=1, keepdim=True) / (number - 1).clamp(min=1)).sqrt()
            centred = centred / (std + STD_EPSILON)
        elif self.args.scale_rewards == "batch":
            present = rewards[~missing]
            centred = centred / ((present.std() if len(present) > 1 else 0.0) + STD_EPSILON)
        return centred.flatten()

    def _dense_advantages(self, instant_rewards: torch.Tensor) -> torch.Tensor:
        """VGPO's advantages from rewards `(N, T)` of all processes."""
        # A sample that no function applies to takes its group's mean: no signal, and the others keep theirs
        grouped = instant_rewards.unflatten(0, (-1, self.num_generations))
        mean = grouped.nanmean(dim=1, keepdim=True).nan_to_num(0.0)
        filled = torch.where(grouped.isnan(), mean, grouped).flatten(0, 1)
        values = cumulative_values(filled, self.args.value_discount)
        advantages = dual_advantages(values, self.num_generations, scale=self.args.value_scale)
        if self.args.value_scale > 0:
            relative = dual_advantages(values, self.num_generations, scale=0.0)
            absolute = (advantages - relative).abs().sum()
            share = absolute / (absolute + relative.abs().sum()).clamp(min=torch.finfo(torch.float32).tiny)
            self._metrics["train"]["advantage/value_share"].append(share.item())
        return advantages

    def _shape(self, advantages: torch.Tensor) -> torch.Tensor:
        """Clamped, then SLAS's power: the bound of the clamp is the one that Corollary 1 of SLAS asks for."""
        clipped = advantages.clamp(-self.args.advantage_clip, self.args.advantage_clip)
        power = self.args.advantage_power if self.advantage_power is None else self.advantage_power.choose(clipped)
        shaped = super_linear(clipped, power)
        # The effective sample size, as a share: 1 where all samples count alike, 1 / N where one of N counts alone
        squares = shaped.numel() * shaped.square().sum()
        share = shaped.abs().sum() ** 2 / squares.clamp(min=torch.finfo(torch.float32).tiny)
        self._metrics["train"]["advantage/effective_share"].append(share.item())
        return shaped

    def _last_transitions(self) -> Transitions:
        """`_measured_transitions` of the micro-batch that was last trained on."""
        batch = self._buffered_inputs[(self._step - 1) % self.args.steps_per_generation]
        return self._measured_transitions(KL_SAMPLES, batch.prompts, batch.steps, batch.latents, batch.images)

    def _measured_transitions(
        self,
        total: int,
        prompts: list[str],
        steps: Sequence[int],
        latents: torch.Tensor,
        images: list[Image.Image] | None = None,
    ) -> Transitions:
        """
        For [`AdvantagePower`]: of some samples of a micro-batch, `total` over all processes; `latents` `(B, S, ...)`.
        """
        chosen = self.advantage_power.measured(len(prompts), total)
        condition, negative_condition = self._conditions(
            [prompts[i] for i in chosen],
            self.args.guidance_scale,
            None if images is None else [images[i] for i in chosen],
        )
        latents = latents[chosen]

        def transition(index: int) -> Transition:
            # An autocast of its own each time: one caches the weights in half precision, and would not see them move
            with self.accelerator.autocast():
                velocity = self.backbone.guided_prediction(
                    self._sampling_model,
                    latents[:, index],
                    self.dynamics.schedule.timesteps[steps[index]],
                    condition,
                    negative_condition,
                    self.args.guidance_scale,
                )
            return self.dynamics.transition(velocity, latents[:, index], steps[index])

        return [partial(transition, index) for index in range(len(steps))]

    def _log_rewards(self, rewards_per_func: torch.Tensor, rewards: torch.Tensor) -> None:
        metrics = self._metrics["train"]
        self._append_reward_metrics(rewards_per_func, rewards, metrics)
        # What must differ within a group for it to have advantages: the sum, or any of the rewards that count
        compared = rewards[:, None]
        if self.args.multi_objective_aggregation == "normalize_then_sum":
            compared = rewards_per_func[:, (self.reward_weights != 0).to(rewards.device)]
        groups = compared.unflatten(0, (-1, self.num_generations))
        highest = groups.nan_to_num(nan=-math.inf).amax(dim=1)
        lowest = groups.nan_to_num(nan=math.inf).amin(dim=1)
        metrics["frac_reward_zero_std"].append((highest <= lowest).all(dim=1).float().mean().item())
        for name in sorted(set(gather_object(list(self._notes.metrics)))):
            values = gather_object(self._notes.metrics.get(name, []))
            metrics[name].append(sum(values) / len(values))
        self._notes.metrics.clear()

    def _append_reward_metrics(
        self, rewards_per_func: torch.Tensor, rewards: torch.Tensor, metrics: dict[str, list[float]]
    ) -> None:
        """Appends `reward`, `reward_std` and `rewards/{name}/mean` and `/std` to the lists of `metrics`."""
        columns = {f"rewards/{name}": rewards_per_func[:, i] for i, name in enumerate(self.reward_func_names)}
        for name, values in {"reward": rewards, **columns}.items():
            values = values[~values.isnan()]
            mean_name, std_name = ("reward", "reward_std") if name == "reward" else (f"{name}/mean", f"{name}/std")
            metrics[mean_name].append(values.mean().item() if len(values) else math.nan)
            metrics[std_name].append(values.std().item() if len(values) > 1 else math.nan)

    def _diversity(self, images: list[Image.Image], group_size: int, total: int) -> float:
        """Diversity within the groups of all processes' images, of which the first `total` count."""
        # A group may be split over processes; reduced pictures are small enough to be gathered
        thumbs = torch.from_numpy(thumbnails(images)).to(self.accelerator.device)
        thumbs = self.accelerator.gather(thumbs)[:total].cpu().numpy()
        return mean_pairwise_distance(pixel_features(thumbs), group_size)

    def _log_samples(
        self, inputs: list[dict[str, Any]], images: list[Image.Image], rewards_per_func: torch.Tensor
    ) -> None:
        # The latest samples of this process, from as many groups as fit
        number = min(self.args.num_images_to_log, len(images))
        chosen = sorted(range(len(images)), key=lambda i: (i % self.num_generations, i))[:number]
        offset = self.accelerator.process_index * len(inputs)
        self._logs["images"] = [images[i] for i in sorted(chosen)]
        self._logs["captions"] = [
            "\n".join(
                [inputs[i]["prompt"]]
                + [
                    f"{name} {value:.3g}"
                    for name, value in zip(self.reward_func_names, rewards_per_func[offset + i].tolist(), strict=True)
                ]
                + [f"{column} {values[i]}" for column, values in self._notes.by_place.items() if i in values]
            )
            for i in sorted(chosen)
        ]
        self._notes = RewardNotes()

    # ---- Loss ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        raise NotImplementedError("The loss is computed for one trained step at a time, see `_compute_loss`.")

    def _compute_loss(
        self,
        model: torch.nn.Module,
        batch: MicroBatch,
        index: int,
        condition: dict[str, torch.Tensor],
        negative_condition: dict[str, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Loss of one trained step, a mean over the samples (Flow-GRPO Eq. 5; GRPO-Guard Eq. 12).

        Args:
            model (`torch.nn.Module`): the wrapped policy.
            batch ([`MicroBatch`]): the samples.
            index (`int`): which of the batch's `S` trained steps.
            condition, negative_condition (`dict[str, torch.Tensor]`): of the prompts.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: two scalars, the loss, and the policy's part of it, without the KL.
        """
        args = self.args
        step = batch.steps[index]
        latents, next_latents, old_mean = batch.latents[:, index], batch.next_latents[:, index], batch.means[:, index]
        advantages = batch.advantages[:, index]

        def transition_of(module: torch.nn.Module):
            velocity = self.backbone.guided_prediction(
                module,
                latents,
                self.dynamics.schedule.timesteps[step],
                condition,
                negative_condition,
                args.guidance_scale,
            )
            return self.dynamics.transition(velocity, latents, step)

        transition = transition_of(model)
        log_ratios = log_ratio(
            self.dynamics.log_prob(next_latents, transition),
            batch.log_probs[:, index],
            transition.mean,
            old_mean,
            transition.std,
            kind=args.importance_ratio,
        )
        dt = self.dynamics.dt(step)
        weight = timestep_weight(args.timestep_weighting, std=transition.std, dt=dt, beta=self.dynamics.beta(step))
        losses = clipped_loss(
            log_ratios, advantages, epsilon=self.epsilon_low, epsilon_high=self.epsilon_high, weight=weight
        )
        policy_loss = losses.mean()
        kl = None
        if self.beta > 0:
            # The copy of full fine-tuning has not been prepared for autocast, as the policy has
            with torch.no_grad(), self.accelerator.autocast(), self._reference() as reference:
                ref_mean = transition_of(reference).mean
            kl = gaussian_kl(transition.mean, ref_mean, self.dynamics.diffusion(transition, step))
            losses = losses + self.beta * kl
            kl = kl.detach()
        self._ratio_statistics.add(
            step, log_ratios.detach(), advantages, self.epsilon_low, self.epsilon_high, kl, losses.detach()
        )
        self._note_first_ratio(log_ratios)
        return losses.mean(), policy_loss

    @contextlib.contextmanager
    def _reference(self) -> Iterator[torch.nn.Module]:
        """The model as it was before training."""
        if self.ref_model is not None:
            yield self.ref_model
        else:
            with self.accelerator.unwrap_model(self.model).disable_adapter():
                yield self._sampling_model

    def _note_first_ratio(self, log_ratios: torch.Tensor) -> None:
        if not self._ratio_checked:
            deviation = torch.expm1(log_ratios.detach()).abs().max()
            self._first_deviation = max(self._first_deviation, deviation.item())

    def _check_ratio(self) -> None:
        """Before the first update the policy is the one that sampled: every ratio must be 1."""
        # A run that resumes in the middle of a generation batch has updated since it sampled: the next one is checked
        if self._ratio_checked or self._step % self._generate_every >= self.current_gradient_accumulation_steps:
            self._first_deviation = 0.0
            return
        if not self.accelerator.sync_gradients:
            return
        self._ratio_checked = True
        deviation = max(gather_object([self._first_deviation]))
        allowed = 0.1 * min(self.epsilon_low, self.epsilon_high)
        self._metrics["train"]["ratio/first_update_deviation"].append(deviation)
        if deviation > allowed:
            logger.warning(
                f"Before the first update the importance ratio should be exactly 1, but it is off by up to "
                f"{deviation:.2e} (clip range {self.epsilon_low:g}): clipping will act on noise. Training and rollout "
                "run different arithmetic. Likely causes: dropout that is still on, a model that keeps state between "
                "calls or draws random numbers, batches of different shapes, torch.compile, or half precision. Try "
                "bf16=False and fp16=False, and compare."
            )

    # ---- Logging ----

    def _show_stage(self, stage: str) -> None:
        """Says beside the progress bar what is going on."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, FlowProgressCallback):
                callback.show_stage(stage)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            metrics = {}
            for name, values in self._metrics["train"].items():
                valid = [value for value in values if not math.isnan(value)]
                metrics[name] = sum(valid) / len(valid) if valid else None
            sums = self.accelerator.reduce(self._ratio_statistics.sums, reduction="sum")
            metrics |= self._ratio_statistics.metrics(sums, with_kl=self.beta > 0)
            self._ratio_statistics.sums.zero_()
            self._metrics["train"].clear()
            logs.update(metrics)
            if self.args.log_images and self._logs["images"]:
                self._write_grid(self._logs["images"], self._logs["captions"], f"step-{self.state.global_step:06d}")
                self._logs = {"images": [], "captions": []}
        super().log(logs, start_time)

    def _write_grid(self, images: list[Image.Image], captions: list[str], name: str) -> None:
        """A grid of pictures as `output_dir/images/{name}.png` and in the trackers."""
        if not self.args.log_images or not self.is_world_process_zero():
            return
        number = self.args.num_images_to_log
        folder = Path(self.args.output_dir, "images")
        folder.mkdir(parents=True, exist_ok=True)
        grid = image_grid(images[:number], captions[:number], path=folder / f"{name}.png")
        tag = name.rsplit("-", 1)[0]
        for tracker in self.args.report_to:
            if tracker in ("wandb", "trackio"):
                module = __import__(tracker)
                if tracker == "trackio" or module.run is not None:
                    module.log({f"images/{tag}": module.Image(grid)})
        for callback in self.callback_handler.callbacks:
            writer = getattr(callback, "tb_writer", None)
            if writer is not None:
                writer.add_image(f"images/{tag}", np.asarray(grid), self.state.global_step, dataformats="HWC")

    # ---- Saving, resuming, sharing ----

    @contextlib.contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """With `use_ema`, the averaged weights in place of the trained ones."""
        if self.ema is None:
            yield
            return
        parameters = self._trained_parameters()
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The adapter in diffusers' format (or the full model), and PEFT's own files, which resuming needs."""
        output_dir = self.args.output_dir if output_dir is None else output_dir
        if not self.args.should_save:
            return
        os.makedirs(output_dir, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        is_checkpoint = Path(output_dir).name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")

        # What is shared is the average, where there is one; a checkpoint goes on from the trained weights themselves
        lora = isinstance(model, PeftModel)
        with contextlib.nullcontext() if is_checkpoint and not lora else self._averaged_weights():
            if lora:
                sharing.save_lora(
                    type(self.pipeline),
                    model,
                    output_dir,
                    component=self.backbone.component,
                    state_dict=state_dict,
                    base_model=self.model_id,
                )
            else:
                sharing.save_full(model, output_dir, state_dict=state_dict)
        if lora and is_checkpoint and self.ema is not None:
            sharing.save_adapter(model, output_dir, state_dict=state_dict, base_model=self.model_id)
        Path(output_dir, "training_args.json").write_text(self._shown_args())

    def _shown_args(self) -> str:
        """The config as JSON, without the token that loading the model may need: checkpoints may be published."""
        args = self.args.to_dict()
        if isinstance(args.get("model_init_kwargs"), dict):
            args["model_init_kwargs"] = {
                name: "<TOKEN>" if name == "token" else value for name, value in args["model_init_kwargs"].items()
            }
        return json.dumps(args, indent=2, default=str)

    @property
    def _over_optimization_callbacks(self) -> list[OverOptimizationCallback]:
        return [cb for cb in self.callback_handler.callbacks if isinstance(cb, OverOptimizationCallback)]

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.push_to_hub and self.args.hub_strategy != "end":
            self.create_model_card()
        try:
            # A folder left by a process that was killed while writing it would mix with this one
            if self.is_world_process_zero() and folder.exists():
                shutil.rmtree(folder)
            self.accelerator.wait_for_everyone()
            self._save_rollouts(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            if not self.args.save_only_model:
                self._saved = self.state.global_step, str(folder)
        except Exception as error:
            if self.is_world_process_zero():
                shutil.rmtree(folder, ignore_errors=True)
            free = shutil.disk_usage(Path(self.args.output_dir)).free / 2**20
            raise RuntimeError(
                f"The checkpoint {folder} could not be written ({type(error).__name__}: {error}); {free:.0f} MiB are "
                "free there. What had been written of it is removed; earlier checkpoints are untouched. Make room and "
                "resume with train(resume_from_checkpoint=True)."
            ) from error

    def _note_update(self) -> None:
        """Notes what sampling changes, for `_save_after_failure`."""
        self._last_update = LastUpdate(
            step=self._step,
            buffered_inputs=self._buffered_inputs if self._step % self._generate_every else None,
            advantage_power=None if self.advantage_power is None else self.advantage_power.snapshot(),
            random_states=RandomStates.take(self.accelerator.device),
        )

    def _save_after_failure(self) -> str:
        """
        When a reward has failed, on all processes: writes a checkpoint of the run as it was after its last update,
        unless there is one. Going on from it equals a run in which nothing failed.

        Returns:
            `str`: where the run is saved and how to go on, for the error message.
        """
        step = self.state.global_step
        if self._saved is None or self._saved[0] != step:
            last = self._last_update
            if last is None:
                return "No update had been made, so there is nothing to save."
            self._step, self._buffered_inputs = last.step, last.buffered_inputs
            if self.advantage_power is not None:
                self.advantage_power.go_back(last.advantage_power)
            last.random_states.restore(self.accelerator.device)
            only_model, self.args.save_only_model = self.args.save_only_model, False
            try:
                self._save_checkpoint(self.model, trial=None)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            except Exception as error:  # the reward's is the one to raise
                return f"The run as it was after update {step} could not be saved: {error}"
            finally:
                self.args.save_only_model = only_model
        folder = self._saved[1]
        return (
            f"The run is saved as it was after update {step}, the last one, in {folder}. With the cause removed, go "
            f"on with train(resume_from_checkpoint={folder!r}): the result is that of a run without this failure."
        )

    def _save_rollouts(self, folder: Path) -> None:
        """The count of micro-batches and, in the middle of a generation batch, the rest of it."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.is_world_process_zero():
            state = {"step": self._step, "num_processes": self.accelerator.num_processes}
            state["over_optimization"] = [callback.export() for callback in self._over_optimization_callbacks]
            if self._base_scores:
                state["base_scores"] = {key: base.to_json() for key, base in self._base_scores.items()}
            if self.ema is not None:
                state["ema_step"] = self.ema.optimization_step
                save_file(
                    {str(i): p.contiguous() for i, p in enumerate(self.ema.shadow_params)},
                    folder / "ema.safetensors",
                )
            if self.advantage_power is not None:
                state["advantage_power"] = self.advantage_power.save(folder)
            (folder / STATE_NAME).write_text(json.dumps(state))
        if self._step % self._generate_every:
            save_micro_batches(self._buffered_inputs, folder, self.accelerator.process_index)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not Path(checkpoint, STATE_NAME).is_file():
            return
        state = json.loads(Path(checkpoint, STATE_NAME).read_text())
        self._step = state["step"]
        if self.advantage_power is not None and "advantage_power" in state:
            self.advantage_power.load(Path(checkpoint), state["advantage_power"])
        self._base_scores |= {key: BaseScores.from_json(base) for key, base in state.get("base_scores", {}).items()}
        is_kept = any(gather_object([Path(self.args.output_dir, BEST_FOLDER).is_dir()]))
        exported = state.get("over_optimization", [])
        for callback, content in zip(self._over_optimization_callbacks, exported, strict=False):
            callback.restore(content, is_kept)
        self._load_average(checkpoint)
        if self._step % self._generate_every:
            if state["num_processes"] != self.accelerator.num_processes:
                raise ValueError(
                    f"{checkpoint} was written in the middle of a generation batch by {state['num_processes']} "
                    f"processes, and can not be resumed by {self.accelerator.num_processes}. Use as many, or a "
                    "checkpoint at the end of a generation batch."
                )
            self._buffered_inputs = load_micro_batches(
                Path(checkpoint), self.accelerator.process_index, self.accelerator.device
            )

    def _load_average(self, checkpoint: str) -> None:
        """With `use_ema`, the average as it was at a checkpoint that has one."""
        state = json.loads(Path(checkpoint, STATE_NAME).read_text())
        if self.ema is None or "ema_step" not in state:
            return
        # safetensors does not know the names of all devices ("cpu:0" in a process group)
        shadow = load_file(Path(checkpoint, "ema.safetensors"))
        self.ema.shadow_params = [shadow[str(i)].to(self.accelerator.device) for i in range(len(shadow))]
        self.ema.optimization_step = state["ema_step"]

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
        # The average is what was found best, and what will be saved
        self._load_average(self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        policy = self.accelerator.unwrap_model(self.model if model is None else model)
        if isinstance(policy, PeftModel) and not self.is_fsdp_enabled:
            # Into the adapter that is there: PEFT's load_adapter would add a second one with a config of its own
            path = Path(resume_from_checkpoint, "adapter_model.safetensors")
            if not path.is_file():
                raise ValueError(
                    f"{resume_from_checkpoint!r} holds no adapter, but the trainer trains one. Resume without a "
                    "peft_config, or from a checkpoint of an adapter."
                )
            try:
                set_peft_model_state_dict(policy, load_file(path))
            except RuntimeError as error:
                raise ValueError(
                    f"The adapter in {resume_from_checkpoint!r} does not fit the trainer's: another rank or other "
                    "target modules. Resume with the peft_config that it was trained with (adapter_config.json there)."
                ) from error
        elif not isinstance(policy, PeftModel) and not self.is_fsdp_enabled:
            sharing.load_full(policy, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
