"""Results as tables: plain text for a terminal, Markdown for a report."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from trl_flow.evaluation.scoring import PairedDifference
from trl_flow.evaluation.vote_plan import OUTCOMES, QUESTIONS


INTERVALS = (
    "± is half of a 95% confidence interval: Student's, over the prompts, with each prompt's images averaged first. "
    "Differences are paired: each prompt's score less the base model's, of images drawn from the same noise."
)
_AVERAGE = (
    "Average: the mean of the gold rewards, each divided by the base model's mean (GRPO-Guard, Table 1); its interval "
    "is that of a ratio of means over the same prompts."
)


def score_table(differences: Mapping[str, PairedDifference]) -> str:
    """Scores before and after as a table of plain text, one line for each. `±` is one standard error of the paired
    difference, and the last column the difference in units of it."""
    rows = [("score", "before", "after", "difference", "in std. errors")]
    for name, d in differences.items():
        units = "-" if math.isnan(d.standard_errors) else f"{d.standard_errors:+.1f}"
        difference = f"{d.difference:+.3f} ± {d.standard_error:.3f}"
        rows.append((name, f"{d.mean_before:.3f}", f"{d.mean_after:.3f}", difference, units))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join([f"{{:<{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])])
    top, *lines = [form.format(*row) for row in rows]
    return "\n".join([top, "-" * len(top), *lines])


def markdown(results: Mapping[str, Any]) -> str:
    """A report of `results.json`'s content: for each prompt set a table of scores and one of paired differences."""
    parts = [f"# {title(results)}", _settings_line(results)]
    paper = results.get("paper_tables", ())
    for table in paper:
        made = category_table(table) if table["columns"] else ""
        parts += [f"## {markdown_text(table['title'])}", made, table["note"]]
    for name, content in results["sets"].items():
        parts += [
            f"## {markdown_text(name)}",
            means_table(content, brackets=results.get("brackets", True)),
            difference_table(content),
        ]
        for table in content.get("categories", ()):
            if not any(table["columns"] == shown["columns"] and table["rows"] == shown["rows"] for shown in paper):
                parts += [f"{markdown_text(table['reward'])} by {table['by']}:", category_table(table), table["note"]]
        if content["gold_note"]:
            parts.append(markdown_text(content["gold_note"]))
    parts.append(legend(results))
    if results.get("votes"):
        parts.append(vote_markdown(results["votes"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def means_table(content: Mapping[str, Any], *, brackets: bool = True) -> str:
    """A prompt set's means in the form of GRPO-Guard's Table 1: models in rows; the optimized rewards (proxy) in
    brackets, the gold rewards, and the average of the latter over the base model's."""
    form = "[{}]" if brackets else "{}"
    proxy, gold = content["proxy"], content["gold_rewards"]
    header = ["model", *(form.format(markdown_text(r)) for r in proxy), *(f"{markdown_text(r)}" for r in gold)]
    header += ["Average (base = 1)"] if gold else []
    rows = []
    for number, (model, means) in enumerate(content["means"].items()):
        cells = [markdown_text(model)]
        for reward in (*proxy, *gold):
            cell = _with_half(means[reward]["mean"], means[reward]["low"])
            # In the paper's table the base model's are not bracketed: it was not trained on them
            cells.append(form.format(cell) if reward in proxy and number > 0 and cell != "-" else cell)
        if gold:
            average = content["gold"][model] if content["gold"] else None
            cells.append(_with_half(average["average"], average["low"] if number else None) if average else "-")
        rows.append(cells)
    return markdown_table(header, rows)


def difference_table(content: Mapping[str, Any]) -> str:
    """A prompt set's paired differences to the base, one line for each model and reward; empty without adapters."""
    rows = []
    for model, by_reward in content["differences"].items():
        for reward, found in by_reward.items():
            cells = ["-", "-", "-", "-", "0"]
            if found is not None:
                values = (found[k] for k in ("difference", "standard_error", "standard_errors", "low", "high"))
                difference, error, units, low, high = (
                    "-" if value is None else format(value, form)
                    for value, form in zip(values, ("+.4g", ".2g", "+.1f", "+.4g", "+.4g"), strict=True)
                )
                interval = "-" if low == "-" else f"{low} to {high}"
                cells = [difference, error, units, interval, str(found["num_pairs"])]
            rows.append([markdown_text(model), markdown_text(reward), *cells])
    if not rows:
        return ""
    header = ["model", "reward", "difference to base", "standard error", "in std. errors", "95% interval", "prompts"]
    return markdown_table(header, rows, left=2)


def category_table(table: Mapping[str, Any]) -> str:
    """A table of models in rows and categories in columns. Of more than twelve it is the other way round, with those
    only of which there is a score."""
    form = table.get("format", ".2f")
    rows = {
        markdown_text(model): ["-" if cells[name] is None else format(cells[name], form) for name in table["columns"]]
        for model, cells in table["rows"].items()
    }
    names = [markdown_text(name) for name in table["columns"]]
    if len(names) <= 12:
        return markdown_table(["model", *names], [[model, *cells] for model, cells in rows.items()])
    turned = zip(names, *rows.values(), strict=True)
    return markdown_table([table["by"], *rows], [list(cells) for cells in turned if set(cells[1:]) != {"-"}])


def _settings_line(results: Mapping[str, Any]) -> str:
    settings = {name: value for name, value in results["settings"].items() if value is not None}
    given = ", ".join(f"{name} {markdown_text(str(value))}" for name, value in settings.items())
    models = [f"* {markdown_text(name)}: {markdown_text(m['path'])}" for name, m in results["models"].items()]
    notes = "".join(f" {markdown_text(note)}" for note in results.get("notes", ()))
    return "\n".join(models) + f"\n\nDrawn along the ODE, all models from the same noise: {given}.{notes}"


def title(results: Mapping[str, Any]) -> str:
    """What the report and the page are called."""
    return (
        "Scores of the base model" if len(results["models"]) == 1 else f"Comparison of {len(results['models'])} models"
    )


def legend(results: Mapping[str, Any]) -> str:
    """What the tables' numbers are."""
    bracketed = results["proxy"] and results.get("brackets", True)
    text = INTERVALS + (" [In brackets]: rewards that were optimized." if bracketed else "")
    return f"{text} {_AVERAGE}" if results["gold"] else text


def _with_half(mean: float | None, low: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.4g}" if low is None else f"{mean:.4g} ± {mean - low:.2g}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A table whose first `left` columns are text, and the others numbers."""
    rule = [*["---"] * left, *["---:"] * (len(header) - left)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def markdown_text(text: str) -> str:
    """Names as they are, whatever they hold: nothing of theirs is Markdown or HTML."""
    return " ".join(re.sub(r"([\\`*\[\]<>|])", r"\\\1", text).split())


def vote_markdown(results: Mapping[str, Any]) -> str:
    """The votes as a table, one line for each comparison and question."""
    header = ["prompts", "models", "question", "win", "tie", "lose", "preferred", "95% interval"]
    rows = []
    for comparison in results["comparisons"]:
        models = f"{markdown_text(comparison['other'])} against {markdown_text(comparison['reference'])}"
        for question, found in comparison["questions"].items():
            counts = [f"{found[outcome]} ({found['shares'][outcome]['mean']:.0%})" for outcome in OUTCOMES]
            mean, low, high = (f"{found['preference'][name]:.0%}" for name in ("mean", "low", "high"))
            prompts = f"{markdown_text(comparison['set'])} ({comparison['num_prompts']})"
            rows.append([prompts, models, QUESTIONS[question].lower(), *counts, mean, f"{low} to {high}"])
    voters = "1 person" if results["num_voters"] == 1 else f"{results['num_voters']} people"
    return (
        f"## Human comparison\n\nBlind votes of {voters}, order and sides at random.\n\n"
        f"{markdown_table(header, rows, left=3)}\n\n"
        "Counts are votes. Shares are means over prompts; preferred is wins and half the ties, with Wilson's interval "
        "for as many cases as prompts: 50% is no preference."
    )
