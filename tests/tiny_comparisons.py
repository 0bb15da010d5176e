"""Adapters with random weights for the tiny pipeline, and folders of images that no model drew."""

import os
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model
from PIL import Image

from trl_flow.evaluation.image_folder import ImageFolder, PromptList
from trl_flow.sharing import save_full, save_lora


def random_lora(
    base: str, folder: str | os.PathLike, *, seed: int, targets: tuple[str, ...] = ("to_q", "to_v")
) -> str:
    """Writes a LoRA that changes what the pipeline `base` draws, in diffusers' format."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(pipeline.transformer, LoraConfig(r=4, lora_alpha=8, target_modules=list(targets)))
    _shift(model, seed)
    save_lora(StableDiffusion3Pipeline, model, folder)
    return str(folder)


def random_full(base: str, folder: str | os.PathLike, *, seed: int) -> str:
    """Writes a transformer all of whose weights differ from those of the pipeline `base`."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(base)
    _shift(pipeline.transformer, seed)
    save_full(pipeline.transformer, folder)
    return str(folder)


def assert_same_images(images, expected) -> None:
    """Images that are equal but for the rounding of a few of their values, by one level of 255."""
    difference = np.abs(_pixels(images) - _pixels(expected))
    assert difference.max() <= 1 and difference.mean() < 0.02


def _pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=int) for image in images])


def _shift(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def plain_image(model: int, index: int, side: int = 16) -> Image.Image:
    """An image of one color, which tells the model (red) and the index (green)."""
    return Image.new("RGB", (side, side), (40 * model, 7 * index % 256, 90))


def painted_folder(
    path: Path, prompts: list[str], *, models: tuple[str, ...] = ("base", "ours"), number: int = 1, side: int = 16
) -> ImageFolder:
    """An evaluation's folder with the images of one set, `shapes`, but without scores or results."""
    folder = ImageFolder(path)
    folder.claim(
        {"seed": 0, "num_images_per_prompt": number},
        {name: {"path": f"path/of/{name}", "fingerprint": name} for name in models},
        {"shapes": PromptList(prompts, "fingerprint")},
    )
    for i, model in enumerate(models):
        for index in range(len(prompts) * number):
            folder.save("shapes", model, index, plain_image(i, index, side))
    return folder
