"""[`FlowRLTrainer`]: the order of things and nothing else, on TRL's base trainer. Each stage is an object of its own,
and what is learned stands in an [`Algorithm`]. Methods have the names and the order of TRL's `GRPOTrainer`."""

import copy
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.integrations import TrackioCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import speed_metrics

from trl_flow import sharing
from trl_flow.algorithms import Algorithm, MicroBatch
from trl_flow.backbones import Backbone, get_backbone
from trl_flow.backbones.base import BACKBONE_SETTINGS
from trl_flow.backbones.contract import scheduled
from trl_flow.backbones.projection import load_projection_vae
from trl_flow.backbones.prompt_length import warn_of_long_prompts
from trl_flow.backbones.settings import evaluation_steps
from trl_flow.prompts.rows import prompts_to_measure
from trl_flow.rewards.checks import reward_names
from trl_flow.rewards.named import as_rewards
from trl_flow.rewards.scorer import RewardScorer
from trl_flow.shapes.bundled import BUNDLED, is_bundled
from trl_flow.sharing.samples import write_samples
from trl_flow.trainer import checks, resuming
from trl_flow.trainer.best_metric import check_best_metric
from trl_flow.trainer.callbacks import LoopCallback, RunLogCallback
from trl_flow.trainer.checkpoints import checkpoint_to_resume, step_of
from trl_flow.trainer.compilation import announcement
from trl_flow.trainer.dynamic_sampling import DynamicSampler
from trl_flow.trainer.evaluator import EvaluationResult, Evaluator, group_diversity
from trl_flow.trainer.flow_rl_config import FlowRLConfig
from trl_flow.trainer.groups import of_one_reading, warn_of_prompts_left_out
from trl_flow.trainer.init_adapter import adapter_of_its_own, check_origin
from trl_flow.trainer.loading import load_pipeline
from trl_flow.trainer.metrics import Metrics, SampleLog, going_on_without
from trl_flow.trainer.model_files import ModelFilesTrainer
from trl_flow.trainer.optimizer_modes import OptimizerModes
from trl_flow.trainer.over_optimization import OverOptimizationCallback
from trl_flow.trainer.phase_scores import PhaseScorer
from trl_flow.trainer.policy import Policy
from trl_flow.trainer.prepare import prepare_module
from trl_flow.trainer.progress import Clock, FlowProgressCallback, messages_above_the_bar
from trl_flow.trainer.prompt_cache import PromptCache
from trl_flow.trainer.publisher import Publisher
from trl_flow.trainer.rollout_buffer import RolloutBuffer
from trl_flow.trainer.run_folder import RunFolder
from trl_flow.trainer.run_state import RunState
from trl_flow.trainer.sampler import Sampler
from trl_flow.trainer.sharding import set_precision
from trl_flow.trainer.trackers import TrackioAtUpdates, log_config, sections_kept
from trl_flow.trainer.trl_compat import identity


RewardFunc = Callable[..., list[float | None]] | str


class FlowRLTrainer(ModelFilesTrainer):
    """
    Base of the trainers: all but the algorithm, which [`create_algorithm`] of a subclass returns.

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            Hub id or folder of a pipeline, or a loaded one, whose transformer (or U-Net) is trained in place.
        reward_funcs (`Callable`, `str` or a list of them):
            Functions, or their names as in recipes (`"pickscore"`, `"my_rewards.brightness"`). Called by keyword as
            `func(prompts=..., images=..., **columns, trainer_state=..., log_metric=..., log_extra=...)`, with lists of
            one entry for each sample (of a video `images` has a frame, and `videos` the list of all); return a list of
            numbers, `None` where they do not apply. May be `async`.
        args ([`FlowRLConfig`], *optional*):
            Configuration; defaults to that of `config_class` with `"{name of the model}-{method}"` as `output_dir`.
        train_dataset ([`~datasets.Dataset`]):
            A column `"prompt"` of non-empty strings, and for a pipeline that edits images `"image"`; all columns but
            the prompt reach the reward functions under their own names.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*): prompts to evaluate on.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*), optimizers (`tuple`, *optional*):
            Further callbacks; an optimizer and a scheduler, as in [`~transformers.Trainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            Trains an adapter; without it, and without `init_adapter`, all weights of the transformer are trained.
        backbone ([`Backbone`], *optional*):
            Instead of the one chosen by the pipeline's class, for pipelines of your own.
        eval_reward_funcs (`Callable`, `str` or a list of them, *optional*):
            Functions as `reward_funcs` that are never optimized: evaluations score by them too, and divide by what
            the base model scores on the same prompts from the same seeds (`eval_gold/{name}` and `eval_gold/average`,
            where 1 is the base model). Need an `eval_dataset`, and a positive mean for the base model.

    Raises:
        TypeError, ValueError: for anything that would make training fail later; nothing has been written then.

    Example:

    ```python
    from trl_flow import FlowGRPOConfig, FlowRLTrainer
    from trl_flow.algorithms import ClippedPolicyGradient

    class MyTrainer(FlowRLTrainer):  # takes the arguments below
        _name = "mine"
        config_class = FlowGRPOConfig

        def create_algorithm(self):  # or an algorithm of your own
            return ClippedPolicyGradient(self.args, self.backbone, self.reward_weights)
    ```
    """

    loss_is_scaled_for_ga = True
    _tag_names = ["trl_flow"]
    config_class: type[FlowRLConfig] = FlowRLConfig

    def create_algorithm(self) -> Algorithm:
        """The [`Algorithm`] to learn by. It can use `self.args`, `self.backbone`, and `self.reward_weights`."""
        raise NotImplementedError

    def __init__(
        self,
        model: str | os.PathLike | DiffusionPipeline,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: FlowRLConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
        backbone: Backbone | None = None,
        eval_reward_funcs: RewardFunc | list[RewardFunc] | None = None,
    ):
        checks.check_model(model, backbone, args, self.config_class)
        is_path = isinstance(model, str | os.PathLike)
        if args is None:
            name = model if is_path else model.config.get("_name_or_path") or "model"
            args = self.config_class(f"{Path(name).name}-{self._name}")
        args = copy.copy(args)  # some fields are changed below; the caller's object may serve a second trainer

        # Data and rewards first: they are cheap to check, a model is not cheap to load
        reward_funcs, eval_reward_funcs = as_rewards(reward_funcs), as_rewards(eval_reward_funcs)
        names, number = reward_names([*reward_funcs, *eval_reward_funcs]), len(reward_funcs)
        options = {"timeout": args.reward_timeout, "frame": args.reward_frame}
        self.scorer = RewardScorer(reward_funcs, names=names[:number], **options)
        self.gold_scorer = RewardScorer(eval_reward_funcs, names=names[number:], **options)
        datasets = {"train_dataset": train_dataset, **checks.named_eval_datasets(eval_dataset)}
        for name, dataset in datasets.items():
            checks.check_dataset(dataset, name)
        scored = self.scorer, self.gold_scorer, train_dataset, eval_dataset, args
        checks.check_rewards(*scored)
        check_best_metric(args, self.scorer.names, self.gold_scorer.names, eval_dataset)
        checks.check_over_optimization(callbacks or [], self.gold_scorer.names, eval_dataset, args)
        self.reward_weights = torch.tensor(args.reward_weights or [1.0] * number, dtype=torch.float32)
        checks.check_output_dir(args)
        peft_config = adapter_of_its_own(args.init_adapter, peft_config)
        if peft_config is not None:
            sharing.check_lora_config(peft_config)

        # Model. A LoRA draws its initial weights at random, so the seed comes first.
        set_seed(args.seed)
        self.pipeline = load_pipeline(model, args, peft_config) if is_path else model
        self.pipeline.set_progress_bar_config(disable=True)
        settings = {name: getattr(args, name) for name in BACKBONE_SETTINGS}
        self.backbone = backbone or get_backbone(self.pipeline, **settings)
        self.model_id = str(model) if is_path else self.pipeline.config.get("_name_or_path")
        checks.check_backbone(self.backbone, args, peft_config)
        projection_vae = getattr(args, "projection_vae", None)
        if projection_vae is not None:
            projection_vae = load_projection_vae(projection_vae, self.backbone)
            if not isinstance(args.projection_vae, str):  # the settings are saved as text
                args.projection_vae = str(projection_vae.config.get("_name_or_path") or type(projection_vae).__name__)
        checks.check_rewards(*scored, videos=self.backbone.frames_per_second is not None)
        if args.eval_num_inference_steps is None:
            args.eval_num_inference_steps = evaluation_steps(self.backbone, args.num_inference_steps)
        scheduled(self.backbone, args.eval_num_inference_steps)
        for name, dataset in datasets.items():
            checks.check_images(dataset, name, self.backbone)
            warn_of_long_prompts(self.backbone, [*prompts_to_measure(dataset), args.negative_prompt or ""], name)
        module = prepare_module(self.backbone, args, peft_config)
        checks.probe_output_dir(args, sum(p.numel() for p in module.parameters() if p.requires_grad))

        # Before the model goes to the device: the text encoders may need the room there
        conditions = PromptCache.of(self.backbone, args)
        conditions.encode_ahead(args, list(datasets.values()))
        self._num_prompts = len(train_dataset)
        train_dataset = checks.repeated(train_dataset, args)
        given = {"eval_dataset": eval_dataset, "callbacks": callbacks, "optimizers": optimizers}
        super().__init__(model=module, args=args, data_collator=identity, train_dataset=train_dataset, **given)
        checks.check_single_device(args)
        set_precision(self.accelerator, args, trains_adapter=peft_config is not None)
        # Only used with `remove_unused_columns=True`
        self._signature_columns = ["prompt", *(["image"] if self.backbone.takes_image else [])]
        for callback in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):  # which print all that is logged
            self.remove_callback(callback)
        self._progress = FlowProgressCallback(shows_bar=not args.disable_tqdm)
        self.add_callback(self._progress)
        if self.pop_callback(TrackioCallback) is not None:
            self.add_callback(TrackioAtUpdates())

        self.algorithm = self.create_algorithm()
        options = {"wrapped": lambda: self.model_wrapped, "keep_reference": self.algorithm.needs_reference}
        options |= {"conditions": conditions, "keep_old": self.algorithm.needs_old}
        self.policy = Policy(self.backbone, args, self.accelerator, **options)
        dynamics, sampled_by = self.algorithm.dynamics, self.algorithm.sampled_by
        self.sampler = Sampler(self.policy, dynamics, args, self._show_stage, sampled_by)
        given = self.scorer, self.reward_weights, self.sampler, args, self.accelerator
        self.phase_scorer = PhaseScorer(*given, projection_vae=projection_vae)
        self.dynamic_sampler = DynamicSampler(args, train_dataset, self.algorithm, self.phase_scorer)
        given = self.policy, self.sampler, self.scorer, self.reward_weights, self.gold_scorer, args
        self.evaluator = Evaluator(*given, save=lambda to: self.save_model(os.fspath(to), _internal_call=True))
        stateful = {"policy": self.policy, "algorithm": self.algorithm, "evaluator": self.evaluator}
        about = {"reward_funcs": self.scorer.names, "prompts": len(train_dataset), "model": self.model_id}
        self.run_state = RunState(args, stateful, about)
        self.run_folder = RunFolder(args)
        self.optimizer_modes = OptimizerModes(lambda: self.optimizer)
        self.metrics = Metrics(self.accelerator)
        self.sample_log = SampleLog(args, self.scorer.names)
        self.publisher = Publisher(args, self.backbone, self.model_id, self.scorer.names, list(datasets.values()))
        model = BUNDLED if is_bundled(self.model_id) else self.model_id
        about = {"config": type(args).__name__, "model": model, "rewards": self.scorer.names}
        self._run_log, self._about = RunLogCallback(about), about
        self.add_callback(self._run_log)
        self.add_callback(LoopCallback(self._before_training, self._after_update))
        self._clock, self._train_step_time, self._logged_at = Clock(), 0.0, 0
        self._stage = self._interrupted = "starting"

    # ---- Training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        Trains, then saves the adapter (or model) and the trainer's state to `output_dir` unless `save_strategy` is
        `"no"`. `resume_from_checkpoint` is a checkpoint's folder, `True` for the last complete one in `output_dir`, or
        `"auto"` for that one if there is one, and else a new run.

        Raises:
            ValueError: if there is no complete checkpoint to resume from, it was written with other batches or another
                adapter, the run has come to its end, or another process trains into `output_dir`.
            OSError: if a reward's model cannot be loaded; nothing has been sampled then.
            RewardError: if a reward function fails. Updates are saved first, whatever `save_strategy` is; so they are,
                unless it is `"no"`, when a single process is interrupted or fails in another way.
        """
        bar = closing(self._progress)
        with self.run_folder.locked(), messages_above_the_bar(), bar, self._saving_what_is_trained():
            self.accelerator.wait_for_everyone()  # the main process may still be writing the checkpoint to resume from
            checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args)
            callbacks = self.callback_handler.callbacks  # those that were added after the constructor, too
            checks.check_over_optimization(callbacks, self.gold_scorer.names, self.eval_dataset, self.args)
            self.run_state.parts |= OverOptimizationCallback.by_name(callbacks)
            self.run_state.reset()
            self.metrics.clear()
            self._train_step_time, self.publisher.best_step = 0.0, None
            if checkpoint is not None:
                self.run_state.check(Path(checkpoint))
                check_origin(checkpoint, self.args)
                resuming.check_adapter(self.policy.module, Path(checkpoint))
                resuming.take_over(self.args, self.run_state.about, Path(checkpoint))
                self._saved = step_of(checkpoint), checkpoint
            for scorer in (self.scorer, self.gold_scorer):
                scorer.load()  # a model that cannot be loaded is found out now, and not after the first sampling phase
            self.run_folder.begin(checkpoint)
            self.accelerator.wait_for_everyone()
            with self._compiled():
                output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
            self.optimizer_modes.eval()
            if self.args.save_strategy != "no":
                self.save_model(_internal_call=True)
                self.save_state()
                self.accelerator.print(self.publisher.where(self.policy.is_adapter, self.state))
        return output

    @contextmanager
    def _compiled(self) -> Iterator[None]:
        """While training, so that the pipeline is afterwards as it was."""
        if not self.args.torch_compile:
            yield
            return
        with self.policy.compiled(self._show_compiling) as number:
            self.accelerator.print(announcement(self.args, number))
            yield

    def _build_accelerator_args(self, **kwargs) -> dict[str, Any]:
        # accelerate would compile updates alone, and switch TF32 on
        return super()._build_accelerator_args(**kwargs) | {"dynamo_plugin": TorchDynamoPlugin(backend="no")}

    def training_step(self, model, inputs, num_items_in_batch=None):
        start = time.perf_counter()
        model.train()
        self.optimizer_modes.train()
        batch = self._prepare_inputs(inputs)
        self._show_stage("updating")
        condition = self.policy.condition(batch.prompts, batch.images)
        units, total = self.algorithm.units(batch), torch.zeros((), device=self.accelerator.device)
        measures = self.args.diagnostics_steps and self.state.global_step % self.args.diagnostics_steps == 0
        # One forward and backward each: memory does not grow with their number
        for number, unit in enumerate(units, start=1):
            self._show_stage(f"updating, step {number} of {len(units)}")
            with self.policy.deferred_sync(defer=number < len(units)):
                with self.compute_loss_context_manager():
                    output = self.algorithm.loss(self.policy, batch, unit, condition)
                loss = output.loss.mean() / (len(units) * self.current_gradient_accumulation_steps)
                if measures:
                    norm = self.policy.gradient_norm(output.policy_loss.mean())
                    self.metrics.append({f"grad_norm/step_{unit}": norm})
                self.policy.backward(loss)
            self.metrics.add(unit, output)
            total += loss.detach()
        self.run_state.advance()
        self._train_step_time += time.perf_counter() - start
        if self.accelerator.sync_gradients:
            self.metrics.append({"step_time": self._train_step_time})
            self._train_step_time = 0.0
        return total

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> MicroBatch:
        self.policy.generation = self.run_state.generation
        if self.run_state.needs_samples:
            needed = self.algorithm.needs_sampling_weights(self.policy)
            self.run_state.sampling_weights = self.policy.copy_weights() if needed else []
            self.run_state.micro_batches = self._generate_and_score(generation_batch)
        self.policy.updates_since_sampling = self.run_state.update
        self.policy.sampling_weights = self.run_state.sampling_weights
        return self.run_state.micro_batch

    def _generate_and_score(self, rows: list[dict[str, Any]]) -> list[MicroBatch]:
        self._show_stage("sampling")
        rows = of_one_reading(rows, self.train_dataset, self.args)
        plan = self.algorithm.plan(self.run_state.generation)
        buffer = RolloutBuffer(len(rows), self.args)
        with self.phase_scorer.phase(rows, plan, self.state) as phase:
            for part in self.sampler.sample(rows, plan, self.run_state.generation):
                buffer.add(part.first, self.algorithm.keep(part.rollout))
                phase.add(part)
            scores = phase.finish()
        drawn, number, refilled = scores.rewards_per_func, len(rows), {}
        diversity = group_diversity(self.accelerator, phase.images, self.args.num_generations, len(drawn))
        if self.args.dynamic_sample:
            scores, refilled = self.dynamic_sampler.refill(phase, scores, buffer, self.run_state.generation)
        phase.measure(drawn)
        rewards = scores.rewards_per_func
        chosen, scores = phase.choose(scores)
        advantages, stats = self.algorithm.advantages(scores)
        self.metrics.append({**phase.metrics, "diversity": diversity, **refilled, **stats})
        first = self.args.process_index * number
        self.sample_log.take(rows, phase.images, rewards[first : first + number], phase.logs)
        images, trained = self.sampler.images_to_edit(rows), len(advantages) // self.args.world_size
        own = slice(self.args.process_index * trained, (self.args.process_index + 1) * trained)
        chosen = None if chosen is None else (chosen[own] - first).tolist()
        return buffer.finish(rows, plan.kept, advantages[own], images, chosen)

    def _before_training(self) -> None:
        warn_of_prompts_left_out(self._num_prompts, self.state.max_steps, self.args)
        self._watch_steps()
        if self.is_world_process_zero():
            gold = ", ".join(self.gold_scorer.names)
            about = {**self._about, "rewards": ", ".join(self.scorer.names), "gold": gold or "none"}
            about = {f"run/{name}": value for name, value in about.items()}
            log_config(about, self.args.report_to, self.callback_handler)
        self._clock, self._logged_at = Clock(), self.state.global_step
        self.state.compute_steps(self.args, self.state.max_steps)  # transformers keeps the checkpoint's
        if self._saved is not None and (best := self.state.best_model_checkpoint) is not None:
            # That of the run that is resumed: its folder may have been moved, and another run's be there
            best = Path(self._saved[1]).parent / Path(best).name
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        # All evaluation sets are scored by the base model, which is logged as update 0
        if self.gold_scorer.reward_funcs:
            for name, dataset in checks.chosen_eval_datasets(None, self.eval_dataset).items():
                start, prefix = time.time(), "eval" if name is None else f"eval_{name}"
                result = self.evaluator.evaluate_base(dataset, self.state, name)
                is_logged = any(f"{prefix}_reward" in entry for entry in self.state.log_history)
                begins = self.evaluator.is_untrained and self.state.global_step == 0
                if begins and not is_logged and not self.args.eval_on_start:
                    if not self.policy.starts_at_reference:
                        result = self.evaluator.evaluate(dataset, self.state, name)
                    self._log_evaluation(result, prefix, start)
        self.evaluator.is_untrained = False
        if self.run_state.evaluation_due and self.args.eval_strategy != "no":
            self._evaluate_saved()

    def _after_update(self) -> None:
        self._counted_at = self.state.global_step
        self.policy.after_update()
        self.run_state.after_update()
        self.metrics.append(self.algorithm.after_update(self.policy))

    def _save_checkpoint(self, model, trial):
        self._show_stage("saving")
        with self.optimizer_modes.evaluating():
            super()._save_checkpoint(model, trial)

    def create_scheduler(self, *args, **kwargs):
        self.policy.begin()  # the model has just been wrapped
        return super().create_scheduler(*args, **kwargs)

    # ---- Evaluation ----

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Draws every prompt of `eval_dataset` (a [`~datasets.Dataset`], a `dict` of them, or a key of the trainer's own,
        which is the default) along the ODE, with seeds that depend on the prompt's row alone, and scores it. Training
        is not affected: all random states are as before.

        Returns:
            `dict[str, float]`: `{prefix}_reward`, `{prefix}_rewards/{name}/mean` and so on, with `eval_reward_funcs`
                `{prefix}_gold/average` and so on, and `{prefix}_diversity` with several images for each prompt.

        Raises:
            ValueError: if there is no such set, or its gold scores cannot be normalized to the base model's.
        """
        metrics: dict[str, float] = {}
        for name, dataset in checks.chosen_eval_datasets(eval_dataset, self.eval_dataset).items():
            checks.check_dataset(dataset, "eval_dataset")
            checks.check_images(dataset, "eval_dataset", self.backbone)
            if eval_dataset is not None:  # those of the trainer were looked at when it was made
                warn_of_long_prompts(self.backbone, prompts_to_measure(dataset), "eval_dataset")
            start = time.time()
            with self.optimizer_modes.evaluating():
                result = self.evaluator.evaluate(dataset, self.state, name)
            is_named = name is not None and not isinstance(eval_dataset, str)
            own = self._log_evaluation(result, f"{metric_key_prefix}_{name}" if is_named else metric_key_prefix, start)
            if self.evaluator.is_untrained and (eval_dataset is None or isinstance(eval_dataset, str)):
                self._run_log.before.append(self.state.log_history[-1])
            self.control.should_evaluate = False  # as CallbackHandler.on_evaluate, which not always passes further
            told = {"metrics": own, "evaluation": None if result.gold is None else result}
            event = "on_evaluate", self.args, self.state, self.control
            self.control = self.callback_handler.call_event(*event, **told)
            metrics |= own
        return metrics

    def _log_evaluation(self, result: EvaluationResult, prefix: str, start: float | None = None) -> dict[str, float]:
        metrics = {f"{prefix}_{name}": value for name, value in result.metrics.items()}
        if start is not None:
            metrics |= speed_metrics(prefix, start, num_samples=result.num_samples)
        with sections_kept():
            super().log(metrics)  # first: a tracker may start with its first log
        if result.images:
            name = f"{prefix}-{self.state.global_step:06d}"
            self.sample_log.write(result.images, result.prompts, name, self.state, self.callback_handler)
            is_first = result.name is None or result.name == next(iter(self.eval_dataset))
            if self.args.log_images and is_first and self.is_world_process_zero():
                with going_on_without(Path(self.args.output_dir, "images", "samples")):
                    write_samples(self.args.output_dir, result.images, result.prompts, self.state.global_step)
        return metrics

    # ---- Logging ----

    def _show_stage(self, stage: str) -> None:
        """`stage` is what is going on, in words of which the first is one of `PARTS` in `run_log`."""
        self._stage = stage
        self._clock.enter(stage.split()[0].rstrip(","))
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, FlowProgressCallback):
                callback.show_stage(stage)

    def _show_compiling(self, begins: bool) -> None:
        """In the middle of another stage, which goes on afterwards."""
        if begins:
            self._interrupted = self._stage
            self._show_stage(f"compiling, while {self._stage}")
        else:
            self._show_stage(self._interrupted)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            self._run_log.counts = self.metrics.counts()
            logs |= self.metrics.flush(self.algorithm)
            logs |= self._clock.read(self.state.global_step - self._logged_at)
            self._logged_at = self.state.global_step
            self._show_stage("logging")
            self.sample_log.flush(self.state, self.callback_handler)
        with sections_kept():
            super().log(logs, start_time)
