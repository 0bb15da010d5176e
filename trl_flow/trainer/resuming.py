"""What of a run's settings may change when it is resumed: what acts, what does not, and what is refused."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers.utils import logging

from trl_flow.sharing import PEFT_FILES
from trl_flow.trainer.flow_rl_config import FlowRLConfig


logger = logging.get_logger(__name__)

# Held by the optimizer's state, so that the checkpoint's values go on
KEPT = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")
# By which the samples of a phase were drawn and are read: none may change in its middle
SAMPLED_WITH = (
    *("num_generations", "num_inference_steps", "guidance_scale", "negative_prompt", "height", "width", "num_frames"),
    *("max_sequence_length", "component", "guidance_scale_2", "reward_frame"),
    *("sde_type", "noise_level", "importance_ratio", "dense_rewards"),
    *("bf16", "fp16", "attention_backend"),
)
# Of where and how often things are written, which changes nothing in the training
_ELSEWHERE = (
    "output_dir",
    "run_name",
    "resume_from_checkpoint",
    "logging_",
    "log_",
    "report_to",
    "hub_",
    "push_to_hub",
)
_ELSEWHERE += ("disable_tqdm", "save_", "local_rank", "project", "trackio", "num_images_to_log", "ddp_", "dataloader_")
_ADAPTER = ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern")


def check_adapter(model: torch.nn.Module, checkpoint: Path) -> None:
    """Raises `ValueError` unless the adapter in the checkpoint is of the form of the model's. Without one in either
    nothing is asked."""
    weights, config = (checkpoint / name for name in PEFT_FILES)
    if not isinstance(model, PeftModel) or not (weights.is_file() and config.is_file()):
        return
    saved, own = json.loads(config.read_text()), model.peft_config["default"]
    pairs = {name: (saved[name], getattr(own, name)) for name in _ADAPTER if name in saved and hasattr(own, name)}
    different = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    with safe_open(weights, "pt") as file:
        modules = {name.rsplit(".lora_", 1)[0] for name in file.keys()}
    current = {name.rsplit(".lora_", 1)[0] for name in get_peft_model_state_dict(model)}
    if modules != current:
        several = [f"{len(names)} modules (such as {min(names - others or names)})" for names, others in
                   ((modules, current), (current, modules))]  # fmt: skip
        different["target_modules"] = tuple(several)
    if different:
        before, now = (", ".join(f"{n}={pair[i]}" for n, pair in different.items()) for i in (0, 1))
        raise ValueError(
            f"The adapter in {checkpoint} has {before}, but the trainer's has {now}. A run resumes with the adapter "
            f"that it began with: use these settings ({PEFT_FILES[1]} there), or begin a new run."
        )


def take_over(args: FlowRLConfig, about: dict[str, Any], checkpoint: Path) -> None:
    """
    Compares a run's settings, `args` and `about`, with those of the checkpoint that it goes on from, and warns of what
    is different: what acts from now on, and what does not, which `args` then have as the checkpoint has it.

    Raises:
        ValueError: if the optimizer's state cannot be taken over, or the checkpoint stands in the middle of a sampling
            phase whose samples were drawn with other settings.
    """
    state = json.loads((checkpoint / "run_state.json").read_text())
    path = checkpoint / "training_args.json"
    saved = json.loads(path.read_text()) if path.is_file() else {}
    own = json.loads(args.shown())
    changed = [n for n in saved if n in own and saved[n] != own[n] and not n.startswith(_ELSEWHERE)]
    _refuse([n for n in changed if n == "optim" and _family(saved[n]) != _family(own[n])], saved, own, checkpoint,
            "The optimizer's state is of another kind")  # fmt: skip
    is_plateau = [values.get("lr_scheduler_type") == "reduce_lr_on_plateau" for values in (saved, own)]
    _refuse([n for n in changed if n == "lr_scheduler_type" and is_plateau[0] != is_plateau[1]], saved, own,
            checkpoint, "The scheduler's state is of another kind")  # fmt: skip
    if state["update"] > 0:
        reason = "It stands in the middle of a sampling phase, whose samples were drawn so"
        _refuse([n for n in changed if n in SAMPLED_WITH], saved, own, checkpoint, reason)
    for name in (kept := [name for name in changed if name in KEPT]):
        setattr(args, name, saved[name])
    before, now = state.get("about", {}), json.loads(json.dumps(about))
    acting = _changes([n for n in changed if n not in KEPT], saved, own)
    acting += _changes([n for n in now if n in before and before[n] != now[n]], before, now)
    if args.process_index == 0 and (acting or kept):
        said = [f"From now on these act: {', '.join(acting)}."] if acting else []
        if kept:
            what = ", ".join(f"{name} stays {saved[name]} (not {own[name]})" for name in kept)
            said.append(
                f"The optimizer's state holds others, which do not: {what}. For another value begin a new run."
            )
        logger.warning(f"The run resumes from {checkpoint} with changed settings. {' '.join(said)}")


def _family(optim: str) -> str:
    return optim.removesuffix("_fused")


def _changes(names: list[str], saved: dict[str, Any], own: dict[str, Any]) -> list[str]:
    return [f"{name} {saved[name]} -> {own[name]}" for name in names]


def _refuse(names: list[str], saved: dict[str, Any], own: dict[str, Any], checkpoint: Path, reason: str) -> None:
    if names:
        before, now = (", ".join(f"{name}={values[name]!r}" for name in names) for values in (saved, own))
        at = ", or a checkpoint at the end of a sampling phase" if "phase" in reason else ", or begin a new run"
        raise ValueError(
            f"{checkpoint} was written with {before}, but this run has {now}. {reason}. Use these settings{at}."
        )
