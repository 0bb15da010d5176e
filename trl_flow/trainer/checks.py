"""What can be refused before training starts."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from peft import PeftConfig
from PIL import ExifTags, Image

from trl_flow.backbones import Backbone
from trl_flow.rollout import Dynamics
from trl_flow.trainer.flow_grpo_config import FlowGRPOConfig
from trl_flow.trainer.loading import is_quantized
from trl_flow.trainer.over_optimization import OverOptimizationCallback


# Names under which reward functions are given something other than a column
RESERVED_COLUMNS = ("prompts", "images", "trainer_state", "log_metric", "log_extra")

# What rollout and trainer use of a backbone, which need not be a subclass of ours
BACKBONE_MEMBERS = (
    *("pipeline", "component", "model", "dtype", "device", "lora_target_modules"),
    *("takes_image", "takes_negative_prompt"),
    *("latent_shape", "encode_prompt", "schedule", "uses_guidance", "guided_prediction", "decode"),
)


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


def check_backbone(backbone: Any, args: FlowGRPOConfig, peft_config: PeftConfig | None) -> None:
    """
    Raises unless `backbone` has what rollout and trainer use of one, whatever its class, and can do what is asked.

    Raises:
        TypeError: if it lacks something of [`Backbone`].
        ValueError: if it can not do what the config asks: guide away from the negative prompt, keep conditions on
            disk, checkpoint gradients, save a LoRA, train quantised weights, slice or tile its VAE.
    """
    needed = [*BACKBONE_MEMBERS, *(["check_image_size"] if getattr(backbone, "takes_image", False) else [])]
    missing = [name for name in needed if not hasattr(backbone, name)]
    if missing:
        raise TypeError(
            f"backbone is a {type(backbone).__name__} without {', '.join(missing)}. Subclass "
            "trl_flow.backbones.Backbone, or add what is missing as it is described there."
        )
    if args.gradient_checkpointing and not getattr(backbone.model, "_supports_gradient_checkpointing", False):
        raise ValueError(
            f"gradient_checkpointing is on, which {type(backbone.model).__name__} does not support. Set "
            "gradient_checkpointing=False."
        )
    if args.precompute_prompt_embeds and not isinstance(backbone, Backbone):
        raise ValueError(
            f"precompute_prompt_embeds keeps conditions under a fingerprint of all that they depend on, which for a "
            f"{type(backbone).__name__} is not known. Subclass trl_flow.backbones.Backbone, or leave the option out."
        )
    if args.negative_prompt is not None and not backbone.takes_negative_prompt:
        raise ValueError(
            f"negative_prompt is {args.negative_prompt!r}, but {type(backbone).__name__} takes none: this model's "
            "guidance does not lead away from a prompt, or only from the empty one. Set negative_prompt=None."
        )
    if peft_config is not None and not hasattr(backbone.pipeline, "save_lora_weights"):
        raise ValueError(
            f"{type(backbone.pipeline).__name__} has no save_lora_weights: an adapter could be trained but not saved. "
            "Let the pipeline inherit one of diffusers' LoRA loaders (such as SD3LoraLoaderMixin), or train "
            "all weights: leave peft_config out."
        )
    if peft_config is None and is_quantized(backbone.model):
        raise ValueError(
            f"The pipeline's {backbone.component} has quantised weights, which can not be trained. Train an adapter: "
            "pass a peft_config, or load the pipeline without a quantization_config."
        )
    for name, method in (("enable_vae_slicing", "use_slicing"), ("enable_vae_tiling", "use_tiling")):
        vae = getattr(backbone.pipeline, "vae", None)
        if getattr(args, name) and not hasattr(vae, method):
            raise ValueError(
                f"{name} is set, but the pipeline's VAE ({type(vae).__name__}) can not do that. Leave it "
                "out, and lower per_device_train_batch_size if decoding needs too much memory."
            )


def check_images(dataset: Dataset, name: str, backbone: Backbone) -> None:
    """Raises `ValueError` unless each row of `dataset` has a picture that fits, where `backbone` edits pictures."""
    if not backbone.takes_image:
        return
    editor = f"{type(backbone).__name__} edits pictures"
    if "image" not in dataset.column_names:
        raise ValueError(
            f"{name} has no column 'image', but {editor}: each row needs the one that its prompt is about. Its "
            f"columns are {dataset.column_names}. Add the column, or rename the one that holds the pictures: "
            "dataset.rename_column(old, 'image')."
        )
    feature = dataset.features["image"]
    if not isinstance(feature, datasets.Image) or not feature.decode:
        raise ValueError(
            f"{name} has a column 'image' of {feature}, but {editor}: it must hold PIL images. If it holds paths or "
            "bytes of pictures, convert it: dataset.cast_column('image', datasets.Image())."
        )
    if dataset.format["type"] not in (None, "custom", "python"):
        raise ValueError(
            f"{name} has the format {dataset.format['type']!r}, in which a picture is an array, but {editor}: its "
            "column 'image' must give PIL images. Take the format off: dataset.with_format(None)."
        )
    encoded = dataset.with_format(None).select_columns(["image"])
    encoded = encoded.cast_column("image", datasets.Image(decode=False))
    for index, row in enumerate(encoded):
        if row["image"] is None:
            raise ValueError(
                f"{name} has no image in row {index}, but {editor}. Filter such rows out: "
                "dataset.filter(lambda row: row['image'] is not None)."
            )
        path, content = row["image"]["path"], row["image"]["bytes"]
        try:
            # Reads the file's head only
            with Image.open(path if content is None else BytesIO(content)) as image:
                width, height = image.size
                if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:
                    width, height = height, width  # decoded, it is turned as the camera was
        except OSError as error:
            raise ValueError(f"{name} has an image in row {index} that can not be read: {error}.") from error
        try:
            backbone.check_image_size(height, width)
        except ValueError as error:
            raise ValueError(f"{name} has an image in row {index} that can not be edited: {error}") from error


def check_eval_reward_funcs(names: list[str], eval_dataset: Any) -> None:
    """Raises `ValueError` for functions of these names that no evaluation would call, or that hide the composite."""
    if not names:
        return
    if not any(True for _ in named_eval_datasets(eval_dataset)):
        raise ValueError(
            f"eval_reward_funcs ({', '.join(names)}) score evaluations only, but there is no eval_dataset. Pass one "
            "with the prompts to evaluate, and set eval_strategy='steps', or leave eval_reward_funcs out."
        )
    if taken := {"average", "average_std_err"} & set(names):
        raise ValueError(
            f"One of eval_reward_funcs is called {taken.pop()!r}, which is the name of the composite's own metric. "
            "Rename it (its __name__ counts)."
        )


def check_over_optimization(callbacks: list, gold_names: list[str], eval_dataset: Any, args: FlowGRPOConfig) -> None:
    """
    Tells an [`OverOptimizationCallback`] among the callbacks which evaluation set to watch.

    Raises:
        ValueError: if it would never be told of an evaluation that it could judge.
    """
    found = [callback for callback in callbacks if isinstance(callback, OverOptimizationCallback)]
    if not found:
        return
    if len(found) > 1:
        raise ValueError(
            f"There are {len(found)} OverOptimizationCallbacks, which would keep their models in one place."
        )
    (callback,) = found
    if not gold_names:
        raise ValueError(
            "OverOptimizationCallback compares the optimised reward with gold scores, but eval_reward_funcs is empty. "
            "Pass functions that are not optimised, or leave the callback out."
        )
    if args.eval_strategy == "no":
        raise ValueError(
            "OverOptimizationCallback judges the evaluations while training, but eval_strategy is 'no'. Set "
            "eval_strategy='steps' and eval_steps."
        )
    sets = eval_dataset if isinstance(eval_dataset, dict) else {None: eval_dataset}
    callback.watched = next(iter(sets)) if callback.eval_name is None else callback.eval_name
    if callback.watched not in sets:
        raise ValueError(
            f"OverOptimizationCallback has eval_name={callback.eval_name!r}, but the evaluation sets are "
            f"{list(eval_dataset) if isinstance(eval_dataset, dict) else 'a single one without a name'}."
        )
    if len(sets[callback.watched]) < 2:
        raise ValueError(
            "OverOptimizationCallback estimates the gold score's noise from its spread over prompts, but the "
            "evaluation set has a single one. Give it more."
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


def checked_stochastic_steps(dynamics: Dynamics, args: FlowGRPOConfig) -> list[int]:
    """
    The steps of the model's schedule that can be stochastic and trained.

    Raises:
        ValueError: if there are none, or too few for the window.
    """
    steps = dynamics.stochastic_steps
    if not steps:
        raise ValueError(
            f"num_inference_steps is {args.num_inference_steps}, and on this model's schedule no step adds noise: "
            "there is nothing to train. Use at least 2 steps."
        )
    if args.sde_window_size is not None:
        first, end = args.sde_window_range
        if min(end, len(steps)) - first < args.sde_window_size:
            raise ValueError(
                f"sde_window_range is {args.sde_window_range}, but on this model's schedule the last of "
                f"{args.num_inference_steps} steps is deterministic and can not be trained, so that a window of "
                f"{args.sde_window_size} steps does not fit. Use more steps, a smaller window or a lower start."
            )
    return steps
