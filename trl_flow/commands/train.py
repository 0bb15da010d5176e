"""`trl-flow train`: from a recipe to a run. Libraries are imported when it runs."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trl_flow.commands import UsageError, show
from trl_flow.commands.methods import BUNDLED_MODELS
from trl_flow.commands.recipe import (
    Recipe,
    option,
    read_accelerate_config,
    read_recipe,
    unknown_option,
    without_nulls,
)
from trl_flow.commands.shared_recipe import shared_recipe
from trl_flow.commands.training_help import training_help, wants_help
from trl_flow.commands.yaml_values import BOOLEANS
from trl_flow.quiet import leave_out_bars


if TYPE_CHECKING:
    from datasets import Dataset
    from trl import DatasetMixtureConfig, TrlParser

    from trl_flow.commands.options import FlowScriptArguments
    from trl_flow.trainer import FlowRLTrainer

DESCRIPTION = """\
Train a text-to-image pipeline by online reinforcement learning.

  trl-flow train --config recipe.yaml
  trl-flow train --config recipe.yaml --learning_rate 1e-4 --output_dir other-run
  trl-flow train --config recipe.yaml --accelerate_config multi_gpu --num_processes 4

A recipe, the YAML file that --config names, is a mapping of the options below. With `extends: base.yaml`, a path from
its folder, it takes over the options of another but for those that it names (null takes one away). Options on the
command line come before those of the recipe; `--reward_weights null` takes one away. `--resume_from_checkpoint true`
goes on with a run, and `auto` begins it if there is no checkpoint yet. With --use_cpu true --accelerate_config starts
two processes on CPUs, or as many as --num_processes says.
"""

# What options say for it: in YAML, and transformers' parser
_FALSE = {text for text, truth in BOOLEANS.items() if not truth} | {"f", "n", "0"}
# Set for the processes that `--accelerate_config` starts, which must not start others
_LAUNCHED = "TRL_FLOW_LAUNCHED"


def prepare(argv: list[str]) -> Callable[[], None]:
    """What trains, or starts the processes that will; raises an error if something is wrong with what was asked for,
    the model, the data and the rewards, which are loaded."""
    if not argv:
        raise ValueError("nothing to train. Give a recipe, --config recipe.yaml, or options; --help lists them.")
    argv, recipe = read_recipe(argv)
    if wants_help(argv):
        usage = "trl-flow train --config recipe.yaml [--option value ...]"
        text = training_help(argv, recipe, usage=usage, description=DESCRIPTION)
        return lambda: show(text)
    from trl_flow.commands.options import parse_training, training_parser

    launcher = None if os.environ.get(_LAUNCHED) else option(argv, recipe, "accelerate_config")
    processes = None if launcher is None else _num_processes(launcher, argv, recipe)
    parser = training_parser(argv, recipe, num_processes=processes, planned=False, prog="trl-flow train")
    if option(argv, {}, "eval_strategy") == "no" or "eval_strategy" in without_nulls(argv)[1]:
        recipe.remove_evaluation()
    # Of options that are unknown here the launcher may know, also in its processes
    strict = option(argv, recipe, "accelerate_config") is None
    script_args, *others, unknown = parse_training(parser, argv, recipe, strict=strict)
    if launcher is None:
        shown = shared_recipe(argv, recipe, [script_args, *others])
        return _prepare_run(script_args, *others, shown)
    return _prepare_launch(launcher, processes, unknown, argv, parser, use_cpu=others[0].use_cpu)


def _num_processes(name: str, argv: list[str], recipe: Recipe) -> int:
    """How many processes an accelerate config is to start: batches are divided among them."""
    import torch

    _, config = read_accelerate_config(name)
    given = option(argv, recipe, "num_processes") or config.get("num_processes")
    if given is not None:
        if not str(given).isdecimal() or int(given) < 1:
            raise ValueError(f"num_processes is {given!r}, but must be a whole number of at least 1.")
        return int(given)
    # Without a value, before another option or at the end, it is on
    use_cpu = option([*argv, "true"], recipe, "use_cpu") or config.get("use_cpu", False)
    if str(use_cpu).lower() not in _FALSE or "--cpu" in argv:
        return 1 if str(config.get("distributed_type", "NO")) == "NO" else 2  # enough to see it at work
    return max(torch.accelerator.device_count(), 1)


def _prepare_launch(
    name: str, processes: int, options: list[str], argv: list[str], parser: "TrlParser", *, use_cpu: bool
) -> Callable[[], None]:
    """`trl-flow train` anew in the processes of `accelerate launch`, to which `options` belong."""
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import is_deepspeed_available

    path, config = read_accelerate_config(name)
    launch_parser = launch_command_parser()
    known = launch_parser._option_string_actions
    if wrong := [token for token in options if token.startswith("--") and token.split("=")[0] not in known]:
        raise ValueError(unknown_option(wrong[0], [*parser._option_string_actions, *known]))
    # The options of the launcher are met again in its processes, and left alone there
    command = ["--module", "trl_flow", "train", *argv]
    arguments = launch_parser.parse_args(["--config_file", str(path), *options, *command])
    on_cpu = use_cpu or arguments.cpu or config.get("use_cpu", False)
    kind = str(config.get("distributed_type", "NO"))
    arguments.num_processes = processes
    if not on_cpu and not torch.accelerator.is_available():
        raise ValueError(
            f"accelerate_config {name!r} is for GPUs, and torch sees none here. Add --use_cpu true for processes on "
            "CPUs (two, or --num_processes)."
        )
    if kind == "DEEPSPEED" and not is_deepspeed_available():
        raise ValueError(f"accelerate_config {name!r} needs DeepSpeed: pip install trl_flow[deepspeed].")
    if on_cpu and processes > 1:
        # With `cpu` accelerate would start one process and not say so; torchrun starts them all
        arguments.cpu, arguments.multi_gpu = False, kind not in ("FSDP", "DEEPSPEED")
        if not use_cpu:
            arguments.training_script_args += ["--use_cpu", "true"]

    def launch() -> None:
        os.environ[_LAUNCHED] = "1"
        launch_command(arguments)

    return launch


def _prepare_run(
    script_args: "FlowScriptArguments", args: Any, model_args: Any, mixture_args: "DatasetMixtureConfig", recipe: str
) -> Callable[[], None]:
    from trl_flow.commands import options
    from trl_flow.rewards.named import named_rewards
    from trl_flow.trainer.checkpoints import AUTO, RunIsCompleteError, checkpoint_to_resume
    from trl_flow.trainer.init_adapter import check_origin

    leave_out_bars()
    if script_args.ignore_bias_buffers:
        raise ValueError("ignore_bias_buffers is TRL's option for old language models. Remove it.")
    model = options.resolve_model(model_args.model_name_or_path, args, model_args)
    rewards, gold = named_rewards(script_args.reward_funcs), script_args.eval_reward_funcs
    gold = named_rewards(gold, "eval_reward_funcs") if gold else None
    bundled, evaluate = model_args.model_name_or_path in BUNDLED_MODELS, args.eval_strategy != "no"
    train_dataset, eval_dataset = load_datasets(script_args, mixture_args, bundled=bundled, evaluate=evaluate)
    resume = args.resume_from_checkpoint
    resume = (BOOLEANS | {"last": True, AUTO: AUTO}).get(str(resume).lower(), resume)
    try:
        resume = checkpoint_to_resume(resume, args)
    except RunIsCompleteError as error:
        if resume != AUTO:
            raise
        complete = str(error)  # a scheduler starts the command again and again until it says so
        return lambda: print(complete)
    data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "eval_reward_funcs": gold}
    if resume is not None and args.init_adapter is not None:
        check_origin(resume, args)
        args.init_adapter = resume  # whose file may be gone; all that counts of it is in the checkpoint
    lora = options.peft_config(script_args, args, model_args)
    callbacks = options.over_optimization_callbacks(script_args)
    trainer = options.trainer_of(args)(model, rewards, args=args, **data, callbacks=callbacks, peft_config=lora)
    trainer.publisher.recipe = recipe
    return lambda: _run(trainer, resume, script_args.dataset_name)


def _run(trainer: "FlowRLTrainer", resume: str | None, dataset_name: str | None) -> None:
    from trl_flow.evaluation.gold import BaseMeanError
    from trl_flow.rewards import CheckpointError
    from trl_flow.rewards.checks import RewardError
    from trl_flow.rewards.scorer import print_failure
    from trl_flow.trainer.checkpoints import CheckpointWriteError, complete_checkpoints

    folder = trainer.args.output_dir
    trainer.resume_hint = "the same command and --resume_from_checkpoint true"
    try:
        trainer.train(resume_from_checkpoint=resume)
    except RewardError as error:
        print_failure(error)
        raise UsageError(str(error)) from error
    except (CheckpointError, CheckpointWriteError, BaseMeanError, OSError) as error:  # which is a full disk
        raise UsageError(str(error)) from error
    except KeyboardInterrupt:
        where = f"No checkpoint had been written to {folder} (save_steps says how often that happens)."
        if found := complete_checkpoints(folder, trainer.args.process_index):
            where = f"The last checkpoint is {found[max(found)]}. Go on from it with the same command and "
            where += "--resume_from_checkpoint true."
        raise KeyboardInterrupt(where) from None
    if trainer.args.save_strategy == "no":
        trainer.save_model(folder, _internal_call=True)  # the push below is the only one
        trainer.accelerator.print(trainer.publisher.where(trainer.policy.is_adapter, trainer.state))
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
        trainer.accelerator.print(f"Pushed to {trainer.hub_model_id}.")


def load_datasets(
    script_args: "FlowScriptArguments", mixture_args: "DatasetMixtureConfig", *, bundled: bool, evaluate: bool
) -> tuple["Dataset", "Dataset | None"]:
    """The prompts to train on and, with `evaluate`, those to evaluate on; those of the bundled world where no data are
    named and the model is the bundled one."""
    from trl import get_dataset

    from trl_flow import shapes
    from trl_flow.prompts import UnknownSplitError, load_prompts
    from trl_flow.prompts.splits import read_split

    if script_args.dataset_streaming or mixture_args.streaming:
        raise ValueError("streaming data sets are not supported: groups are built by row numbers. Remove the option.")
    name, splits = script_args.dataset_name, None
    if mixture_args.datasets:
        splits = get_dataset(mixture_args)
    elif name is None and bundled:
        splits = {split: shapes.load_prompts(split) for split in ("train", "test")}
    elif name is None:
        raise ValueError(
            "dataset_name is missing: the name of a prompt set (--help lists them), a hub id, or a file .jsonl, "
            ".json, .csv, .tsv, .parquet (with a column `prompt`) or .txt (one prompt a line)."
        )

    def named(split: str) -> "Dataset":
        if split not in splits:
            raise UnknownSplitError("dataset", split, tuple(splits))
        return splits[split]

    def load(split: str, wanted: str, remedy: str) -> "Dataset":
        try:
            if splits is not None:
                return read_split(split, named)
            columns = {"prompt_column": script_args.prompt_column, "image_column": script_args.image_column}
            return load_prompts(name, split, config=script_args.dataset_config, **columns)
        except UnknownSplitError as error:
            only = ", ".join(error.splits)
            raise ValueError(f"{wanted} has no split {split!r}, only {only}: set {remedy}.") from error

    train = load(script_args.dataset_train_split, "the data set", "dataset_train_split")
    wanted, remedy = "eval_strategy asks for evaluations, but the data set", "dataset_test_split, or eval_strategy no"
    return train, (load(script_args.dataset_test_split, wanted, remedy) if evaluate else None)
