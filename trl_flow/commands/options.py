"""The options of a training, as its recipe and its command line give them."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

import torch
from peft import LoraConfig
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config

import trl_flow
from trl_flow.commands import methods
from trl_flow.commands.recipe import Recipe, unknown_option, without_nulls
from trl_flow.commands.yaml_values import meant
from trl_flow.descriptions import described
from trl_flow.shapes import pipeline_path
from trl_flow.shapes.bundled import TINY_DECODER
from trl_flow.trainer import (
    AWMTrainer,
    DiffusionNFTTrainer,
    FlowGRPOConfig,
    FlowGRPOTrainer,
    FlowRLConfig,
    FlowRLTrainer,
    OverOptimizationCallback,
)


METHODS = {name: getattr(trl_flow, config) for name, config in methods.METHODS.items()}
_TRAINERS = (FlowGRPOTrainer, DiffusionNFTTrainer, AWMTrainer)


@described
@dataclass
class FlowScriptArguments(ScriptArguments):
    """
    What a training is of, and how its processes are started.

    Parameters:
        method (`str`):
            Published recipe whose defaults are used, and whose options `--method nft --help` lists.
        dataset_name (`str`, *optional*):
            The prompts: a set (`geneval`, `generated_geneval`, `ocr`, `pickscore`, `pickscore_sfw`, `hpdv2`,
            `drawbench`, `vbench`, `unigenbench`, `unigenbench_long`, `unigenbench_zh`, `unigenbench_zh_long`;
            `name:path` reads a copy of it), a file .jsonl, .json, .csv, .tsv, .parquet or .txt, a folder, or the id of
            a data set on the Hub. The name of a set comes before a file or folder of that name, which is `./name`.
        dataset_train_split (`str`):
            The prompts to train on, as `train`, `train[:100]` or `train+test`.
        dataset_test_split (`str`):
            The prompts to evaluate on, as `test` or `train[90%:]`.
        prompt_column (`str`):
            Column with the prompts, in a file or a data set on the Hub.
        image_column (`str`, *optional*):
            Column with the images to be edited, or their paths, relative to the file; for models that edit images.
        reward_funcs (`list[str]`, *optional*):
            Reward functions: `aesthetic`, `clipscore`, `clipscore_dfn5b`, `deqa`, `geneval`, `geneval_nonnegative`,
            `geneval_strict`, `geneval_correct`, `hpsv2`, `hpsv2.1`, `imagereward`, `jpeg_compressibility`,
            `jpeg_incompressibility`, `motion`, `ocr`, `pickscore`, `shapes_soft`, `shapes_strict`, `shapes_fidelity`,
            `unigenbench`, `unifiedreward`, `unifiedreward_alignment`, `unifiedreward_coherence`,
            `unifiedreward_style`, `video_judge`, `win_rate`, or any dotted import path, such as
            `my_rewards.brightness`, looked for in the current folder too; a class is called without arguments.
            `frames:ocr` is the mean of a reward over a video's frames.
        eval_reward_funcs (`list[str]`, *optional*):
            Functions that only score evaluations (gold scores), named as `reward_funcs` are.
        over_optimization_patience (`int`, *optional*):
            Watch for over-optimization: warn, once in so many evaluations in a row the reward is above and the gold
            average below those of the best evaluation so far, and keep the model that is best by gold in
            output_dir/best_gold. Needs `eval_reward_funcs` and `eval_strategy`.
        over_optimization_stop (`bool`):
            Stop training then, when `over_optimization_patience` warns.
        over_optimization_num_standard_errors (`float`):
            How far below the gold average must be, in standard errors of the difference.
        init_lora_weights (`str`, *optional*):
            How a LoRA begins, PEFT's option: `gaussian`, as Flow-GRPO; PEFT's own.
        accelerate_config (`str`, *optional*):
            Start a process for each GPU, or with `use_cpu` two on CPUs: single_gpu, multi_gpu, fsdp2, zero2, zero3 or
            the path of an accelerate config. Options of `accelerate launch`, such as --num_processes, go with it.
    """

    method: Literal["flow_grpo", "guard", "slas", "vgpo", "nft", "awm"] = "flow_grpo"
    dataset_name: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    prompt_column: str = "prompt"
    image_column: str | None = None
    reward_funcs: list[str] | None = None
    eval_reward_funcs: list[str] | None = None
    over_optimization_patience: int | None = None
    over_optimization_stop: bool = False
    over_optimization_num_standard_errors: float = 2.0
    init_lora_weights: str | None = None
    accelerate_config: str | None = None


def training_parser(
    argv: Sequence[str],
    recipe: Mapping[str, Any],
    *,
    num_processes: int | None = None,
    planned: bool = True,
    **kwargs: Any,
) -> TrlParser:
    """The parser of all options of a training, with `kwargs` of its own. Defaults depend on the method and the model
    that `argv` and `recipe` name. With `num_processes` it is for a run of so many: one that is `planned`, each on a
    GPU with bfloat16, or one that starts on this machine."""
    config = METHODS[methods.method_of(argv, recipe)]
    if num_processes is not None:
        bases = (_Planned, config) if planned else (config,)
        config = type(config.__name__, bases, {"world_size": num_processes})
    layout = {"add_help": False, "allow_abbrev": False}  # see `training_help`
    parser = TrlParser((FlowScriptArguments, config, ModelConfig, DatasetMixtureConfig), **layout, **kwargs)
    parser.set_defaults(**methods.changed_defaults(argv, recipe))
    return parser


def parse_training(parser: TrlParser, argv: Sequence[str], recipe: Recipe, *, strict: bool = True) -> tuple[Any, ...]:
    """
    What `parser` makes of `argv` and a recipe that has been read, as `parse_args_and_config` would of the file, and
    what it does not know; with `strict` a `ValueError` says so, before values are looked at.
    """
    (argv, nulls), options = without_nulls(argv), dict(recipe)
    if "--config" in argv:
        place = argv.index("--config")
        del argv[place : place + 2]
    environment = options.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise ValueError(f"env is {environment!r}, but must be a mapping of environment variables to their values.")
    written = recipe.written.get("env") or environment
    os.environ.update({str(name): "" if value is None else str(value) for name, value in written.items()})
    hints = {name: hint for cls in parser.dataclass_types for name, hint in get_type_hints(cls).items()}
    options |= {n: meant(recipe.written.get(n, options[n]), hints[n]) for n in options if n in hints}
    options |= dict.fromkeys(nulls)
    known = parser._option_string_actions
    # `null` is the default, also of what only other methods have, but no misspelled name
    nothing = [name for name, value in options.items() if value is None]
    unknown = [f"--{name}" for name in nothing if strict and f"--{name}" not in known and not _methods_with(name)]
    unknown += parser.set_defaults_with_config(**{n: value for n, value in options.items() if n not in nothing})
    if strict and unknown:
        raise ValueError(_other_methods(unknown[0], parser) or unknown_option(unknown[0], known, recipe))
    # Exits here on -h and on values that do not fit
    *parsed, left = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if strict and left:
        raise ValueError(_other_methods(left[0], parser) or unknown_option(left[0], known))
    return *parsed, unknown + left


def _methods_with(name: str) -> list[str]:
    return [method for method, config in METHODS.items() if name in config.__dataclass_fields__]


def _other_methods(token: str, parser: TrlParser) -> str | None:
    """What to say about an option that only other methods have."""
    name = token.split("=")[0].removeprefix("--").replace("-", "_")
    if not (others := _methods_with(name)):
        return None
    config = next(cls for cls in parser.dataclass_types if issubclass(cls, FlowRLConfig))
    classes = (config, *config.__bases__)  # a plan's config is derived from the method's
    own = next(method for cls in classes for method, each in METHODS.items() if each is cls)
    why = config.why_not(name)
    return f"--{name} belongs to {', '.join(others)}, not to {own}" + (f": {why}." if why else ".")


def trainer_of(args: Any) -> type[FlowRLTrainer]:
    """The trainer that a config is for."""
    return next(trainer for trainer in _TRAINERS if isinstance(args, trainer.config_class))


def peft_config(script_args: FlowScriptArguments, args: FlowRLConfig, model_args: ModelConfig) -> LoraConfig | None:
    """The LoRA that is asked for, if one is; what an adapter to go on from decides may be `None`."""
    if args.init_adapter is not None and not model_args.use_peft:
        what = "use_peft is False, which trains all weights, but init_adapter is an adapter to start from"
        raise ValueError(f"{what}. Leave one of them out.")
    config = get_peft_config(model_args)
    targets = None if config is None else config.target_modules
    if isinstance(targets, str) and re.fullmatch(r"[\w.]+", targets):
        # TRL makes a text of a list of one, which PEFT takes for a regular expression of whole names
        config.target_modules = {targets}
    # How a recipe's LoRA begins gives way to an adapter to go on from
    if config is not None and script_args.init_lora_weights is not None and args.init_adapter is None:
        config.init_lora_weights = script_args.init_lora_weights
    return config


def over_optimization_callbacks(script_args: FlowScriptArguments) -> list[OverOptimizationCallback]:
    """The callback that is asked for, if it is."""
    prefix = "over_optimization_"
    given = {name.removeprefix(prefix): value for name, value in vars(script_args).items() if name.startswith(prefix)}
    if given["patience"] is not None:
        return [OverOptimizationCallback(**given)]
    if given["stop"]:
        raise ValueError(
            "over_optimization_stop is True, but over_optimization_patience is not set: nothing watches. Say after "
            "how many evaluations in a row to stop, such as over_optimization_patience: 2."
        )
    return []


class _Planned:
    """A config of a run elsewhere: this machine's devices do not count."""

    def __post_init__(self):
        self.use_cpu = True
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        super().__post_init__()


def resolve_model(model: Any, args: FlowGRPOConfig, model_args: ModelConfig) -> str:
    """The hub id or the folder of the model; how it is loaded is written into `args.model_init_kwargs`."""
    if model is None:
        raise ValueError("model_name_or_path is missing: a hub id, a folder, or `bundled` for the model shipped.")
    if not isinstance(model, str):
        raise ValueError(f"model_name_or_path is {model!r}, but must be a hub id, a folder, or `bundled`.")
    attention = ModelConfig.__dataclass_fields__["attn_implementation"].default
    for name, default in (("attn_implementation", attention), ("lora_task_type", None)):
        if getattr(model_args, name) != default:
            raise ValueError(f"{name} is TRL's option for language models and has no effect here. Remove it.")
    model = pipeline_path() if model in methods.BUNDLED_MODELS else model
    if getattr(args, "projection_vae", None) in methods.BUNDLED_MODELS:
        args.projection_vae = os.path.join(pipeline_path(), TINY_DECODER)
    kwargs = dict(args.model_init_kwargs or {})
    if model_args.model_revision != "main":
        kwargs.setdefault("revision", model_args.model_revision)
    if model_args.dtype is not None:
        dtype = getattr(torch, model_args.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype is {model_args.dtype!r}, but must be float32, bfloat16 or float16.")
        kwargs.setdefault("dtype", dtype)
    if model_args.load_in_8bit:
        kwargs.setdefault("quantization_config", {"load_in_8bit": True})
    elif model_args.load_in_4bit:
        quantization = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": model_args.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": model_args.use_bnb_nested_quant,
            "bnb_4bit_quant_storage": model_args.bnb_4bit_quant_storage,
        }
        kwargs.setdefault("quantization_config", {k: v for k, v in quantization.items() if v is not None})
    args.model_init_kwargs = kwargs
    return model
