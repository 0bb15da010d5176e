"""What can be refused before training starts."""

import math
import os
import shutil
import tempfile
from inspect import signature
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from peft import PeftConfig
from PIL import ExifTags, Image
from transformers.utils import logging

from trl_flow.backbones import Backbone
from trl_flow.backbones.contract import latent_shape, scheduled
from trl_flow.backbones.settings import check_settings
from trl_flow.images import check_mode
from trl_flow.lora.diffusers_format import file_component
from trl_flow.prompts.rows import check_prompts, columns_of_rows, first_row, has_transform
from trl_flow.rewards.checks import RESERVED_COLUMNS, needs_group
from trl_flow.rewards.scorer import RewardScorer
from trl_flow.trainer.attention import check_attention_backend
from trl_flow.trainer.compilation import check_compiler
from trl_flow.trainer.flow_rl_config import FlowRLConfig
from trl_flow.trainer.loading import is_quantized
from trl_flow.trainer.over_optimization import OverOptimizationCallback


logger = logging.get_logger(__name__)


def check_model(model: Any, backbone: Backbone | None, args: Any, config_class: type[FlowRLConfig]) -> None:
    """Raises unless `model` is or names a pipeline, `backbone` is for it, and `args` are of the class, or `None`."""
    if args is not None and not isinstance(args, config_class):
        raise TypeError(f"args is a {type(args).__name__}, but must be a {config_class.__name__} or a preset of it.")
    if not isinstance(model, str | os.PathLike | DiffusionPipeline):
        raise TypeError(f"model is a {type(model).__name__}, but must be a pipeline, or its hub id or folder.")
    if getattr(backbone, "pipeline", model) is not model:
        raise ValueError("backbone was made for another pipeline than model. Pass model=backbone.pipeline.")


def check_single_device(args: FlowRLConfig) -> None:
    """Raises `ValueError` where transformers would use `nn.DataParallel`."""
    if args.n_gpu > 1:
        instead = "Launch with `accelerate launch` or `torchrun`, or show one GPU with CUDA_VISIBLE_DEVICES."
        raise ValueError(f"{args.n_gpu} GPUs are visible to one process; nn.DataParallel is unsupported. {instead}")


def named_eval_datasets(eval_dataset: Any) -> dict[str, Any]:
    """One, several or no evaluation sets by their names in messages."""
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    return {} if eval_dataset is None else {"eval_dataset": eval_dataset}


def check_dataset(dataset: Any, name: str) -> None:
    """Raises `TypeError` or `ValueError` unless `dataset` is a `Dataset` of non-empty prompts."""
    if isinstance(dataset, dict):
        raise TypeError(f"{name} is a {type(dataset).__name__} of splits {list(dataset)}. Pass one: {name}[split].")
    if not isinstance(dataset, Dataset):
        kind = "missing" if dataset is None else f"a {type(dataset).__name__}"
        remedies = {
            list: " Of a list make one: Dataset.from_list(rows), or Dataset.from_dict({'prompt': prompts}).",
            str: " Of a file, folder or name make one: trl_flow.prompts.load_prompts(name).",
        }
        raise TypeError(
            f"{name} is {kind}, but must be a datasets.Dataset with a column 'prompt', such as "
            f"load_dataset(..., split='train') without streaming.{remedies.get(type(dataset), '')}"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: there is no prompt to train on or to draw.")
    try:
        check_prompts(dataset)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error
    if reserved := [column for column in columns_of_rows(dataset) if column in RESERVED_COLUMNS]:
        raise ValueError(f"{name} has columns {reserved}, under whose names rewards get other things. Rename them.")


def check_backbone(backbone: Any, args: FlowRLConfig, peft_config: PeftConfig | None) -> None:
    """Raises `TypeError` unless `backbone` is a [`Backbone`] whose methods return what they must, and `ValueError`
    unless it can do what is asked."""
    kind = type(backbone).__name__
    if not isinstance(backbone, Backbone):
        raise TypeError(f"backbone is a {kind}, but must be a trl_flow.backbones.Backbone. Subclass it: one file.")
    for name in ("num_frames", "guidance_scale_2", "component"):  # a backbone of one's own has its own
        if getattr(args, name) not in (None, getattr(backbone, name)):
            own = f"{name} is {getattr(args, name)!r}, but the backbone's is {getattr(backbone, name)!r}"
            raise ValueError(f"{own}. Leave {name} out, or make the backbone with it.")
    latent_shape(backbone)
    scheduled(backbone, args.num_inference_steps)
    pipeline, model = backbone.pipeline, backbone.model
    if args.torch_compile:
        check_compiler(args)
    check_attention_backend(backbone, args)
    if args.gradient_checkpointing and not getattr(model, "_supports_gradient_checkpointing", False):
        what = f"gradient_checkpointing is on, which {type(model).__name__} does not support"
        raise ValueError(f"{what}. Set gradient_checkpointing=False.")
    check_sampling(backbone, args)
    if peft_config is not None:
        _check_lora_loader(backbone)
    if peft_config is None and is_quantized(model):
        raise ValueError(
            f"The pipeline's {backbone.component} has quantized weights, which cannot be trained. Train an adapter: "
            "pass a peft_config, or load the pipeline without a quantization_config."
        )
    vae = getattr(pipeline, "vae", None)
    for name, method in (("enable_vae_slicing", "use_slicing"), ("enable_vae_tiling", "use_tiling")):
        if getattr(args, name) and not hasattr(vae, method):
            raise ValueError(
                f"{name} is set, but the pipeline's VAE ({type(vae).__name__}) cannot do that. Leave it out, and "
                "lower per_device_train_batch_size if decoding needs too much memory."
            )


def check_sampling(backbone: Backbone, args: FlowRLConfig) -> None:
    """Raises `ValueError` for a sampling setting other than its default that changes no image of this pipeline."""
    fields = type(args).__dataclass_fields__
    names = ("guidance_scale", "guidance_scale_2", "eval_guidance_scale", "negative_prompt", "max_sequence_length")
    given = {name: getattr(args, name) for name in names if getattr(args, name) != fields[name].default}
    scales = [args.guidance_scale, args.eval_guidance_scale]
    check_settings(backbone, given, [scale for scale in scales if scale is not None])


def _check_lora_loader(backbone: Backbone) -> None:
    """Raises `ValueError` unless an adapter of the pipeline can be saved, and loaded into it again."""
    pipeline, kind = backbone.pipeline, type(backbone.pipeline).__name__
    instead = "or train all weights: no peft_config"
    if not hasattr(pipeline, "save_lora_weights"):
        raise ValueError(
            f"{kind} has no save_lora_weights: an adapter could be trained but not saved. Let it inherit a LoRA "
            f"loader of diffusers (of one without a text encoder, SanaLoraLoaderMixin), {instead}."
        )
    if not isinstance(pipeline, LoraBaseMixin):
        return  # with a loader of its own
    taken = signature(pipeline.save_lora_weights).parameters
    if f"{file_component(backbone.component)}_lora_layers" not in taken:
        known = [name for name in ("transformer", "unet") if f"{name}_lora_layers" in taken]
        raise ValueError(
            f"{kind}'s LoRA loader saves adapters of its {' and '.join(known)}, but the trained part is called "
            f"{backbone.component!r}. Register it under that name and make it the backbone's component, {instead}."
        )
    if missing := [name for name in pipeline._lora_loadable_modules if not hasattr(pipeline, name)]:
        raise ValueError(
            f"{kind} has no {' and no '.join(missing)}, into which its LoRA loader loads adapters too: they could be "
            f"saved but not loaded. Inherit a loader for the {backbone.component} alone, such as SanaLoraLoaderMixin, "
            f"{instead}."
        )
    if not hasattr(backbone.model, "load_lora_adapter"):
        raise ValueError(
            f"{type(backbone.model).__name__} has no load_lora_adapter: an adapter of it could be saved but not "
            f"loaded. Let it inherit diffusers.loaders.PeftAdapterMixin, {instead}."
        )


def check_images(dataset: Dataset, name: str, backbone: Backbone) -> None:
    """Raises `ValueError` unless each row of `dataset` has an image that fits, where `backbone` draws from one."""
    if not backbone.takes_image:
        return
    editor = f"{type(backbone).__name__} draws from an image"
    if has_transform(dataset):
        image = first_row(dataset).get("image")
        if not isinstance(image, Image.Image):
            made = f"its transform makes {type(image).__name__} of the first row's"
            raise ValueError(f"{name} must have PIL images in the column 'image', since {editor}, but {made}.")
        return
    if "image" not in dataset.column_names:
        raise ValueError(
            f"{name} has no column 'image', but {editor}: each row needs the one that its prompt is about. Its "
            f"columns are {dataset.column_names}. Add it, use dataset.rename_column(old, 'image'), or load the file "
            "with image_column=old."
        )
    feature = dataset.features["image"]
    if not isinstance(feature, datasets.Image) or not feature.decode:
        raise ValueError(
            f"{name} has a column 'image' of {feature}, but {editor}: it must hold PIL images. Of paths or bytes it "
            "makes them: dataset.cast_column('image', datasets.Image()), or image_column='image' when loading a file."
        )
    if dataset.format["type"] not in (None, "custom", "python"):
        raise ValueError(
            f"{name} has the format {dataset.format['type']!r}, in which an image is an array, but {editor} of PIL. "
            "Take the format off: dataset.with_format(None)."
        )
    images = dataset.with_format(None).select_columns(["image"])
    for index, row in enumerate(images.cast_column("image", datasets.Image(decode=False))):
        if row["image"] is None:
            instead = "Filter such rows out: dataset.filter(lambda row: row['image'] is not None)."
            raise ValueError(f"{name} has no image in row {index}, but {editor}. {instead}")
        path, content = row["image"]["path"], row["image"]["bytes"]
        try:
            # Reads the file's head only
            with Image.open(path if content is None else BytesIO(content)) as image:
                mode, (width, height) = image.mode, image.size
                if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:
                    width, height = height, width  # decoded, it is turned as the camera was
        except OSError as error:
            raise ValueError(f"{name} has an image in row {index} that cannot be read: {error}.") from error
        try:
            check_mode(mode)
            backbone.check_image_size(height, width)
        except ValueError as error:
            raise ValueError(f"{name} has an image in row {index} that cannot be edited: {error}") from error


def check_rewards(
    scorer: RewardScorer, gold_scorer: RewardScorer, train_dataset: Dataset, eval_dataset: Any, args: FlowRLConfig,
    *, videos: bool | None = None,
) -> None:  # fmt: skip
    """Raises `TypeError` or `ValueError` for reward functions that cannot be called, or unfit weights. `videos` says
    whether the model draws such, if that is known yet."""
    if not scorer.reward_funcs:
        raise ValueError("reward_funcs is empty. Pass at least one reward function.")
    scorer.check([] if args.remove_unused_columns else columns_of_rows(train_dataset), videos=videos)
    named = named_eval_datasets(eval_dataset)
    for name, dataset in named.items():
        for each in (scorer, gold_scorer):
            try:
                each.check(columns_of_rows(dataset), videos=videos)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from error
    if args.load_best_model_at_end and isinstance(eval_dataset, dict) and args.metric_for_best_model == "reward":
        known = ", ".join(f"eval_{name}_reward" for name in eval_dataset)
        raise ValueError(f"load_best_model_at_end needs metric_for_best_model. Set it to one of {known}.")
    if args.load_best_model_at_end and gold_scorer.names and args.metric_for_best_model == "reward":
        args.metric_for_best_model = "gold/average"  # of the optimized reward the best may be the most hacked
    if gold_scorer.names and not named:
        raise ValueError(
            f"eval_reward_funcs ({', '.join(gold_scorer.names)}) score evaluations only, but there is no "
            "eval_dataset. Pass one, and set eval_strategy='steps', or leave eval_reward_funcs out."
        )
    if taken := {"average", "average_std_err"} & set(gold_scorer.names):
        what = f"One of eval_reward_funcs is called {taken.pop()!r}, which is the name of the composite's own metric."
        raise ValueError(f"{what} Rename it (its __name__ counts).")
    size, number = args.per_device_train_batch_size, args.num_generations
    comparing = [name for name, func in zip(scorer.names, scorer.reward_funcs, strict=True) if needs_group(func)]
    if comparing and size * args.steps_per_generation % number:
        steps = math.lcm(number // math.gcd(size, number), args.steps_per_generation, args.gradient_accumulation_steps)
        raise ValueError(
            f"The reward function '{comparing[0]}' compares the images of a group, but each of the {args.world_size} "
            f"processes has {size * args.steps_per_generation} images of a sampling phase, which cuts groups of "
            f"num_generations={number} apart. Set steps_per_generation={steps} (a phase then has more images), or "
            f"a per_device_train_batch_size that is a multiple of {number}."
        )
    if args.reward_weights is not None and len(args.reward_weights) != len(scorer.names):
        raise ValueError(
            f"reward_weights has length {len(args.reward_weights)}, and reward_funcs has length {len(scorer.names)}: "
            f"{', '.join(scorer.names)}. Give one weight for each function. Without reward_weights (with a recipe: "
            "--reward_weights null) each has 1."
        )


def check_over_optimization(callbacks: list, gold_names: list[str], eval_dataset: Any, args: FlowRLConfig) -> None:
    """Tells an [`OverOptimizationCallback`] among the callbacks which evaluation set to watch. Raises `ValueError` if
    it would never be told of an evaluation that it could judge."""
    found = [callback for callback in callbacks if isinstance(callback, OverOptimizationCallback)]
    if not found:
        return
    if len(found) > 1:
        raise ValueError(f"There are {len(found)} OverOptimizationCallbacks, which would keep models in one place.")
    callback, kind = found[0], OverOptimizationCallback.__name__
    if not gold_names:
        raise ValueError(
            f"{kind} compares the optimized reward with gold scores, but eval_reward_funcs is empty. Pass functions "
            "that are not optimized, or leave the callback out (with a recipe: --over_optimization_patience null)."
        )
    if args.eval_strategy == "no":
        raise ValueError(f"{kind} judges evaluations, but eval_strategy is 'no'. Set 'steps', and eval_steps.")
    sets = eval_dataset if isinstance(eval_dataset, dict) else {None: eval_dataset}
    callback.watched = next(iter(sets)) if callback.eval_name is None else callback.eval_name
    if callback.watched not in sets:
        known = list(sets) if isinstance(eval_dataset, dict) else "a single one without a name"
        raise ValueError(f"{kind} has eval_name={callback.eval_name!r}, but the evaluation sets are {known}.")
    if len(sets[callback.watched]) < 2:
        spread = "the gold score's noise from its spread over prompts, but the evaluation set has a single one"
        raise ValueError(f"{kind} estimates {spread}. Give it more.")


def check_output_dir(args: FlowRLConfig) -> None:
    """Training that cannot save is refused now, not at its first checkpoint."""
    path = Path(args.output_dir)
    folder = next(folder for folder in (path, *path.parents) if folder.exists())
    if args.should_save and not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        reason = "read-only for this user" if folder.is_dir() else "not a folder"
        raise ValueError(f"output_dir {str(path)!r} cannot be written to ({folder} is {reason}). Choose another.")


def probe_output_dir(args: FlowRLConfig, num_parameters: int) -> None:
    """Writes a file and removes it again, and sees that a checkpoint will fit."""
    if not args.should_save:
        return
    try:
        os.makedirs(args.output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output_dir) as file:
            file.write(b"0" * 4096)
    except OSError as error:
        raise ValueError(f"output_dir {args.output_dir!r} cannot be written to: {error}. Choose another.") from error
    # Weights in two formats, and Adam's two moments, in float32
    needed, free = 16 * num_parameters, shutil.disk_usage(args.output_dir).free
    if args.save_strategy != "no" and free < needed:
        raise ValueError(
            f"output_dir {args.output_dir!r} has {free / 2**20:.0f} MiB left, but a checkpoint of {num_parameters:,} "
            f"trained parameters takes {needed / 2**20:.0f}. Make room, choose another folder, or train fewer."
        )


def repeated(dataset: Dataset, args: FlowRLConfig) -> Dataset:
    """A set smaller than one sampling phase would give TRL's sampler no full batch at all."""
    needed = args.generation_batch_size // args.num_generations
    copies = math.ceil(needed / len(dataset))
    if copies == 1:
        return dataset
    logger.warning(
        f"The data set has {len(dataset)} prompts, but each sampling phase takes {needed} (generation_batch_size / "
        f"num_generations): it is repeated {copies} times."
    )
    return dataset.repeat(copies)


def chosen_eval_datasets(
    eval_dataset: Dataset | dict[str, Dataset] | str | None, own: Dataset | dict[str, Dataset] | None
) -> dict[str | None, Dataset]:
    """The sets that `evaluate(eval_dataset)` means, by name (`None` for a single one), where the trainer has `own`."""
    eval_dataset = own if eval_dataset is None else eval_dataset
    if eval_dataset is None:
        raise ValueError("There is no eval_dataset: pass one here or to the trainer.")
    if isinstance(eval_dataset, str):
        sets = own if isinstance(own, dict) else {}
        if eval_dataset not in sets:
            raise ValueError(f"eval_dataset is {eval_dataset!r}, but must be a data set or one of {list(sets)}.")
        return {eval_dataset: sets[eval_dataset]}
    return eval_dataset if isinstance(eval_dataset, dict) else {None: eval_dataset}
