"""`trl-flow memory`: what a recipe will need. Libraries are imported when it runs."""

import argparse
import json
from collections.abc import Callable

from trl_flow.commands import show
from trl_flow.commands.recipe import option, read_accelerate_config, read_recipe
from trl_flow.commands.training_help import training_help, wants_help


DESCRIPTION = """\
Estimate the memory that training will need on each device, from the model's configuration files: nothing is downloaded
in full, and no GPU is needed.

  trl-flow memory --config recipe.yaml
  trl-flow memory --model stabilityai/stable-diffusion-3.5-medium --use_peft --per_device_train_batch_size 8
  trl-flow memory --config recipe.yaml --accelerate_config fsdp2 --num_processes 8

All options of `trl-flow train` count as they do there, and the accelerate configs fsdp2, zero2 and zero3 shard.
"""

OWN = {
    "--model MODEL": "model_name_or_path, the hub id or the folder",
    "--json": "Print the numbers, in bytes, as one line of JSON",
    "--num_processes null": "Devices; null: as many as the accelerate config has, or 1",
}


def prepare(argv: list[str]) -> Callable[[], None]:
    """What prints the estimate; raises an error if something is wrong with what was asked for."""
    if not argv:
        raise ValueError("nothing to estimate. Give a recipe, --config recipe.yaml, or a model, --model.")
    argv, recipe = read_recipe(argv)
    if wants_help(argv):
        usage = "trl-flow memory [--config recipe.yaml] [--model MODEL] [--json] [--option value ...]"
        text = training_help(argv, recipe, usage=usage, description=DESCRIPTION, own=OWN)
        return lambda: show(text)
    from trl_flow import memory
    from trl_flow.commands.options import parse_training, peft_config, resolve_model, training_parser

    sharding, processes = _sharding(option(argv, recipe, "accelerate_config"))
    processes = str(option(argv, recipe, "num_processes") or processes)
    if not processes.isdecimal() or processes == "0":
        raise ValueError(f"num_processes is {processes}, but must be a whole number of at least 1.")
    parser = training_parser(argv, recipe, num_processes=int(processes), prog="trl-flow memory")
    parser.add_argument("--model", dest="model_name_or_path", default=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--num_processes", "--num-processes")
    script_args, args, model_args, _, own, _ = parse_training(parser, argv, recipe)
    model = resolve_model(model_args.model_name_or_path, args, model_args)
    loading = args.model_init_kwargs
    folder = memory.fetch_configs(model, revision=loading.get("revision"), token=loading.get("token"))
    plan = memory.Plan(args, peft_config(script_args, args, model_args), sharding)
    result = memory.estimate(folder, plan)
    enough = memory.fits(result, min(memory.CARDS))
    found = [] if enough else memory.savings(plan, result, lambda other: memory.estimate(folder, other))
    text = json.dumps(memory.as_json(result, found)) if own.json else memory.as_text(result, plan, found)
    return lambda: show(text)


def _sharding(name: str | None) -> tuple[str, int]:
    """What an accelerate config shards (as in `trl_flow.memory`), and its number of processes."""
    if name is None:
        return "none", 1
    _, config = read_accelerate_config(name)
    stage = (config.get("deepspeed_config") or {}).get("zero_stage", 0)
    processes = config.get("num_processes") or 1
    if config.get("distributed_type") == "FSDP" or stage == 3:
        return "weights", processes
    return "gradients" if stage == 2 else "none", processes
