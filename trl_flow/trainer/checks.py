"""What can be refused before training starts, and the loading of the pipeline."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import PeftConfig

from trl_flow.trainer.flow_grpo_config import FlowGRPOConfig


# Names under which reward functions are given something other than a column
RESERVED_COLUMNS = ("prompts", "images", "trainer_state", "log_metric", "log_extra")


def named_eval_datasets(eval_dataset: Any) -> Iterator[tuple[str, Any]]:
    """`(name for messages, data set)` of one, several or no evaluation sets."""
    if isinstance(eval_dataset, dict):
        for name, dataset in eval_dataset.items():
            yield f"eval_dataset[{name!r}]", dataset
    elif eval_dataset is not None:
        yield "eval_dataset", eval_dataset


def check_dataset(dataset: Any, name: str) -> None:
    """Raises `TypeError` or `ValueError` unless `dataset` is a `Dataset` of non-empty prompts."""
    if isinstance(dataset, dict):
        raise TypeError(f"{name} is a {type(dataset).__name__} of splits {list(dataset)}. Pass one: {name}[split].")
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} is {'missing' if dataset is None else 'a ' + type(dataset).__name__}, but must be a "
            "datasets.Dataset with a 'prompt' column, such as Dataset.from_dict({'prompt': [...]}) or "
            "load_dataset(..., split='train') without streaming."
        )
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"{name} has no column 'prompt'; its columns are {dataset.column_names}. Rename the one that holds "
            "the prompts: dataset.rename_column(old, 'prompt')."
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: there is no prompt to train on or to draw.")
    for index, prompt in enumerate(dataset["prompt"]):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(
                f"{name} has prompt {prompt!r} in row {index}, but every prompt must be a non-empty string. "
                "Filter such rows out, or convert them."
            )
    reserved = [column for column in dataset.column_names if column in RESERVED_COLUMNS]
    if reserved:
        raise ValueError(
            f"{name} has columns {reserved}, whose names reward functions get other things under. Rename them."
        )


def check_output_dir(args: FlowGRPOConfig) -> None:
    """Training that can not save is refused now, not at its first checkpoint."""
    if not args.should_save:
        return
    probe = Path(args.output_dir)
    while not probe.exists():
        probe = probe.parent
    if not probe.is_dir() or not os.access(probe, os.W_OK | os.X_OK):
        raise ValueError(
            f"output_dir {args.output_dir!r} can not be written to ({probe} is "
            f"{'read-only for this user' if probe.is_dir() else 'not a folder'}). Choose another."
        )


def probe_output_dir(args: FlowGRPOConfig, num_parameters: int) -> None:
    """Writes a file and removes it again, and sees that a checkpoint will fit."""
    if not args.should_save:
        return
    try:
        os.makedirs(args.output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output_dir) as file:
            file.write(b"0" * 4096)
    except OSError as error:
        raise ValueError(f"output_dir {args.output_dir!r} can not be written to: {error}. Choose another.") from error
    # Weights in two formats, and Adam's two moments, in float32
    needed, free = 16 * num_parameters, shutil.disk_usage(args.output_dir).free
    if args.save_strategy != "no" and free < needed:
        raise ValueError(
            f"output_dir {args.output_dir!r} has {free / 2**20:.0f} MiB left, but one checkpoint of "
            f"{num_parameters:,} trained parameters takes about {needed / 2**20:.0f} MiB. Make room, choose "
            "another folder, or train fewer parameters (a LoRA of lower rank)."
        )


def load_pipeline(model: str | os.PathLike, args: FlowGRPOConfig, peft_config: PeftConfig | None) -> DiffusionPipeline:
    """The pipeline of a hub id or folder, frozen parts in half precision where that is trained in."""
    kwargs = dict(args.model_init_kwargs or {})
    # diffusers' older name for it, which it warns of
    dtype = kwargs.pop("torch_dtype", None) if kwargs.get("dtype") is None else kwargs["dtype"]
    if dtype is None:
        half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        # The VAE loses accuracy in half precision; weights that are trained need float32
        dtype = {"default": half, "vae": torch.float32}
        if peft_config is None:
            dtype |= {"transformer": torch.float32, "unet": torch.float32}
    elif isinstance(dtype, str):
        # from a command line or a YAML file; diffusers would take float32 in its place
        name, dtype = dtype, getattr(torch, dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"model_init_kwargs has dtype {name!r}, but must be float32, bfloat16 or float16.")
    kwargs["dtype"] = dtype
    if os.path.isdir(model) and not os.path.isfile(os.path.join(model, "model_index.json")):
        raise ValueError(
            f"The folder {os.fspath(model)!r} is not a diffusers pipeline: it has no model_index.json. It holds "
            f"{sorted(os.listdir(model))[:10]}. Pass the folder that DiffusionPipeline.save_pretrained wrote, or "
            "a hub id."
        )
    try:
        return DiffusionPipeline.from_pretrained(os.fspath(model), **kwargs)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"The model {os.fspath(model)!r} could not be loaded as a diffusers pipeline: {error}. Pass a hub id "
            "such as 'stabilityai/stable-diffusion-3.5-medium' (log in with `hf auth login` if it is gated), a "
            "local folder, or a loaded pipeline."
        ) from error
