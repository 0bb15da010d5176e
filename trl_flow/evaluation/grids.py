"""Grids of images with captions that a person can read."""

import functools
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont, ImageOps


# Images below this many pixels a side are enlarged: in a 32-pixel cell nobody sees anything, or reads a caption
_SMALLEST_SIDE = 128
_FONT_SIZE = 11
_LINE_HEIGHT = 15
_MARGIN = 6
_MOST_LINES = 8
# Of the names beside the rows, at most
_NAME_WIDTH = 140
_PAPER, _INK = "white", "black"


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    # DejaVu, which matplotlib brings along, has Greek, Cyrillic and many symbols; Pillow's own font has few of them.
    # All letters of this one have the same width
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf"), _FONT_SIZE)


def _wrap(text: str, width: int, most_lines: int = _MOST_LINES) -> list[str]:
    """`text` in lines of at most `width` pixels; what is beyond `most_lines` is replaced by an ellipsis."""
    columns = max(1, int(width / _font().getlength("x")))
    # As much as can be shown, before the words of what is far longer are looked at
    paragraphs = text[: (columns + 1) * (most_lines + 1)].splitlines()
    lines = [line for paragraph in paragraphs for line in textwrap.wrap(paragraph, columns) or [""]]
    if len(lines) > most_lines:
        lines = [*lines[: most_lines - 1], lines[most_lines - 1][: columns - 1] + "…"]
    return lines


def _write_lines(draw: ImageDraw.ImageDraw, lines: Sequence[str], left: int, top: int) -> None:
    for number, line in enumerate(lines):
        draw.text((left, top + number * _LINE_HEIGHT), line, fill=_INK, font=_font())


def evenly(total: int, number: int) -> list[int]:
    """At most `number` indices from 0 to `total - 1`, at equal distances: what is shown is chosen by index alone."""
    number = min(number, total)
    return [i * total // number for i in range(number)]


def _enlarged(images: Sequence[Image.Image], upscale: int | None) -> list[Image.Image]:
    if upscale is None:
        upscale = max(1, math.ceil(_SMALLEST_SIDE / max(max(image.size) for image in images)))
    if upscale < 1:
        raise ValueError(f"upscale is {upscale}, but must be a whole number of at least 1, or None.")
    # Nearest neighbor shows the pixels that the model drew, and no others
    return [ImageOps.scale(image.convert("RGB"), upscale, Image.Resampling.NEAREST) for image in images]


def _write(grid: Image.Image, path: str | os.PathLike | None) -> Image.Image:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        grid.save(path)
    return grid


def image_grid(
    images: Sequence[Image.Image],
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    path: str | os.PathLike | None = None,
    upscale: int | None = None,
) -> Image.Image:
    """
    Images in rows and columns, each with its caption below.

    Captions are wrapped at the image's width and cut, with an ellipsis, after eight lines; line breaks in them are
    kept. Characters that the font lacks appear as boxes.

    Args:
        images (`Sequence[PIL.Image.Image]`): the images, of any sizes and modes.
        captions (`Sequence[str]`, *optional*): one for each image.
        columns (`int`, *optional*): images in a row; by default about as many as there are rows.
        path (`str` or `os.PathLike`, *optional*): file to write as well; its folder is made if need be.
        upscale (`int`, *optional*): factor by which all images are enlarged, by nearest neighbor. By default the
            smallest with which the largest image has a side of 128 pixels or more.

    Raises:
        ValueError: if there is no image, or not one caption for each, or `columns` or `upscale` is below 1.
    """
    if len(images) == 0:
        raise ValueError("images is empty: there is nothing to put into a grid.")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"There are {len(captions)} captions for {len(images)} images. Give one for each, or None.")
    if columns is not None and columns < 1:
        raise ValueError(f"columns is {columns}, but must be at least 1, or None.")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    images = _enlarged(images, upscale)
    width, height = max(image.width for image in images), max(image.height for image in images)
    texts = [_wrap(str(caption), width) for caption in captions] if captions is not None else [[]] * len(images)

    rows = [range(first, min(first + columns, len(images))) for first in range(0, len(images), columns)]
    heights = [height + max(len(texts[i]) for i in row) * _LINE_HEIGHT + _MARGIN for row in rows]
    grid = Image.new("RGB", (columns * (width + _MARGIN) + _MARGIN, sum(heights) + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(grid)
    top = _MARGIN
    for row, row_height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = _MARGIN + column * (width + _MARGIN)
            grid.paste(images[i], (left, top))
            _write_lines(draw, texts[i], left, top + height)
        top += row_height
    return _write(grid, path)


def before_after_grid(
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    captions: Sequence[str],
    scores: Sequence[tuple[float, float]] | None = None,
    path: str | os.PathLike | None = None,
    upscale: int | None = None,
    columns: int = 2,
) -> Image.Image:
    """
    Each prompt's image before and after training side by side, under a heading, with the prompt below.

    Args:
        before, after (`Sequence[PIL.Image.Image]`): images of the same prompts, in the same order.
        captions (`Sequence[str]`): the prompts.
        scores (`Sequence[tuple[float, float]]`, *optional*): score before and after of each, shown with the prompt.
        path, upscale: as for [`image_grid`].
        columns (`int`): pairs in a row.
    """
    lengths = [len(part) for part in (before, after, captions, scores) if part is not None]
    if len(before) == 0 or len(set(lengths)) > 1:
        counts = f"{len(before)} images before, {len(after)} after, {len(captions)} captions"
        counts += "" if scores is None else f" and {len(scores)} scores"
        raise ValueError(f"There are {counts}. Give one of each for each prompt, and at least one.")
    enlarged = _enlarged([*before, *after], upscale)
    pairs = []
    for first, second in zip(enlarged[: len(before)], enlarged[len(before) :], strict=True):
        size = (first.width + _MARGIN + second.width, _LINE_HEIGHT + max(first.height, second.height))
        pair = Image.new("RGB", size, _PAPER)
        draw = ImageDraw.Draw(pair)
        for name, image, left in (("before", first, 0), ("after", second, first.width + _MARGIN)):
            _write_lines(draw, [name], left, 0)
            pair.paste(image, (left, _LINE_HEIGHT))
        pairs.append(pair)
    if scores is not None:
        captions = [f"{c}\n{old:.2f} → {new:.2f}" for c, (old, new) in zip(captions, scores, strict=True)]
    return image_grid(pairs, captions, columns=columns, path=path, upscale=1)


def comparison_grid(
    rows: Sequence[Sequence[Image.Image]],
    columns: Sequence[str],
    captions: Sequence[str],
    path: str | os.PathLike | None = None,
    cell: int = 256,
    names: Sequence[str] | None = None,
) -> Image.Image:
    """
    One row of images for each prompt, one column for each model, with the prompts above the rows.

    Args:
        rows (`Sequence[Sequence[PIL.Image.Image]]`): the models' images of each prompt.
        columns, captions (`Sequence[str]`): the models' names, and the prompts; what is beyond three lines is cut. An
            empty caption takes no space.
        path: as for [`image_grid`].
        cell (`int`): longest side of an image in the grid, in pixels. Larger ones are reduced to it, and smaller ones
            enlarged by a whole factor, by nearest neighbor.
        names (`Sequence[str]`, *optional*): of the rows, on their left.
    """
    is_full = rows and columns and all(len(row) == len(columns) for row in rows)
    if not is_full or len(captions) != len(rows) or cell < 1 or (names is not None and len(names) != len(rows)):
        raise ValueError(
            f"There are rows of {[len(row) for row in rows][:10]} images, {len(columns)} columns, {len(captions)} "
            f"captions, {len(names or [])} names and a cell of {cell} pixels. Give an image for each column in every "
            "row, and all captions."
        )
    cells = [[_fitted(image, cell) for image in row] for row in rows]
    width = max(image.width for row in cells for image in row)
    labels = [_wrap(str(name), _NAME_WIDTH) for name in names or [""] * len(rows)]
    beside = math.ceil(max((_font().getlength(line) for lines in labels for line in lines), default=-_MARGIN))
    left = [beside + 2 * _MARGIN + column * (width + _MARGIN) for column in range(len(columns) + 1)]
    headings = [_wrap(name, width, most_lines=2) for name in columns]
    header = max(len(lines) for lines in headings) * _LINE_HEIGHT
    texts = [_wrap(str(caption), left[-1] - 2 * _MARGIN, most_lines=3) for caption in captions]
    tall = [max(*(p.height for p in row), len(n) * _LINE_HEIGHT) for row, n in zip(cells, labels, strict=True)]
    heights = [height + len(lines) * _LINE_HEIGHT for height, lines in zip(tall, texts, strict=True)]
    grid = Image.new("RGB", (left[-1], header + _MARGIN + sum(heights) + len(rows) * 2 * _MARGIN), _PAPER)
    draw = ImageDraw.Draw(grid)
    for column, lines in enumerate(headings):
        _write_lines(draw, lines, left[column], _MARGIN)
    top = header + 2 * _MARGIN
    for row, lines, label, height in zip(cells, texts, labels, heights, strict=True):
        _write_lines(draw, lines, _MARGIN, top)
        below = top + len(lines) * _LINE_HEIGHT
        _write_lines(draw, label, _MARGIN, below)
        for column, image in enumerate(row):
            grid.paste(image, (left[column], below))
        top += height + 2 * _MARGIN
    return _write(grid, path)


def _fitted(image: Image.Image, side: int) -> Image.Image:
    longest = max(image.size)
    if longest <= side:
        return _enlarged([image], side // longest)[0]
    return ImageOps.contain(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
