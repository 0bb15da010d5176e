"""What the bundled model is trained on: rendered scenes, and captions that are sometimes wrong."""

import random

import numpy as np
import torch
from tqdm import tqdm

from trl_flow.shapes.prompts import is_held_out, make_caption
from trl_flow.shapes.world import COLORS, RELATIONS, SHAPES, place, random_ground, relation_holds, render


Target = tuple[list[dict], str | None]  # objects and relation, as `parse_caption` returns them

# Shares of the images with one to three like shapes, and with two different ones
_GROUP_SHARES = {1: 0.15, 2: 0.15, 3: 0.15}


def random_scene(rng: np.random.Generator) -> tuple[np.ndarray, Target]:
    """An image, uint8 `(64, 64, 3)`, of a combination that is not held out, and what its caption says."""
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
    """`number` images of training scenes, uint8 `(N, 3, 64, 64)`, and what their captions say."""
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
