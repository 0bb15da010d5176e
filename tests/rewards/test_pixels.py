"""Pixels are those of the authors' programs."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_reward_models import MEAN, STD, cropped_pixels, picture
from transformers import CLIPImageProcessorPil

from trl_flow.rewards.pixels import fill_and_crop, fit_and_pad


def flat(width, height, level=255):
    return Image.new("RGB", (width, height), (level,) * 3)


def restored(pixels):
    """Before the normalization, `(3, H, W)`."""
    return pixels * STD + MEAN


def test_normalization_is_clips():
    pixels = fill_and_crop(Image.new("RGB", (4, 4), (255, 0, 51)), 2)
    # (1 - 0.48145466) / 0.26862954, (0 - 0.4578275) / 0.26130258, (0.2 - 0.40821073) / 0.27577711
    assert pixels.mean(dim=(1, 2)).tolist() == pytest.approx([1.930336, -1.752097, -0.754996], abs=1e-5)


@pytest.mark.parametrize("size", [(28, 28), (56, 56), (40, 31), (33, 90), (28, 40), (64, 28), (10, 7)])
def test_filling_and_cropping_is_what_clips_processor_does_where_the_margins_are_even(size):
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    image = picture(0, *size)
    ours = fill_and_crop(image, 28)
    width, height = (28 * side // min(size) for side in size)
    if (width - 28) % 2 == 0 and (height - 28) % 2 == 0:
        theirs = processor(images=[image], return_tensors="pt")["pixel_values"][0]
        # A level of 255 is 0.015
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert ours.shape == (3, 28, 28)
    assert torch.allclose(restored(ours).clamp(0, 1), restored(ours), atol=1e-6)


@pytest.mark.parametrize("extra, left", [(1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3), (7, 4)])
def test_uneven_margins_are_rounded_to_even_as_torchvision_does(extra, left):
    # Columns count up from 0, so that the first one that is kept tells its place
    columns = np.broadcast_to(np.arange(8 + extra, dtype=np.uint8)[None, :, None], (8, 8 + extra, 3))
    pixels = fill_and_crop(Image.fromarray(columns.copy()), 8)
    assert (restored(pixels)[0, 0] * 255).round().tolist() == list(range(left, left + 8))


def test_fitting_keeps_the_whole_picture_between_black_bands():
    pixels = restored(fit_and_pad(flat(40, 20), 28))
    # 28 x 14, with 7 rows of black above and below
    assert torch.allclose(pixels[:, 7:21], torch.ones(3, 14, 28), atol=1e-5)
    assert torch.allclose(pixels[:, :7], torch.zeros(3, 7, 28), atol=1e-6)
    assert torch.allclose(pixels[:, 21:], torch.zeros(3, 7, 28), atol=1e-6)
    # An odd rest is at the right and the bottom: 28 x 25 has one row above and two below
    rows = restored(fit_and_pad(flat(28, 25), 28))[0, :, 0]
    assert rows.round().tolist() == [0] + [1] * 25 + [0] * 2
    columns = restored(fit_and_pad(flat(25, 28), 28))[0, 0]
    assert columns.round().tolist() == [0] + [1] * 25 + [0] * 2


def test_fitting_does_not_touch_pixels_that_fit():
    image = picture(0, 28, 28)
    expected = torch.tensor(np.array(image)).permute(2, 0, 1) / 255
    assert torch.allclose(restored(fit_and_pad(image, 28)), expected, atol=1e-6)


def test_shrinking_averages_instead_of_skipping_pixels():
    # One white column in four becomes a quarter of grey; a filter of two columns would see it or miss it
    stripes = np.zeros((112, 112, 3), dtype=np.uint8)
    stripes[:, 1::4] = 255
    for transform in (fit_and_pad, fill_and_crop):
        pixels = restored(transform(Image.fromarray(stripes), 28))[:, 4:-4, 4:-4]
        assert pixels.sub(0.25).abs().max() < 0.1


def test_fitting_overshoots_at_edges_where_pillow_would_cut():
    edge = np.zeros((28, 14, 3), dtype=np.uint8)
    edge[:, 7:] = 255
    image = Image.fromarray(edge).resize((14, 14))
    assert restored(fit_and_pad(image, 28)).max() > 1.01
    assert restored(fill_and_crop(image, 28)).max() <= 1 + 1e-6


def test_the_references_crop_agrees():
    for size in [(28, 28), (40, 40), (33, 90), (90, 33)]:
        assert torch.allclose(cropped_pixels(picture(0, *size)), fill_and_crop(picture(0, *size), 28), atol=1e-6)
