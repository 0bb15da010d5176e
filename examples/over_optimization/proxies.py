"""Rewards that are imperfect on purpose, as learned and rule-based rewards are; each says what it does not see.

All are deterministic: the same image and prompt always get the same value, so that a run can be repeated.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file

from trl_flow.images import to_rgb
from trl_flow.rewards import JPEGCompressibilityReward
from trl_flow.shapes import COLORS, IMAGE_SIZE, SHAPES, PlacedShape, check, load_prompts, render


# Share of the image that a color's paint must cover for the full reward: about twice the area of a drawn shape
FULL_SHARE = 0.2


def color_shares(image: Image.Image) -> np.ndarray:
    """Share of the image's pixels in each of the world's six hues, weighted by how saturated they are, `(6,)`."""
    pixels = np.asarray(to_rgb(image), dtype=np.float32).reshape(-1, 3) / 255
    chroma = pixels.max(axis=1) - pixels.min(axis=1)
    hues = np.asarray(list(COLORS.values()), dtype=np.float32)
    nearest = ((pixels[:, None] - hues[None]) ** 2).sum(axis=2).argmin(axis=1)
    return np.bincount(nearest, weights=chroma, minlength=len(hues)) / len(pixels)


class ColorsOnlyReward:
    """
    How much of the image is painted in the colors that the prompt names, from 0 to 1.

    For each named color the painted share counts up to `FULL_SHARE`; the mean over them is multiplied by the share of
    the paint that is in a named color. Right colors raise it honestly. It is blind to shapes, to counts, to places
    and to everything that is smeared over the ground.

    Args:
        dense (`bool`): whether unfinished images may be scored (VGPO); if not, the finished one's reward counts.
    """

    __name__ = "colors_only"

    def __init__(self, dense: bool = True):
        self.dense = dense

    def __call__(
        self, prompts: list[str], images: list[Image.Image], objects: list[list[dict]], **kwargs
    ) -> list[float]:
        names = list(COLORS)
        rewards = []
        for image, things in zip(images, objects, strict=True):
            shares = color_shares(image)
            named = [names.index(color) for color in dict.fromkeys(thing["color"] for thing in things)]
            painted = np.minimum(shares[named] / FULL_SHARE, 1.0).mean()
            rewards.append(float(painted * shares[named].sum() / max(shares.sum(), 1e-6)))
        return rewards


class Scorer(torch.nn.Module):
    """A small convolutional net: how much it sees of each (color, shape), and how well that fits the prompt."""

    def __init__(self):
        super().__init__()
        kinds = len(COLORS) * len(SHAPES)
        self.look = torch.nn.Sequential(
            torch.nn.Conv2d(3, 24, 5, stride=2, padding=2),
            torch.nn.SiLU(),
            torch.nn.Conv2d(24, 48, 3, stride=2, padding=1),
            torch.nn.SiLU(),
            torch.nn.Conv2d(48, kinds, 3, padding=1),
            torch.nn.Softplus(),
        )
        self.judge = torch.nn.Sequential(torch.nn.Linear(2 * kinds, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1))

    def forward(self, pictures: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """`(B, 3, 64, 64)` in [0, 1] and counts `(B, 18)` to scores `(B,)` in [0, 1]."""
        # The sum over places is what makes it blind to positions and relations
        seen = self.look(2 * pictures - 1).sum(dim=(2, 3)) / 8
        return self.judge(torch.cat([(seen - wanted).abs(), seen * wanted], dim=1)).squeeze(1).sigmoid()


def picture_tensor(image: Image.Image) -> torch.Tensor:
    """`(3, 64, 64)`, float32 in [0, 1]."""
    image = to_rgb(image).resize((IMAGE_SIZE, IMAGE_SIZE))
    return torch.from_numpy(np.asarray(image, dtype=np.float32).transpose(2, 0, 1).copy()) / 255


def wanted_counts(objects: list[dict]) -> torch.Tensor:
    """How many of each (color, shape) are asked for, `(18,)`."""
    counts = torch.zeros(len(COLORS), len(SHAPES))
    for thing in objects:
        counts[list(COLORS).index(thing["color"]), SHAPES.index(thing["shape"])] += thing["count"]
    return counts.flatten()


def training_picture(objects: list[dict], rng: np.random.Generator) -> Image.Image:
    """A scene of about what is asked for: words wrong, shapes missing or surplus, any places, blur and noise."""
    shapes = []
    for thing in objects:
        for _ in range(thing["count"]):
            color, shape = thing["color"], thing["shape"]
            if rng.random() < 0.25:
                color = str(rng.choice(list(COLORS)))
            if rng.random() < 0.25:
                shape = str(rng.choice(SHAPES))
            shapes.append((color, shape))
    if rng.random() < 0.25:
        shapes.pop()
    if rng.random() < 0.25:
        shapes.append((str(rng.choice(list(COLORS))), str(rng.choice(SHAPES))))
    placed = [PlacedShape(color, shape, *rng.uniform(12, 52, size=2), rng.uniform(14, 24)) for color, shape in shapes]
    image = render(placed, ground=float(rng.choice([0.05, 0.95])))
    image = image.filter(ImageFilter.GaussianBlur(float(rng.choice([0.0, 1.0, 2.0, 4.0]))))
    noise = rng.choice([0.0, 8.0, 24.0]) * rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def train_scorer(path: str | os.PathLike, *, pictures: int = 5000, updates: int = 600) -> None:
    """
    Trains the scorer on rendered images, never on the model's own, and writes its weights.

    Args:
        path (`str` or `os.PathLike`): safetensors file to write.
        pictures, updates (`int`): size of the training set, and updates on 128 of them each.
    """
    rng = np.random.default_rng(0)
    prompts = load_prompts("train")
    targets = [prompts[int(i)]["objects"] for i in rng.integers(len(prompts), size=pictures)]
    images = [training_picture(objects, rng) for objects in targets]
    # The relation is left out: the scorer is not to know of it
    scores = torch.tensor([check(image, objects).soft for image, objects in zip(images, targets, strict=True)])
    seen = torch.stack([picture_tensor(image) for image in images])
    wanted = torch.stack([wanted_counts(objects) for objects in targets])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        scorer = Scorer()
        optimizer = torch.optim.AdamW(scorer.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
        for _ in range(updates):
            batch = torch.randint(pictures, (128,))
            loss = (scorer(seen[batch], wanted[batch]) - scores[batch]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file that is there is whole, even if this is interrupted
    temporary = path.with_suffix(f".{os.getpid()}")
    save_file(scorer.state_dict(), temporary)
    os.replace(temporary, path)


class LearnedReward:
    """
    The scorer's guess of the soft score, from 0 to 1: a learned reward model with blind spots.

    It averages over places, so that positions and relations are invisible to it, and it has only been shown rendered
    pictures: what it says of anything else is extrapolation, which optimization finds.

    Args:
        path (`str` or `os.PathLike`): its weights; trained and written there (about 20 seconds) if there is no file.
    """

    __name__ = "learned_scorer"

    def __init__(self, path: str | os.PathLike):
        if not Path(path).is_file():
            train_scorer(path)
        self.scorer = Scorer()
        self.scorer.load_state_dict(load_file(path))
        self.scorer.eval()

    @torch.no_grad()
    def __call__(
        self, prompts: list[str], images: list[Image.Image], objects: list[list[dict]], **kwargs
    ) -> list[float]:
        seen = torch.stack([picture_tensor(image) for image in images])
        wanted = torch.stack([wanted_counts(things) for things in objects])
        return self.scorer(seen, wanted).tolist()


class SmallSpreadReward:
    """
    The colors' reward with a spread that depends on the prompt, plus noise: the setting of SLAS's Proposition 1.

    `0.5 + spread * colors + noise`, where `spread` is 1 for a third of the prompts and `small` for the others, and the
    noise is the same for all. In the small groups nearly all of the difference between two images is noise, which
    dividing by the group's standard deviation makes as loud as the signal of the large ones.

    Args:
        small (`float`): spread for two thirds of the prompts.
        noise (`float`): standard deviation of the noise, a hash of the image and the prompt.
    """

    __name__ = "small_spread"

    def __init__(self, small: float = 0.05, noise: float = 0.03):
        self.small = small
        self.noise = noise
        self.colors = ColorsOnlyReward()

    def spread(self, prompt: str) -> float:
        """Factor of the colors' reward."""
        return 1.0 if hashlib.sha256(prompt.encode()).digest()[0] % 3 == 0 else self.small

    def __call__(
        self, prompts: list[str], images: list[Image.Image], objects: list[list[dict]], **kwargs
    ) -> list[float]:
        colors = self.colors(prompts, images, objects)
        rewards = []
        for prompt, image, color in zip(prompts, images, colors, strict=True):
            digest = hashlib.sha256(prompt.encode() + image.tobytes()).digest()
            noise = np.random.default_rng(int.from_bytes(digest[:8], "little")).standard_normal()
            rewards.append(max(0.0, 0.5 + self.spread(prompt) * color + self.noise * float(noise)))
        return rewards


def jpeg_reward() -> JPEGCompressibilityReward:
    """JPEG compressibility, blind to the prompt: an empty image is the best one. Positive for 64 x 64 pixels."""
    return JPEGCompressibilityReward(offset=2.0)
