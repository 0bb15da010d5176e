from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from trl_flow.evaluation import fonts
from trl_flow.evaluation.grids import before_after_grid, comparison_grid, evenly, image_grid


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def plain(color, size=(32, 32)) -> Image.Image:
    return Image.new("RGB", size, color)


def dark_pixels(grid: Image.Image, box: tuple[int, int, int, int]) -> int:
    """Pixels of text (nearly black) in a box `(left, top, right, bottom)`."""
    return int((np.asarray(grid.crop(box).convert("L")) < 100).sum())


def test_small_images_are_enlarged_pixel_by_pixel():
    # 32 pixels need a factor of 4 to reach 128; a pixel then covers 4 x 4, and no color appears that was not there
    image = Image.new("RGB", (32, 32), RED)
    image.putpixel((1, 0), GREEN)
    grid = image_grid([image], path=None)
    pixels = np.asarray(grid)
    assert grid.size == (6 + 128 + 6, 6 + 128 + 6)
    assert (pixels == GREEN).all(axis=2).sum() == 16
    assert (pixels[6:10, 10:14] == GREEN).all()
    assert (pixels == RED).all(axis=2).sum() == 128 * 128 - 16


def test_large_images_keep_their_size():
    assert image_grid([plain(RED, (200, 150))]).size == (6 + 200 + 6, 6 + 150 + 6)


def test_images_go_row_by_row():
    grid = image_grid([plain(c) for c in (RED, GREEN, BLUE)], columns=2, upscale=1)
    assert grid.size == (6 + 2 * 38, 6 + 2 * 38)
    assert [grid.getpixel(index) for index in ((20, 20), (58, 20), (20, 58), (58, 58))] == [
        RED,
        GREEN,
        BLUE,
        (255, 255, 255),
    ]


def test_a_caption_is_under_its_image_and_nowhere_else():
    grid = image_grid([plain(RED), plain(GREEN)], ["some words", ""], columns=2)
    below = 6 + 128
    assert dark_pixels(grid, (6, below, 134, grid.height)) > 50
    assert dark_pixels(grid, (140, below, grid.width, grid.height)) == 0


def test_long_captions_are_wrapped_within_the_image():
    # Nothing of the left caption reaches the right cell, whether it breaks at spaces or in the midst of a word
    for caption in ("many words " * 20, "x" * 400):
        grid = image_grid([plain(RED), plain(GREEN)], [caption, ""], columns=2)
        assert dark_pixels(grid, (134, 134, grid.width, grid.height)) == 0
        assert grid.height == 6 + 128 + 8 * 15 + 6  # eight lines, and no more


def test_line_breaks_in_captions_are_kept():
    one, two = image_grid([plain(RED)], ["a"]), image_grid([plain(RED)], ["a\nb"])
    assert two.height - one.height == 15


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "\n\n",
        "红色的圆",
        "🦊 and 🐈\u200d⬛",
        "שלום",
        "\x00\t\ud800",
        "a\u0301" * 500,
        "word " * 5000,
        "x" * 20000,
    ],
)
def test_any_text_can_be_a_caption(caption):
    assert image_grid([plain(RED)], [caption]).getpixel((70, 70)) == RED


def test_modes_and_sizes_may_be_mixed():
    grid = image_grid([Image.new("L", (128, 64), 7), Image.new("RGBA", (64, 128), (*BLUE, 255))], columns=2)
    assert grid.getpixel((6, 6)) == (7, 7, 7)
    assert grid.getpixel((6 + 128 + 6, 6)) == BLUE


def test_the_file_holds_what_is_returned(tmp_path):
    grid = image_grid([plain(RED)], ["words"], path=tmp_path / "new" / "grid.png")
    with Image.open(tmp_path / "new" / "grid.png") as saved:
        assert np.array_equal(np.asarray(saved.convert("RGB")), np.asarray(grid))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"images": []}, "empty"),
        ({"images": [plain(RED)], "captions": ["a", "b"]}, "2 captions for 1 images"),
        ({"images": [plain(RED)], "columns": 0}, "columns is 0"),
        ({"images": [plain(RED)], "upscale": 0}, "upscale is 0"),
    ],
)
def test_what_makes_no_grid_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        image_grid(**arguments)


def test_before_is_left_of_after():
    grid = before_after_grid([plain(RED)], [plain(GREEN)], ["a prompt"], [(0.25, 1.0)])
    row = 6 + 15 + 64
    assert grid.getpixel((6 + 64, row)) == RED
    assert grid.getpixel((6 + 128 + 6 + 64, row)) == GREEN
    assert dark_pixels(grid, (6, 6, 134, 6 + 15)) > 0  # the headings
    assert dark_pixels(grid, (140, 6, 268, 6 + 15)) > 0


def test_pairs_that_are_none_are_refused():
    with pytest.raises(ValueError, match="2 images before, 1 after, 1 captions"):
        before_after_grid([plain(RED)] * 2, [plain(RED)], ["a"])
    with pytest.raises(ValueError, match="0 images before"):
        before_after_grid([], [], [])


# ---- comparison_grid ----


def test_prompts_are_rows_and_models_columns(tmp_path):
    rows = [[plain(RED), plain(GREEN)], [plain(BLUE), plain(RED)]]
    grid = comparison_grid(rows, ["base", "ours"], ["one", "two"], path=tmp_path / "new" / "grid.png", cell=64)
    # Names above, then for each prompt a line of 15 pixels, the images enlarged twice, and 12 pixels to the next
    tops = [15 + 12 + 15, 15 + 12 + 15 + 64 + 12 + 15]
    assert grid.size == (6 + 2 * (64 + 6), tops[1] + 64 + 6)
    colors = [[grid.getpixel((left, top + 30)) for left in (6 + 30, 6 + 70 + 30)] for top in tops]
    assert colors == [[RED, GREEN], [BLUE, RED]]
    assert dark_pixels(grid, (6, 0, 70, 24)) > 0 and dark_pixels(grid, (76, 0, 140, 24)) > 0
    for top in tops:
        assert dark_pixels(grid, (6, top - 15, 140, top)) > 0
    assert Image.open(tmp_path / "new" / "grid.png").size == grid.size


def test_large_images_are_reduced_to_the_cell():
    wide = plain(RED, (1000, 500))
    wide.paste(GREEN, (500, 0, 1000, 500))
    grid = comparison_grid([[wide]], ["m"], ["p"], cell=100)
    assert grid.size == (6 + 100 + 6, 15 + 12 + 15 + 50 + 6)
    assert grid.getpixel((6 + 40, 60)) == RED and grid.getpixel((6 + 60, 60)) == GREEN


def test_long_names_and_prompts_are_cut():
    grid = comparison_grid([[plain(RED)]], ["name " * 100], ["prompt " * 1000], cell=128)
    assert grid.size == (6 + 128 + 6, 2 * 15 + 12 + 3 * 15 + 128 + 6)


@pytest.mark.parametrize(
    "rows, columns, captions, cell",
    [
        ([], ["a"], [], 64),
        ([[]], [], ["p"], 64),
        ([[plain(RED)]], ["a", "b"], ["p"], 64),
        ([[plain(RED)]], ["a"], [], 64),
        ([[plain(RED)]], ["a"], ["p"], 0),
    ],
)
def test_grids_that_do_not_fit_are_refused(rows, columns, captions, cell):
    with pytest.raises(ValueError, match="images|cell"):
        comparison_grid(rows, columns, captions, cell=cell)


@pytest.mark.parametrize(
    "total, number, indices", [(10, 4, [0, 2, 5, 7]), (3, 16, [0, 1, 2]), (5, 5, [0, 1, 2, 3, 4]), (0, 3, [])]
)
def test_what_is_shown_is_spread_evenly(total, number, indices):
    assert evenly(total, number) == indices


# ---- letters that the usual font lacks ----


@pytest.fixture
def only_fonts(monkeypatch):
    """Makes the given ones the machine's only fonts."""

    def use(*names: str) -> None:
        folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
        monkeypatch.setattr(fonts, "_fonts", lambda: [folder / name for name in names])
        fonts._other_font.cache_clear()

    yield use
    fonts._other_font.cache_clear()


def caption_of(text: str, number: int = 1) -> np.ndarray:
    """The pixels of the last of `number` captions, all of them alike."""
    grid = image_grid([plain(RED)] * number, [text] * number, columns=1)
    return np.asarray(grid)[-20:]


def test_another_font_draws_letters_that_the_usual_one_lacks(only_fonts):
    only_fonts("STIXGeneral.ttf")
    letters = "\U0001d49c\U0001d49e"  # script A and C
    assert not set(letters) & fonts._letters(fonts.DEFAULT)
    assert Path(fonts.font_for(letters, 11).path).name == "STIXGeneral.ttf"
    assert (caption_of(letters[0]) != caption_of(letters[1])).any()
    assert dark_pixels(image_grid([plain(RED)], [letters]), (6, 134, 60, 155)) > 10


def test_letters_of_no_font_are_replaced_by_the_number_of_the_prompt(only_fonts):
    only_fonts()
    shown = caption_of("prompt 2, in letters that no font here has", 2)
    assert (caption_of("一只猫", 2) == shown).all() and (caption_of("两条狗", 2) == shown).all()
    images = [plain(RED)] * 2
    same = image_grid(images, ["cat\n0.5", "prompt 2, in letters that no font here has\n0.7"])
    assert np.array_equal(image_grid(images, ["cat\n0.5", "两条狗\n0.7"]), same)
    numbered = [f"prompt {i}, in letters that no font here has" for i in (1, 2)]
    both = [comparison_grid([images] * 2, ["a", "b"], texts) for texts in (["一只猫", "两条狗"], numbered)]
    assert np.array_equal(*both)


def test_two_chinese_captions_differ_whatever_fonts_there_are():
    grid = np.asarray(image_grid([plain(RED)] * 2, ["一只猫", "两条狗"], columns=2))
    left, right = grid[134:, 6:134], grid[134:, 140:268]
    assert (left != right).any() and (left < 100).any() and (right < 100).any()


def test_a_symbol_does_not_take_the_words_around_it_away(only_fonts):
    only_fonts()
    assert fonts.font_for("a cat \U0001f600", 11) is not None and fonts.font_for("\U0001f600", 11) is None
