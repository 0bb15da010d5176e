"""The options of a training, as its recipe and its command line give them."""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import torch
import transformers

from trl_flow.commands.recipe import Recipe, did_you_mean, option, unknown_option, without_nulls
from trl_flow.commands.yaml_values import meant


# Importing pipelines that are not used hints at packages that are not needed
_verbosity = transformers.utils.logging.get_verbosity()
transformers.utils.logging.set_verbosity_error()

from peft import LoraConfig  # noqa: E402
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config  # noqa: E402

from trl_flow.prompts import PROMPT_SETS  # noqa: E402
from trl_flow.rewards.named import NAMED_REWARDS  # noqa: E402
from trl_flow.shapes import IMAGE_SIZE, pipeline_path  # noqa: E402
from trl_flow.shapes.bundled import T5_TOKENS  # noqa: E402
from trl_flow.trainer import (  # noqa: E402
    AWMConfig,
    AWMTrainer,
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    FlowGRPOConfig,
    FlowGRPOTrainer,
    FlowRLConfig,
    FlowRLTrainer,
    GuardConfig,
    OverOptimizationCallback,
    SLASConfig,
    VGPOConfig,
)


transformers.utils.logging.set_verbosity(_verbosity)

METHODS = {"flow_grpo": FlowGRPOConfig, "guard": GuardConfig, "slas": SLASConfig, "vgpo": VGPOConfig}
METHODS |= {"nft": DiffusionNFTConfig, "awm": AWMConfig}
_TRAINERS = (FlowGRPOTrainer, DiffusionNFTTrainer, AWMTrainer)
BUNDLED_MODELS = ("bundled", "shapes")


def _field(help: str, default: Any = None, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class FlowScriptArguments(ScriptArguments):
    """What a training is of, and how its processes are started."""

    method: str = _field(
        "Published recipe whose defaults are used, and whose options `--method nft --help` lists.",
        "flow_grpo",
        choices=tuple(METHODS),
    )
    dataset_name: str | None = _field(
        f"The prompts: a set ({', '.join(f'`{name}`' for name in PROMPT_SETS)}; `name:path` reads a copy of it), a "
        "file .jsonl, .json, .csv, .tsv, .parquet or .txt, a folder, or the id of a data set on the Hub. The name of "
        "a set comes before a file or folder of that name, which is `./name`."
    )
    dataset_train_split: str = _field("The prompts to train on, as `train`, `train[:100]` or `train+test`.", "train")
    dataset_test_split: str = _field("The prompts to evaluate on, as `test` or `train[90%%:]`.", "test")
    prompt_column: str = _field("Column with the prompts, in a file or a data set on the Hub.", "prompt")
    image_column: str | None = _field(
        "Column with the images to be edited, or their paths, relative to the file; for models that edit images."
    )
    reward_funcs: list[str] | None = _field(
        f"Reward functions: {', '.join(f'`{name}`' for name in NAMED_REWARDS)}, or any dotted import path, such as "
        "`my_rewards.brightness`, looked for in the current folder too; a class is called without arguments."
    )
    eval_reward_funcs: list[str] | None = _field(
        "Functions that only score evaluations (gold scores), named as `reward_funcs` are."
    )
    over_optimization_patience: int | None = _field(
        "Watch for over-optimization: warn, once in so many evaluations in a row the reward is above and the gold "
        "average below those of the best evaluation so far, and keep the model that is best by gold in "
        "output_dir/best_gold. Needs `eval_reward_funcs` and `eval_strategy`."
    )
    over_optimization_stop: bool = _field("Stop training then.", False)
    over_optimization_num_standard_errors: float = _field(
        "How far below the gold average must be, in standard errors of the difference.", 2.0
    )
    init_lora_weights: str | None = _field("How a LoRA begins, PEFT's option: `gaussian`, as Flow-GRPO; PEFT's own.")
    accelerate_config: str | None = _field(
        "Start one process for each GPU: single_gpu, multi_gpu, fsdp2, zero2, zero3 or the path of an accelerate "
        "config. Options of `accelerate launch`, such as --num_processes, go with it."
    )


def training_parser(
    argv: Sequence[str], recipe: Mapping[str, Any], *, num_processes: int | None = None, **kwargs: Any
) -> TrlParser:
    """The parser of all options of a training, with `kwargs` of its own. Defaults depend on the method and the model
    that `argv` and `recipe` name. With `num_processes` it is for a plan: of so many, each on a GPU with bfloat16."""
    method = option(argv, recipe, "method") or "flow_grpo"
    if method not in METHODS:
        near = did_you_mean(str(method), METHODS)
        raise ValueError(f"method is {method!r}, but must be one of {', '.join(METHODS)}.{near}")
    config = METHODS[method]
    if num_processes is not None:
        config = type(config.__name__, (_Planned, config), {"world_size": num_processes})
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = TrlParser((FlowScriptArguments, config, ModelConfig, DatasetMixtureConfig), **layout, **kwargs)
    # The trainer chooses dtypes and turns dropout off; TRL's defaults are for language models
    parser.set_defaults(dtype=None, lora_dropout=0.0, lora_task_type=None)
    if option(argv, recipe, "init_adapter") is not None:  # whose own they are
        parser.set_defaults(use_peft=True, lora_r=None, lora_alpha=None)
    if (option(argv, {}, "model") or option(argv, recipe, "model_name_or_path")) in BUNDLED_MODELS:
        parser.set_defaults(height=IMAGE_SIZE, width=IMAGE_SIZE, max_sequence_length=T5_TOKENS)
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
    model = pipeline_path() if model in BUNDLED_MODELS else model
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
