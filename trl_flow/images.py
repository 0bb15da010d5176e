"""What is drawn: images, videos as lists of frames, and the one way from any mode to RGB: a picture is the same
to trainer, rewards, servers and grids."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps


# What a backbone decodes one sample to: an image, or the frames of a video in their order
Sample = Image.Image | list[Image.Image]
# The frame that stands for a video where one image is wanted
Frame = Literal["first", "middle", "last"]


# The same in a few lines, for code that knows nothing of this package
TO_RGB_CODE = """\
def to_rgb(image):  # as in training: what is transparent is white, 16 bits are scaled to 8
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value / 257 + 0.5).convert("L")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
"""


def check_mode(mode: str) -> None:
    """Raises a `ValueError` for a Pillow mode whose values have no range of their own: `I` and `F`."""
    if mode in ("I", "F"):
        raise ValueError(
            f"The image has mode {mode!r}, {'32-bit integers' if mode == 'I' else 'floats'} of which it is not known "
            "what is black and white. Scale it to 8 bits, or give 16 bits as such: "
            "Image.fromarray(np.asarray(image).astype(np.uint16)) has mode 'I;16'."
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """
    A copy of `image` in RGB, turned as its EXIF orientation says.

    16 bits (`I;16` and its kin) are scaled by 1/257, where Pillow would cut them off at 255. What is transparent shows
    white, whatever color it has under its alpha: in `RGBA`, `LA`, `PA`, a palette or a transparent color.

    Raises:
        ValueError: for the modes `I` and `F`.
    """
    check_mode(image.mode)
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        gray = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        gray[values == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(gray)
    elif image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def check_samples(samples: Sequence[Sample]) -> bool:
    """Whether the samples are videos. `TypeError` unless all are images, or all lists of at least one frame."""
    are_videos = any(isinstance(sample, list) for sample in samples)
    for i, sample in enumerate(samples):
        frames, is_video = frames_of(sample), isinstance(sample, list)
        if is_video != are_videos or not frames or not all(isinstance(frame, Image.Image) for frame in frames):
            kinds = " and ".join(dict.fromkeys(type(frame).__name__ for frame in frames)) or "nothing"
            raise TypeError(
                f"Sample {i} is {'a list of ' if is_video else ''}{kinds}, but all must be PIL images, or all videos: "
                "lists of at least one. Give list(frames) for a tuple, and Image.fromarray(frame) for each array."
            )
    return are_videos


def frames_of(sample: Sample) -> list[Image.Image]:
    """The frames of a video; of an image, itself."""
    return sample if isinstance(sample, list) else [sample]


def spread(frames: list[Image.Image], number: int) -> list[Image.Image]:
    """At most `number` of the frames, at equal distances: the first and the last among them, or one in the middle."""
    number = min(number, len(frames))
    if number == 1:
        return [frame_of(frames)]
    return [frames[round(i * (len(frames) - 1) / (number - 1))] for i in range(number)]


def frame_of(sample: Sample, frame: Frame = "middle") -> Image.Image:
    """The frame that stands for a video, of an even number the later of the two in the middle; of an image, itself."""
    frames = frames_of(sample)
    return frames[{"first": 0, "middle": len(frames) // 2, "last": -1}[frame]]
