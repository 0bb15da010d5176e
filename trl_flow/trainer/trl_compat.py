"""Every private part of TRL that trl_flow stands on, in one place.

`setup.cfg` asks for `trl<2` because of this file alone: none of these names is exported by TRL, so a release of TRL
may move them. Nothing else in the project imports from inside TRL.
"""

from collections.abc import Callable, Iterator

import torch
from datasets import Dataset
from trl.trainer.base_config import _BaseConfig  # TrainingArguments with the defaults that all TRL trainers share
from trl.trainer.base_trainer import _BaseTrainer  # transformers.Trainer with TRL's gradient-accumulation contract
from trl.trainer.utils import (
    RepeatSampler,  # repeats each prompt for its group, and each batch for its updates
    disable_dropout_in_model,
    identity,  # the data collator: rows reach the trainer as a list of dictionaries
)


__all__ = ["EpochRepeatSampler", "GroupTrainer", "_BaseConfig", "disable_dropout_in_model", "identity"]


class EpochRepeatSampler(RepeatSampler):
    """[`RepeatSampler`] whose order depends on the epoch's number alone: TRL's draws each epoch's permutation from one
    running generator, so that a run that is resumed in its second epoch sees the first epoch's order again. Here the
    generator is seeded with `seed + epoch()` each time."""

    def __init__(self, *args, epoch: Callable[[], int], seed: int, **kwargs):
        super().__init__(*args, seed=seed, **kwargs)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return super().__iter__()


class GroupTrainer(_BaseTrainer):
    """TRL's base trainer with the data loader of its `GRPOTrainer`: it yields whole generation batches, the images of
    a group next to each other, each as often as there are micro-batches in it, and is sampled from once."""

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
            mini_repeat_count=self.args.num_generations,
            batch_size=self.args.generation_batch_size // self.args.num_generations,
            repeat_count=self.args.num_iterations * self.args.steps_per_generation,
            shuffle=self.args.shuffle_dataset,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

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
