"""
What the bundled model can do: the tables and images of `trl_flow/shapes/README.md`.

    python examples/bundled_model/report.py --work-dir pipeline-work --images docs/images

The tables are printed. The images are the training curve (from the log in `--work-dir`) and 24 held-out prompts.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from diffusers import AutoencoderTiny, StableDiffusion3Pipeline
from matplotlib import pyplot as plt

from trl_flow.backbones import get_backbone
from trl_flow.backbones.contract import encoded
from trl_flow.backbones.projection import decoding_with
from trl_flow.evaluation.drawing import draw, draw_batch
from trl_flow.evaluation.grids import evenly, image_grid
from trl_flow.evaluation.intervals import standard_error
from trl_flow.evaluation.tables import markdown_table
from trl_flow.rollout import decode
from trl_flow.shapes import IMAGE_SIZE, load_pipeline, load_prompts, pipeline_path, prompt_kind
from trl_flow.shapes.bundled import T5_TOKENS, TINY_DECODER
from trl_flow.shapes.checker import CheckResult, check


SCORES = ("strict", "soft", "fidelity")
PARTS = ("count", "color", "shape", "attribute", "relation")
NUMBER = 3  # images of each prompt
# Steps, guidance and T5 tokens: the demo's rollouts, `DRAWING_SETTINGS`, and the stock pipeline's defaults among them
SAMPLINGS = [(6, 1.0, 1), (10, 1.0, 1), (10, 2.0, 1), (10, 3.0, 1), (10, 4.5, 1), (28, 7.0, 256)]
SETTINGS = {"seed": 0, "height": IMAGE_SIZE, "width": IMAGE_SIZE}


def measure(pipeline: StableDiffusion3Pipeline, rows: Dataset, steps: int, guidance: float, t5: int) -> list:
    images = draw(
        pipeline,
        rows["prompt"],
        **SETTINGS,
        num_images_per_prompt=NUMBER,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=t5,
        batch_size=54,
        progress=f"{steps} steps, guidance {guidance:g}",
    )
    each = [row for row in rows for _ in range(NUMBER)]
    return [check(image, row["objects"], row["relation"]) for image, row in zip(images, each, strict=True)]


def mean(results: list[CheckResult], name: str) -> str:
    """A mean with its standard error over prompts."""
    values = np.array([getattr(result, name) for result in results]).reshape(-1, NUMBER).mean(1)
    return f"{values.mean():.2f} ± {standard_error(values):.2f}"


def tables(pipeline: StableDiffusion3Pipeline) -> str:
    rows = load_prompts("test")
    kinds = [prompt_kind(row["objects"], row["relation"]) for row in rows for _ in range(NUMBER)]
    names = list(dict.fromkeys(kinds))
    whole, parts = [], []
    for steps, guidance, t5 in SAMPLINGS:
        results = measure(pipeline, rows, steps, guidance, t5)
        told = f"{steps} steps" + (", the pipeline's defaults" if t5 > T5_TOKENS else "")
        scale = f"{guidance:g}" if guidance > 1 else "none"
        whole.append([told, scale, *(mean(results, name) for name in SCORES)])
        if t5 == T5_TOKENS:
            values = {name: [getattr(result, name) for result in results] for name in ("strict", *PARTS)}
            of_parts = [np.mean([value for value in values[name] if value is not None]) for name in PARTS]
            of_kinds = [
                np.mean([v for v, kind in zip(values["strict"], kinds, strict=True) if kind == k]) for k in names
            ]
            parts.append([told, scale, *(f"{value:.2f}" for value in (*of_parts, *of_kinds))])
    first = markdown_table(["sampling", "guidance", *SCORES], whole, left=2)
    by_kind = [f"strict: {names[0]}", *names[1:]]
    return f"{first}\n\n{markdown_table(['sampling', 'guidance', *PARTS, *by_kind], parts, left=2)}"


@torch.no_grad()
def projections(pipeline: StableDiffusion3Pipeline, tiny: AutoencoderTiny) -> str:
    """What the tiny decoder does to the soft scores of the steps' predicted images, one image for each prompt."""
    rows, steps = load_prompts("test"), SAMPLINGS[0][0]
    backbone = get_backbone(pipeline, height=IMAGE_SIZE, width=IMAGE_SIZE, max_sequence_length=T5_TOKENS)
    conditions = [encoded(backbone, prompt) for prompt in rows["prompt"]]
    condition = {name: torch.cat([each[name] for each in conditions]) for name in conditions[0]}
    predictions = []
    given = {"seed": 0, "indices": range(len(rows)), "num_inference_steps": steps, "guidance_scale": 1.0}
    draw_batch(backbone, backbone.model, condition, None, **given, predictions=predictions)
    lines = []
    for step, latents in enumerate(predictions):
        scores = []
        for vae in (None, tiny):
            with decoding_with(backbone, vae):
                images = decode(backbone, latents)
            results = [check(i, row["objects"], row["relation"]) for i, row in zip(images, rows, strict=True)]
            scores.append([result.soft for result in results])
        own, other = np.array(scores)
        correlation = np.corrcoef(own, other)[0, 1]
        lines.append([str(step + 1), f"{own.mean():.3f}", f"{other.mean():.3f}", f"{correlation:.3f}"])
    return markdown_table(["step", "soft by the VAE", "by the tiny decoder", "correlation"], lines)


def curve(log: Path, path: Path) -> None:
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    scores = [line for line in lines if "scores" in line]
    steps = [line["step"] / 1000 for line in scores]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    for axis, (sampling, told) in zip(
        axes, {"6 steps": "6 steps, no guidance", "10 steps, guidance 2": "10 steps, guidance 2"}.items(), strict=True
    ):
        for name in SCORES:
            axis.plot(steps, [line["scores"][sampling][name] for line in scores], label=name)
        axis.set(title=told, xlabel="thousand training steps", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out prompts, 128 images")
    axes[0].legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a pipeline's folder; default: the bundled one")
    parser.add_argument("--work-dir", type=Path, help="of the training, for its curve")
    parser.add_argument("--images", type=Path, help="a folder for the images; default: none are made")
    options = parser.parse_args()
    pipeline = load_pipeline() if options.model is None else StableDiffusion3Pipeline.from_pretrained(options.model)
    if options.images is not None:
        rows = load_prompts("test")
        prompts = rows.select(evenly(len(rows), 24))["prompt"]
        sampling = {"num_inference_steps": 10, "guidance_scale": 2.0, "max_sequence_length": T5_TOKENS}
        images = draw(pipeline, prompts, **SETTINGS, **sampling, batch_size=24)
        image_grid(images, prompts, columns=8, path=options.images / "world_prompts.png")
        if options.work_dir is not None:
            curve(options.work_dir / "log.jsonl", options.images / "world_curve.png")
    print(tables(pipeline))
    folder = Path(options.model or pipeline_path(), TINY_DECODER)
    print(f"\n{projections(pipeline, AutoencoderTiny.from_pretrained(folder))}")


if __name__ == "__main__":
    main()
