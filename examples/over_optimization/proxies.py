"""Rewards that are imperfect on purpose, as learned and rule-based rewards are; each says what it does not see.

Clean drawings of the prompts have at least 0.95 by each, so that it can be climbed honestly, and each has a cheap way
up besides. All are deterministic: the same image and prompt always get the same value.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file

from trl_flow.images import to_rgb
from trl_flow.rewards import ShapesReward
from trl_flow.shapes import COLORS, IMAGE_SIZE, SHAPES, check, detect, load_prompts, render
from trl_flow.shapes.world import place, random_ground


THUMBNAIL = 32  # what the scorer looks at, whatever the size of the world's images
SCORER = f"scorer_2_{IMAGE_SIZE}.safetensors"  # another name for each architecture, and for each world


def wanted_shapes(objects: Sequence[dict]) -> list[tuple[str, str]]:
    """Each shape that is asked for, as (color, shape)."""
    return [(thing["color"], thing["shape"]) for thing in objects for _ in range(thing["count"])]


def clean_drawing(objects: Sequence[dict], rng: np.random.Generator) -> Image.Image:
    """The world's own drawing of what is asked for; relations aside, of which no proxy knows."""
    return render(place(wanted_shapes(objects), rng), random_ground(rng))


# ---- A learned scorer ----


class Scorer(torch.nn.Module):
    """A small convolutional net: how many of each (color, shape) it sees, and how well that fits the prompt."""

    def __init__(self):
        super().__init__()
        kinds = len(COLORS) * len(SHAPES)
        self.look = torch.nn.Sequential(
            torch.nn.Conv2d(3, 24, 5, stride=2, padding=2),
            torch.nn.SiLU(),
            torch.nn.Conv2d(24, 48, 5, stride=2, padding=2),
            torch.nn.SiLU(),
            torch.nn.Conv2d(48, kinds, 3, padding=1),
            torch.nn.Softplus(),
        )
        torch.nn.init.constant_(self.look[4].bias, -4.0)  # it begins with having seen about one of each
        self.judge = torch.nn.Sequential(torch.nn.Linear(2 * kinds, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1))

    def forward(self, pictures: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, 3, 32, 32)` in [0, 1] and counts `(B, 18)` to what it sees `(B, 18)` and scores `(B,)` in [0, 1]."""
        # The sum over places is what makes it blind to positions and relations
        seen = self.look(2 * pictures - 1).sum(dim=(2, 3))
        fit = torch.cat([(seen - wanted).abs(), torch.minimum(seen, wanted)], dim=1)
        return seen, self.judge(fit).squeeze(1).sigmoid()


def thumbnail(image: Image.Image) -> torch.Tensor:
    """`(3, 32, 32)`, float32 in [0, 1]."""
    image = to_rgb(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(image, dtype=np.float32).transpose(2, 0, 1).copy()) / 255


def counts(shapes: Sequence[tuple[str, str]]) -> torch.Tensor:
    """How many there are of each (color, shape), `(18,)`."""
    found = torch.zeros(len(COLORS), len(SHAPES))
    for color, shape in shapes:
        found[list(COLORS).index(color), SHAPES.index(shape)] += 1
    return found.flatten()


def training_row(objects: Sequence[dict], rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, float]:
    """
    A drawing of about what is asked for, what is in it, and its soft score: words wrong, shapes missing or surplus.

    It is then blurred, speckled or made noisy, and keeps the score that it had: how a shape is painted does not count.
    """
    shapes = wanted_shapes(objects)
    if rng.random() < 0.6:
        for i, (color, shape) in enumerate(shapes):
            color = str(rng.choice(list(COLORS))) if rng.random() < 0.25 else color
            shapes[i] = (color, str(rng.choice(SHAPES)) if rng.random() < 0.25 else shape)
        if len(shapes) > 1 and rng.random() < 0.25:
            shapes.pop()
        if len(shapes) < 3 and rng.random() < 0.35:
            shapes.append((str(rng.choice(list(COLORS))), str(rng.choice(SHAPES))))
    image = render(place(shapes, rng), random_ground(rng))
    score = check(image, objects).soft
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.choice([0.0, 0.5, 1.0])) * IMAGE_SIZE / THUMBNAIL))
        array = np.asarray(image, dtype=np.float32)
        speckled = rng.random(array.shape[:2]) < rng.choice([0.0, 0.1, 0.25])
        array = np.where(speckled[:, :, None], np.median(array, axis=(0, 1)), array)
        array = array + rng.choice([0.0, 10.0, 30.0]) * rng.standard_normal(array.shape)
        image = Image.fromarray(np.clip(array, 0, 255).astype(np.uint8))
    return thumbnail(image), counts(shapes), score


def train_scorer(path: str | os.PathLike, *, pictures: int = 10_000, updates: int = 2000) -> None:
    """
    Trains the scorer on rendered images, never on the model's own, and writes its weights.

    Args:
        path (`str` or `os.PathLike`): safetensors file to write.
        pictures, updates (`int`): size of the training set, and updates on 128 of them each.
    """
    rng = np.random.default_rng(0)
    targets = load_prompts("train")["objects"][:]
    targets = [targets[int(i)] for i in rng.integers(len(targets), size=pictures)]
    thumbnails, present, scores = zip(*(training_row(objects, rng) for objects in targets), strict=True)
    seen, present, scores = torch.stack(thumbnails), torch.stack(present), torch.tensor(scores)
    wanted = torch.stack([counts(wanted_shapes(objects)) for objects in targets])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        scorer = Scorer()
        optimizer = torch.optim.AdamW(scorer.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, updates)
        for _ in range(updates):
            batch = torch.randint(pictures, (128,))
            found, guess = scorer(seen[batch], wanted[batch])
            # It is told what is in the image, too: from the score alone it would take several times as long
            loss = (guess - scores[batch]).square().mean() + (found - present[batch]).square().mean()
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

    It looks at thumbnails, was taught that blur, speckles and noise do not count, averages over places, so that
    positions and relations are invisible to it, and has only been shown drawings: what it says of anything else is
    extrapolation, which optimization finds.

    Args:
        path (`str` or `os.PathLike`): its weights; trained and written there (about two minutes) if there is no file.
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
        seen = torch.stack([thumbnail(image) for image in images])
        wanted = torch.stack([counts(wanted_shapes(things)) for things in objects])
        return self.scorer(seen, wanted)[1].tolist()


# ---- A rule ----


class RecallReward:
    """
    How much of what the prompt names is there, from 0 to 1: for each shape half for its color and half for both.

    It never looks for what the prompt does not name: more shapes, in all colors, are the cheap way up. A rule of this
    kind is GenEval's for colors and positions.

    Args:
        binary (`bool`): 1 if all of it is there, else 0.
        dense (`bool`): whether unfinished images may be scored (VGPO); if not, the finished one's reward counts.
    """

    def __init__(self, binary: bool = False, dense: bool = True):
        self.binary, self.dense = binary, dense
        self.__name__ = "recall_binary" if binary else "recall"

    def __call__(
        self, prompts: list[str], images: list[Image.Image], objects: list[list[dict]], **kwargs
    ) -> list[float]:
        rewards = [self.recall(image, things) for image, things in zip(images, objects, strict=True)]
        return [float(reward == 1) for reward in rewards] if self.binary else rewards

    @staticmethod
    def recall(image: Image.Image, objects: Sequence[dict]) -> float:
        """The share of what is asked for that is found, each find counted once."""
        seen, wanted = detect(image), wanted_shapes(objects)
        found = [(p.color, p.shape if known else None) for p, known in zip(seen.shapes, seen.recognized, strict=True)]
        points = 0.0
        for part, worth in ((slice(None), 1.0), (slice(1), 0.5)):  # first both, then the color alone
            missing = []
            for want in wanted:
                match = next((i for i, find in enumerate(found) if find[part] == want[part]), None)
                if match is None:
                    missing.append(want)
                else:
                    found.pop(match)
                    points += worth
            wanted = missing
        return points / sum(thing["count"] for thing in objects)


# ---- A rare signal under noise ----


class NoisyStrictReward:
    """
    The strict score, which few images have, plus noise on all: SLAS's premise is noise that is small beside a genuine
    difference.

    The noise is even between bounds, as an unbounded one is itself what a power amplifies, and a hash of the image and
    the prompt.

    Args:
        noise (`float`): its standard deviation.
    """

    def __init__(self, noise: float):
        self.noise, self.strict = noise, ShapesReward("strict")
        self.__name__ = f"strict_noise_{noise:g}"

    def __call__(self, prompts: list[str], images: list[Image.Image], **kwargs) -> list[float]:
        scores = self.strict(prompts, images, **kwargs)
        return [s + self.draw(*pair) for s, *pair in zip(scores, prompts, images, strict=True)]

    def draw(self, prompt: str, image: Image.Image) -> float:
        digest = hashlib.sha256(prompt.encode() + image.tobytes()).digest()
        return self.noise * 3**0.5 * (int.from_bytes(digest[:8], "little") / 2**63 - 1)
