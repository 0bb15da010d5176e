"""Scenes of colored shapes on a plain ground, and their anti-aliased images.

An image is 64 x 64 pixels and shows one to three shapes. Positions and sizes are in pixels, with x to the right and y
downwards; the center of the top left pixel is at (0.5, 0.5). The size of a shape is the square root of its area, so
that shapes of equal size cover equally many pixels, and its position is its center of mass.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from PIL import Image


IMAGE_SIZE = 64
"""Width and height of the images, in pixels."""
CENTERS = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.92, 0.08, 0.08), "yellow": (0.92, 0.92, 0.08), "green": (0.08, 0.92, 0.08),
    "cyan": (0.08, 0.92, 0.92), "blue": (0.08, 0.08, 0.92), "magenta": (0.92, 0.08, 0.92),
}  # fmt: skip
"""Six hues, 60 degrees apart, all with the same chroma (largest minus smallest channel). RGB from 0 to 1."""
COLOR_CHROMA = 0.84
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
"""The shapes of the world."""
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
"""The relations of a first object to a second."""
# A ground is gray; each of the two kinds is a range of lightness.
DARK_GROUND = (0.02, 0.10)
LIGHT_GROUND = (0.90, 0.98)

# Ratios of a shape's own measure to the square root of its area.
_CIRCLE_RADIUS, _SQUARE_HALF_SIDE = 1 / math.sqrt(math.pi), 0.5
_TRIANGLE_CIRCUMRADIUS = math.sqrt(4 / (3 * math.sqrt(3)))
# Distances from the center of mass to the bounding box, in sizes: left and right, up, down.
_EXTENTS = {
    "circle": (_CIRCLE_RADIUS,) * 3,
    "square": (_SQUARE_HALF_SIDE,) * 3,
    "triangle": (_TRIANGLE_CIRCUMRADIUS * math.sqrt(3) / 2, _TRIANGLE_CIRCUMRADIUS, _TRIANGLE_CIRCUMRADIUS / 2),
}
# Of a random scene: the range of sizes by the number of shapes, the space between and around them
_SIZES, _GAP, _MARGIN = {1: (17.0, 26.0), 2: (16.0, 23.0), 3: (14.5, 19.5)}, 4.0, 2.0


@dataclass(frozen=True)
class PlacedShape:
    """One shape in a scene, in pixels: a key of `COLORS`, one of `SHAPES` (squares are upright, triangles equilateral
    with a point up), the center of mass from the left and the top edge, and the square root of the area.

    Example:

    ```pycon
    >>> from trl_flow.shapes import SHAPES, PlacedShape
    >>> row = [PlacedShape("blue", shape, x=12 + 20 * i, y=32, size=16) for i, shape in enumerate(SHAPES)]
    >>> row[0].shape, row[1].box()
    ('circle', (24.0, 24.0, 40.0, 40.0))
    ```
    """

    color: str
    shape: str
    x: float
    y: float
    size: float

    def __post_init__(self) -> None:
        if self.color not in COLORS:
            raise ValueError(f"unknown color {self.color!r}; the world has {', '.join(COLORS)}")
        if self.shape not in SHAPES:
            raise ValueError(f"unknown shape {self.shape!r}; the world has {', '.join(SHAPES)}")
        if not self.size > 0:
            raise ValueError(f"the size of a shape must be positive, received {self.size!r}")

    def box(self) -> tuple[float, float, float, float]:
        """Bounding box as (left, top, right, bottom), in pixels."""
        sideways, up, down = (extent * self.size for extent in _EXTENTS[self.shape])
        return self.x - sideways, self.y - up, self.x + sideways, self.y + down


def signed_distance(shape: str, dx: np.ndarray, dy: np.ndarray, size: float) -> np.ndarray:
    """Distance to the outline of a shape of area `size ** 2`: negative inside, and a lower bound of the distance at
    its corners. `dx` and `dy` are positions relative to the center of mass, y downwards."""
    if shape == "circle":
        return np.hypot(dx, dy) - _CIRCLE_RADIUS * size
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - _SQUARE_HALF_SIDE * size
    inradius = _TRIANGLE_CIRCUMRADIUS * size / 2
    return np.maximum(dy, np.abs(dx) * (math.sqrt(3) / 2) - dy / 2) - inradius


def render_array(shapes: Sequence[PlacedShape], ground: float) -> np.ndarray:
    """Image of a scene, anti-aliased, later shapes over earlier ones: float32, (64, 64, 3), from 0 to 1, as `ground`
    is."""
    if not 0 <= ground <= 1:
        raise ValueError(f"`ground` is a gray level from 0 (black) to 1 (white), received {ground!r}")
    array = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), ground, dtype=np.float32)
    for placed in shapes:
        dx, dy = CENTERS[None, :] - placed.x, CENTERS[:, None] - placed.y
        distance = signed_distance(placed.shape, dx, dy, placed.size)
        coverage = np.clip(0.5 - distance, 0, 1)[:, :, None]
        array += coverage * (np.asarray(COLORS[placed.color], dtype=np.float32) - array)
    return array


def render(shapes: Sequence[PlacedShape], ground: float = 0.05) -> Image.Image:
    """A scene as an 8 bit RGB image of 64 x 64 pixels: the shapes, which may be none, later ones over earlier ones, on
    a ground of the gray level `ground`; `ValueError` when that is outside 0 (black) to 1 (white).

    Example:

    ```pycon
    >>> from trl_flow.shapes import PlacedShape, render
    >>> image = render([PlacedShape("red", "circle", x=32, y=32, size=20)], ground=0.05)
    >>> image.getpixel((32, 32))
    (235, 20, 20)
    ```
    """
    return Image.fromarray(np.round(render_array(shapes, ground) * 255).astype(np.uint8))


def relation_holds(relation: str, first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Whether one center (x, y), y downwards, lies left of, right of, above or below another. The four relations
    exclude each other: the direction in which the centers lie further apart decides."""
    dx, dy = first[0] - second[0], first[1] - second[1]
    holds = (dx < -abs(dy), dx > abs(dy), dy < -abs(dx), dy > abs(dx))
    return holds[RELATIONS.index(relation)]


def random_ground(rng: np.random.Generator) -> float:
    """Gray level of a ground, near black or near white with equal chances."""
    return float(rng.uniform(*(DARK_GROUND if rng.random() < 0.5 else LIGHT_GROUND)))


def place(wanted: Sequence[tuple[str, str]], rng: np.random.Generator) -> list[PlacedShape]:
    """Random positions and sizes for one to three shapes `(color, shape)`, whole in the image and clear of each
    other."""
    low, high = _SIZES[len(wanted)]
    extents = np.array([_EXTENTS[shape] for _, shape in wanted])
    while True:
        # Many draws at once: few of three shapes are clear of each other
        sizes = rng.uniform(low, high, (64, len(wanted)))
        sideways, up, down = (extent * sizes for extent in extents.T)
        x, y = (
            rng.uniform(before + _MARGIN, IMAGE_SIZE - _MARGIN - after)
            for before, after in ((sideways, sideways), (up, down))
        )
        clear = np.ones(len(sizes), dtype=bool)
        for one, other in combinations(range(len(wanted)), 2):
            beside = np.abs(x[:, one] - x[:, other]) - sideways[:, one] - sideways[:, other]
            tops, bottoms = y - up, y + down
            above = np.maximum(tops[:, one] - bottoms[:, other], tops[:, other] - bottoms[:, one])
            clear &= np.maximum(beside, above) >= _GAP
        if clear.any():
            found = zip(x[clear][0], y[clear][0], sizes[clear][0], strict=True)
            return [PlacedShape(*what, *map(float, where)) for what, where in zip(wanted, found, strict=True)]
