"""Videos in files: frames as they were drawn, and mp4 to look at."""

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageSequence

from trl_flow.images import to_rgb
from trl_flow.rewards.base import require


# From 0 to 10, as in diffusers, whose default is 5: the eye should not see the codec
_QUALITY = 7


def require_mp4() -> None:
    """Raises an `ImportError` that names the extra if mp4 files cannot be written and read."""
    require("imageio_ffmpeg", "imageio", reward="mp4", extra="video")


def write_mp4(path: str | os.PathLike, frames: Sequence[Image.Image], frames_per_second: float) -> None:
    """Writes an mp4 file (H.264), whole or not at all. Sizes that are odd grow by a pixel, which the codec needs.
    `ImportError` without the extra `video`."""
    from diffusers.utils import export_to_video

    require_mp4()
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.mp4")
    options = {"fps": frames_per_second, "quality": _QUALITY, "macro_block_size": 2}
    try:
        export_to_video([to_rgb(frame) for frame in frames], str(temporary), **options)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_mp4(path: str | os.PathLike) -> list[Image.Image]:
    """The frames of a video file, RGB: those that were written up to the codec's loss. `OSError` if it is damaged or
    missing, `ImportError` without the extra `video`."""
    require_mp4()
    import imageio.v3 as iio

    return [Image.fromarray(frame) for frame in iio.imiter(path, plugin="FFMPEG")]


def write_frames(file, frames: Sequence[Image.Image]) -> None:
    """Writes frames into one PNG file without loss: an animated one, the first frame to programs that know none."""
    copies = [to_rgb(frame) for frame in frames]
    for frame in copies:
        frame.info.clear()  # frames that are alike are merged if they have durations
    copies[0].save(file, format="PNG", save_all=True, append_images=copies[1:], compress_level=1)


def read_frames(image: Image.Image) -> list[Image.Image]:
    """The frames of an opened image file, RGB."""
    return [to_rgb(frame) for frame in ImageSequence.Iterator(image)]
