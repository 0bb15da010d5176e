"""The bundled model's autoencoder, and the tiny decoder that projections are drawn with."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from stage import Stage, adamw, generator, log


BATCH = 8


def rate(step: int, steps: int) -> float:
    """Constant, then a linear fall: what comes before the fall does not depend on the number of steps."""
    return min(1, step / 50 + 0.02, max(0.005, (steps - step) / (0.4 * steps)))


def batch_of(images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    return images[torch.randint(len(images), (BATCH,), generator=random)].float() / 127.5 - 1


def difference(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Most of an image is flat ground: the absolute error alone would blur the shapes' edges."""
    return (decoded - images).abs().mean() + 2 * (decoded - images).square().mean()


def disturbed(latents: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """
    Latents as a sampler leaves them: half of them as they are, half with up to 0.3 standard deviations of noise and up
    to 1.3 times too large, as much guidance makes them.
    """
    shape = (len(latents), 1, 1, 1)
    mean, deviation = latents.mean(), latents.std()
    some = (torch.rand(shape, generator=random) < 0.5).float()
    scale = 1 + some * 0.3 * torch.rand(shape, generator=random)
    level = some * 0.3 * torch.rand(shape, generator=random)
    noise = torch.randn(latents.shape, generator=random)
    return mean + (latents - mean) * scale + level * deviation * noise


def train_autoencoder(vae: AutoencoderKL, images: torch.Tensor, folder: Path, steps: int, seed: int) -> None:
    """Trains the autoencoder on uint8 `images`, and sets its scaling and shift from them."""
    vae.train()

    def loss_of(step: int) -> torch.Tensor:
        random = generator(seed, 1, step)
        batch = batch_of(images, random)
        posterior = vae.encode(batch).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=random)
        return difference(vae.decode(latents).sample, batch) + 1e-6 * posterior.kl().mean()

    def after(step: int) -> None:
        if step % 500 == 0:
            log(folder, stage="autoencoder", step=step, psnr_db=round(psnr(vae, images[:250]), 2))

    # At 2e-3 it learns the ground and a blur, and stays there
    optimizer = adamw(list(vae.parameters()), 1e-3)
    stage = Stage(folder, "autoencoder", {"vae": vae}, [optimizer], lambda step: rate(step, steps))
    stage.run(steps, loss_of, after)
    vae.eval().requires_grad_(False)
    latents = encode(vae, images[:4000], scaled=False)
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def train_decoder(vae: AutoencoderKL, images: torch.Tensor, folder: Path, steps: int, seed: int) -> None:
    """Trains the decoder further, to draw clean shapes from disturbed latents too. What the encoder says stays."""
    latents = encode(vae, images, scaled=False)

    def loss_of(step: int) -> torch.Tensor:
        random = generator(seed, 4, step)
        chosen = torch.randint(len(images), (BATCH,), generator=random)
        decoded = vae.decode(disturbed(latents[chosen], random)).sample
        return difference(decoded, images[chosen].float() / 127.5 - 1)

    optimizer = adamw(list(vae.decoder.requires_grad_(True).train().parameters()), 5e-4)
    stage = Stage(folder, "decoder", {"vae": vae}, [optimizer], lambda step: rate(step, steps))
    stage.run(steps, loss_of)
    vae.eval().requires_grad_(False)


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: torch.Tensor, decoder: AutoencoderTiny | None = None) -> float:
    """Peak signal-to-noise ratio in dB of uint8 images, encoded and decoded, by the tiny decoder if one is given."""
    errors = []
    for part in images.split(50):
        part = part.float() / 127.5 - 1
        latents = vae.encode(part).latent_dist.mode()
        if decoder is not None:
            latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        decoded = (decoder or vae).decode(latents).sample.clamp(-1, 1)
        errors.append(((decoded - part) / 2).square().mean())
    return (-10 * torch.log10(torch.stack(errors).mean())).item()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor, scaled: bool = True) -> torch.Tensor:
    """Latents of uint8 images, as the transformer sees them if `scaled`."""
    latents = torch.cat([vae.encode(part.float() / 127.5 - 1).latent_dist.mode() for part in images.split(100)])
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor if scaled else latents


def train_tiny_decoder(
    tiny: AutoencoderTiny, vae: AutoencoderKL, images: torch.Tensor, folder: Path, steps: int, seed: int
) -> None:
    """Trains a decoder of scaled latents to draw what the autoencoder's own does, from latents as they are, disturbed,
    and halfway between two images, as early predictions of a clean image are."""
    latents = encode(vae, images, scaled=True)

    def loss_of(step: int) -> torch.Tensor:
        random = generator(seed, 3, step)
        chosen, other = torch.randint(len(latents), (2, BATCH), generator=random)
        share = (torch.rand((BATCH, 1, 1, 1), generator=random) - 0.5).clamp(min=0)
        given = disturbed(latents[chosen].lerp(latents[other], share), random)
        with torch.no_grad():
            wanted = vae.decode(given / vae.config.scaling_factor + vae.config.shift_factor).sample.clamp(-1, 1)
        return difference(tiny.decode(given).sample, wanted)

    optimizer = adamw(list(tiny.decoder.train().parameters()), 2e-3)
    stage = Stage(folder, "tiny_decoder", {"tiny": tiny}, [optimizer], lambda step: rate(step, steps))
    stage.run(steps, loss_of)
    tiny.eval().requires_grad_(False)
