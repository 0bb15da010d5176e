"""The command `trl-flow`. Libraries are imported where they are needed, so that `--help` and errors come at once."""

import argparse
import contextlib
import difflib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset
    from trl import ModelConfig, ScriptArguments, TrlParser

    from trl_flow.trainer import FlowGRPOConfig

METHODS = ("flow_grpo", "guard", "slas", "vgpo")
BUNDLED_MODELS = ("bundled", "shapes")
ACCELERATE_CONFIGS = Path(__file__).parent / "accelerate_configs"

# Set for the processes that `--accelerate_config` starts, which must not start others
_LAUNCHED = "TRL_FLOW_LAUNCHED"
_TRACEBACK = "TRL_FLOW_DEBUG"

# Fields of TRL's ModelConfig for language models. Options that did nothing would mislead.
_UNSUPPORTED_MODEL_OPTIONS = ("attn_implementation", "lora_task_type")

_TRAIN_DESCRIPTION = """\
Train a text-to-image pipeline by online reinforcement learning.

  trl-flow train --config recipe.yaml
  trl-flow train --config recipe.yaml --learning_rate 1e-4 --output_dir other-run
  trl-flow train --config recipe.yaml --accelerate_config multi_gpu --num_processes 4

A recipe is a YAML file of the options below; options on the command line come before those of the recipe. Beside them:

  --config PATH              the recipe
  --accelerate_config NAME   start one process for each GPU: single_gpu, multi_gpu, fsdp2, zero2, zero3 or the path of
                             an accelerate config; options of `accelerate launch`, such as --num_processes, go with it.
                             On CPUs: torchrun --nproc_per_node 2 -m trl_flow train --config recipe.yaml --use_cpu true
"""


class UsageError(Exception):
    """Something that the user asked for can not be done; the message says what to change. No traceback is shown."""


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs the command line.

    Args:
        argv (`Sequence[str]`, *optional*): arguments after the command's name; default: those of this process.

    Returns:
        `int`: exit code; 0 for success, 2 for a mistake in what was asked for, 130 for Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["train"]:
            return _train(argv[1:])
        if argv[:1] == ["memory"]:
            return _memory(argv[1:])
        arguments = _parser().parse_args(argv)
        if arguments.command is None:
            _parser().print_help()
            return 0
        run = {"demo": _demo, "env": _env, "evaluate": _evaluate, "serve-rewards": _serve_rewards}[arguments.command]
        return run(arguments)
    except UsageError as error:
        if os.environ.get(_TRACEBACK):
            raise
        # All processes of a distributed run find the same mistake; one of them tells
        if os.environ.get("RANK", "0") == "0":
            command = f"trl-flow {argv[0]}" if argv else "trl-flow"
            print(f"{command}: error: {error}\n({_TRACEBACK}=1 shows where it was found.)", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"\nInterrupted. {interrupt}".rstrip(), file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from trl_flow import __version__
    from trl_flow.evaluation import evaluate_command as evaluation
    from trl_flow.serving import command as serving

    parser = argparse.ArgumentParser(
        prog="trl-flow",
        description="Online reinforcement learning for text-to-image flow and diffusion models.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"trl_flow {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND", parser_class=_Parser)

    demo = commands.add_parser(
        "demo",
        help="train the bundled model for about three minutes and show it before and after (no network needed)",
        description="Trains the bundled text-to-image model to follow its prompts better, on any machine and without "
        "network. Prints a table of scores before and after on prompts never trained on, and writes pictures, curves, "
        "results.json and the adapter.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    demo.add_argument("--full", action="store_true", help="train 2.5 times as long, with a falling learning rate")
    demo.add_argument("--method", choices=("guard", "flow_grpo"), default="guard", help="the algorithm")
    demo.add_argument("--output-dir", "--output_dir", default="trl-flow-demo", metavar="DIR", help="where to write")
    demo.add_argument("--seed", type=_seed, default=0, help="of the training; pictures are drawn from fixed seeds")

    commands.add_parser(
        "train",
        help="train a model by a recipe: trl-flow train --config recipe.yaml (train --help lists all options)",
        add_help=False,
    )
    commands.add_parser(
        "memory",
        help="estimate the device memory that a recipe needs: trl-flow memory --config recipe.yaml",
        add_help=False,
    )
    evaluate = commands.add_parser(
        "evaluate",
        help="compare a base model and adapters: scores, pictures side by side, and a blind vote",
        description=evaluation.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    evaluation.add_arguments(evaluate)
    serve = commands.add_parser(
        "serve-rewards",
        help="serve reward functions over HTTP: trl-flow serve-rewards --rewards pickscore,hpsv2 --port 8000",
        description=serving.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    serving.add_arguments(serve)
    commands.add_parser(
        "env",
        help="print the versions and devices that a bug report should name",
        description="Prints the versions and devices that a bug report should name.",
        allow_abbrev=False,
    )
    return parser


class _Parser(argparse.ArgumentParser):
    """Names the option that was probably meant, as `_train` does."""

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        for token in unknown:
            if token.startswith("--"):
                self.error(_unknown_option(token, self._option_string_actions))
        return namespace, unknown


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def _unknown_option(token: str, known: Sequence[str]) -> str:
    option = token.split("=")[0]
    message = f"there is no option {option}"
    if near := difflib.get_close_matches(option, known, n=1):
        return f"{message}. Did you mean {near[0]}?"
    return f"{message}. --help lists those that there are."


# ---- demo ----


def _demo(arguments: argparse.Namespace) -> int:
    import diffusers
    import transformers

    from trl_flow.demo import FULL, QUICK, DemoError, run_demo

    # Bars and hints of loading would bury the few lines that matter
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        run_demo(
            FULL if arguments.full else QUICK,
            method=arguments.method,
            output_dir=arguments.output_dir,
            seed=arguments.seed,
        )
    except DemoError as error:
        raise UsageError(str(error)) from error
    return 0


# ---- env ----


def _env(arguments: argparse.Namespace) -> int:
    import platform

    import torch

    from trl_flow.evaluation.outputs import versions

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if not devices and torch.accelerator.is_available():
        devices = [str(torch.accelerator.current_accelerator())]
    lines = {"platform": platform.platform(), **versions()}
    lines["devices"] = ", ".join(devices) or "CPU"
    lines["CPU threads of torch"] = str(torch.get_num_threads())
    print("\n".join(f"- {name}: {value}" for name, value in lines.items()))
    return 0


# ---- evaluate ----


def _evaluate(arguments: argparse.Namespace) -> int:
    from trl_flow.evaluation.evaluate_command import prepare

    with _mistakes():
        run = prepare(arguments)
    try:
        run()
    # What the pipeline refuses to draw, damaged pictures, a full disk, a reward function that fails
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    return 0


# ---- serve-rewards ----


def _serve_rewards(arguments: argparse.Namespace) -> int:
    from trl_flow.serving.command import run

    with _mistakes():
        return run(arguments)


# ---- memory ----

_MEMORY_DESCRIPTION = """\
Estimate the memory that training will need on each device, from the model's configuration files: nothing is downloaded
in full, and no GPU is needed.

  trl-flow memory --config recipe.yaml
  trl-flow memory --model stabilityai/stable-diffusion-3.5-medium --use_peft --per_device_train_batch_size 8
  trl-flow memory --config recipe.yaml --accelerate_config fsdp2 --num_processes 8
"""


def _memory(argv: list[str]) -> int:
    parser = _Parser(
        prog="trl-flow memory",
        usage="trl-flow memory [--config recipe.yaml] [--model MODEL] [--json] [--option value ...]",
        description=_MEMORY_DESCRIPTION,
        epilog="All options of `trl-flow train` can be given too, and count as they do there.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="PATH", help="a recipe, as for `trl-flow train`")
    parser.add_argument("--model", "--model_name_or_path", help="hub id, folder, or `bundled`")
    parser.add_argument("--json", action="store_true", help="print the numbers, in bytes, as one line of JSON")
    parser.add_argument(
        "--accelerate_config", metavar="NAME", help="as for `trl-flow train`: fsdp2, zero2 and zero3 shard"
    )
    parser.add_argument(
        "--num_processes", type=int, metavar="N", help="devices; default: the accelerate config's, or 1"
    )
    # Not with `parse_known_args`, which here names the option that was probably meant: that is for the options' parser
    arguments, others = argparse.ArgumentParser.parse_known_args(parser, argv)
    if not argv:
        raise UsageError("nothing to estimate. Give a recipe, --config recipe.yaml, or a model, --model.")

    config = ["--config", arguments.config] if arguments.config else []
    recipe = _read_recipe(config)
    with _mistakes():
        sharding, num_processes = _sharding(arguments.accelerate_config or recipe.pop("accelerate_config", None))
        num_processes = num_processes if arguments.num_processes is None else arguments.num_processes
        if num_processes < 1:
            raise ValueError(f"num_processes is {num_processes}, but must be at least 1.")
        model = arguments.model or recipe.get("model_name_or_path")
        if model is None:
            raise ValueError("there is no model: give --model, or model_name_or_path in the recipe.")
        if not isinstance(model, str):
            raise ValueError(f"model_name_or_path is {model!r}, but must be a hub id, a folder, or `bundled`.")
        options = _train_parser(_method(others, recipe), bundled=model, num_processes=num_processes)
        options.prog, options.usage = parser.prog, parser.usage
        # A GPU that has bfloat16 is what is planned for, on whatever machine
        in_float16 = str(_option([*others, "--"], recipe, "fp16")).lower() in ("true", "1", "yes", "--")
        options.set_defaults(bf16=not in_float16, use_cpu=True)
        *parsed, unknown_in_recipe, unknown = options.parse_args_and_config(
            [*config, *others], return_remaining_strings=True, separate_remaining_strings=True
        )
    unknown = [token for token in [*unknown_in_recipe, *unknown] if token.startswith("--")]
    unknown = [token for token in unknown if token.split("=")[0] not in ("--accelerate_config", "--num_processes")]
    if unknown:
        known = [*options._option_string_actions, *parser._option_string_actions]
        raise UsageError(_unknown_option(unknown[0], known))
    _, args, model_args, _ = parsed
    with _mistakes():
        print(_estimate(model, args, model_args, sharding, as_json=arguments.json))
    return 0


def _sharding(name: str | None) -> tuple[str, int]:
    """What an accelerate config shards (as in `trl_flow.memory`), and its number of processes."""
    if name is None:
        return "none", 1
    _, config = _read_accelerate_config(name)
    stage = (config.get("deepspeed_config") or {}).get("zero_stage", 0)
    kind = (
        "weights" if config.get("distributed_type") == "FSDP" or stage == 3 else "gradients" if stage == 2 else "none"
    )
    return kind, config.get("num_processes") or 1


def _estimate(model: str, args: "FlowGRPOConfig", model_args: "ModelConfig", sharding: str, *, as_json: bool) -> str:
    import json

    from trl import get_peft_config

    from trl_flow import memory

    if model in BUNDLED_MODELS:
        from trl_flow.shapes import pipeline_path

        model = pipeline_path()
    args.model_init_kwargs = _model_init_kwargs(args.model_init_kwargs, model_args, bundled=os.path.isdir(model))
    kwargs = args.model_init_kwargs
    folder = memory.fetch_configs(model, revision=kwargs.get("revision"), token=kwargs.get("token"))
    plan = memory.Plan(args, get_peft_config(model_args), sharding)
    result = memory.estimate(folder, plan)
    found = []
    if result.total > min(memory.CARDS) * memory.GIB:
        found = memory.savings(plan, result, lambda other: memory.estimate(folder, other))
    if as_json:
        return json.dumps(memory.as_json(result, found))
    return memory.as_text(result, plan, found)


# ---- train ----


@contextlib.contextmanager
def _mistakes() -> Iterator[None]:
    """What is wrong with options, data or model is told without a traceback. Not for training itself: a failure there
    may be a fault of the program, whose place one has to see."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UsageError(str(error) or type(error).__name__) from error


def _train(argv: list[str]) -> int:
    argv = [part for token in argv for part in (token.split("=", 1) if token.startswith("--config=") else [token])]
    if not argv:
        raise UsageError("nothing to train. Give a recipe, --config recipe.yaml, or options; --help lists them.")
    recipe = _read_recipe(argv)
    with _mistakes():
        parser = _train_parser(_method(argv, recipe), bundled=_option(argv, recipe, "model_name_or_path"))
        # Exits here on -h and on values that do not fit
        *parsed, unknown_in_recipe, unknown = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
    launch_options = unknown_in_recipe + unknown
    if "--accelerate_config" in launch_options:
        if not os.environ.get(_LAUNCHED):
            return _launch(launch_options, _without(argv, unknown), parser)
    elif launch_options:
        raise UsageError(
            _unknown_option(
                next((token for token in launch_options if token.startswith("--")), launch_options[0]),
                [*parser._option_string_actions, "--config", "--accelerate_config"],
            )
        )
    _run_training(*parsed)
    return 0


def _read_recipe(argv: list[str]) -> dict[str, Any]:
    if "--config" not in argv:
        return {}
    index = argv.index("--config")
    if index + 1 == len(argv):
        raise UsageError("--config needs the path of a YAML file.")
    return _read_mapping(Path(argv[index + 1]), "recipe", "options, such as `learning_rate: 1e-4`")


def _read_mapping(path: Path, kind: str, of: str) -> dict[str, Any]:
    import yaml

    name = f"the {kind} {os.fspath(path)!r}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{name} can not be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{name} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(
            f"{name} must be a YAML mapping of {of}, but holds "
            f"{'nothing' if content is None else f'a {type(content).__name__}'}."
        )
    return content


def _read_accelerate_config(name: str) -> tuple[Path, dict[str, Any]]:
    path = Path(name) if Path(name).is_file() else ACCELERATE_CONFIGS / f"{name}.yaml"
    if not path.is_file():
        names = sorted(path.stem for path in ACCELERATE_CONFIGS.glob("*.yaml"))
        raise UsageError(f"accelerate_config is {name!r}, which is neither a file nor one of {', '.join(names)}.")
    return path, _read_mapping(path, "accelerate config", "settings, such as `num_processes: 2`")


def _option(argv: list[str], recipe: dict[str, Any], name: str) -> Any:
    """An option's value before everything is parsed: on it depends what there is to parse."""
    for index, token in enumerate(argv):
        if token.startswith(f"--{name}="):
            return token.split("=", 1)[1]
        if token == f"--{name}" and index + 1 < len(argv):
            return argv[index + 1]
    return recipe.get(name)


def _method(argv: list[str], recipe: dict[str, Any]) -> str:
    method = _option(argv, recipe, "method") or "flow_grpo"
    if method not in METHODS:
        near = difflib.get_close_matches(str(method), METHODS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"method is {method!r}, but must be one of {', '.join(METHODS)}.{hint}")
    return method


def _train_parser(method: str, *, bundled: str | None = None, num_processes: int | None = None) -> "TrlParser":
    """The parser of all options. `num_processes` is for plans: the batches of as many processes as there will be."""
    from dataclasses import dataclass, field

    import transformers

    # Importing pipelines that are not used hints at packages that are not needed
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from trl_flow.prompts import PROMPT_SETS
    from trl_flow.rewards.named import NAMED_REWARDS
    from trl_flow.trainer import FlowGRPOConfig, GuardConfig, SLASConfig, VGPOConfig

    transformers.utils.logging.set_verbosity(verbosity)

    @dataclass
    class FlowScriptArguments(ScriptArguments):
        method: str = field(
            default="flow_grpo",
            metadata={"help": "Published recipe whose defaults are used.", "choices": METHODS},
        )
        dataset_name: str | None = field(
            default=None,
            metadata={
                "help": f"The prompts: a set ({', '.join(f'`{name}`' for name in PROMPT_SETS)}; `name:path` reads a "
                "copy of it instead of downloading it), a file .jsonl, .json, .csv, .tsv, .parquet or .txt, a folder, "
                "or the id of a data set on the Hub. The name of a set comes before a file or folder of that name, "
                "which is `./name`."
            },
        )
        prompt_column: str = field(
            default="prompt",
            metadata={"help": "Column with the prompts, in a file or a data set on the Hub."},
        )
        reward_funcs: list[str] | None = field(
            default=None,
            metadata={
                "help": f"Reward functions: {', '.join(f'`{name}`' for name in NAMED_REWARDS)}, or any dotted import "
                "path, such as `my_rewards.brightness`, looked for in the current folder too; a class is called "
                "without arguments."
            },
        )
        eval_reward_funcs: list[str] | None = field(
            default=None,
            metadata={"help": "Functions that only score evaluations (gold scores), named as `reward_funcs` are."},
        )

    configs = {"flow_grpo": FlowGRPOConfig, "guard": GuardConfig, "slas": SLASConfig, "vgpo": VGPOConfig}
    config = configs[method]
    if num_processes is not None:
        config = type(config.__name__, (config,), {"world_size": property(lambda self: num_processes)})
    parser = TrlParser(
        (FlowScriptArguments, config, ModelConfig, DatasetMixtureConfig),
        prog="trl-flow train",
        usage="trl-flow train --config recipe.yaml [--option value ...]",
        description=_TRAIN_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # The trainer chooses dtypes and turns dropout off; TRL's defaults are for language models
    parser.set_defaults(dtype=None, lora_dropout=0.0, lora_task_type=None)
    if bundled in BUNDLED_MODELS:
        from trl_flow.shapes import PICTURE_SIZE
        from trl_flow.shapes.model import T5_TOKENS

        parser.set_defaults(height=PICTURE_SIZE, width=PICTURE_SIZE, max_sequence_length=T5_TOKENS)
    return parser


def _without(tokens: list[str], removed: list[str]) -> list[str]:
    """`tokens` less the ordered subsequence `removed`."""
    rest = iter(removed)
    awaited = next(rest, None)
    kept = []
    for token in tokens:
        if awaited is not None and token == awaited:
            awaited = next(rest, None)
        else:
            kept.append(token)
    return kept


def _launch(launch_options: list[str], training_options: list[str], parser: "TrlParser") -> int:
    """Starts `trl-flow train` anew in the processes of `accelerate launch`."""
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser

    index = launch_options.index("--accelerate_config")
    if index + 1 == len(launch_options):
        raise UsageError("--accelerate_config needs a name or the path of a file.")
    name = launch_options[index + 1]
    others = launch_options[:index] + launch_options[index + 2 :]
    path, config = _read_accelerate_config(name)
    launch_parser = launch_command_parser()
    known = set(launch_parser._option_string_actions)
    for token in others:
        if token.startswith("--") and token.split("=")[0] not in known:
            raise UsageError(_unknown_option(token, [*parser._option_string_actions, *sorted(known)]))

    arguments = launch_parser.parse_args(
        ["--config_file", str(path), *others, "--module", "trl_flow", "train", *training_options]
    )
    on_cpu = arguments.cpu or config.get("use_cpu", False)
    if arguments.num_processes is None:
        arguments.num_processes = config.get("num_processes") or torch.accelerator.device_count()
    torchrun = "`torchrun --nproc_per_node 2 -m trl_flow train ... --use_cpu true`"
    if not on_cpu and not torch.accelerator.is_available():
        raise UsageError(
            f"accelerate_config {name!r} is for GPUs, and torch sees none here. For processes on CPUs use {torchrun}."
        )
    if on_cpu and arguments.num_processes > 1:
        # accelerate would start one process and not say so
        raise UsageError(
            f"accelerate does not start {arguments.num_processes} processes on CPUs. Use {torchrun} without "
            "--accelerate_config."
        )
    os.environ[_LAUNCHED] = "1"
    launch_command(arguments)
    return 0


def _run_training(
    script_args: "ScriptArguments", args: "FlowGRPOConfig", model_args: "ModelConfig", mixture_args: Any
) -> None:
    from trl import ModelConfig, get_peft_config

    from trl_flow import FlowGRPOTrainer
    from trl_flow.rewards.named import named_rewards
    from trl_flow.trainer.checkpoints import is_complete, last_complete_checkpoint

    with _mistakes():
        if model_args.model_name_or_path is None:
            raise ValueError("model_name_or_path is missing: a hub id, a folder, or `bundled` for the model shipped.")
        for field in _UNSUPPORTED_MODEL_OPTIONS:
            default = None if field == "lora_task_type" else ModelConfig.__dataclass_fields__[field].default
            if getattr(model_args, field) != default:
                raise ValueError(f"{field} is TRL's option for language models and has no effect here. Remove it.")
        if script_args.ignore_bias_buffers:
            raise ValueError("ignore_bias_buffers is TRL's option for old language models. Remove it.")
        bundled = model_args.model_name_or_path in BUNDLED_MODELS
        model = model_args.model_name_or_path
        if bundled:
            from trl_flow.shapes import pipeline_path

            model = pipeline_path()
        args.model_init_kwargs = _model_init_kwargs(args.model_init_kwargs, model_args, bundled=bundled)
        reward_funcs = named_rewards(script_args.reward_funcs)
        gold = script_args.eval_reward_funcs
        eval_reward_funcs = named_rewards(gold, "eval_reward_funcs") if gold else None
        train_dataset, eval_dataset = _datasets(
            script_args,
            mixture_args,
            bundled=bundled,
            evaluate=args.eval_strategy != "no",
            prompt_column=script_args.prompt_column,
        )
        resume = args.resume_from_checkpoint
        if resume is True or str(resume).lower() in ("true", "last"):
            resume = last_complete_checkpoint(args.output_dir)
        elif resume is not None and not is_complete(resume):
            raise ValueError(
                f"resume_from_checkpoint is {resume!r}, which is no complete checkpoint. Give one, or `true` for the "
                "last complete one in output_dir."
            )
        trainer = FlowGRPOTrainer(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=get_peft_config(model_args),
            eval_reward_funcs=eval_reward_funcs,
        )

    try:
        trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_last_checkpoint(args.output_dir)) from None
    trainer.save_model(args.output_dir, _internal_call=True)  # the push below is the only one
    trainer.accelerator.print(f"Saved to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Pushed to {trainer.hub_model_id}.")


def _last_checkpoint(output_dir: str) -> str:
    from trl_flow.trainer.checkpoints import last_complete_checkpoint

    try:
        last = last_complete_checkpoint(output_dir)
    except ValueError:
        return f"No checkpoint had been written to {output_dir} (save_steps says how often that happens)."
    return f"The last checkpoint is {last}. Go on from it with the same command and --resume_from_checkpoint true."


def _model_init_kwargs(given: dict | None, model_args: "ModelConfig", *, bundled: bool) -> dict[str, Any]:
    kwargs = dict(given or {})
    if not bundled and model_args.model_revision != "main":
        kwargs.setdefault("revision", model_args.model_revision)
    if model_args.dtype is not None:
        import torch

        dtype = getattr(torch, model_args.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype is {model_args.dtype!r}, but must be float32, bfloat16 or float16.")
        kwargs.setdefault("dtype", dtype)
    if model_args.load_in_4bit or model_args.load_in_8bit:
        quantization = {"load_in_4bit": True} if model_args.load_in_4bit else {"load_in_8bit": True}
        if model_args.load_in_4bit:
            quantization["bnb_4bit_quant_type"] = model_args.bnb_4bit_quant_type
            quantization["bnb_4bit_use_double_quant"] = model_args.use_bnb_nested_quant
            if model_args.bnb_4bit_quant_storage is not None:
                quantization["bnb_4bit_quant_storage"] = model_args.bnb_4bit_quant_storage
        kwargs.setdefault("quantization_config", quantization)
    return kwargs


def _datasets(
    script_args: "ScriptArguments", mixture_args: Any, *, bundled: bool, evaluate: bool, prompt_column: str = "prompt"
) -> tuple["Dataset", "Dataset | None"]:
    """The prompts to train on and, when they are asked for, those to evaluate on."""
    from trl import get_dataset

    from trl_flow.prompts import UnknownSplitError

    if script_args.dataset_streaming or mixture_args.streaming:
        raise ValueError("streaming data sets are not supported: groups are built by row numbers. Remove the option.")
    train_split, test_split = script_args.dataset_train_split, script_args.dataset_test_split
    name = script_args.dataset_name
    if mixture_args.datasets:
        load = partial(_split_of, get_dataset(mixture_args))
    elif name is None and bundled:
        from trl_flow.shapes import load_prompts

        load = partial(_split_of, {split: load_prompts(split) for split in ("train", "test")})
    elif name is None:
        raise ValueError(
            "dataset_name is missing: the name of a prompt set (--help lists them), a hub id, or a file .jsonl, "
            ".json, .csv, .tsv, .parquet (with a column `prompt`) or .txt (one prompt a line)."
        )
    else:
        from trl_flow.prompts import load_prompts

        load = partial(load_prompts, name, config=script_args.dataset_config, prompt_column=prompt_column)
    try:
        train = load(split=train_split)
    except UnknownSplitError as error:
        raise ValueError(
            f"the data set has no split {train_split!r}, only {', '.join(error.splits)}: set dataset_train_split."
        ) from error
    try:
        return train, load(split=test_split) if evaluate else None
    except UnknownSplitError as error:
        raise ValueError(
            f"eval_strategy asks for evaluations, but the data set has no split {test_split!r}, only "
            f"{', '.join(error.splits)}: set dataset_test_split, test_split_size, or eval_strategy no."
        ) from error


def _split_of(splits: Mapping[str, "Dataset"], split: str) -> "Dataset":
    from trl_flow.prompts import UnknownSplitError

    if split not in splits:
        raise UnknownSplitError("dataset", split, tuple(splits))
    return splits[split]
