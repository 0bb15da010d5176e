"""The command `trl-flow`. Libraries are imported where they are needed, so that `--help` and errors come at once."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module

from trl_flow.commands import UsageError, show
from trl_flow.commands.recipe import unknown_option
from trl_flow.quiet import leave_out_bars


_TRACEBACK = "TRL_FLOW_DEBUG"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`, by default that of this process. Returns its exit code: 0 for success, 2 for a
    mistake in what was asked for, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] in (["train"], ["memory"]):  # whose options are known when the recipe has been read
            command = import_module(f"trl_flow.commands.{argv[0]}")
            with _mistakes():
                run = command.prepare(argv[1:])
            run()
            return 0
        parser = _parser()
        arguments = parser.parse_args(argv)
        if arguments.command is None:
            parser.print_help()
            return 0
        commands = {"demo": _demo, "env": _env, "evaluate": _evaluate, "compare-runs": _compare_runs}
        commands |= {"export": _export, "methods": _methods, "serve-rewards": _serve_rewards}
        commands |= {"watch": _watch}
        return commands[arguments.command](arguments) or 0
    except UsageError as error:
        if os.environ.get(_TRACEBACK):
            raise
        # All processes of a distributed run find the same mistake; one of them tells
        if os.environ.get("RANK", "0") == "0":
            print(f"trl-flow {argv[0]}: error: {error}\n({_TRACEBACK}=1 shows where it was found.)", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"\nInterrupted. {interrupt}".rstrip(), file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from trl_flow import __version__
    from trl_flow.commands import compare_runs, export, methods, watch
    from trl_flow.evaluation import evaluate_command as evaluation
    from trl_flow.serving import command as serving

    what = "Online reinforcement learning for text-to-image flow and diffusion models."
    parser = argparse.ArgumentParser(prog="trl-flow", description=what, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"trl_flow {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND", parser_class=_Parser)

    demo = commands.add_parser(
        "demo",
        help="train the bundled model for about three minutes and show it before and after (no network needed)",
        description="Trains the bundled text-to-image model to follow its prompts better, on any machine and without "
        "network. Prints a table of scores before and after on prompts never trained on, and writes images, curves, "
        "results.json and the adapter.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--full", action="store_true", help="train 2.5 times as long, with a falling learning rate")
    demo.add_argument("--method", choices=("nft", "guard", "flow_grpo"), default="nft", help="the algorithm")
    demo.add_argument("--output-dir", "--output_dir", default="trl-flow-demo", metavar="DIR", help="where to write")
    demo.add_argument("--seed", type=_seed, default=0, help="of the training; images are drawn from fixed seeds")

    by_recipe = {
        "train": "train a model by a recipe: trl-flow train --config recipe.yaml (train --help lists the options)",
        "memory": "estimate the device memory that a recipe needs: trl-flow memory --config recipe.yaml",
    }
    for name, help in by_recipe.items():
        commands.add_parser(name, help=help, add_help=False)
    for name, command, help in (
        ("evaluate", evaluation, "compare a base model and adapters: scores, images side by side, and a blind vote"),
        ("watch", watch, "show a running or finished run in a browser: curves, latest images, time left"),
        ("compare-runs", compare_runs, "compare training runs at equal proxy, from their logs: a table and a plot"),
        ("export", export, "write an adapter for ComfyUI or kohya's scripts: --format comfyui --output FILE"),
        ("serve-rewards", serving, "serve reward functions over HTTP: --rewards pickscore,hpsv2 --port 8000"),
    ):
        layout = {"description": command.DESCRIPTION, "formatter_class": argparse.RawDescriptionHelpFormatter}
        command.add_arguments(commands.add_parser(name, help=help, **layout))
    what = "list what each method changes of Flow-GRPO's defaults"
    layout = {"description": methods.DESCRIPTION, "formatter_class": argparse.RawDescriptionHelpFormatter}
    commands.add_parser("methods", help=what, **layout)
    what = "print the versions and devices that a bug report should name"
    commands.add_parser("env", help=what, description=f"{what.capitalize()}.")
    return parser


class _Parser(argparse.ArgumentParser):
    """Takes no abbreviations, and names the option that was probably meant."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if wrong := [token for token in unknown if token.startswith("--")]:
            self.error(unknown_option(wrong[0], self._option_string_actions))
        return namespace, unknown


def _methods(arguments: argparse.Namespace) -> None:
    from trl_flow.commands.methods import DESCRIPTION, methods_table

    show(f"{DESCRIPTION}\n{methods_table()}")


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


@contextlib.contextmanager
def _mistakes(errors: tuple = (ValueError, TypeError, OSError, ImportError)) -> Iterator[None]:
    """What is wrong with options, data or model is told without a traceback. Not for training itself: a failure there
    may be a fault of the program, whose place one has to see."""
    try:
        yield
    except errors as error:
        raise UsageError(str(error) or type(error).__name__) from error


def _demo(arguments: argparse.Namespace) -> None:
    import diffusers
    import transformers

    # Bars and hints of loading would bury the few lines that matter
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    from trl_flow.demo import FULL, QUICK, DemoError, run_demo

    settings = (FULL if arguments.full else QUICK)[arguments.method]
    with _mistakes((DemoError,)):
        run_demo(settings, output_dir=arguments.output_dir, seed=arguments.seed)


def _env(arguments: argparse.Namespace) -> None:
    import platform

    import torch

    from trl_flow.evaluation.outputs import versions

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if not devices and torch.accelerator.is_available():
        devices = [str(torch.accelerator.current_accelerator())]
    lines = {"platform": platform.platform(), **versions(), "devices": ", ".join(devices) or "CPU"}
    lines["CPU threads of torch"] = str(torch.get_num_threads())
    print("\n".join(f"- {name}: {value}" for name, value in lines.items()))


def _evaluate(arguments: argparse.Namespace) -> None:
    from trl_flow.evaluation.evaluate_command import prepare

    with _mistakes():
        run = prepare(arguments)
    leave_out_bars()
    # What the pipeline refuses to draw or cannot decode, damaged images, a full disk, a reward function that fails
    with _mistakes((ValueError, OSError, FloatingPointError)):
        run()


def _compare_runs(arguments: argparse.Namespace) -> None:
    from trl_flow.commands.compare_runs import run

    with _mistakes():
        run(arguments)


def _watch(arguments: argparse.Namespace) -> None:
    from trl_flow.commands.watch import run

    with _mistakes():
        run(arguments)


def _export(arguments: argparse.Namespace) -> None:
    from trl_flow.commands.export import run

    with _mistakes():
        run(arguments)


def _serve_rewards(arguments: argparse.Namespace) -> int:
    from trl_flow.serving.command import run

    with _mistakes():
        return run(arguments)
