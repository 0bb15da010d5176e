"""Rule-based checker of images of the world, in the manner of GenEval (Ghosh et al., 2023, arXiv:2310.11513).

The image is segmented by hue, split into connected components, and each component is compared with a circle, a
square and a triangle at about twice the image's resolution. What was detected is then held against the target.
An image takes about a millisecond.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image
from scipy import ndimage

from trl_flow.images import to_rgb
from trl_flow.shapes.world import (
    CENTERS,
    COLOR_CHROMA,
    COLORS,
    DARK_GROUND,
    IMAGE_SIZE,
    LIGHT_GROUND,
    RELATIONS,
    SHAPES,
    PlacedShape,
    relation_holds,
    render_array,
    signed_distance,
)


# A pixel belongs to a shape when its chroma is at least half of a pure color's, that is when the shape covers half of
# it. Components below the smallest area are specks: they do not count as objects, and fidelity pays for them.
_CHROMA_THRESHOLD, _MIN_PIXELS, _MIN_OVERLAP = 0.5 * COLOR_CHROMA, 48, 0.75

# Templates live on a grid of positions relative to the center of mass, in units of the square root of the area. With
# the usual sizes of 16 to 24 pixels one grid step is about half a pixel.
_GRID = (np.arange(72, dtype=np.float32) + 0.5) / 36 - 1
_TEMPLATES = np.stack([signed_distance(shape, _GRID[None, :], _GRID[:, None], 1.0) < 0 for shape in SHAPES])
_TEMPLATE_AREAS = _TEMPLATES.sum(axis=(1, 2))

# Fidelity: this much root mean square error is free (8 bit rounding and the autoencoder), then an exponential fall.
_FREE_ERROR, _ERROR_SCALE = 0.04, 0.08


@dataclass(frozen=True)
class Detection:
    """What the checker sees: the `shapes`, each as the best fitting one; whether each is `recognized`, that is
    overlaps that shape by at least 0.75 (intersection over union); and the gray level of the `ground`, moved into the
    nearest range that the world uses.

    Example:

    ```pycon
    >>> from trl_flow.shapes import Detection, PlacedShape, detect, render
    >>> seen: Detection = detect(render([PlacedShape("red", "circle", x=32, y=32, size=20)], ground=0.95))
    >>> seen.recognized, round(seen.ground, 2)
    ((True,), 0.95)
    ```
    """

    shapes: tuple[PlacedShape, ...]
    recognized: tuple[bool, ...]
    ground: float


@dataclass(frozen=True)
class CheckResult:
    """
    Scores of one image, all from 0 to 1. With `n` objects detected and `N` asked for, every part is divided by the
    larger of the two, so that missing and surplus objects both cost.

    Attributes:
        soft (`float`): mean of the parts.
        strict (`float`): 1 when every part is 1, else 0.
        fidelity (`float`): closeness of the image to a clean rendering of what was detected in it,
            `exp(-max(0, rmse - 0.04) / 0.08)`. It does not look at the target: an empty ground has fidelity 1.
        count (`float`): part, `min(n, N) / max(n, N)`.
        color, shape (`float`): parts, number of colors and of shapes in common (as multisets) over `max(n, N)`.
        attribute (`float`): part, the same for (color, shape) pairs: is each shape in its own color?
        relation (`float` or `None`): part, 1 when some first object stands in it to some second; `None` without one.
        detection (`Detection`): what was seen.

    Example:

    ```pycon
    >>> from trl_flow.shapes import CheckResult, PlacedShape, check, parse_caption, render
    >>> image = render([PlacedShape("red", "circle", x=32, y=32, size=20)])
    >>> result: CheckResult = check(image, *parse_caption("two red circles"))
    >>> result.count, result.color, result.strict
    (0.5, 0.5, 0.0)
    ```
    """

    soft: float
    strict: float
    fidelity: float
    count: float
    color: float
    shape: float
    attribute: float
    relation: float | None
    detection: Detection

    @property
    def parts(self) -> dict[str, float]:
        """The parts that `soft` is the mean of, by name."""
        names = ("count", "color", "shape", "attribute", "relation")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def check(image: Image.Image, objects: Sequence[dict], relation: str | None = None) -> CheckResult:
    """
    Score an image against a target.

    Args:
        image (`PIL.Image.Image`): an image; one of another size than 64 x 64 is resized first.
        objects (sequence of `dict`): what is asked for (`count`, `color` and `shape`), as from [`parse_caption`].
        relation (`str`, *optional*): one of `RELATIONS`, of the first to the second entry of `objects`.

    Raises:
        TypeError: when `image` is not a PIL image.
        ValueError: when `objects` is empty, or a relation is asked for without two objects.

    Example:

    ```pycon
    >>> from trl_flow.shapes import PlacedShape, check, parse_caption, render
    >>> image = render([PlacedShape("red", "circle", x=32, y=32, size=20)])
    >>> check(image, *parse_caption("a red circle")).strict
    1.0
    >>> check(image, *parse_caption("a red square")).parts
    {'count': 1.0, 'color': 1.0, 'shape': 0.0, 'attribute': 0.0}
    ```
    """
    if not objects:
        raise ValueError("`objects` is empty: there is nothing to check the image against")
    if relation is not None and (relation not in RELATIONS or len(objects) < 2):
        words = f"a relation is one of {', '.join(RELATIONS)} and needs two objects"
        raise ValueError(f"{words}, received {relation!r} and {objects}")
    array = _as_array(image)
    seen = _detect(array)

    wanted = [(item["color"], item["shape"]) for item in objects for _ in range(item["count"])]
    found = [(p.color, p.shape if known else None) for p, known in zip(seen.shapes, seen.recognized, strict=True)]
    most = max(len(wanted), len(found))
    parts = {
        "count": min(len(wanted), len(found)) / most,
        "color": _common((color for color, _ in wanted), (color for color, _ in found)) / most,
        "shape": _common((shape for _, shape in wanted), (shape for _, shape in found)) / most,
        "attribute": _common(wanted, found) / most,
    }
    if relation is not None:
        seen_as = [((p.x, p.y), what) for p, what in zip(seen.shapes, found, strict=True)]
        firsts = [place for place, what in seen_as if what == wanted[0]]
        seconds = [place for place, what in seen_as if what == wanted[objects[0]["count"]]]
        # No object stands in a relation to itself
        parts["relation"] = float(any(relation_holds(relation, *pair) for pair in product(firsts, seconds)))

    error = np.sqrt(np.mean((array - render_array(seen.shapes, seen.ground)) ** 2))
    return CheckResult(
        soft=sum(parts.values()) / len(parts),
        strict=float(all(part == 1 for part in parts.values())),
        fidelity=float(np.exp(-max(0.0, error - _FREE_ERROR) / _ERROR_SCALE)),
        relation=parts.pop("relation", None),
        detection=seen,
        **parts,
    )


def detect(image: Image.Image) -> Detection:
    """Find the colored shapes in an image; the argument is as for [`check`].

    Example:

    ```pycon
    >>> from trl_flow.shapes import PlacedShape, detect, render
    >>> seen = detect(render([PlacedShape("red", "circle", x=32, y=32, size=20)]))
    >>> [(shape.color, shape.shape) for shape in seen.shapes]
    [('red', 'circle')]
    ```
    """
    return _detect(_as_array(image))


def _as_array(image: Image.Image) -> np.ndarray:
    if not isinstance(image, Image.Image):
        raise TypeError(f"the checker takes a PIL image, received {type(image).__name__}")
    image = to_rgb(image).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32) / 255


def _common(wanted: Iterable, found: Iterable) -> int:
    return (Counter(wanted) & Counter(found)).total()


def _detect(array: np.ndarray) -> Detection:
    # Channel by channel: numpy is ten times slower along an axis of three
    red, green, blue = np.ascontiguousarray(array.transpose(2, 0, 1))
    largest = np.maximum(np.maximum(red, green), blue)
    chroma = largest - np.minimum(np.minimum(red, green), blue)
    colored = chroma >= _CHROMA_THRESHOLD
    # The nearest of the six hues: each third of their circle belongs to the channel that is largest
    scale = np.maximum(chroma, 1e-6)
    thirds = [(green - blue) / scale, 2 + (blue - red) / scale, 4 + (red - green) / scale]
    hues = np.select([largest == red, largest == green], thirds[:2], thirds[2]).round().astype(np.int64) % 6
    labels, areas = _connected(np.where(colored, hues, -1))
    coverage = np.minimum(chroma / COLOR_CHROMA, 1)

    shapes, recognized, names = [], [], list(COLORS)
    for label, area in enumerate(areas, start=1):
        if area < _MIN_PIXELS:
            continue
        own = labels == label
        # A shape's anti-aliased edge lies in the eight neighbors of its pixels
        grown = ndimage.binary_dilation(own, np.ones((3, 3)))
        shape, overlap, *place = _fit(np.where(grown & (own | ~colored), coverage, 0))
        shapes.append(PlacedShape(names[hues[own][0]], shape, *place))
        recognized.append(bool(overlap >= _MIN_OVERLAP))

    plain = largest[chroma < 0.2]
    level = float(np.median(plain)) if plain.size else 0.0
    low, high = DARK_GROUND if level < 0.5 else LIGHT_GROUND
    return Detection(tuple(shapes), tuple(recognized), min(max(level, low), high))


def _connected(classes: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Labels (64, 64) of the regions of equal class that hang together through pixel edges, from 1 on in the order of
    their first pixels, and 0 where the class is -1; and the number of pixels of each label."""
    regions = np.zeros(classes.shape, dtype=np.int64)
    for kind in np.unique(classes[classes >= 0]):
        own, _ = ndimage.label(classes == kind)
        regions += np.where(own, own + regions.max(), 0)
    found, first, areas = np.unique(regions[regions > 0], return_index=True, return_counts=True)
    order = np.argsort(first)
    numbers = np.zeros(len(found) + 1, dtype=np.int64)
    numbers[found[order]] = np.arange(len(found)) + 1
    return numbers[regions], areas[order].tolist()


def _fit(coverage: np.ndarray) -> tuple[str, float, float, float, float]:
    """Best fitting shape, its overlap (intersection over union), center of mass x and y, and size."""
    area = float(coverage.sum())
    x, y = (float((coverage.sum(axis=axis) * CENTERS).sum()) / area for axis in (0, 1))
    size = area**0.5

    columns, rows = x - 0.5 + _GRID * size, y - 0.5 + _GRID * size
    region = _interpolation(rows) @ coverage @ _interpolation(columns).T >= 0.5
    shared = (_TEMPLATES & region).sum(axis=(1, 2))
    overlaps = shared / (_TEMPLATE_AREAS + region.sum() - shared)
    best = int(overlaps.argmax())
    return SHAPES[best], float(overlaps[best]), x, y, size


def _interpolation(positions: np.ndarray) -> np.ndarray:
    """Weights (72, 64) that interpolate pixel values linearly at the positions; nothing lies outside the image."""
    return np.maximum(0, 1 - np.abs(positions[:, None] - (CENTERS - 0.5)[None, :]))
