"""
Trains the bundled pipeline from nothing: `python examples/bundled_model/train.py --output-dir pipeline`.

Five minutes for the VAE, then `--minutes` for the transformer and its text encoders, on one CPU core. The captions are
noisy on purpose, as those of web images are: with probability `--caption-noise` an image's caption is another one,
or has a wrong word. The model then knows how to draw what it is asked for, but does not always do it, which leaves
reinforcement learning something to do.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from model import new_pipeline
from tqdm import tqdm

from trl_flow.shapes.bundled import T5_TOKENS
from trl_flow.shapes.checker import check
from trl_flow.shapes.prompts import is_held_out, load_prompts, make_caption
from trl_flow.shapes.world import COLORS, RELATIONS, SHAPES, place, random_ground, relation_holds, render


Target = tuple[list[dict], str | None]  # objects and relation, as `parse_caption` returns them

# Shares of the images with one to three like shapes, and with two different ones
_GROUP_SHARES = {1: 0.15, 2: 0.15, 3: 0.15}


def random_scene(rng: np.random.Generator) -> tuple[np.ndarray, Target]:
    """An image, uint8 `(32, 32, 3)`, of a combination that is not held out, and what its caption says."""
    while True:
        number = rng.choice([1, 2, 3, 0], p=[*_GROUP_SHARES.values(), 1 - sum(_GROUP_SHARES.values())])
        colors = [str(color) for color in rng.permutation(list(COLORS))[:2]]
        shapes = [str(shape) for shape in rng.choice(SHAPES, size=2)]
        pairs = list(zip(colors, shapes, strict=True))
        if number:
            objects = [{"count": int(number), "color": colors[0], "shape": shapes[0]}]
            wanted = pairs[:1] * int(number)
        else:
            objects = [{"count": 1, "color": color, "shape": shape} for color, shape in pairs]
            wanted = pairs
        if is_held_out(objects):
            continue
        placed = place(wanted, rng)
        relation = None
        if not number and rng.random() < 0.6:
            first, second = ((shape.x, shape.y) for shape in placed)
            relation = next((name for name in RELATIONS if relation_holds(name, first, second)), None)
        return np.asarray(render(placed, random_ground(rng))), (objects, relation)


def render_images(number: int, seed: int) -> tuple[torch.Tensor, list[Target]]:
    """`number` images of training scenes, uint8 `(N, 3, 32, 32)`, and what their captions say."""
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng) for _ in tqdm(range(number), desc="Rendering", mininterval=5)]
    pixels = torch.from_numpy(np.stack([image for image, _ in scenes])).permute(0, 3, 1, 2).contiguous()
    return pixels, [target for _, target in scenes]


def noisy_caption(target: Target, targets: list[Target], noise: float, rng: random.Random) -> str:
    """The caption of an image; with probability `noise` that of another one, or with one word wrong."""
    objects, relation = target
    if rng.random() >= noise:
        return make_caption(objects, relation)
    if rng.random() < 0.5:
        return make_caption(*rng.choice(targets))
    if relation is not None and rng.random() < 0.5:
        return make_caption(objects, rng.choice([other for other in RELATIONS if other != relation]))
    choices = {"color": list(COLORS), "shape": list(SHAPES)}
    if len(objects) == 1:
        choices["count"] = [1, 2, 3]
    # A wrong word may name a held-out combination, whose caption no training step may see
    while True:
        wrong = [dict(item) for item in objects]
        item, key = rng.choice(wrong), rng.choice(list(choices))
        item[key] = rng.choice([value for value in choices[key] if value != item[key]])
        if not is_held_out(wrong) and len({item["color"] for item in wrong}) == len(wrong):
            return make_caption(wrong, relation)


def train_vae(pipeline: StableDiffusion3Pipeline, images: torch.Tensor, minutes: float) -> None:
    """Trains the VAE on uint8 `images`, and sets its scaling and shift from them."""
    vae = pipeline.vae.train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    start, bar = time.time(), tqdm(desc="VAE", mininterval=5)
    while (done := (time.time() - start) / 60 / minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, bar.n / 50 + 0.02) * (0.5 + 0.5 * math.cos(math.pi * done))
        batch = images[torch.randint(len(images), (16,))].float() / 127.5 - 1
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        # Most of an image is flat ground: the absolute error alone would blur the shapes' edges
        loss = (decoded - batch).abs().mean() + 2 * (decoded - batch).square().mean() + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        bar.update()
        bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
    vae.eval().requires_grad_(False)
    latents = encode(pipeline, images[:4000], scaled=False)
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


@torch.no_grad()
def measure_vae(pipeline: StableDiffusion3Pipeline, images: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of uint8 images, encoded and decoded."""
    vae = pipeline.vae.eval()
    errors = []
    for part in images.split(250):
        part = part.float() / 127.5 - 1
        decoded = vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append(((decoded - part) / 2).square().mean())
    return (-10 * torch.log10(torch.stack(errors).mean())).item()


@torch.no_grad()
def encode(pipeline: StableDiffusion3Pipeline, images: torch.Tensor, scaled: bool = True) -> torch.Tensor:
    """Latents of uint8 images, as the transformer sees them if `scaled`."""
    vae = pipeline.vae
    parts = images.split(500)
    latents = torch.cat(
        [
            vae.encode(part.float() / 127.5 - 1).latent_dist.mode()
            for part in tqdm(parts, desc="Encoding", disable=len(parts) < 10)
        ]
    )
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor if scaled else latents


def encode_captions(
    pipeline: StableDiffusion3Pipeline, tokens: torch.Tensor, t5_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `StableDiffusion3Pipeline.encode_prompt` makes of CLIP tokens, with gradients."""
    outputs = [
        encoder(tokens, output_hidden_states=True) for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)
    ]
    t5_tokens = torch.zeros(len(tokens), t5_length, dtype=torch.long)
    t5_tokens[:, 0] = pipeline.tokenizer_3.unk_token_id
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    states = torch.cat([states, pipeline.text_encoder_3(t5_tokens)[0]], dim=1)
    return states, torch.cat([output[0] for output in outputs], dim=-1)


def train_transformer(
    pipeline: StableDiffusion3Pipeline,
    latents: torch.Tensor,
    contents: list[Target],
    *,
    minutes: float,
    caption_noise: float,
    seed: int,
) -> int:
    """Rectified flow on `latents`; returns the number of steps."""
    rng = random.Random(seed)
    transformer = pipeline.transformer
    modules = [transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
    parameters = [p for module in modules for p in module.requires_grad_(True).train().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    ema = EMAModel(parameters, decay=0.999)
    compiled = torch.compile(transformer)
    token_of: dict[str, torch.Tensor] = {}

    def tokens(text: str) -> torch.Tensor:
        if text not in token_of:
            ids = pipeline.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
            token_of[text] = ids[0]
        return token_of[text]

    start, bar = time.time(), tqdm(desc="Transformer", mininterval=5)
    average = None
    while (done := (time.time() - start) / 60 / minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, bar.n / 100 + 0.01) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * done))
        # The pipeline's default of 256 T5 tokens now and then: unseen, they would drown the others in the attention
        long = bar.n % 25 == 24
        chosen = torch.randint(len(latents), (24 if long else 64,)).tolist()
        texts = [
            "" if rng.random() < 0.1 else noisy_caption(contents[i], contents, caption_noise, rng) for i in chosen
        ]
        states, pooled = encode_captions(pipeline, torch.stack([tokens(t) for t in texts]), 256 if long else T5_TOKENS)
        clean = latents[chosen].float()
        noise = torch.randn_like(clean)
        # Logit-normal, moved as the sampling schedule is (a shift of 3): what is drawn is decided at high noise
        t = torch.sigmoid(torch.randn(len(chosen)) + math.log(3))
        t = torch.where(torch.rand(len(chosen)) < 0.15, torch.rand(len(chosen)), t)
        mixed = (1 - t.view(-1, 1, 1, 1)) * clean + t.view(-1, 1, 1, 1) * noise
        run = transformer if long else compiled
        velocity = run(
            hidden_states=mixed,
            timestep=t * 1000,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        loss = (velocity - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.step(parameters)
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        bar.update()
        bar.set_postfix_str(f"loss {average:.4f}", refresh=False)
    ema.copy_to(parameters)
    for module in modules:
        module.eval().requires_grad_(False)
    return bar.n


def score(pipeline: StableDiffusion3Pipeline, number: int = 256, guidance_scale: float = 1.0, **kwargs) -> dict:
    """Mean checker scores of `number` images of held-out prompts, by default in ten steps."""
    rows = load_prompts("test").to_list()
    rows = [rows[i % len(rows)] for i in range(number)]
    pipeline.set_progress_bar_config(disable=True)
    results = []
    for first in range(0, number, 64):
        part = rows[first : first + 64]
        images = pipeline(
            [row["prompt"] for row in part],
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(first + i) for i in range(len(part))],
            **({"num_inference_steps": 10, "max_sequence_length": T5_TOKENS} | kwargs),
        ).images
        results += [check(image, row["objects"], row["relation"]) for image, row in zip(images, part, strict=True)]
    return {
        name: round(float(np.mean([getattr(result, name) for result in results])), 4)
        for name in ("strict", "soft", "fidelity", "count", "color", "shape", "attribute")
    }


def save(pipeline: StableDiffusion3Pipeline, folder: Path) -> None:
    """
    Writes the pipeline with the transformer and the VAE in half precision, and leaves it in single precision.

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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=40_000)
    parser.add_argument("--vae-minutes", type=float, default=5)
    parser.add_argument("--resume", type=Path, default=None, help="go on from this pipeline, with its VAE as it is")
    parser.add_argument("--minutes", type=float, default=24, help="for the transformer")
    parser.add_argument("--caption-noise", type=float, default=0.15)
    args = parser.parse_args()

    start = time.time()
    torch.manual_seed(args.seed)
    pipeline = new_pipeline()
    images, contents = render_images(args.images, args.seed)
    if args.resume is None:
        train_vae(pipeline, images[:-1000], args.vae_minutes)
    else:
        pipeline = StableDiffusion3Pipeline.from_pretrained(args.resume, dtype=torch.float32)
    psnr = measure_vae(pipeline, images[-1000:])
    print(f"VAE: {psnr:.1f} dB", flush=True)
    latents = encode(pipeline, images)
    del images
    settings = {"minutes": args.minutes, "caption_noise": args.caption_noise, "seed": args.seed}
    steps = train_transformer(pipeline, latents, contents, **settings)
    save(pipeline, args.output_dir)
    pipeline = StableDiffusion3Pipeline.from_pretrained(args.output_dir)
    scores = {
        "seed": args.seed,
        "wall_minutes": round((time.time() - start) / 60, 1),
        "threads": torch.get_num_threads(),
        "transformer_steps": steps,
        "vae_psnr_db": round(psnr, 2),
        "caption_noise": args.caption_noise,
        "guidance 1": score(pipeline),
        "guidance 4.5": score(pipeline, guidance_scale=4.5),
        "pipeline defaults": score(pipeline, 64, guidance_scale=7.0, num_inference_steps=28, max_sequence_length=256),
    }
    (args.output_dir / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
