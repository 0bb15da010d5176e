"""What people preferred: counts, shares with intervals, and bars."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from trl_flow.evaluation.intervals import share_interval
from trl_flow.evaluation.outputs import write_json
from trl_flow.evaluation.plots import new_figure, saved_figure
from trl_flow.evaluation.tables import markdown
from trl_flow.evaluation.vote_plan import OUTCOMES, QUESTIONS, Ballots


BARS = "votes.png"
_COLORS = {"win": "#2f7fc1", "tie": "#c9cdd2", "lose": "#e2843b"}


def vote_results(ballots: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """
    Counts votes, as [`~trl_flow.evaluation.vote_plan.Ballots`] reads them, by prompt set and pair of models; `None`
    without votes. A win is one of `other`.

    Shares are means over the prompts, of each prompt's votes (several voters, several images) averaged first; their
    intervals are Wilson's for as many cases as prompts, which are rather too wide than too narrow where a prompt has
    several votes. The preference is the share of wins and half the ties; 0.5 is none.
    """
    grouped: dict[tuple[str, str, str], dict[int, list[Mapping[str, str]]]] = {}
    for ballot in ballots:
        for vote in ballot["votes"]:
            by_prompt = grouped.setdefault((vote["set"], vote["reference"], vote["other"]), {})
            by_prompt.setdefault(vote["row"], []).append(vote["answers"])
    if not grouped:
        return None
    comparisons = []
    for pair, by_prompt in sorted(grouped.items()):
        found = dict(zip(("set", "reference", "other"), pair, strict=True))
        found |= {"num_votes": sum(map(len, by_prompt.values())), "num_prompts": len(by_prompt)}
        found["questions"] = {question: _question(question, list(by_prompt.values())) for question in QUESTIONS}
        comparisons.append(found)
    return {"num_voters": sum(bool(ballot["votes"]) for ballot in ballots), "comparisons": comparisons}


def _question(question: str, by_prompt: Sequence[Sequence[Mapping[str, str]]]) -> dict[str, Any]:
    groups = [[answers[question] for answers in group] for group in by_prompt]
    counts = {outcome: sum(group.count(outcome) for group in groups) for outcome in OUTCOMES}
    shares = {o: float(np.mean([group.count(o) / len(group) for group in groups])) for o in OUTCOMES}

    def with_interval(share: float) -> dict[str, float]:
        return dict(zip(("mean", "low", "high"), (share, *share_interval(share, len(groups))), strict=True))

    preference = with_interval(min(1.0, shares["win"] + shares["tie"] / 2))
    return counts | {"shares": {o: with_interval(share) for o, share in shares.items()}, "preference": preference}


def vote_bars(results: Mapping[str, Any], path: str | os.PathLike | None = None) -> Figure:
    """Shares of win, tie and lose as stacked bars, one panel for each comparison (GRPO-Guard's supplement, Figure 1),
    from what [`vote_results`] gives; written to `path` as PNG."""
    comparisons = results["comparisons"]
    columns = min(len(comparisons), 2)
    rows = -(-len(comparisons) // columns)
    figure = new_figure(6.4 * columns, 2.5 * rows + 0.4)
    for number, comparison in enumerate(comparisons, start=1):
        axes = figure.add_subplot(rows, columns, number)
        labels = [QUESTIONS[question] for question in comparison["questions"]]
        left = np.zeros(len(labels))
        for outcome in OUTCOMES:
            found = [q["shares"][outcome]["mean"] for q in comparison["questions"].values()]
            bars = axes.barh(labels, found, left=left, height=0.62, color=_COLORS[outcome], label=outcome)
            # What does not fit into its part is left to the table
            axes.bar_label(bars, [f"{s:.0%}" if s >= 0.06 else "" for s in found], label_type="center", fontsize=9)
            left += found
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1))
        names = (comparison[key] for key in ("other", "reference", "set"))
        other, reference, name = (name if len(name) <= 40 else name[:39] + "…" for name in names)
        counts = f"{comparison['num_prompts']} prompts, {comparison['num_votes']} votes"
        # Two dollar signs in a name would be taken for a formula
        axes.set_title(f"{other} against {reference}\n{name}: {counts}", fontsize=10, parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return saved_figure(figure, path)


def update_votes(folder: Path) -> dict[str, Any] | None:
    """Puts the votes that there are into an evaluation's `results.json` and `results.md`, and draws `votes.png`.
    Returns what `results.json` then holds; `None` where there is no vote, or no such file."""
    votes = vote_results(Ballots(folder).voters())
    path = folder / "results.json"
    if votes is None or not path.is_file():
        return None
    results = json.loads(path.read_text(encoding="utf-8")) | {"votes": votes}
    vote_bars(votes, folder / BARS)
    write_json(path, results)
    (folder / "results.md").write_text(markdown(results), encoding="utf-8")
    return results
