"""`torchrun --nproc_per_node 2 sharded_run.py FOLDER [NAME ...]`, with accelerate's environment for FSDP or DeepSpeed:
trains `SCENARIOS`, and some of them again from a checkpoint in the middle of a sampling phase.
Without torchrun: the same in one process, which has the same batches."""

import json
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))  # trl_flow, where it is not installed

import torch
from tiny_loras import saved_adapter
from tiny_models import tiny_sd3_pipeline
from tiny_training import darkness, prompts, tiny_trainer
from torch.distributed.fsdp import FSDPModule

from trl_flow import AWMConfig, DiffusionNFTConfig, GuardConfig, SLASConfig, VGPOConfig


RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
# Adam hides a wrong scale of the gradients, which plain descent shows (FSDP2 cannot load its empty state, though)
SGD = {"optim": "sgd", "learning_rate": 10.0, "weight_decay": 0.0}
ADAM = {"learning_rate": 1e-3, "adam_epsilon": 1e-6}
# The checkpoint stands in the middle of a phase
SAVED = {"num_iterations": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 3}
EVALUATED = {"eval_dataset": prompts(3), "eval_reward_funcs": [darkness], "eval_strategy": "steps", "eval_steps": 2}
SCENARIOS = {
    # The probe is far enough away to be noticed where it should not be
    "guard": {"cls": GuardConfig, "ratio_probe": 100, "beta": 0.1, "use_ema": True, **ADAM, **SAVED, **EVALUATED},
    "flow": {  # all of which a launcher's configuration may count differently: micro-batches, clipping, the schedule
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 2e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 1,
        "max_steps": 3,
        **SGD,
    },
    "slas": {"cls": SLASConfig, **SGD},
    "vgpo": {"cls": VGPOConfig, **SGD},
    "nft": {"cls": DiffusionNFTConfig, "old_decay_rate": 0.2, "use_ema": True, **ADAM, **SAVED},
    "awm": {"cls": AWMConfig, "old_decay_rate": 0.2, **ADAM, **SAVED},
    "goes on": {"init_adapter": "adapter", "lora": None, "beta": 0.1, **ADAM, **SAVED, **EVALUATED},
    "all weights": {"lora": None, "beta": 0.1, "use_ema": True, **ADAM, **SAVED, **EVALUATED},
    "all weights, nft": {"cls": DiffusionNFTConfig, "lora": None, **ADAM, **SAVED},
    "compiled": {"torch_compile_backend": "eager", **ADAM},  # not under ZeRO-3
    "bfloat16": {"cls": GuardConfig, "bf16": True, **ADAM, **SAVED},
}


def trainer_of(folder: Path, name: str, output_dir: Path):
    fields = dict(SCENARIOS[name])
    if fields.get("init_adapter"):
        fields["init_adapter"] = os.fspath(folder / f"adapter-{RANK}")
        saved_adapter("sd3", Path(fields["init_adapter"]), target_modules=["to_q", "to_v"])
    if fields.get("bf16"):
        fields["pipeline"] = tiny_sd3_pipeline()
        fields["pipeline"].transformer.to(torch.bfloat16)
    batch = 8 // fields.get("gradient_accumulation_steps", 1) // WORLD_SIZE
    return tiny_trainer(output_dir, per_device_train_batch_size=batch, **fields)


def run(folder: str, *names: str) -> None:
    """Of each scenario there is a folder, and with checkpoints a second one, of the run that was resumed."""
    folder = Path(folder)
    for name in names or (name for name in SCENARIOS if (name, os.environ.get("EXPECTED")) != ("compiled", "zero3")):
        trainer = trainer_of(folder, name, folder / name)
        trainer.train()
        trainer.save_model()
        check(trainer)
        logs = [trainer.state.log_history]
        if SCENARIOS[name].get("save_steps"):
            rest = trainer_of(folder, name, folder / f"{name}, resumed")
            rest.train(resume_from_checkpoint=os.fspath(folder / name / "checkpoint-3"))
            logs.append(rest.state.log_history)
        if RANK == 0:
            (folder / f"{name}.json").write_text(json.dumps(logs))
    if not names:
        (folder / f"refused-{RANK}.txt").write_text(refused(folder))


def refused(folder: Path) -> str:
    """What is said about the gradients of single steps, of which a process has none where layers are split, and about
    compilation."""
    said = []
    for fields in ({"diagnostics_steps": 1}, {"torch_compile_backend": "eager"}):
        try:
            tiny_trainer(folder / "refused", **fields)
        except ValueError as error:
            said.append(str(error))
    return "\n".join(said)


def check(trainer) -> None:
    """That the weights are split, where they should be, and those that are trained are float32."""
    assert trainer.args.world_size == WORLD_SIZE
    parameters = list(trainer.policy.module.parameters())
    assert {p.dtype for p in parameters if p.requires_grad} == {torch.float32}
    expected = os.environ.get("EXPECTED")
    split = any(isinstance(module, FSDPModule) for module in trainer.model.modules())
    assert (expected == "fsdp2") == trainer.is_fsdp_enabled == split
    assert (expected in ("zero2", "zero3")) == trainer.is_deepspeed_enabled
    assert (expected == "zero3") == any(hasattr(p, "ds_tensor") for p in parameters)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(*sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
