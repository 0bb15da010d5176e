"""Distances of images that can be worked out by hand."""

import numpy as np
import pytest
from PIL import Image

from trl_flow.evaluation.diversity import diversity, mean_pairwise_distance, thumbnails


def plain(value: int, size: int = 16) -> Image.Image:
    return Image.new("RGB", (size, size), (value, value, value))


def test_equal_images_have_none_and_opposite_ones_all():
    assert diversity([plain(90), plain(90)], 2) == 0.0
    assert diversity([plain(0), plain(255)], 2) == pytest.approx(1.0)


def test_the_root_mean_square_of_the_pixels():
    # one channel of three differs by 255: sqrt(1/3)
    red, black = Image.new("RGB", (16, 16), (255, 0, 0)), plain(0)
    assert diversity([red, black], 2) == pytest.approx((1 / 3) ** 0.5)


def test_the_mean_over_pairs_then_over_prompts():
    # pairs 51, 102 and 153 of 255; a second prompt without any
    images = [plain(0), plain(51), plain(153), plain(7), plain(7), plain(7)]
    assert diversity(images, 3) == pytest.approx((0.2 + 0.4 + 0.6) / 3 / 2)
    # images of different prompts are not compared
    assert diversity([plain(0), plain(0), plain(255), plain(255)], 2) == 0.0


def test_layout_counts_and_grain_does_not():
    rng = np.random.default_rng(0)

    def noise():
        return Image.fromarray(rng.integers(0, 256, size=(512, 512, 3), dtype=np.uint8))

    left, right = (np.zeros((512, 512, 3), dtype=np.uint8) for _ in range(2))
    left[:, :256], right[:, 256:] = 255, 255
    # uniform noise has a standard deviation of 74; 256 pixels to one: a sixteenth, and sqrt(2) for a difference
    assert diversity([noise(), noise()], 2) == pytest.approx(2**0.5 * 73.9 / 16 / 255, rel=0.05)
    assert diversity([Image.fromarray(left), Image.fromarray(right)], 2) == pytest.approx(1.0)


def test_any_mode_and_size():
    images = [Image.new("L", (40, 20), 0), Image.new("RGBA", (64, 64), (255, 255, 255, 10))]
    assert thumbnails(images).shape == (2, 3072)
    assert diversity(images, 2) == pytest.approx(1.0)


def test_features_of_ones_own():
    def embed(images):
        return [[3.0, 0.0], [0.0, 4.0]]

    assert diversity([plain(0), plain(0)], 2, embed=embed) == 5.0
    with pytest.raises(ValueError, match=r"shape \(2, 2\) for 4 images"):
        diversity([plain(0)] * 4, 2, embed=embed)


@pytest.mark.parametrize("size", [1, 3, 0])
def test_a_group_that_has_no_pairs_or_does_not_fit_is_refused(size):
    with pytest.raises(ValueError, match=f"group size is {size} for 4"):
        mean_pairwise_distance(np.zeros((4, 2)), size)
