"""The one way to RGB: `trl_flow.images`."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from trl_flow.images import TO_RGB_CODE, frame_of, frames_of, to_rgb


ROOT = Path(__file__).parents[1]
RAMP = np.linspace(0, 65535, 256).astype(np.uint16).reshape(8, 32)  # every 257th value


def cut_out(under_alpha):
    """A red square on nothing, which has the color `under_alpha`."""
    pixels = np.full((8, 8, 4), (*under_alpha, 0), dtype=np.uint8)
    pixels[2:6, 2:6] = (200, 30, 30, 255)
    return Image.fromarray(pixels)


def palette_with_transparency():
    image = Image.new("P", (4, 1))
    image.putpalette([0, 0, 0, 200, 30, 30])
    image.putdata([0, 1, 0, 1])
    image.info["transparency"] = 0
    return image


def transparent_color(mode, color, transparent):
    image = Image.new(mode, (1, 1), color)
    image.info["transparency"] = transparent
    return image


def stock(image):
    """As the code in a model card does it."""
    scope = {"Image": Image}
    exec(TO_RGB_CODE, scope)
    return scope["to_rgb"](image)


@pytest.mark.parametrize("convert", [to_rgb, stock])
@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_16_bits_are_scaled(dtype, convert):
    image = Image.fromarray(RAMP.astype(dtype))
    assert image.mode.startswith("I;16")
    assert np.array_equal(np.asarray(convert(image))[..., 0].ravel(), np.arange(256))
    # to the nearest: 257 * 100 + 128 is below a half, one more is above
    between = Image.fromarray(np.array([[25828, 25829]], dtype=dtype))
    assert np.asarray(convert(between))[0, :, 1].tolist() == [100, 101]


def test_the_cards_code_scales_16_bits_that_older_releases_of_pillow_open_as_32():
    image = Image.fromarray(RAMP)
    assert stock(image.convert("I")).tobytes() == to_rgb(image).tobytes()


@pytest.mark.parametrize("convert", [to_rgb, stock])
def test_what_is_transparent_is_white_whatever_is_under_it(convert):
    black, green = convert(cut_out((0, 0, 0))), convert(cut_out((0, 255, 0)))
    assert black.tobytes() == green.tobytes()
    assert black.getpixel((0, 0)) == (255, 255, 255) and black.getpixel((3, 3)) == (200, 30, 30)
    half = Image.new("LA", (1, 1), (0, 128))
    assert convert(half).getpixel((0, 0)) == (127, 127, 127)
    assert list(convert(palette_with_transparency()).get_flattened_data()) == [(255,) * 3, (200, 30, 30)] * 2
    assert convert(transparent_color("RGB", (1, 2, 3), (1, 2, 3))).getpixel((0, 0)) == (255, 255, 255)
    assert convert(transparent_color("RGB", (1, 2, 3), (1, 2, 4))).getpixel((0, 0)) == (1, 2, 3)


def test_other_kinds_of_transparency():
    assert to_rgb(Image.new("PA", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("La", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("RGBa", (1, 1), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(transparent_color("I;16", 300, 300)).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(transparent_color("I;16", 301, 300)).getpixel((0, 0)) == (1, 1, 1)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_opaque_images_are_as_pillow_converts_them(mode):
    colors = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(colors).convert(mode)
    assert to_rgb(image).tobytes() == image.convert("RGB").tobytes() == stock(image).tobytes()
    assert to_rgb(image) is not image


def test_the_cards_code_scales_16_bits_alike():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert stock(Image.fromarray(values)).tobytes() == to_rgb(Image.fromarray(values)).tobytes()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_a_range_are_refused(mode):
    with pytest.raises(ValueError, match=rf"mode '{mode}'.*np.uint16"):
        to_rgb(Image.new(mode, (1, 1)))


def test_a_photo_is_turned_as_the_camera_was(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (24, 8)).save(tmp_path / "lying.jpg", exif=exif)
    turned = to_rgb(Image.open(tmp_path / "lying.jpg"))
    assert turned.size == (8, 24)
    assert to_rgb(turned).size == (8, 24)  # once is enough


def test_there_is_no_other_way_to_rgb():
    files = [*ROOT.glob("trl_flow/**/*.py"), *ROOT.glob("examples/**/*.py")]
    pattern = re.compile(r"""\.convert\(\s*(?:mode=)?["']RGB["']""")
    assert [file.name for file in files if pattern.search(file.read_text(encoding="utf-8"))] == ["images.py"]


def test_a_frame_stands_for_a_video_and_an_image_for_itself():
    frames = [Image.new("RGB", (2, 2), (value, 0, 0)) for value in range(5)]
    assert [frame_of(frames, which) for which in ("first", "middle", "last")] == [frames[0], frames[2], frames[4]]
    assert frame_of(frames[:4]) is frames[2] and frames_of(frames) is frames
    assert frame_of(frames[1], "last") is frames[1] and frames_of(frames[1]) == [frames[1]]
