"""The page: one table a claim, and figures, from the results that run.py has written.

python examples/over_optimization/report.py over_optimization/results.jsonl --folder docs/results
"""

import argparse
import math
import os
import platform
from pathlib import Path
from typing import Any

import figures
import numpy as np
from analysis import (
    Curve,
    Effect,
    Rows,
    Runs,
    effect,
    late,
    read,
    runs_of,
    slowness,
    summary,
    verdict,
)
from experiments import ARMS, CLAIMS, NOISES, SEEDS, SHAPES, STEP, Claim
from mechanism import RATIOS, STEPS

from trl_flow.evaluation.outputs import versions


PAGE = "over_optimization.md"
FINDINGS = Path(__file__).parent / "findings.md"
_PROXIES = {
    "learned": "a small scorer that was taught on drawings that texture does not count; blind to places, and to "
    "whatever is no drawing",
    "recall": "a rule: how much of what the prompt names is there; blind to what it does not name",
    "binary": "the rule, 1 if all of what the prompt names is there, else 0",
    "strict": "the strict checker, plus noise",
}


def write(results: Path, folder: Path, *, quick: bool = False) -> None:
    """Writes the page and its figures from `results` to `folder`, made if need be; `quick`: of the small runs."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = read(results)
    lines = ["# Over-optimization, measured", "", *_first_paragraph(rows, quick), "", *_preamble(rows, quick)]
    if FINDINGS.is_file() and not quick:
        lines += ["", FINDINGS.read_text(encoding="utf-8").strip()]
    lines += _clipping(rows, folder, quick)
    for name, claim in CLAIMS.items():
        runs = runs_of(rows, claim.arms, quick=quick)
        if any(runs.values()):
            lines += _claim(name, claim, runs, folder)
    lines += _absolute_term(rows, folder, quick)
    lines += _figures_of_several(rows, folder, quick)
    (folder / PAGE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _first_paragraph(rows: Rows, quick: bool) -> list[str]:
    """What holds, what does not, and what is not decided."""
    found = summary(rows, quick=quick)
    heads = {
        "holds": "Holds",
        "does not hold": "Does not hold; the opposite was measured",
        "not detected": "Not detected; the interval contains 0",
        "not decided": f"Not decided; fewer than {SEEDS} seeds",
    }
    lines = [f"* **{head}**: {'; '.join(found[name]) or 'none'}." for name, head in heads.items()]
    return [*lines, "* Differences are means over seeds, paired by seed, with 95% intervals by Student's t."]


def _preamble(rows: Rows, quick: bool) -> list[str]:
    hours = sum(row["seconds"] for row in rows.values()) / 3600
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    command = "python examples/over_optimization/run.py" + (" --quick" if quick else " --jobs 2")
    arm = ARMS["learned: baseline"].settings(0, quick)
    evaluation = f"{arm['eval_prompts']} held-out prompts x {arm['eval_images']} images"
    return [
        "The bundled model of colored shapes, trained against rewards that are imperfect on purpose. Written by",
        "",
        "```bash",
        command,
        "python examples/over_optimization/report.py over_optimization/results.jsonl --folder docs/results",
        "```",
        "",
        f"on {platform.machine()} with {os.cpu_count()} cores (one for each run; CPU, float32), {platform.system()}; "
        f"{packages}. {len(rows)} runs, {hours:.1f} core-hours.",
        "",
        f"Settings are the papers'; learning rates and clip ranges are multiplied by {STEP:.3g}, both alike, and clip "
        "ranges scaled to the latent's dimensions by the library. So Guard has a third of the baseline's rate; "
        "tables that say `one rate` are the second reading. LoRA of rank 32; sampling phases of "
        f"{arm['prompts']} prompts x {arm['num_generations']} images (SLAS: {ARMS['strict + 0: group'].prompts}), 6 "
        "steps, of which the last is an ODE step and not trained, trained on in two halves, twice. Evaluation every "
        f"{arm['eval_updates']} updates on {evaluation} along the ODE, the same noise for all arms of a seed. "
        "**Gold** is the mean of the soft checker and the fidelity to a clean drawing, each divided by the base "
        "model's; neither is optimized. Runs on the learned scorer and the rule end when gold is below 0.8. "
        "Differences at equal proxy are means over the upper half of the way that both runs of a pair have gone.",
    ]


def _claim(name: str, claim: Claim, runs: Runs, folder: Path) -> list[str]:
    proxy = claim.arms[0].split(": ")[0].split(" ")[0]
    first, at = claim.arms[0], "at equal proxy" if claim.at == "proxy" else "in the second half of the updates"
    lines = ["", f"## {claim.title}", "", f"*{claim.says}* Proxy: {_PROXIES[proxy]}.", ""]
    lines += [f"**{verdict(claim, runs).capitalize()}**, `{_name(claim.subject)}` compared with `{_name(first)}`.", ""]
    heads = ["arm", "seeds", f"{claim.score} more than `{_name(first)}`'s, {at}"]
    if claim.at == "proxy":
        heads += ["updates for one of its", "highest proxy", "gold there", "soft", "fidelity", "diversity", "strict"]
        cells = _at_proxy
    else:
        heads += [*dict.fromkeys((claim.score, "proxy", "gold", "diversity")), "equal groups", "effective share"]
        cells = _at_updates
    lines += [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for arm, by_seed in runs.items():
        curves = list(by_seed.values())
        of = "–" if arm == first else _told(effect(claim, arm, runs))
        row = [_name(arm), f"{len(curves)} of {SEEDS}", of]
        row += cells(claim, by_seed, runs[first]) if curves else ["–"] * (len(heads) - 3)
        lines.append(f"| {' | '.join(row)} |")
    if claim.score == "gold":
        figures.gold(runs, folder / f"{name}.png")
        lines += ["", f"![{claim.title}]({name}.png)"]
    return lines


def _name(arm: str) -> str:
    return arm.split(": ")[-1]


def _told(of: Effect) -> str:
    """A difference, and whether it is one."""
    if not of.seeds:
        return "–"
    text = of.text(signed=True)
    if of.seeds == 1:
        return f"{text} (one seed)"
    return text if of.is_detected else f"not detected ({text})"


def _at_proxy(claim: Claim, by_seed: dict[int, Curve], first: dict[int, Curve]) -> list[str]:
    curves = list(by_seed.values())
    ratio = Effect.of([slowness(curve, first[seed]) for seed, curve in by_seed.items() if seed in first])
    slower = "–"
    if ratio.seeds:
        bounds = "" if math.isnan(ratio.half) else f" ({_exp(ratio, -1):.2f} to {_exp(ratio, 1):.2f})"
        slower = f"{math.exp(ratio.mean):.2f}{bounds}"
    cells = [slower, Effect.of([curve.highest for curve in curves]).text()]
    for score in ("gold", "soft", "fidelity", "diversity", "strict"):
        cells.append(Effect.of([curve.at_proxy(score, curve.highest) for curve in curves]).text())
    return cells


def _exp(of: Effect, side: int) -> float:
    return math.exp(of.mean + side * of.half)


def _at_updates(claim: Claim, by_seed: dict[int, Curve], first: dict[int, Curve]) -> list[str]:
    curves = list(by_seed.values())
    scores = dict.fromkeys((claim.score, "proxy", "gold", "diversity", "equal", "effective"))
    return [Effect.of([late(score, curve) for curve in curves]).text() for score in scores]


def _clipping(rows: Rows, folder: Path, quick: bool) -> list[str]:
    """The lag at which a small latent is clipped as a large one."""
    by_seed = runs_of(rows, ["clipping by lag"], quick=quick)["clipping by lag"]
    if not by_seed:
        return []
    measured, step = list(by_seed.values()), STEPS[-1]
    published = Effect.of([row["published"][step] for row in measured])
    lags = list(measured[0]["lags"])
    moved = {lag: Effect.of([row["lags"][lag]["move"][step] for row in measured]) for lag in lags}
    matched = min(lags, key=lambda lag: abs(math.log(moved[lag].mean / published.mean)))
    lines = [
        "",
        "## Clipping at the paper's lag",
        "",
        "*The standard ratio is clipped below its range and hardly above it; RatioNorm is clipped alike (GRPO-Guard, "
        "supplement, Figure 4).*",
        "",
        "One batch, and a policy that is ever more updates away. A step's mean has moved by delta standard "
        "deviations; the standard ratio is shifted by delta sqrt(D) / 2 of its spread. With 65,536 dimensions "
        f"delta sqrt(D) is {published.text(2)} one update of Flow-GRPO's rate after sampling (step {step}, the last "
        f"that is trained); with this model's {measured[0]['dimensions']:,} it is so after about {matched}. Clip "
        "ranges are the "
        f"published ones, scaled by dimensions and delta. Means at step {step}, {len(measured)} of {SEEDS} seeds.",
        "",
        "| updates | delta sqrt(D) | ratio | shift / spread | below | above | below less above |",
        "| --- " * 7 + "|",
    ]
    for lag in lags:
        for kind in RATIOS:
            each = [{key: column[step] for key, column in row["lags"][lag][kind].items()} for row in measured]
            cells = [Effect.of([one[key] for one in each]).text(2) for key in ("shift", "below", "above")]
            cells.append(_told(Effect.of([one["below"] - one["above"] for one in each])))
            lines.append(f"| {lag} | {moved[lag].text(2)} | {kind} | {' | '.join(cells)} |")
    lines += ["", "Gradient norms one update after sampling, the largest over the smallest of the trained steps:", ""]
    lines += ["| variant | ratio |", "| --- | --- |"]
    for name in measured[0]["gradients"]:
        ratios = [max(row["gradients"][name]) / min(row["gradients"][name]) for row in measured]
        lines.append(f"| {name} | {Effect.of(ratios).text(1)} |")
    figures.clipping(by_seed, matched, folder / "ratios_flow.png")
    return [*lines, "", f"![Ratios at a lag of {matched} updates, and gradients](ratios_flow.png)"]


def _absolute_term(rows: Rows, folder: Path, quick: bool) -> list[str]:
    by_seed = runs_of(rows, ["absolute term"], quick=quick)["absolute term"]
    if not by_seed:
        return []
    figures.walks(by_seed, folder / "absolute_term.png")
    lines = [
        "",
        "## VGPO: the absolute term's gradient where all rewards are equal",
        "",
        "*The absolute value is a persistent signal when diversity vanishes (VGPO, Section 3.3).* A signal's mean "
        "over more groups tends to a vector; a random walk's falls as one over the root of their number (exponent "
        "-0.5). "
        f"The relative part has real rewards. {len(by_seed)} of {SEEDS} seeds.",
        "",
        "| part | exponent | share of the squared norm that is a signal |",
        "| --- | --- | --- |",
    ]
    for name in ("absolute", "relative"):
        exponents = [_exponent(row[name]["norms"]) for row in by_seed.values()]
        signal = Effect.of([row[name]["signal"] for row in by_seed.values()])
        lines.append(f"| {name} | {Effect.of(exponents).text(2)} | {_told(signal)} |")
    return [*lines, "", "![Norm of the mean gradient](absolute_term.png)"]


def _exponent(norms: dict[str, float]) -> float:
    return float(np.polyfit(np.log([int(n) for n in norms]), np.log(list(norms.values())), 1)[0])


def _figures_of_several(rows: Rows, folder: Path, quick: bool) -> list[str]:
    """Figures that are of more than one claim."""
    lines: list[str] = []
    noises: dict[str, Any] = {}
    for noise in sorted(NOISES):
        runs = runs_of(rows, [f"strict + {noise}: {shape}" for shape in SHAPES], quick=quick)
        if any(runs.values()):
            noises[noise] = runs
    if noises:
        figures.strict(noises, folder / "slas.png")
        lines += ["", "## SLAS: the strict score over the updates", "", "![Strict score by noise](slas.png)"]
    runs = runs_of(rows, [arm for arm in ARMS if arm.startswith("binary: ")], quick=quick)
    if any(runs.values()):
        figures.values(runs, folder / "vgpo.png")
        lines += ["", "## VGPO: reward, equal groups and diversity over the updates", "", "![VGPO](vgpo.png)"]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("over_optimization/report"), help="Of page and figures.")
    parser.add_argument("--quick", action="store_true", help="The results are those of run.py --quick.")
    given = parser.parse_args()
    write(given.results, given.folder, quick=given.quick)
    print(given.folder / PAGE)


if __name__ == "__main__":
    main()
