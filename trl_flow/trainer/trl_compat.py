"""Every private part of TRL that trl_flow stands on: `setup.cfg` asks for `trl<2` because of this file alone, for a
release of TRL may move what it does not export. Nothing else in the project imports from inside TRL."""

from collections.abc import Callable, Iterator

import torch
from datasets import Dataset
from trl.trainer.base_config import _BaseConfig  # TrainingArguments with the defaults that all TRL trainers share
from trl.trainer.base_trainer import _BaseTrainer  # transformers.Trainer with TRL's gradient-accumulation contract
from trl.trainer.utils import RepeatSampler, disable_dropout_in_model, identity

from trl_flow.prompts.rows import ReadOnce


__all__ = ["EpochRepeatSampler", "GroupTrainer", "_BaseConfig", "disable_dropout_in_model", "identity"]


class EpochRepeatSampler(RepeatSampler):
    """[`RepeatSampler`], seeded with `seed + epoch()` in each epoch: TRL's draws all permutations from one running
    generator, so that a run that is resumed in its second epoch sees the first epoch's order again."""

    def __init__(self, *args, epoch: Callable[[], int], seed: int, **kwargs):
        super().__init__(*args, seed=seed, **kwargs)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return super().__iter__()


class GroupTrainer(_BaseTrainer):
    """TRL's base trainer with its `GRPOTrainer`'s data loader: whole generation batches, the images of a group next to
    each other, each as often as there are micro-batches in it."""

    def get_train_dataloader(self):
        size = self._train_batch_size * self.args.steps_per_generation
        options = {"sampler_fn": self._get_train_sampler, "is_training": True}
        return self._get_dataloader(ReadOnce(self.train_dataset), "Training", batch_size=size, **options)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> torch.utils.data.Sampler:
        args, dataset = self.args, self.train_dataset if dataset is None else dataset
        repeats = {"mini_repeat_count": args.num_generations, "shuffle": args.shuffle_dataset}
        repeats["batch_size"] = args.generation_batch_size // args.num_generations
        repeats["repeat_count"] = args.num_iterations * args.steps_per_generation
        seed = args.seed if args.data_seed is None else args.data_seed
        return EpochRepeatSampler(dataset, seed=seed, epoch=lambda: int(self.state.epoch or 0), **repeats)

    def _determine_best_metric(self, metrics, trial):
        name = self.args.metric_for_best_model
        if name is not None and metrics.get(name if name.startswith("eval_") else f"eval_{name}", 0.0) is None:
            return False  # no reward applied to any image of this evaluation
        return super()._determine_best_metric(metrics=metrics, trial=trial)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        raise NotImplementedError("The loss is computed for one unit at a time, see `Algorithm.loss`.")

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys: list[str] | None = None):
        raise NotImplementedError("Evaluation draws and scores images, see `evaluate`; there is nothing to predict.")

    def _send_telemetry(self) -> None:
        """None: TRL's would be sent under TRL's name, and fails on diffusers' configs."""
