"""The OCR reward scores as Flow-GRPO does, and reads what is really written."""

import random
import socket
import sys
import threading
from pathlib import Path

import matplotlib
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from trl_flow.rewards import OCRReward
from trl_flow.rewards.checks import check_reward_func, is_dense, reward_name
from trl_flow.rewards.ocr import quoted_text, text_score
from trl_flow.rewards.scorer import RewardScorer


FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"

# No two of one group of letters that look the same in some font (capital I and small l, O and 0)
WORDS = """
apple bakery castle dragon engine forest garden hammer island jacket kitchen lantern market nature orange pepper
quartz river summer table umbrella valley window yellow zebra bridge coffee dinner energy flower guitar helmet insect
jungle kernel lemon mirror number office pencil queen rabbit silver tiger urban violin winter yogurt anchor basket
candle desert eagle family galaxy harbor impact jewel kangaroo ladder magnet needle ocean palace quiet rocket school
temple unicorn velvet whisper yacht zodiac autumn breeze cactus domino ember falcon granite horizon
""".split()


def written(text, font="DejaVuSans.ttf", size=32, ground="white", ink="black", canvas=(320, 96)):
    """A picture with a text in its middle."""
    image = Image.new("RGB", canvas, ground)
    middle = canvas[0] // 2, canvas[1] // 2
    ImageDraw.Draw(image).multiline_text(
        middle, text, font=ImageFont.truetype(str(FONTS / font), size), fill=ink, anchor="mm", align="center"
    )
    return image


@pytest.fixture(scope="module")
def ocr():
    return OCRReward(num_threads=1)


# --- the score ---


@pytest.mark.parametrize(
    ("read", "target", "expected"),
    [
        ("OPEN", "OPEN", 1.0),
        ("open", "OPEN", 1.0),
        ("Grand\nOpening", "grand opening", 1.0),
        ("we are OPEN today", "Open", 1.0),  # part of what was read
        ("OPFN", "OPEN", 3 / 4),  # one letter of four
        ("OPE", "OPEN", 3 / 4),
        ("OPEENN", "OPEN", 2 / 4),
        ("kitten", "sitting", 1 - 3 / 7),
        ("", "OPEN", 0.0),
        ("something else entirely", "OPEN", 0.0),  # 21 edits, but no more than the length counts
        ("ab", "ba", 0.0),  # two edits of two
        ("a", "b", 0.0),
        ("50%", "50 %", 1.0),
        ("ÇA VA", "ça va", 1.0),
        ("你好", "你 好", 1.0),
        ("O\tP\u3000E N", "OPEN", 1.0),
    ],
)
def test_scores_by_hand(read, target, expected):
    assert text_score(read, target) == pytest.approx(expected, abs=1e-12)


letters = st.text("abcdefghij", min_size=1, max_size=30)


@settings(max_examples=50)
@given(target=letters, data=st.data())
def test_one_wrong_letter_costs_one_over_the_length(target, data):
    place = data.draw(st.integers(0, len(target) - 1))
    wrong = target[:place] + "z" + target[place + 1 :]
    assert text_score(wrong, target) == pytest.approx(1 - 1 / len(target))


@settings(max_examples=50)
@given(target=letters, before=st.text(max_size=20), after=st.text(max_size=20))
def test_other_text_around_the_target_costs_nothing(target, before, after):
    assert text_score(before + target + after, target) == 1.0


@settings(max_examples=50)
@given(read=st.text(max_size=40), target=st.text(min_size=1, max_size=20))
def test_scores_are_from_0_to_1_and_1_means_that_the_target_is_there(read, target):
    assume(target.strip())
    score = text_score(read, target)
    assert 0 <= score <= 1
    plain_read, plain_target = ("".join(text.split()).lower() for text in (read, target))
    assert (score == 1) == (plain_target in plain_read)


@pytest.mark.parametrize("target", ["", " ", "\n\t"])
def test_an_empty_target_has_no_score(target):
    with pytest.raises(ValueError, match="empty"):
        text_score("OPEN", target)


# --- the text of a prompt ---


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ('A sign that reads "Grand Opening" at night', "Grand Opening"),
        ('"First" and "second"', "First"),
        ("A sign “Hello there”", "Hello there"),
        ("Ein Schild „Guten Tag“", "Guten Tag"),
        ("Une enseigne «Chez moi»", "Chez moi"),
        ("招牌「你好」", "你好"),
        ("本『こころ』", "こころ"),
        ("»Auf« und »Zu«", "Auf"),
        ("«Ouvert» et «Fermé»", "Ouvert"),
        ("En skylt ”Öppet” och ”Stängt”", "Öppet"),
        ("A 5” board that says “Mind the gap”", "Mind the gap"),
        ("It's a sign: \"Don't stop\"", "Don't stop"),
        ('says "“nested”"', "“nested”"),
        ('two\nlines "a\nb"', "a\nb"),
        # inches
        ('a 27" monitor that says "HELLO"', "HELLO"),
        ('a ½" pipe and a 1⅜” one that say "HELLO"', "HELLO"),
        ("a 27” monitor beside a 32” one that says “HELLO”", "HELLO"),
        ('a 5"x7" card and a 6\'2" man: "Route 66"', "Route 66"),
        ('"Route 66" on a 27" screen', "Route 66"),
        ("a 27\" monitor that says 'HELLO'", "HELLO"),
        # single ones, where there are no double ones
        ("A cat holding a sign that says '12345'", "12345"),
        ("a child's drawing of a shop called 'Joe's Diner'", "Joe's Diner"),
        ("the dogs' house, a sign: 'Keep Out!'.", "Keep Out!"),
        ("it's 'single', not the 'first'", "single"),
        ("'OPEN' on a door that doesn't open", "OPEN"),
        ("a sign (‘Don’t walk’) in Sam’s street", "Don’t walk"),
        ("Ein Schild ‚Guten Tag‘", "Guten Tag"),
        ("Ein Schild ›Guten Tag‹, une enseigne ‹Chez moi›", "Guten Tag"),
        ("En skylt ’Öppet’ vid kusten", "Öppet"),
        ("牌子上写着'你好'的店", "你好"),
        ("a neon sign, ''LIVE'', in the '90s", "LIVE"),
        ("a rock 'n' roll poster of the '80s with the word 'LOUD'", "LOUD"),
        ("a '90s' party", "90s"),
        ("a 6' tall door that says '24 hours'", "24 hours"),
        ("it's a \"double\", not a 'single'", "double"),
    ],
)
def test_the_first_quoted_text_counts(prompt, expected):
    assert quoted_text(prompt) == expected


NO_TEXT = [
    "a cat",
    "",
    'a 5" nail',
    'a 27" and a 32" screen',
    'says ""',
    'says "  "',
    "says “”",
    "says ''",
    "says ' '",
]
NO_TEXT += [
    "it's the dogs' park",
    "rock 'n' roll",
    "rock ‘n’ roll",
    "a '90s car",
    "a 6' 2'' door",
    "don’t, the dogs’ park",
]


@pytest.mark.parametrize("prompt", NO_TEXT)
def test_a_prompt_without_quoted_text_is_refused_by_name(prompt, ocr):
    with pytest.raises(ValueError, match="no text in quotation marks.*column `text`") as raised:
        ocr(prompts=[prompt], images=[written("cat")])
    assert repr(prompt) in str(raised.value)


def test_the_column_text_comes_before_the_quotes_and_none_means_no_text(ocr):
    images = [written("river")] * 3
    prompts = ['a "temple"', "no quotes here", 'a "river"']
    assert ocr(prompts=prompts, images=images, text=["river", "river", None]) == [1.0, 1.0, None]


@pytest.mark.parametrize("entry", [3, ["river"], 1.5])
def test_a_column_with_something_other_than_text_is_refused(entry, ocr):
    with pytest.raises(TypeError, match="column `text` holds.*for the prompt 'p'"):
        ocr(prompts=["p"], images=[written("river")], text=[entry])


def test_an_empty_text_is_refused(ocr):
    with pytest.raises(ValueError, match="empty"):
        ocr(prompts=["p"], images=[written("river")], text=[""])


# --- reading ---


def words_and_pictures(count):
    """Words in upper, lower and title case, seven fonts, three sizes and six pairs of colors."""
    rng = random.Random(0)
    colors = [("white", "black"), ("black", "white"), ("lightyellow", "darkblue"), ("darkgreen", "yellow")]
    colors += [("crimson", "white"), ("lightblue", "black")]
    fonts = ["Sans", "Sans-Bold", "Sans-Oblique", "SansMono", "Serif", "Serif-Bold", "Serif-Italic"]
    for i in range(count):
        word = rng.choice([str.lower, str.upper, str.title])(WORDS[i % len(WORDS)])
        ground, ink = colors[i % len(colors)]
        font = f"DejaVu{fonts[i % len(fonts)]}.ttf"
        yield word, written(word, font=font, size=(20, 28, 36)[i % 3], ground=ground, ink=ink, canvas=(288, 96))


def share_read(ocr, count):
    words, images = zip(*words_and_pictures(count), strict=True)
    return sum(ocr.read(image) == word for word, image in zip(words, images, strict=True)) / count


def test_words_are_read(ocr):
    assert share_read(ocr, 20) >= 0.95


@pytest.mark.slow
def test_at_least_95_percent_of_200_words_are_read(ocr):
    assert share_read(ocr, 200) >= 0.95


def test_right_wrong_and_missing_text_score_as_they_should(ocr):
    images = [written("Coffee"), written("Coffer"), written("Tiger"), Image.new("RGB", (128, 64), "white")]
    scores = ocr(prompts=['a mug that says "COFFEE"'] * 4, images=images)
    # Coffer: one letter of six. Tiger: e and r of coffee's six letters can stay where they are, at best
    assert scores[0] == 1.0
    assert scores[1] == pytest.approx(5 / 6)
    assert 0 < scores[2] <= 2 / 6
    assert scores[3] == 0.0


def test_lines_are_put_together_from_top_to_bottom(ocr):
    image = written("HAPPY\nBIRTHDAY\nDEAR ANNA", canvas=(320, 192))
    assert ocr.read(image).split("\n") == ["HAPPY", "BIRTHDAY", "DEAR ANNA"]
    assert ocr(prompts=['cake with "Happy Birthday Dear Anna"'], images=[image]) == [1.0]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "LA", "CMYK"])
def test_pictures_of_every_mode_are_read(mode, ocr):
    assert ocr(prompts=['"window"'], images=[written("window").convert(mode)]) == [1.0]


@pytest.mark.parametrize("size", [(1, 1), (2, 40), (40, 2), (5000, 8), (8, 5000), (32, 32)])
def test_pictures_of_strange_shapes_score_0(size, ocr):
    assert ocr(prompts=['"window"'], images=[Image.new("RGB", size, "white")]) == [0.0]


def test_a_picture_far_larger_than_the_limit_is_read(ocr):
    image = written("GARDEN", size=300, canvas=(2400, 900))
    assert ocr(prompts=['"garden"'], images=[image]) == [1.0]


def test_no_pictures_give_no_scores(ocr):
    assert ocr(prompts=[], images=[]) == []


def test_the_trainers_way_of_calling_gives_the_same(ocr):
    check_reward_func(ocr, ["prompt", "text", "level"])
    scores = RewardScorer([ocr]).score(["p", "q"], [written("river")] * 2, {"text": ["river", None]}).rewards[:, 0]
    assert scores[0] == 1.0 and scores[1].isnan()  # NaN where it does not apply


def test_several_threads_read_at_the_same_time(ocr):
    words = ["river", "temple", "window", "garden"]
    results = {}

    def read(word):
        results[word] = ocr.read(written(word))

    threads = [threading.Thread(target=read, args=(word,)) for word in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {word: word for word in words}


def test_a_closed_reader_reads_again():
    with OCRReward(num_threads=1) as reward:
        assert reward._loaded is None  # nothing is loaded before the first call
        assert reward.read(written("river")) == "river"
    assert reward._loaded is None
    assert reward(prompts=['"river"'], images=[written("river")]) == [1.0]


# --- construction ---


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime", "rapidfuzz"])
def test_without_a_package_the_extra_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'{package}.*pip install "trl_flow\[ocr\]"'):
        OCRReward()


@pytest.mark.parametrize("num_threads", [0, -1, 1.5, True, "2"])
def test_a_number_of_threads_that_is_none_is_refused(num_threads):
    with pytest.raises(ValueError, match="num_threads is"):
        OCRReward(num_threads)


def test_its_name_and_that_it_scores_intermediate_pictures(ocr):
    assert reward_name(ocr) == "ocr"
    assert is_dense(ocr) is True


def test_nothing_is_downloaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"a connection to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert OCRReward(num_threads=1)(prompts=['"river"'], images=[written("river")]) == [1.0]
