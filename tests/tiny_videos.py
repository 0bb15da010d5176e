"""Videos that a person can see something in: a square that moves over a ground of another color."""

import numpy as np
from PIL import Image


COLORS = {"red": (200, 40, 40), "blue": (40, 70, 200), "green": (40, 160, 70), "yellow": (220, 190, 40)}


def moving_square(
    color: str = "red", frames: int = 9, size: tuple[int, int] = (48, 32), ground: str | int = "white", step: int = 4
) -> list[Image.Image]:
    """A square of a third of the height that goes `step` pixels to the right in each frame, and round the edge."""
    width, height = size
    side = height // 3
    video = []
    for number in range(frames):
        frame = Image.new("RGB", size, COLORS.get(ground, ground) if isinstance(ground, str) else (ground,) * 3)
        pixels = np.asarray(frame).copy()
        columns = (np.arange(side) + 2 + step * number) % width
        pixels[side : 2 * side, columns] = COLORS[color]
        video.append(Image.fromarray(pixels))
    return video


def gray(*values: int, size: tuple[int, int] = (8, 8)) -> list[Image.Image]:
    """A video of one-colored frames."""
    return [Image.new("RGB", size, (value,) * 3) for value in values]
