"""From images to the pixels that reward models were trained on, as their authors' programs do it."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


# Scaled to fill a square, an image that is longer than so many times its width would take gigabytes
_LONGEST = 64


def without_ends(image: Image.Image) -> Image.Image:
    """An image; but of one that is more than 64 times as long as wide only the middle, which a crop will show."""
    margins = [max(side - _LONGEST * min(image.size), 0) // 2 for side in image.size]
    if not any(margins):
        return image
    return image.crop((*margins, image.width - margins[0], image.height - margins[1]))


def fill_and_crop(image: Image.Image, size: int) -> torch.Tensor:
    """
    Scales an RGB image with Pillow's bicubic filter until its shorter side has `size` pixels, takes the middle and
    normalizes it: `(3, size, size)` in float32. It is what OpenAI's CLIP does (`CLIPImageProcessor` rounds margins
    down where this rounds them: one pixel apart in some sizes).
    """
    image = without_ends(image)
    short = min(image.size)
    width, height = (size * side // short for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    # Python rounds halves to even, and so did the authors
    left, top = round((width - size) / 2), round((height - size) / 2)
    return normalize(_tensor(image.crop((left, top, left + size, top + size))))


def fit_and_pad(image: Image.Image, size: int) -> torch.Tensor:
    """
    Scales an RGB image until its longer side has `size` pixels, with a bicubic filter that is widened for shrinking,
    centers it on black and normalizes it: `(3, size, size)` in float32. It is what HPSv2 does. Values between the 256
    steps and overshoots are kept, where Pillow would round and cut.
    """
    pixels = _tensor(image)
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        pixels = F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
    left, top = (size - width) // 2, (size - height) // 2
    return normalize(F.pad(pixels, (left, size - width - left, top, size - height - top)))


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """`(3, H, W)` from `[0, 1]` to mean 0 and variance 1 over CLIP's training set, per channel."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels - mean) / std


def _tensor(image: Image.Image) -> torch.Tensor:
    """`(3, H, W)` in `[0, 1]`."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
