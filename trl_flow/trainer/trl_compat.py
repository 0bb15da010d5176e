"""Every private part of TRL that trl_flow stands on, in one place.

`setup.cfg` asks for `trl<2` because of this file alone: none of these names is exported by TRL, so a release of TRL
may move them. Nothing else in the project imports from inside TRL.
"""

from collections.abc import Callable, Iterator

import torch
from trl.trainer.base_config import _BaseConfig  # TrainingArguments with the defaults that all TRL trainers share
from trl.trainer.base_trainer import _BaseTrainer  # transformers.Trainer with TRL's gradient-accumulation contract
from trl.trainer.utils import (
    RepeatSampler,  # repeats each prompt for its group, and each batch for its updates
    disable_dropout_in_model,
    identity,  # the data collator: rows reach the trainer as a list of dictionaries
)


__all__ = ["EpochRepeatSampler", "_BaseConfig", "_BaseTrainer", "disable_dropout_in_model", "identity"]


class EpochRepeatSampler(RepeatSampler):
    """[`RepeatSampler`] whose order depends on the epoch's number alone, not on how many epochs were drawn before.

    TRL's sampler draws each epoch's permutation from one running generator, so a run that is resumed in its second
    epoch sees the first epoch's order again. Here the generator is seeded with `seed + epoch` each time.

    Args:
        epoch (`Callable[[], int]`): returns the number of the epoch that is about to begin.
        kwargs: as for [`RepeatSampler`]; `seed` is required.
    """

    def __init__(self, *args, epoch: Callable[[], int], seed: int, **kwargs):
        super().__init__(*args, seed=seed, **kwargs)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return super().__iter__()
