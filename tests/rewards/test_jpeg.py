"""The JPEG rewards are the sizes of the files that Pillow writes."""

import numpy as np
import pytest
from PIL import Image

from trl_flow.rewards import JPEGCompressibilityReward, JPEGIncompressibilityReward
from trl_flow.rewards.checks import reward_name


def noise(size=64):
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ramp(size=64):
    row = np.linspace(0, 255, size).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(row[None, :, None], (size, size, 3)).copy())


def flat(size=64):
    return Image.new("RGB", (size, size), "red")


def kilobytes_on_disk(image, folder, quality):
    path = folder / "image.jpg"
    image.save(path, quality=quality)
    return path.stat().st_size / 1000


@pytest.mark.parametrize("quality", [95, 30])
def test_rewards_are_plus_and_minus_the_size_of_the_file_on_disk(tmp_path, quality):
    images = [noise(), ramp(), flat()]
    sizes = [kilobytes_on_disk(image, tmp_path, quality) for image in images]
    assert sizes[0] > sizes[1] > sizes[2] > 0
    prompts = [""] * 3
    assert JPEGIncompressibilityReward(quality=quality)(prompts=prompts, images=images) == sizes
    assert JPEGCompressibilityReward(quality=quality)(prompts=prompts, images=images) == [-size for size in sizes]


def test_default_quality_is_that_of_ddpo(tmp_path):
    assert JPEGIncompressibilityReward()(prompts=[""], images=[noise()]) == [kilobytes_on_disk(noise(), tmp_path, 95)]


def test_offset_shifts_compressibility_and_can_make_it_positive():
    images = [noise(), flat()]
    plain = JPEGCompressibilityReward()([""] * 2, images)
    shifted = JPEGCompressibilityReward(offset=20.0)([""] * 2, images)
    assert max(plain) < 0 < min(shifted)
    assert shifted == [20.0 + reward for reward in plain]


def test_sizes_are_in_the_range_that_the_docstrings_give():
    reward = JPEGIncompressibilityReward()
    smallest, large_noise = reward([""] * 2, [flat(1), noise(256)])
    assert smallest == pytest.approx(0.63, abs=0.05)
    assert large_noise / (256 * 256 / 1000) == pytest.approx(1.2, abs=0.1)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
def test_images_of_other_modes_are_judged_as_rgb_and_left_as_they_were(mode):
    image = ramp().convert(mode)
    before = image.copy()
    reward = JPEGIncompressibilityReward()
    assert reward([""], [image]) == reward([""], [before.convert("RGB")])
    assert image.mode == mode and image.tobytes() == before.tobytes()


@pytest.mark.parametrize("cls", [JPEGCompressibilityReward, JPEGIncompressibilityReward])
@pytest.mark.parametrize("quality", [0, 101, 95.5, True])
def test_a_quality_that_jpeg_does_not_have_is_refused(cls, quality):
    with pytest.raises(ValueError, match=f"quality={quality} .* from 1 to 100"):
        cls(quality=quality)


def test_names_in_metrics():
    assert reward_name(JPEGCompressibilityReward()) == "jpeg_compressibility"
    assert reward_name(JPEGIncompressibilityReward()) == "jpeg_incompressibility"
