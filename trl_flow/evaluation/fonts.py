"""A font that has the letters of a text, of those that matplotlib brings along and those of the machine."""

import functools
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import matplotlib
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import ImageFont


# DejaVu has Greek, Cyrillic and many symbols, Pillow's own font few of them. All letters of this one have one width
DEFAULT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont | None:
    """A font with every letter of `text`: `DEFAULT` if it has them, else one of the machine's, if any has."""
    # A picture between words may become a box
    letters = _of_kind(text, "LN") or _of_kind(text, "LNPS")
    return _loaded(DEFAULT, size) if letters <= _letters(DEFAULT) else _other_font(letters, size)


def _of_kind(text: str, categories: str) -> frozenset[str]:
    return frozenset(letter for letter in text if unicodedata.category(letter)[0] in categories)


@functools.lru_cache(maxsize=1024)
def _other_font(letters: frozenset[str], size: int) -> ImageFont.FreeTypeFont | None:
    return next((_loaded(path, size) for path in _fonts() if letters <= _letters(path)), None)


@functools.cache
def _fonts() -> list[Path]:
    """The machine's fonts, upright ones of normal weight and those without serifs first."""
    plain = ("Sans", "Regular")
    paths = sorted(map(Path, findSystemFonts()), key=lambda path: (-sum(word in path.name for word in plain), path))
    return list(_usable(paths))


def _usable(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        try:
            _letters(path), _loaded(path, 12)
            yield path
        except (OSError, RuntimeError, ValueError):  # damaged, or of bitmaps in other sizes
            continue


@functools.cache
def _letters(path: Path) -> frozenset[str]:
    return frozenset(map(chr, FT2Font(str(path)).get_charmap()))


@functools.cache
def _loaded(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)
