"""The renderer: areas, places and colors are what a scene says."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_flow.shapes import COLORS, RELATIONS, SHAPES, PlacedShape, detect, render
from trl_flow.shapes.world import COLOR_CHROMA, place, random_ground, relation_holds, render_array


@pytest.mark.parametrize("shape", SHAPES)
def test_area_and_centre_of_mass_are_those_of_the_scene(shape):
    # On black, the red channel of a red shape is 0.92 times its coverage.
    picture = render_array([PlacedShape("red", shape, 30.6, 33.6, 20.0)], ground=0.0)
    coverage = picture[:, :, 0] / 0.92
    centres = np.arange(64) + 0.5
    assert coverage.sum() == pytest.approx(20.0**2, rel=0.01)
    assert (coverage.sum(axis=0) * centres).sum() / coverage.sum() == pytest.approx(30.6, abs=0.05)
    assert (coverage.sum(axis=1) * centres).sum() / coverage.sum() == pytest.approx(33.6, abs=0.05)


def test_square_on_pixel_borders_is_exact():
    # A square of side 4 around (8, 8) covers the pixels 6 to 9 of both axes, and no part of any other.
    picture = render_array([PlacedShape("blue", "square", 8.0, 8.0, 4.0)], ground=0.05)
    expected = np.full((64, 64, 3), 0.05, dtype=np.float32)
    expected[6:10, 6:10] = COLORS["blue"]
    np.testing.assert_allclose(picture, expected, atol=1e-6)


def test_triangle_points_up():
    picture = render_array([PlacedShape("green", "triangle", 32.0, 32.0, 24.0)], ground=0.0)
    widths = (picture[:, :, 1] > 0.46).sum(axis=1)
    rows = np.flatnonzero(widths)
    # The apex is one circumradius above the centre, the base half of one below, as wide as the side.
    circumradius = 24 * math.sqrt(4 / (3 * math.sqrt(3)))
    assert rows[0] == pytest.approx(32 - circumradius, abs=1.5)
    assert rows[-1] + 1 == pytest.approx(32 + circumradius / 2, abs=1)
    assert widths[rows[-1]] == pytest.approx(circumradius * math.sqrt(3), abs=1.5)
    assert all(np.diff(widths[rows]) >= 0)


def test_later_shapes_cover_earlier_ones():
    scene = [PlacedShape("red", "square", 16, 16, 10), PlacedShape("cyan", "circle", 16, 16, 6)]
    picture = np.asarray(render(scene))
    assert tuple(picture[16, 16]) == tuple(round(255 * value) for value in COLORS["cyan"])
    assert tuple(picture[12, 12]) == tuple(round(255 * value) for value in COLORS["red"])


def test_colors_are_sixty_degrees_apart_and_equally_vivid():
    import colorsys

    assert [round(colorsys.rgb_to_hsv(*rgb)[0] * 360) for rgb in COLORS.values()] == [0, 60, 120, 180, 240, 300]
    assert all(max(rgb) - min(rgb) == pytest.approx(COLOR_CHROMA) for rgb in COLORS.values())


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), number=st.integers(1, 3))
def test_random_scenes_are_whole_and_clear_and_are_seen_as_they_are(seed, number):
    rng = np.random.default_rng(seed)
    wanted = [(list(COLORS)[rng.integers(6)], SHAPES[rng.integers(3)]) for _ in range(number)]
    scene = place(wanted, rng)
    assert [(placed.color, placed.shape) for placed in scene] == wanted
    boxes = [placed.box() for placed in scene]
    assert all(min(box) >= 0 and max(box) <= 64 for box in boxes)
    for index, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[:index]:
            assert right < other[0] or other[2] < left or bottom < other[1] or other[3] < top

    seen = detect(render(scene, random_ground(rng)))
    assert all(seen.recognized)
    by_place = sorted(seen.shapes, key=lambda placed: (placed.x, placed.y))
    for placed, found in zip(sorted(scene, key=lambda p: (p.x, p.y)), by_place, strict=True):
        assert (found.color, found.shape) == (placed.color, placed.shape)
        assert found.x == pytest.approx(placed.x, abs=0.35)
        assert found.y == pytest.approx(placed.y, abs=0.35)
        assert found.size == pytest.approx(placed.size, rel=0.05)


@given(x=st.floats(-9, 9), y=st.floats(-9, 9))
def test_at_most_one_relation_holds_and_it_turns_around(x, y):
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    held = [relation for relation in RELATIONS if relation_holds(relation, (x, y), (0.0, 0.0))]
    assert len(held) == (abs(x) != abs(y))
    assert all(relation_holds(opposite[relation], (0.0, 0.0), (x, y)) for relation in held)


def test_relations_by_hand():
    # y points downwards
    assert relation_holds("left of", (5, 10), (20, 12))
    assert relation_holds("right of", (20, 12), (5, 10))
    assert relation_holds("above", (10, 5), (12, 20))
    assert relation_holds("below", (12, 20), (10, 5))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PlacedShape("orange", "circle", 5, 5, 5), "orange"),
        (lambda: PlacedShape("red", "star", 5, 5, 5), "star"),
        (lambda: PlacedShape("red", "circle", 5, 5, 0), "positive"),
        (lambda: render([], ground=200), "200"),
    ],
)
def test_what_the_world_does_not_have_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
