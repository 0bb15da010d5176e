"""
Trains the bundled pipeline from nothing: `python examples/bundled_model/train.py --output-dir pipeline`.

One run of a fixed number of steps: the autoencoder, the transformer with its text encoders, the decoder once more on
disturbed latents, and the tiny decoder that projections are drawn with. The learning rates follow the steps, and each
step draws its random numbers from the seed and its own number: a run that was broken off and called again continues as
if nothing had happened, and anybody gets the same model up to rounding. Checkpoints and `log.jsonl` are in
`--work-dir`.

The captions are noisy on purpose, as those of web images are: with probability `--caption-noise` an image's caption is
another one, or has a wrong word. The model then knows how to draw what it is asked for, but does not always do so,
which leaves reinforcement learning something to do.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from autoencoder import encode, psnr, train_autoencoder, train_decoder, train_tiny_decoder
from data import render_images
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from model import new_autoencoder, new_pipeline, new_tiny_decoder
from stage import log, read, write
from transformer import train_transformer

from trl_flow.evaluation.outputs import write_json
from trl_flow.shapes.bundled import T5_TOKENS, TINY_DECODER
from trl_flow.shapes.checker import check
from trl_flow.shapes.prompts import load_prompts


DECODER_IMAGES = 8_000  # that the decoders are trained and measured on, after the transformer
PARTS = ("strict", "soft", "fidelity", "count", "color", "shape", "attribute")
# Of the demo's rollouts, of `DRAWING_SETTINGS`, and the stock pipeline's defaults
SAMPLINGS = {
    "6 steps": {"num_inference_steps": 6, "guidance_scale": 1.0},
    "10 steps, guidance 2": {"num_inference_steps": 10, "guidance_scale": 2.0},
    "28 steps, guidance 7": {"num_inference_steps": 28, "guidance_scale": 7.0},
}


@torch.no_grad()
def score(pipeline: StableDiffusion3Pipeline, number: int, **sampling) -> dict[str, float]:
    """Mean checker scores of `number` images of held-out prompts."""
    rows = load_prompts("test").to_list()
    rows = [rows[i % len(rows)] for i in range(number)]
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    results = []
    for first in range(0, number, 64):
        part = rows[first : first + 64]
        images = pipeline(
            [row["prompt"] for row in part],
            generator=[torch.Generator().manual_seed(first + i) for i in range(len(part))],
            **({"max_sequence_length": T5_TOKENS} | sampling),
        ).images
        results += [check(image, row["objects"], row["relation"]) for image, row in zip(images, part, strict=True)]
    return {name: round(float(np.mean([getattr(result, name) for result in results])), 4) for name in PARTS}


def save(pipeline: StableDiffusion3Pipeline, folder: Path) -> None:
    """
    Writes the pipeline with the transformer and the autoencoder in half precision, and leaves it in single precision.

    The text encoders stay in single precision: transformers loads a model in the precision of its file, so that halved
    ones would not fit a transformer that diffusers loads in float32.
    """
    halved = [pipeline.transformer, pipeline.vae]
    for module in halved:
        module.to(torch.float16)
    pipeline.save_pretrained(folder)
    for module in halved:
        module.to(torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--work-dir", type=Path, default=None, help="default: the output's name and `-work`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--autoencoder-steps", type=int, default=5_000)
    parser.add_argument("--decoder-steps", type=int, default=1_500)
    parser.add_argument("--steps", type=int, default=38_000, help="of the transformer")
    parser.add_argument("--caption-noise", type=float, default=0.1)
    parser.add_argument("--score-every", type=int, default=2_000, help="steps of the transformer")
    args = parser.parse_args()
    work = args.work_dir or args.output_dir.with_name(args.output_dir.name + "-work")
    work.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    vae, tiny_decoder = new_autoencoder(), new_tiny_decoder()
    pipeline = new_pipeline(vae)
    if not (work / "latents.pt").is_file():
        images, contents = render_images(args.images, args.seed)
        train_autoencoder(vae, images[:-1000], work, args.autoencoder_steps, args.seed)
        quality = round(psnr(vae, images[-1000:]), 2)
        log(work, stage="autoencoder", psnr_db=quality)
        vae.save_pretrained(work / "vae")
        write(work / "latents.pt", {"latents": encode(vae, images).half(), "contents": contents})
        del images
    stored = read(work / "latents.pt")
    vae = AutoencoderKL.from_pretrained(work / "vae").eval()
    pipeline.register_modules(vae=vae)

    def watch(step: int) -> None:
        log(work, step=step, scores={name: score(pipeline, 128, **SAMPLINGS[name]) for name in list(SAMPLINGS)[:2]})

    train_transformer(
        pipeline,
        stored["latents"],
        stored["contents"],
        work,
        steps=args.steps,
        caption_noise=args.caption_noise,
        seed=args.seed,
        watch=watch,
        watch_every=args.score_every,
    )
    images, _ = render_images(DECODER_IMAGES, args.seed + 1)
    train_decoder(vae, images[:-500], work, args.decoder_steps, args.seed)
    train_tiny_decoder(tiny_decoder, vae, images[:-500], work, args.decoder_steps, args.seed)
    quality = {
        "autoencoder": round(psnr(vae, images[-500:]), 2),
        "tiny_decoder": round(psnr(vae, images[-500:], tiny_decoder), 2),
    }
    save(pipeline, args.output_dir)
    tiny_decoder.to(torch.float16).save_pretrained(args.output_dir / TINY_DECODER)
    pipeline = StableDiffusion3Pipeline.from_pretrained(args.output_dir)
    scores = {
        **{name: getattr(args, name) for name in ("seed", "images", "autoencoder_steps", "decoder_steps")},
        **{"steps": args.steps, "caption_noise": args.caption_noise, "psnr_db": quality},
        **{name: score(pipeline, 324, **sampling) for name, sampling in list(SAMPLINGS.items())[:2]},
        "pipeline defaults": score(pipeline, 108, **SAMPLINGS["28 steps, guidance 7"], max_sequence_length=256),
    }
    write_json(args.output_dir / "scores.json", scores)
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
