"""`trl-flow evaluate`: its options, and what they become. Libraries are imported when it runs."""

import argparse
import json
import os
import textwrap
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_flow.rewards.named import NAMED_REWARDS


if TYPE_CHECKING:
    from datasets import Dataset

    from trl_flow.evaluation.vote import VoteServer

DESCRIPTION = """\
Compare a base model and adapters: draw prompt sets with all of them from the same noise, as the trainer
evaluates, score the images, and write tables, an image grid and a page to look at pairs side by side.

  trl-flow evaluate --model stabilityai/stable-diffusion-3.5-medium --adapters runs/flow runs/guard \\
      --prompts pickscore --proxy pickscore --gold hpsv2 imagereward --output_dir comparison
  trl-flow evaluate --model bundled --adapters demo=trl-flow-demo --prompts bundled \\
      --proxy shapes_soft shapes_fidelity --gold shapes_strict --output_dir comparison
  trl-flow evaluate --table guard --model stabilityai/stable-diffusion-3.5-medium --adapters runs/guard \\
      --table_rewards unifiedreward@http://localhost:8000/v1 --output_dir guard-table
  trl-flow evaluate --vote comparison

If it is killed, run the same command again to continue. Adapters, prompt sets and rewards may be added to a folder.
"""

BUNDLED = ("bundled", "shapes")
_TYPES = {"int": int, "float": float}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to a parser."""
    rewards = ", ".join(NAMED_REWARDS)
    parser.epilog = textwrap.fill(
        f"Rewards are {rewards}; of videos frames:NAME, the mean over frames; a dotted import path such as "
        "my_rewards.brightness, looked for in the current folder too; or the address of a reward server, as "
        "http://host:8000#pickscore. Each must apply to all prompt sets.",
        width=100,
        break_on_hyphens=False,
    )
    path = Path(__file__).with_name("command_options.json")
    for title, options in json.loads(path.read_text(encoding="utf-8")).items():
        group = parser.add_argument_group(title)
        for flags, how in options.items():
            kind = {"type": _TYPES[how.pop("type")]} if "type" in how else {}
            group.add_argument(*flags.split(), **how, **kind)


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Checks what can be checked without a model, and returns what does the rest: it checks everything else before the
    first image is drawn."""
    if isinstance(arguments.vote, str) and arguments.output_dir not in (None, arguments.vote):
        raise ValueError(f"--vote {arguments.vote} and --output_dir {arguments.output_dir} are two folders. Give one.")
    if arguments.vote is not None:
        _check_vote(arguments)
    if isinstance(arguments.vote, str) and arguments.model is None:
        drawing = ("adapters", "prompts", "proxy", "gold", "table", "steps")
        if given := [name for name in drawing if getattr(arguments, name)]:
            what = f"--vote {arguments.vote} is a vote on what that folder holds, and --{given[0]} is for drawing"
            raise ValueError(f"{what}. Remove it, or give --model too.")
        return _vote(arguments, arguments.vote)
    folder = arguments.output_dir or (arguments.vote if isinstance(arguments.vote, str) else "trl-flow-evaluation")
    evaluation, names = _evaluation(arguments)

    from trl_flow.rewards.checks import RewardError
    from trl_flow.rewards.scorer import print_failure

    kept = f"The images and scores so far are in {folder}. Run the same command again to continue from there."

    def run() -> None:
        from trl_flow.evaluation.evaluate import PAGE, REPORT, RESULTS, STEPS, evaluate_models

        try:
            comparison = evaluate_models(output_dir=folder, **evaluation)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(kept) from None
        except RewardError as error:
            print_failure(error)
            raise ValueError(f"{error}\n{kept}") from error
        if arguments.table:
            from trl_flow.evaluation.paper_tables import with_table

            comparison = with_table(comparison, arguments.table, names)
        written = ", ".join([REPORT, RESULTS, PAGE, *([STEPS] if arguments.steps else [])])
        print(f"\n{comparison.markdown}\nIn {folder}: {written} and the image grids.")
        if arguments.vote is not None:
            _vote(arguments, folder)()

    return run


def _evaluation(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """The arguments of `evaluate_models`, but for the folder, and what the rewards of a paper's table are called."""
    wrong = ("prompts", "proxy", "gold") if arguments.table else ("table_prompts", "table_rewards")
    if given := [name for name in wrong if getattr(arguments, name)]:
        why = "--table chooses prompts and rewards itself" if arguments.table else "there is no --table"
        raise ValueError(f"--{given[0]} has no meaning, since {why}. Remove it, or choose the other way.")
    for name in ("model",) if arguments.table else ("model", "prompts"):
        if not getattr(arguments, name):
            hint = "For a vote on a folder that is there: trl-flow evaluate --vote DIR."
            raise ValueError(f"--{name} is missing. {hint}")
    rewards = [*arguments.proxy, *arguments.gold]
    if twice := next((name for name in rewards if rewards.count(name) > 1), None):
        raise ValueError(f"the reward {twice} is named twice. It is either a proxy or gold.")
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"limit is {arguments.limit}, but must be at least 1.")
    import diffusers
    import transformers

    # Bars and hints of loading would bury the lines that matter
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    from trl_flow.evaluation.adapters import split_name
    from trl_flow.evaluation.inputs import DrawingOptions
    from trl_flow.rewards.named import named_rewards

    model, options = arguments.model, {}
    if model in BUNDLED:
        from trl_flow.shapes import pipeline_path

        model = pipeline_path()
    chosen, names = {}, {}
    if arguments.table:
        from trl_flow.evaluation.paper_tables import table_inputs

        copies = {"prompts": arguments.table_prompts, "rewards": arguments.table_rewards}
        wanted = (arguments.table, model, arguments.adapters)
        chosen, names, options = table_inputs(*wanted, **copies, limit=arguments.limit)
    given = {field.name: getattr(arguments, field.name) for field in fields(DrawingOptions)}
    options |= {name: value for name, value in given.items() if value is not None}
    sets = {}
    for name, source in map(split_name, arguments.prompts or ()):
        name = name or (Path(source).stem if os.path.exists(source) else source)
        if name in sets:
            raise ValueError(f"two prompt sets are called {name!r}. Name them: --prompts a={source} ...")
        dataset = _prompts(source, prompt_column=arguments.prompt_column, image_column=arguments.image_column)
        sets[name] = dataset.take(min(arguments.limit or len(dataset), len(dataset)))
    evaluation = {
        "model": model,
        "adapters": arguments.adapters,
        "prompts": sets,
        "proxy": named_rewards(arguments.proxy, "proxy") if arguments.proxy else (),
        "gold": named_rewards(arguments.gold, "gold") if arguments.gold else (),
        "options": DrawingOptions(**options),
        **{name: getattr(arguments, name) for name in ("grid_prompts", "steps", "page_megabytes", "rescore")},
        **{name: getattr(arguments, name) for name in ("revision", "variant", "reward_frame")},
    }
    return evaluation | chosen, names


def _prompts(source: str, **columns: str | None) -> "Dataset":
    if source in BUNDLED:
        from trl_flow.shapes import load_prompts as bundled_prompts

        return bundled_prompts("test")
    from trl_flow.prompts import UnknownSplitError, load_prompts

    try:
        return load_prompts(source, "test", **columns)
    except UnknownSplitError as error:
        if len(error.splits) > 1:
            raise
        return load_prompts(source, error.splits[0], **columns)  # a file is all of one split


def _check_vote(arguments: argparse.Namespace) -> None:
    if arguments.vote_pairs < 1:
        raise ValueError(f"vote_pairs is {arguments.vote_pairs}, but must be at least 1.")
    if not 0 <= arguments.port < 65536:
        raise ValueError(f"port is {arguments.port}, but must be from 0 (any that is free) to 65535.")
    if arguments.model is not None:
        from trl_flow.evaluation.adapters import BASE, parse_adapters

        names = [BASE, *(adapter.name for adapter in parse_adapters(arguments.adapters))]
        wanted = names if arguments.vote_models is None else arguments.vote_models
        if not set(wanted) <= set(names) or len(set(wanted)) < 2:
            raise ValueError(f"a vote compares two models or more of {', '.join(names)}, but is asked for {wanted}.")


def _vote(arguments: argparse.Namespace, folder: str) -> Callable[[], None]:
    """Opens a vote; what is returned serves it."""
    from trl_flow.evaluation.vote import VoteServer

    names = {"models": "vote_models", "pairs": "vote_pairs", "seed": "vote_seed", "port": "port"}
    return partial(_serve, VoteServer(folder, **{name: getattr(arguments, own) for name, own in names.items()}))


def _serve(server: "VoteServer") -> None:
    from trl_flow.evaluation.tables import vote_markdown
    from trl_flow.evaluation.vote_results import BARS, vote_results

    hint = f"open {server.url} in a browser on this machine. Ctrl-C ends the vote."
    print(f"\n{len(server.pairs)} pairs to vote on: {hint}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("\nThe vote has ended. All votes are saved, and the same command continues it.")
    finally:
        server.close()
    results = vote_results(server.ballots.voters())
    print("Nobody has voted." if results is None else f"\n{vote_markdown(results)}")
    if results is not None and (server.folder.path / BARS).is_file():
        print(f"\nIn {server.folder.path}: results.md, results.json and {BARS}.")
