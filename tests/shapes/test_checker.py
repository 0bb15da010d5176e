"""The checker, on images drawn here with PIL, not with the package's renderer, and on real renderings."""

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from trl_flow.shapes import CheckResult, PlacedShape, check, parse_caption, render
from trl_flow.shapes.checker import _connected
from trl_flow.shapes.prompts import all_targets
from trl_flow.shapes.world import place, random_ground, relation_holds


RED, GREEN, BLUE = (235, 20, 20), (20, 235, 20), (20, 20, 235)
BLACK, WHITE = (13, 13, 13), (240, 240, 240)


def drawing(*shapes: tuple, ground: tuple[int, int, int] = BLACK) -> Image.Image:
    """Shapes `(name, color, x, y, half width)`, in units of two pixels, drawn four times as large and scaled down."""
    image = Image.new("RGB", (256, 256), ground)
    draw = ImageDraw.Draw(image)
    for name, color, x, y, half in shapes:
        left, top, right, bottom = (8 * value for value in (x - half, y - half, x + half, y + half))
        if name == "circle":
            draw.ellipse((left, top, right, bottom), fill=color)
        elif name == "square":
            draw.rectangle((left, top, right, bottom), fill=color)
        elif name == "triangle":
            height = math.sqrt(3) * 8 * half
            draw.polygon([(8 * x, bottom - height), (right, bottom), (left, bottom)], fill=color)
        elif name == "bar":
            draw.rectangle((left, 8 * (y - 1.5), right, 8 * (y + 1.5)), fill=color)
    return image.resize((64, 64), Image.Resampling.BOX)


def checked(image: Image.Image, caption: str) -> CheckResult:
    return check(image, *parse_caption(caption))


RED_CIRCLE = ("circle", RED, 8, 16, 5)
GREEN_SQUARE = ("square", GREEN, 24, 16, 5)

# Caption, drawing, and the parts by hand: with n objects seen and N wanted, all are out of max(n, N).
CASES = {
    "all right": (
        "a red circle left of a green square",
        drawing(RED_CIRCLE, GREEN_SQUARE),
        {"count": 1, "color": 1, "shape": 1, "attribute": 1, "relation": 1},
    ),
    "on white": (
        "a red circle and a green square",
        drawing(RED_CIRCLE, GREEN_SQUARE, ground=WHITE),
        {"count": 1, "color": 1, "shape": 1, "attribute": 1},
    ),
    "triangle": (
        "a blue triangle",
        drawing(("triangle", BLUE, 16, 16, 7)),
        {"count": 1, "color": 1, "shape": 1, "attribute": 1},
    ),
    "blank": ("two red circles", drawing(), {"count": 0, "color": 0, "shape": 0, "attribute": 0}),
    "one wrong color": (
        "a red circle and a green square",
        drawing(RED_CIRCLE, ("square", BLUE, 24, 16, 5)),
        {"count": 1, "color": 1 / 2, "shape": 1, "attribute": 1 / 2},
    ),
    "colors swapped": (
        "a red circle and a green square",
        drawing(("circle", GREEN, 8, 16, 5), ("square", RED, 24, 16, 5)),
        {"count": 1, "color": 1, "shape": 1, "attribute": 0},
    ),
    "one too few": (
        "three blue squares",
        drawing(("square", BLUE, 8, 8, 4), ("square", BLUE, 24, 24, 4)),
        {"count": 2 / 3, "color": 2 / 3, "shape": 2 / 3, "attribute": 2 / 3},
    ),
    "one too many": (
        "a red circle",
        drawing(RED_CIRCLE, ("circle", RED, 24, 16, 5)),
        {"count": 1 / 2, "color": 1 / 2, "shape": 1 / 2, "attribute": 1 / 2},
    ),
    "surplus of another kind": (
        "two red circles",
        drawing(("circle", RED, 7, 7, 4), ("circle", RED, 24, 7, 4), ("square", GREEN, 16, 24, 4)),
        {"count": 2 / 3, "color": 2 / 3, "shape": 2 / 3, "attribute": 2 / 3},
    ),
    "wrong relation": (
        "a red circle right of a green square",
        drawing(RED_CIRCLE, GREEN_SQUARE),
        {"count": 1, "color": 1, "shape": 1, "attribute": 1, "relation": 0},
    ),
    "diagonal, further apart sideways": (
        "a red circle above a green square",
        drawing(("circle", RED, 6, 12, 4), ("square", GREEN, 25, 20, 4)),
        {"count": 1, "color": 1, "shape": 1, "attribute": 1, "relation": 0},
    ),
    "relation to something else": (
        "a red circle left of a green square",
        drawing(RED_CIRCLE, ("square", BLUE, 24, 16, 5)),
        {"count": 1, "color": 1 / 2, "shape": 1, "attribute": 1 / 2, "relation": 0},
    ),
    "no shape of this world": (
        "a red square",
        drawing(("bar", RED, 16, 16, 12)),
        {"count": 1, "color": 1, "shape": 0, "attribute": 0},
    ),
}


@pytest.mark.parametrize("caption, image, parts", CASES.values(), ids=CASES.keys())
def test_parts_by_hand(caption, image, parts):
    result = checked(image, caption)
    assert result.parts == pytest.approx(parts)
    assert result.soft == pytest.approx(sum(parts.values()) / len(parts))
    assert result.strict == (1 if set(parts.values()) == {1} else 0)


@pytest.mark.parametrize(
    "case, soft",
    [
        ("one wrong color", 0.75),
        ("colors swapped", 0.75),
        ("one too few", 2 / 3),
        ("wrong relation", 0.8),
        ("relation to something else", 0.6),
        ("no shape of this world", 0.5),
    ],
)
def test_soft_scores_by_hand(case, soft):
    caption, image, _ = CASES[case]
    assert checked(image, caption).soft == pytest.approx(soft)


def renderings(number: int) -> list[tuple[Image.Image, tuple]]:
    rng = np.random.default_rng(7)
    targets = all_targets()
    pictures = []
    while len(pictures) < number:
        objects, relation = targets[rng.integers(len(targets))]
        scene = place([(item["color"], item["shape"]) for item in objects for _ in range(item["count"])], rng)
        if relation is None or relation_holds(relation, *((placed.x, placed.y) for placed in scene)):
            pictures.append((render(scene, random_ground(rng)), (objects, relation)))
    return pictures


def test_renderings_are_right_and_other_captions_wrong():
    pictures = renderings(400)
    results = [check(image, *target) for image, target in pictures]
    assert all(result.strict == 1 and result.soft == 1 for result in results)
    assert min(result.fidelity for result in results) > 0.999
    others = [target for _, target in pictures[1:] + pictures[:1]]
    mismatched = [check(image, *other).strict for (image, _), other in zip(pictures, others, strict=True)]
    assert np.mean(mismatched) < 0.02


def test_a_speck_is_no_object_but_costs_fidelity():
    specked = render([PlacedShape("red", "circle", 16, 32, 18)])
    assert checked(specked, "a red circle").fidelity > 0.999
    ImageDraw.Draw(specked).rectangle((48, 48, 53, 53), fill=BLUE)
    result = checked(specked, "a red circle")
    assert result.strict == 1
    # One channel of 36 pixels is off by (235 - 13) / 255, two channels by (20 - 13) / 255; there are 12288 values.
    error = math.sqrt(36 * (222**2 + 2 * 7**2) / 255**2 / 12288)
    assert result.fidelity == pytest.approx(math.exp(-(error - 0.04) / 0.08), abs=0.01)
    assert result.fidelity < 0.93


def test_fidelity_of_a_flat_grey_by_hand():
    # No ground of this world is gray: 128/255 counts as the nearest light one, 0.90, and misses it by 0.398.
    result = checked(Image.new("RGB", (64, 64), (128, 128, 128)), "a red circle")
    assert result.fidelity == pytest.approx(math.exp(-(0.90 - 128 / 255 - 0.04) / 0.08), rel=1e-4)
    assert checked(Image.new("RGB", (64, 64), BLACK), "a red circle").fidelity == 1


def test_fidelity_falls_with_noise():
    clean = np.asarray(drawing(RED_CIRCLE, GREEN_SQUARE), dtype=np.float64)
    noise = np.random.default_rng(0).standard_normal(clean.shape)
    scores = []
    for level in (0, 20, 40, 60):
        noisy = Image.fromarray(np.clip(clean + level * noise, 0, 255).astype(np.uint8))
        scores.append(checked(noisy, "a red circle and a green square").fidelity)
    assert scores[0] > 0.99
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] < 0.3


def test_larger_pictures_are_scaled_down():
    image = drawing(RED_CIRCLE, GREEN_SQUARE)
    large = image.resize((256, 256), Image.Resampling.NEAREST)
    caption = "a red circle left of a green square"
    assert checked(large, caption) == checked(image, caption)


def test_every_picture_has_scores_between_zero_and_one():
    rng = np.random.default_rng(0)
    for size in (1, 4, 8, 64):
        for _ in range(20):
            blocks = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            image = Image.fromarray(blocks).resize((64, 64), Image.Resampling.NEAREST)
            result = checked(image, "a red circle left of a green square")
            assert all(0 <= value <= 1 for value in [*result.parts.values(), result.soft, result.fidelity])


def test_wrong_arguments_are_refused():
    image = drawing(RED_CIRCLE)
    objects, _ = parse_caption("a red circle")
    with pytest.raises(TypeError, match="PIL image, received ndarray"):
        check(np.asarray(image), objects)
    with pytest.raises(ValueError, match="empty"):
        check(image, [])
    with pytest.raises(ValueError, match="needs two objects"):
        check(image, objects, "above")


def flooded(classes: np.ndarray) -> np.ndarray:
    """The number of the first pixel of each pixel's region, from 1, spread from neighbor to neighbor; 0 for -1."""
    first = np.where(classes >= 0, np.arange(1, classes.size + 1).reshape(classes.shape), 0)
    before = None
    while before is None or (first != before).any():
        before = first.copy()
        for axis in (0, 1):
            for here, there in ((np.s_[1:], np.s_[:-1]), (np.s_[:-1], np.s_[1:])):
                one, other = (here, there) if axis == 0 else ((np.s_[:], here), (np.s_[:], there))
                joined = classes[one] == classes[other]
                first[one] = np.where(joined, np.minimum(first[one], first[other]), first[one])
    return first


SPIRAL = np.full((32, 32), -1)
for ring in range(0, 16, 2):
    SPIRAL[ring : 32 - ring, [ring, 31 - ring]] = SPIRAL[[ring, 31 - ring], ring : 32 - ring] = 0
    SPIRAL[ring + 1, ring], SPIRAL[ring + 2, ring : ring + 2] = -1, 0
COMB = np.where((np.arange(32) % 2 == 0)[None, :] | (np.arange(32) == 31)[:, None], 0, -1)


@pytest.mark.parametrize(
    "classes",
    [
        SPIRAL,
        COMB,
        np.full((32, 32), -1),
        np.zeros((32, 32), dtype=int),
        np.indices((32, 32)).sum(axis=0) % 2,
        *(np.random.default_rng(seed).integers(-1, 1 + seed, (32, 32)) for seed in range(4)),
        *(np.random.default_rng(seed).integers(-1, 3, (8, 8)).repeat(4, axis=0).repeat(4, axis=1) for seed in (4, 5)),
    ],
    ids=["spiral", "comb", "none", "one", "chequered", *(f"noise {kinds}" for kinds in range(1, 5)), "blocks", "more"],
)
def test_regions_hang_together_through_edges(classes):
    labels, areas = _connected(classes)
    # Numbered in the order of their first pixels
    found, expected = np.unique(flooded(classes), return_inverse=True)
    assert np.array_equal(labels, expected.reshape(32, 32) + (found[0] > 0))
    assert areas == [int((labels == label).sum()) for label in range(1, labels.max() + 1)]
