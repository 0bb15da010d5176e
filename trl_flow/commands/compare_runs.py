"""`trl-flow compare-runs`: the gold of training runs where their proxies are equal."""

import argparse
import os
from pathlib import Path


DESCRIPTION = """\
Compare training runs at equal proxy: the gold average of each, where its optimized reward first reaches a
level. Needs evaluations with the same eval_reward_funcs. Prints a table, and writes it with a plot. Nothing is
drawn or trained.

  trl-flow compare-runs flow=runs/flow guard=runs/guard
  trl-flow compare-runs runs/flow runs/guard --levels 0.8 0.9 --output_dir comparison
  trl-flow compare-runs flow=runs/flow vgpo=runs/vgpo --proxy pickscore
"""

TABLE, PLOT = "equal_proxy.md", "equal_proxy.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to a parser."""
    add = parser.add_argument
    what = "two output folders or more, of finished or running trainings, their checkpoints or logs; the first is the "
    add("runs", nargs="+", metavar="[NAME=]RUN", help=f"{what}one that the others are compared with")
    levels = "levels of the proxy (the highest that all runs reach, and half of the way there)"
    add("--levels", nargs="+", type=float, metavar="REWARD", help=levels)
    add("--proxy", metavar="NAME", help="which of the rewards is the proxy (their sum with reward_weights)")
    add("--eval_name", "--eval-name", metavar="NAME", help="which of several evaluation sets (the first)")
    add("--output_dir", "--output-dir", default="trl-flow-runs", metavar="DIR", help="where to write (trl-flow-runs)")


def run(arguments: argparse.Namespace) -> None:
    """Reads the logs, prints the table and writes both files. `ValueError` if something does not fit, before."""
    from trl_flow.evaluation.equal_proxy import equal_proxy_table, gold_at_proxy
    from trl_flow.evaluation.plots import equal_proxy

    runs = _named(arguments.runs)
    options = {name: getattr(arguments, name) for name in ("levels", "eval_name", "proxy")}
    table, folder = equal_proxy_table(gold_at_proxy(runs, **options)), Path(arguments.output_dir)
    equal_proxy(runs, folder / PLOT, **options)
    (folder / TABLE).write_text(table, encoding="utf-8")
    print(f"{table}\nIn {folder}: {TABLE} and {PLOT}.")


def _named(specifications: list[str]) -> dict[str, str]:
    runs: dict[str, str] = {}
    for specification in specifications:
        name, equals, path = specification.partition("=")
        # A path may have an equals sign of its own
        if not equals or os.path.exists(specification) or os.sep in name:
            name, path = "", specification
        name = name.strip() or Path(path).resolve().name
        if name in runs:
            raise ValueError(f"two runs are called {name!r}: {runs[name]} and {path}. Name them: name=path.")
        runs[name] = path
    return runs
