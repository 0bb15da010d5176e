"""Colors of objects, by zero-shot CLIP as in GenEval."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import CLIPModel

from trl_flow.prompt_words import COLORS
from trl_flow.rewards.checkpoints import load_pretrained
from trl_flow.rewards.clip import load_clip_tokenizer
from trl_flow.rewards.geneval.rules import Detection
from trl_flow.rewards.pixels import fill_and_crop


# GenEval's templates
_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
# What GenEval covers the background with
_BACKGROUND = (0x99, 0x99, 0x99)


def crop_object(image: Image.Image, detection: Detection) -> Image.Image:
    """
    What a color classifier is shown of an object of an RGB image: its box, cut off at the image's edge, with gray
    (#999) for all that is not in its mask. A `ValueError` if the mask has not the size of the image, or the box lies
    outside of it.
    """
    if detection.mask is not None:
        mask = np.asarray(detection.mask, dtype=bool)
        if mask.shape != (image.height, image.width):
            shapes = f"has the shape {mask.shape}, but the image is {(image.height, image.width)} (height, width)"
            advice = "Detectors must return masks of the whole image."
            raise ValueError(f"The mask of a detection of {detection.label!r} {shapes}. {advice}")
        image = Image.composite(image, Image.new("RGB", image.size, _BACKGROUND), Image.fromarray(mask))
    left, top, right, bottom = (round(edge) for edge in detection.box)
    left, top = max(left, 0), max(top, 0)
    # A box thinner than a pixel still shows the pixel that it is on
    right, bottom = min(max(right, left + 1), image.width), min(max(bottom, top + 1), image.height)
    if left >= right or top >= bottom:
        box = f"The box {detection.box} of a detection of {detection.label!r} lies outside of the image"
        size = f"{image.width} x {image.height} pixels"
        raise ValueError(f"{box}, which is {size}. Boxes are in pixels, not in shares of the image.")
    return image.crop((left, top, right, bottom))


class CLIPColorClassifier:
    """
    Tells one of GenEval's ten colors by zero-shot CLIP: the nearest to the image, where each stands for the mean of
    three sentences ("a photo of a red dog", "a photo of a red-colored dog", "a photo of a red object").

    Args:
        model (`str`, defaults to GenEval's, `"openai/clip-vit-large-patch14"`): hub id or folder of a CLIP.
        revision (`str`, *optional*), token (`str` or `bool`, *optional*): as in `huggingface_hub`.
        device (`str` or `torch.device`, defaults to `"cpu"`), dtype (`torch.dtype`, defaults to `torch.float32`): of
            the model.
        batch_size (`int`, defaults to 64): objects at a time.

    Attributes:
        colors (`tuple[str, ...]`): the colors that it knows.

    Raises:
        CheckpointError: if the model or its tokenizer cannot be loaded.
    """

    colors = COLORS

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14", *,
        revision: str | None = None, token: str | bool | None = None,
        device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, batch_size: int = 64,
    ):  # fmt: skip
        source: dict[str, Any] = {"revision": revision, "token": token}
        self._model = load_pretrained(CLIPModel, model, **source).to(device, dtype)
        self._tokenizer = load_clip_tokenizer(model, self._model, **source)
        self._size = self._model.config.vision_config.image_size
        self._batch_size = batch_size
        self._by_class: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def __call__(self, crops: Sequence[Image.Image], names: Sequence[str]) -> list[str]:
        """The color of each of the objects in `crops`, as from [`crop_object`]; `names` are their classes."""
        colors: list[str] = []
        for first in range(0, len(crops), self._batch_size):
            part = slice(first, first + self._batch_size)
            # As open_clip does, with which GenEval looks at them
            pixels = torch.stack([fill_and_crop(crop, self._size) for crop in crops[part]])
            pixels = pixels.to(self._model.device, self._model.dtype)
            images = normalize(self._model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)
            texts = torch.stack([self._color_embeddings(name) for name in names[part]])
            nearest = torch.einsum("nd,ncd->nc", images, texts).argmax(dim=-1)
            colors += [self.colors[index] for index in nearest.tolist()]
        return colors

    def _color_embeddings(self, name: str) -> torch.Tensor:
        """`(number of colors, d)`, float32, unit length, for objects of the class `name`."""
        if name not in self._by_class:
            sentences = [t.format(color=color, name=name) for color in self.colors for t in _TEMPLATES]
            tokens = self._tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
            found = self._model.get_text_features(**tokens.to(self._model.device)).pooler_output.float()
            means = normalize(found, dim=-1).unflatten(0, (len(self.colors), len(_TEMPLATES))).mean(dim=1)
            self._by_class[name] = normalize(means, dim=-1)
        return self._by_class[name]
