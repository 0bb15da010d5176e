"""One page of tables, and the figures beside it, from the runs that are finished."""

import os
import platform
from pathlib import Path
from typing import Any

import figures
import numpy as np
from experiments import ARMS, COMMON, SECTIONS, Scale
from results import Curve, common_level, ratio_file, ratio_settings, read_ratio, read_section, spread

from trl_flow.evaluation.outputs import versions


TABLE = "over_optimization.md"
FINDINGS = Path(__file__).parent / "findings.md"


def write(
    output: Path,
    folder: Path,
    scale: Scale,
    command: str,
    failed: dict[str, str],
    *,
    seeds: int | None = None,
    findings: bool = False,
) -> None:
    """
    Writes `over_optimization.md` and its figures.

    Args:
        output (`Path`): folder of the runs.
        folder (`Path`): folder of the report, made if need be.
        scale ([`Scale`]): only runs of this scale are shown.
        command (`str`): what made them, to be shown.
        failed (`dict[str, str]`): runs that failed, and why.
        seeds (`int`, *optional*): seeds of each arm that are shown; default: each section's own number.
        findings (`bool`): whether `findings.md`, what was read in the full results, belongs on the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sections = {name: read_section(output, name, scale, seeds) for name in SECTIONS}
    lines = ["# Over-optimization, measured", "", *_preamble(sections, scale, command)]
    if findings:
        lines += ["", FINDINGS.read_text(encoding="utf-8").strip()]
    lines += _ratios(output, folder, scale)
    for name, runs in sections.items():
        if runs:
            lines += _section(name, runs, folder)
    if failed:
        lines += ["", "## Runs that failed", ""] + [f"* {name}: {error}" for name, error in failed.items()]
    (folder / TABLE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _preamble(sections: dict[str, dict[str, dict[int, Curve]]], scale: Scale, command: str) -> list[str]:
    every = {
        (arm, seed): curve.seconds
        for runs in sections.values()
        for arm, by_seed in runs.items()
        for seed, curve in by_seed.items()
    }
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return [
        "The bundled model of colored shapes, trained against rewards that are imperfect on purpose, with every "
        "method of the three papers. Written by",
        "",
        "```bash",
        command,
        "```",
        "",
        f"on {platform.machine()} with {os.cpu_count()} cores (one core for each run; CPU, float32), "
        f"{platform.system()}; {packages}. {len(every)} runs, {sum(every.values()) / 60:.0f} minutes of one core.",
        "",
        f"Each run: {scale.updates} updates of AdamW, learning rate 1e-3, LoRA of rank 32; sampling phases of "
        f"{scale.prompts} prompts x {scale.num_generations} pictures, 6 steps, no guidance, trained on in two halves, "
        f"twice. Evaluation every {scale.eval_steps} updates on {scale.eval_prompts} held-out prompts x 2 pictures "
        "along the ODE, the same noise for all arms of a seed. **Gold** is the mean of the strict checker, the "
        "fidelity to a clean rendering and the diversity, each divided by the base model's value; the diversity is "
        "the root mean square difference of the two pictures of a prompt. Neither these nor the soft checker are "
        "optimized. Numbers are means over seeds ± their standard deviation (one seed: no spread). In the figures "
        "lines are means over seeds, and the bars behind their ends reach from the lowest seed to the highest.",
    ]


def _section(name: str, runs: dict[str, dict[int, Curve]], folder: Path) -> list[str]:
    section = SECTIONS[name]
    level = common_level(runs, section.slow)
    base = np.mean([curve.scores["proxy"][0] for by_seed in runs.values() for curve in by_seed.values()])
    half = (base + level) / 2
    aside = f" ({', '.join(section.slow)} aside)" if section.slow else ""
    baseline = runs.get(section.arms[0], {})
    proxy = ARMS[section.arms[0]].proxy
    figures.training_curves(runs, folder / f"{name}.png")
    lines = [
        "",
        f"## {section.title}",
        "",
        f"*The papers' claim: {section.claim}*",
        "",
        f"Proxy: {_PROXIES.get(proxy, proxy)}.",
        "",
        f"The last five columns compare runs at equal proxy, {level:.3f} being the highest that all runs reached"
        f"{aside} and {half:.3f} half of the way: updates until a run first gets there, gold at that place, its "
        f"difference Δ from `{section.arms[0]}` at the same seed, and the mean of this difference at eight equal "
        "steps of the way.",
        "",
        f"| arm | seeds | proxy | gold | strict | fidelity | soft | diversity | updates to {half:.3f} | updates to "
        f"{level:.3f} | gold at {level:.3f} | Δ gold there | Δ gold on the way |",
        "| --- " * 13 + "|",
    ]
    for arm, by_seed in runs.items():
        curves = list(by_seed.values())
        final = [spread([curve.scores[score][-1] for curve in curves]) for score in _FINAL]
        difference = [
            curve.score_at("gold", level) - baseline[seed].score_at("gold", level)
            for seed, curve in by_seed.items()
            if seed in baseline
        ]
        on_the_way = [
            curve.mean_on_the_way("gold", level) - baseline[seed].mean_on_the_way("gold", level)
            for seed, curve in by_seed.items()
            if seed in baseline
        ]
        lines.append(
            f"| {arm} | {len(curves)} | "
            + " | ".join(
                [
                    *final,
                    spread([curve.updates_to(half) for curve in curves]),
                    spread([curve.updates_to(level) for curve in curves]),
                    spread([curve.score_at("gold", level) for curve in curves]),
                    "" if arm == section.arms[0] else spread(difference),
                    "" if arm == section.arms[0] else spread(on_the_way),
                ]
            )
            + " |"
        )
    lines += ["", f"![{section.title}]({name}.png)"]
    if name == "guard":
        figures.steps_in_training(runs, COMMON["num_inference_steps"], folder / "guard_steps.png")
        lines += [
            "",
            "Over the whole training of each arm, every arm with its own policy and pictures:",
            "",
            "![ratios and clipping per step in training](guard_steps.png)",
        ]
    return lines


_PROXIES = {
    "colors": "paint in the colors that the prompt names; blind to shapes, counts and places",
    "learned": "a small scorer, trained on rendered pictures; blind to places, and to whatever is not like those",
    "jpeg": "JPEG compressibility; blind to the prompt",
    "small-spread": "the colors' reward, at a twentieth of its spread for two thirds of the prompts, plus noise",
}
_FINAL = ("proxy", "gold", "strict", "fidelity", "soft", "diversity")


def _ratios(output: Path, folder: Path, scale: Scale) -> list[str]:
    measured = []
    for settings in ratio_settings(scale):
        content = read_ratio(ratio_file(output, settings), settings)
        if content is not None:
            measured.append(settings | content)
    # As the runs are trained; the others tell how clip ranges depend on it
    usual = [entry for entry in measured if entry["learning_rate"] == COMMON["learning_rate"]]
    if not usual:
        return []
    lines = [
        "",
        "## Ratios and gradients on the same rollouts",
        "",
        "*The papers' claim: standard ratios drift below 1 with a spread that differs over steps, and RatioNorm "
        "centers them (Guard, Figure 2); gradient norms differ about 20 times over steps, Guard's about 2.5 times "
        "(Figure 3); Flow-GRPO clips below 1 and never above, Guard both alike (supplement, Figure 4).*",
        "",
        "One batch is sampled, the policy is moved by unclipped updates on it, and then every variant is computed at "
        "this policy on these samples. Means over seeds; all steps are trained. The clip range is the one that a "
        "fifth of all ratios lie outside of.",
    ]
    for kind in dict.fromkeys(entry["sde_type"] for entry in usual):
        for updates in dict.fromkeys(entry["updates"] for entry in usual):
            entries = [e for e in usual if e["sde_type"] == kind and e["updates"] == updates]
            lines += _ratio_table(entries, kind, updates)
        figures.ratios([e for e in usual if e["sde_type"] == kind], folder / f"ratios_{kind}.png")
        lines += ["", f"![ratios, clipping and gradients, {kind}](ratios_{kind}.png)"]
    return lines + _dimensions(usual) + _learning_rates(measured)


def _ratio_table(entries: list[dict[str, Any]], kind: str, updates: int) -> list[str]:
    steps = len(entries[0]["ratios"]["standard"]["mean"])

    def mean(path: tuple[str, str, str | None]) -> np.ndarray:
        group, name, key = path
        return np.mean([e[group][name] if key is None else e[group][name][key] for e in entries], axis=0)

    columns = " | ".join(str(step) for step in range(steps))
    lines = [
        "",
        f"### {kind}-SDE, {updates} update{'s' if updates > 1 else ''} after sampling",
        "",
        f"| ratio | clip range | of r - 1, by step | {columns} |",
        "| --- " * (3 + steps) + "|",
    ]
    for name in entries[0]["ratios"]:
        epsilon = f"{mean(('ratios', name, 'epsilon')):.1e}"
        for key, pattern in (("mean", "{:.1e}"), ("std", "{:.1e}"), ("above", "{:.2f}"), ("below", "{:.2f}")):
            values = " | ".join(pattern.format(value) for value in mean(("ratios", name, key)))
            lines.append(f"| {name} | {epsilon} | {key} | {values} |")
    lines += [
        "",
        f"| gradient norm | max / min over steps | without the first and the last | {columns} |",
        "| --- " * (3 + steps) + "|",
    ]
    for name in entries[0]["gradients"]:
        each = np.array([e["gradients"][name] for e in entries])
        ratio = spread(list(each.max(axis=1) / each.min(axis=1)))
        inner = spread(list(each[:, 1:-1].max(axis=1) / each[:, 1:-1].min(axis=1)))
        lines.append(f"| {name} | {ratio} | {inner} | " + " | ".join(f"{v:.1e}" for v in each.mean(axis=0)) + " |")
    return lines


def _dimensions(measured: list[dict[str, Any]]) -> list[str]:
    sizes = list(measured[0]["by_dimensions"]["fresh"])
    lines = [
        "",
        "### Clip ranges and the size of the latent",
        "",
        "Standard deviation of RatioNorm's log-ratio when the mean is taken over `d` of the latent's "
        f"{measured[0]['dimensions']} dimensions, drawn at random (mean over the steps). On fresh samples the move of "
        "the mean and the noise are independent; on samples that were trained on they are not, for that is what was "
        "trained.",
        "",
        "| dynamics | updates | samples | " + " | ".join(f"d = {size}" for size in sizes) + " | exponent of d |",
        "| --- " * (4 + len(sizes)) + "|",
    ]
    for kind, updates in dict.fromkeys((e["sde_type"], e["updates"]) for e in measured):
        for samples in ("fresh", "trained"):
            entries = [
                e["by_dimensions"][samples] for e in measured if (e["sde_type"], e["updates"]) == (kind, updates)
            ]
            values = np.mean([[entry[size] for size in sizes] for entry in entries], axis=0)
            exponent = np.polyfit(np.log([int(size) for size in sizes]), np.log(values), 1)[0]
            cells = " | ".join(f"{value:.1e}" for value in values)
            lines.append(f"| {kind} | {updates} | {samples} | {cells} | {exponent:.2f} |")
    return lines


def _learning_rates(measured: list[dict[str, Any]]) -> list[str]:
    entries = [entry for entry in measured if entry["sde_type"] == "flow" and entry["updates"] == 1]
    kinds = list(entries[0]["ratios"])
    lines = [
        "",
        "### Clip ranges and the learning rate",
        "",
        "The range that a fifth of the ratios lie outside of, Flow-SDE, one update after sampling:",
        "",
        "| learning rate | " + " | ".join(kinds) + " |",
        "| --- " * (1 + len(kinds)) + "|",
    ]
    for rate in sorted({entry["learning_rate"] for entry in entries}):
        same = [entry for entry in entries if entry["learning_rate"] == rate]
        ranges = [np.mean([entry["ratios"][kind]["epsilon"] for entry in same]) for kind in kinds]
        lines.append(f"| {rate:g} | " + " | ".join(f"{value:.1e}" for value in ranges) + " |")
    return lines
