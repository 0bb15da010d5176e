"""The bundled model's transformer and text encoders: rectified flow on the autoencoder's latents."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from data import Target, noisy_caption
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from muon import Muon
from stage import Stage, adamw, generator

from trl_flow.shapes.bundled import T5_TOKENS


BATCH, LONG_BATCH = 32, 12
EMPTY_CAPTIONS = 0.1
# The share of the learning rates at a step of 38,000: as soon as the loss stood still they fell, and then more slowly
RATES = {0: 0.005, 200: 1.0, 8_800: 1.0, 11_750: 0.59, 38_000: 0.0}
RATE, MATRIX_RATE = 1.5e-3, 3e-3


def rate(step: int, steps: int) -> float:
    """The share of the learning rates, between the points of `RATES`, drawn out or in to `steps`."""
    return float(np.interp(step * max(RATES) / steps, list(RATES), list(RATES.values())))


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


def noise_levels(number: int, source: torch.Generator) -> torch.Tensor:
    """Logit-normal, moved as the sampling schedule is (a shift of 3): what is drawn is decided at high noise. Some are
    uniform."""
    t = torch.sigmoid(torch.randn(number, generator=source) + math.log(3))
    uniform = torch.rand(number, generator=source)
    return torch.where(torch.rand(number, generator=source) < 0.15, uniform, t)


def train_transformer(
    pipeline: StableDiffusion3Pipeline,
    latents: torch.Tensor,
    contents: list[Target],
    folder: Path,
    *,
    steps: int,
    caption_noise: float,
    seed: int,
    watch: Callable[[int], None] | None = None,
    watch_every: int = 1000,
) -> None:
    """Trains on `latents` and leaves the averaged weights in the pipeline; `watch` is called with them now and then,
    and with the number of steps done."""
    transformer = pipeline.transformer
    names = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    modules = {name: getattr(pipeline, name).requires_grad_(True).train() for name in names}
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    ema = EMAModel(parameters, decay=0.999, foreach=True)
    token_of: dict[str, torch.Tensor] = {}

    def tokens(text: str) -> torch.Tensor:
        if text not in token_of:
            ids = pipeline.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
            token_of[text] = ids[0]
        return token_of[text]

    def loss_of(step: int) -> torch.Tensor:
        source, rng = generator(seed, 2, step), random.Random(f"{seed} {step}")
        # The pipeline's default of 256 T5 tokens now and then: unseen, they would drown the others in the attention
        long = step % 25 == 24
        chosen = torch.randint(len(latents), (LONG_BATCH if long else BATCH,), generator=source).tolist()
        texts = [
            "" if rng.random() < EMPTY_CAPTIONS else noisy_caption(contents[i], contents, caption_noise, rng)
            for i in chosen
        ]
        states, pooled = encode_captions(pipeline, torch.stack([tokens(t) for t in texts]), 256 if long else T5_TOKENS)
        clean = latents[chosen].float()
        noise = torch.randn(clean.shape, generator=source)
        t = noise_levels(len(chosen), source)
        velocity = transformer(
            hidden_states=clean.lerp(noise, t.view(-1, 1, 1, 1)),
            timestep=t * 1000,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return (velocity - (noise - clean)).square().mean()

    def after(step: int) -> None:
        ema.step(parameters)
        if watch is not None and step % watch_every == 0:
            ema.store(parameters)
            ema.copy_to(parameters)
            for module in modules.values():
                module.eval()
            watch(step)
            for module in modules.values():
                module.train()
            ema.restore(parameters)

    matrices = [parameter for parameter in pipeline.transformer.transformer_blocks.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in parameters if not any(parameter is matrix for matrix in matrices)]
    # In a minute the loss is where AdamW alone has it in two
    optimizers = [Muon(matrices, MATRIX_RATE), adamw(others, RATE)]
    stage = Stage(folder, "transformer", modules | {"ema": ema}, optimizers, lambda step: rate(step, steps))
    stage.run(steps, loss_of, after)
    ema.copy_to(parameters)
    for module in modules.values():
        module.eval().requires_grad_(False)
