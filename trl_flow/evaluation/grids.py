"""Grids of images, and of videos as strips of frames, with captions that a person can read."""

import functools
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from trl_flow.evaluation.fonts import font_for
from trl_flow.images import Sample, frames_of, spread, to_rgb


# Images below this many pixels a side are enlarged: in a 32-pixel cell nobody sees anything, or reads a caption
_SMALLEST_SIDE = 128
_FONT_SIZE, _MARGIN = 11, 6
# Frames of a video in its strip, how far apart they stand, and their longest side in grids that do not scale images
STRIP, _GAP, _LARGEST_FRAME = 4, 2, 256
_NAME_WIDTH = 140  # of the names beside rows, at most
_PAPER, _INK = "white", "black"
_framed = functools.partial(ImageOps.expand, fill=_PAPER)


def _font(text: str = "", size: int = _FONT_SIZE) -> ImageFont.FreeTypeFont:
    return font_for(text, size) or font_for("", size)


def _columns(text: str, width: int, size: int) -> int:
    """So many of the text's widest letters are at most `width` pixels wide."""
    font = _font(text, size)
    return max(1, int(width / max(font.getlength(letter) for letter in {"x", *text})))


def _readable(texts: Sequence[str], what: str = "prompt") -> list[str]:
    """The texts, but in place of a line whose letters no font has the number of its text: boxes would all be alike."""

    def readable(number: int, line: str) -> str:
        return line if font_for(line, _FONT_SIZE) else f"{what} {number}, in letters that no font here has"

    return ["\n".join(readable(i, line) for line in text.splitlines()) for i, text in enumerate(texts, start=1)]


def _wrap(text: str, width: int, most_lines: int = 8, size: int = _FONT_SIZE) -> list[str]:
    """`text` in lines of at most `width` pixels; what is beyond `most_lines` is replaced by an ellipsis."""
    # As much as can be shown, before the words of what is far longer are looked at
    paragraphs = text[: (_columns("", width, size) + 1) * (most_lines + 1)].splitlines()
    lines = [line for text in paragraphs for line in textwrap.wrap(text, _columns(text, width, size)) or [""]]
    if len(lines) > most_lines:
        last = lines[most_lines - 1]
        lines[most_lines - 1 :] = [last[: _columns(last + "…", width, size) - 1] + "…"]
    return lines


def _text(lines: Sequence[str], width: int, size: int = _FONT_SIZE) -> Image.Image:
    line_height, foot = round(1.35 * size), round(0.35 * size)
    sheet = Image.new("RGB", (width, len(lines) * line_height), _PAPER)
    for number, line in enumerate(lines):
        # By the line's foot, as fonts leave different room above their letters
        place = (0, (number + 1) * line_height - foot)
        ImageDraw.Draw(sheet).text(place, line, fill=_INK, font=_font(line, size), anchor="ls")
    return sheet


def _joined(parts: Sequence[Image.Image], axis: int, cell: tuple[int, int] = (0, 0)) -> Image.Image:
    """The images beside (`axis` 0) or below (1) each other, each in a cell of at least this width and height."""
    sizes = np.maximum([part.size for part in parts], cell)
    size, corner = sizes.max(axis=0), np.zeros(2, dtype=int)
    size[axis] = sizes[:, axis].sum()
    sheet = Image.new("RGB", tuple(size.tolist()), _PAPER)
    for part, own in zip(parts, sizes, strict=True):
        sheet.paste(part, tuple(corner.tolist()))
        corner[axis] += own[axis]
    return sheet


def evenly(total: int, number: int) -> list[int]:
    """At most `number` indices from 0 to `total - 1`, at equal distances: what is shown is chosen by index alone."""
    number = min(number, total)
    return [i * total // number for i in range(number)]


def enlarged(samples: Sequence[Sample], upscale: int | None) -> list[Image.Image]:
    """The images, RGB, and videos as strips, by the whole factor `upscale`, as for [`image_grid`]."""
    parts = [[_reduced(frame, _LARGEST_FRAME) for frame in _strip(s)] if isinstance(s, list) else [s] for s in samples]
    if upscale is None:
        upscale = max(1, math.ceil(_SMALLEST_SIDE / max(max(image.size) for images in parts for image in images)))
    if upscale < 1:
        raise ValueError(f"upscale is {upscale}, but must be a whole number of at least 1, or None.")
    return [_beside([_scaled(image, upscale) for image in images]) for images in parts]


def _scaled(image: Image.Image, factor: int) -> Image.Image:
    # Nearest neighbor shows the pixels that the model drew, and no others
    return ImageOps.scale(to_rgb(image), factor, Image.Resampling.NEAREST)


def _reduced(image: Image.Image, side: int) -> Image.Image:
    image = to_rgb(image)
    return ImageOps.contain(image, (side, side), Image.Resampling.LANCZOS) if max(image.size) > side else image


def _strip(sample: Sample) -> list[Image.Image]:
    """The frames of a video that are shown; of an image, itself."""
    return spread(frames_of(sample), STRIP)


def _beside(frames: Sequence[Image.Image]) -> Image.Image:
    return _joined([*(_framed(frame, (0, 0, _GAP, 0)) for frame in frames[:-1]), frames[-1]], 0)


def _sheet(rows: Sequence[Image.Image], path: str | os.PathLike | None) -> Image.Image:
    grid = _framed(_joined(rows, 1), (_MARGIN, _MARGIN, 0, 0))
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        grid.save(path)
    return grid


def image_grid(
    images: Sequence[Sample],
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    path: str | os.PathLike | None = None,
    upscale: int | None = None,
) -> Image.Image:
    """
    Images in rows and columns, each with its caption below. A video is shown as a strip: four frames, evenly spaced
    from the first to the last, of at most 256 pixels.

    Captions are wrapped at the image's width and cut, with an ellipsis, after eight lines; line breaks in them are
    kept. In place of a line in letters that no font of the machine has stands the caption's number.

    The images may be of any sizes and modes; `columns` of them are in a row, by default about as many as there are
    rows. `path` is a file to write as well; its folder is made if need be. All images are enlarged by the factor
    `upscale`, by nearest neighbor, by default the smallest with which the largest has a side of 128 pixels or more.
    `ValueError` if there is no image, or not one caption for each, or `columns` or `upscale` is below 1.
    """
    if len(images) == 0:
        raise ValueError("images is empty: there is nothing to put into a grid.")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"There are {len(captions)} captions for {len(images)} images. Give one for each, or None.")
    if columns is not None and columns < 1:
        raise ValueError(f"columns is {columns}, but must be at least 1, or None.")
    widest = max(len(_strip(sample)) for sample in images)
    columns = min(columns or math.ceil(math.sqrt(len(images) / widest)), len(images))
    images = enlarged(images, upscale)
    width, height = max(image.width for image in images), max(image.height for image in images)
    captions = None if captions is None else _readable([str(caption) for caption in captions])
    texts = [_wrap(caption, width) for caption in captions] if captions is not None else [[]] * len(images)
    rows = []
    for row in (slice(first, first + columns) for first in range(0, len(images), columns)):
        below = _joined([_text(lines, width) for lines in texts[row]], 0, (width + _MARGIN, 0))
        rows += [_joined(images[row], 0, (width + _MARGIN, height)), _framed(below, (0, 0, 0, _MARGIN))]
    return _sheet(rows, path)


def before_after_grid(
    before: Sequence[Sample],
    after: Sequence[Sample],
    captions: Sequence[str],
    scores: Sequence[tuple[float, float]] | None = None,
    path: str | os.PathLike | None = None,
    upscale: int | None = None,
    columns: int = 2,
) -> Image.Image:
    """
    Each prompt's image (or strip of a video) before and after training side by side, under a heading, with the prompt
    below.

    `before` and `after` are images of the same prompts (`captions`), in the same order, and `scores` those before and
    after of each, shown with the prompt. `path` and `upscale` are as for [`image_grid`], `columns` pairs in a row.
    `ValueError` if there is no pair, or the numbers differ.
    """
    lengths = [len(part) for part in (before, after, captions, scores) if part is not None]
    if len(before) == 0 or len(set(lengths)) > 1:
        counts = f"{len(before)} images before, {len(after)} after, {len(captions)} captions"
        counts += "" if scores is None else f" and {len(scores)} scores"
        raise ValueError(f"There are {counts}. Give one of each for each prompt, and at least one.")
    both = enlarged([*before, *after], upscale)
    names = ["before"] * len(before) + ["after"] * len(after)
    halves = [_joined([_text([name], i.width), i], 1) for name, i in zip(names, both, strict=True)]
    left = [_framed(half, (0, 0, _MARGIN, 0)) for half in halves[: len(before)]]
    pairs = [_joined(pair, 0) for pair in zip(left, halves[len(before) :], strict=True)]
    if scores is not None:
        captions = [f"{c}\n{old:.2f} → {new:.2f}" for c, (old, new) in zip(captions, scores, strict=True)]
    return image_grid(pairs, captions, columns=columns, path=path, upscale=1)


def comparison_grid(
    rows: Sequence[Sequence[Sample]],
    columns: Sequence[str],
    captions: Sequence[str],
    path: str | os.PathLike | None = None,
    cell: int = 256,
    names: Sequence[str] = (),
) -> Image.Image:
    """
    One row of images (or strips of videos) for each prompt, one column for each model, with the prompts above the
    rows.

    `rows` are the models' images of each prompt, `columns` the models' names, and `captions` the prompts, of which
    what is beyond three lines is cut; an empty one takes no space. `names` stand to the left of the rows. `path` is as
    for [`image_grid`]. Images, and frames in strips, whose longest side is above `cell` pixels are reduced to it, and
    those below 128 pixels enlarged by a whole factor, by nearest neighbor.
    """
    is_full = columns and {len(columns)} == {*map(len, rows)} and len(names) in (0, len(rows))
    if not is_full or len(captions) != len(rows) or cell < 1:
        raise ValueError(
            f"There are rows of {[len(row) for row in rows][:10]} images, {len(columns)} columns, {len(captions)} "
            f"captions, {len(names)} names and a cell of {cell} pixels. Give an image for each column in every row, "
            "all captions, and all names or none."
        )
    cells = [[_fitted(image, cell) for image in row] for row in rows]
    width = max(image.width for row in cells for image in row)
    columns, names = _readable(columns, "model"), _readable(names or [""] * len(rows), "model")
    captions = _readable([str(caption) for caption in captions])
    # A wide picture is shown smaller than it is, and its letters with it
    size = max(_FONT_SIZE, width // 16, min(len(columns) * width // 60, width // 9))
    labels = [_wrap(name, _NAME_WIDTH * size // _FONT_SIZE, size=size) for name in names]
    longest = max((_font(line, size).getlength(line) for lines in labels for line in lines), default=-_MARGIN)
    beside = math.ceil(longest) + _MARGIN
    total = beside + len(columns) * (width + _MARGIN)
    heading = _joined([_text(_wrap(name, width, 2, size), width, size) for name in columns], 0, (width + _MARGIN, 0))
    parts = [_framed(heading, (beside, 0, 0, 0))]
    for row, caption, lines in zip(cells, captions, labels, strict=True):
        text = _text(_wrap(caption, total - _MARGIN, 3, size), total - _MARGIN, size)
        images = _joined([_text(lines, beside, size), _joined(row, 0, (width + _MARGIN, 0))], 0)
        parts.append(_framed(_joined([text, images], 1), (0, _MARGIN, 0, _MARGIN)))
    return _sheet(parts, path)


def _fitted(sample: Sample, side: int) -> Image.Image:
    frames = [_reduced(frame, side) for frame in _strip(sample)]
    return _beside([_scaled(frame, max(1, min(side, _SMALLEST_SIDE) // max(frame.size))) for frame in frames])
