"""`torchrun --nproc_per_node 2 sharded_run.py FOLDER METHOD`, with accelerate's environment for FSDP: four updates of
a method of `METHODS`, resumed in the middle of a phase. Without torchrun: the same in one process."""

import os
import sys
from pathlib import Path

import torch
from accelerate.state import DistributedType, PartialState


# accelerate shards on accelerators only; what it does then needs none
if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    find_out = PartialState.__init__

    def as_on_gpus(self, *args, **kwargs):
        find_out(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_on_gpus

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_training import tiny_trainer

from trl_flow import AWMConfig, DiffusionNFTConfig, GuardConfig


METHODS = {
    "guard": {
        "cls": GuardConfig,
        "ratio_probe": 100,
        "beta": 0.1,
    },  # far enough away to be noticed where it should not be
    "nft": {"cls": DiffusionNFTConfig, "old_decay_rate": 0.2},
    "awm": {"cls": AWMConfig, "old_decay_rate": 0.2},
}
FIELDS = {
    "num_iterations": 2,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "save_strategy": "steps",
    "save_steps": 3,
}


def run(folder: str, method: str) -> list[dict]:
    """The logs; the adapter is in `folder`."""
    fields = FIELDS | METHODS[method] | {"per_device_train_batch_size": 8 // int(os.environ.get("WORLD_SIZE", 1))}
    trainer = tiny_trainer(folder, **fields)
    assert trainer.is_fsdp_enabled == (os.environ.get("ACCELERATE_USE_FSDP") == "true")
    trainer.train()
    trainer = tiny_trainer(os.path.join(folder, "resumed"), **fields)
    trainer.train(resume_from_checkpoint=os.path.join(folder, "checkpoint-3"))
    return trainer.state.log_history


if __name__ == "__main__":
    run(*sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
