"""What prompts and the rewards that read them agree on: GenEval's words, and the text that a prompt quotes."""

import re


# GenEval: https://github.com/djghosh13/geneval, `object_names.txt` and `create_prompts.py`

# What a prompt asks for, the `tag` of its metadata
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

# COCO's 80 classes in COCO's order. GenEval writes three of them out: "computer mouse", "tv remote" and
# "computer keyboard"
CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

POSITIONS = ("left of", "right of", "above", "below")


def dimension_of(testpoint: str) -> str:
    """UniGenBench's dimension of a test point: "Attribute" of "Attribute - Color", "Style" of "Style"."""
    return testpoint.split("-")[0].strip()


# Straight, English, Swedish, German, French and East Asian quotation marks, each with the mark that closes it. Behind
# a digit or a fraction the two that look like inches are inches
_NO_INCH = r"(?<![\d¼-¾⅐-⅞])"
_QUOTED = re.compile(
    rf'{_NO_INCH}"([^"]*)"|“([^“”]*)”|{_NO_INCH}”([^“”]*)”|„([^„“”]*)[“”]|«([^«»]*)»|»([^«»]*)«|「([^「」]*)」|『([^『』]*)』'
)
# Single ones stand around words: an apostrophe has a letter (or foot, a digit) before or behind it, or begins a word
# that is cut short. East Asian letters do not count, since there are no spaces between words
_LETTER = r"[^\W\u2e80-\U0010ffff]"
_CUT_SHORT = r"(?:n['’]|(?:\d0s|(?i:tis|twas|til|em))\b(?!['’]))"
_QUOTED_SINGLY = re.compile(
    rf"(?<!{_LETTER})(?<!['’])(?:''(?!['\s])(.+?)(?<!['\s])''|'(?!['\s]|{_CUT_SHORT})(.+?)(?<!['\s])'"
    rf"|[‘’](?![’\s]|{_CUT_SHORT})(.+?)(?<!\s)’|‚(.+?)[‘’]|‹(.+?)›|›(.+?)‹)(?!{_LETTER})",
    flags=re.DOTALL,
)


def quoted_text(prompt: str) -> str:
    """
    The first text in quotation marks in `prompt`: in double ones, straight (`"OPEN"`) or typographic (`“OPEN”`,
    `”OPEN”`, `„OPEN“`, `«OPEN»`, `»OPEN«`, `「OPEN」`, `『OPEN』`), or where there are none in single ones (`'OPEN'`,
    `‘OPEN’`, `’OPEN’`, `‚OPEN‘`, `‹OPEN›`, `›OPEN‹`). Inches (`27"`) and apostrophes open nothing.

    Raises:
        ValueError: if there is none, or nothing but white space in it.
    """
    match = _QUOTED.search(prompt) or _QUOTED_SINGLY.search(prompt)
    text = next(group for group in match.groups() if group is not None) if match else ""
    if not text.strip():
        raise ValueError(
            f"The prompt {prompt!r} has no text in quotation marks, so there is nothing to look for in its image. "
            'Quote it (a sign that reads "OPEN"), or give the data set a column `text` with the text of each prompt, '
            "and None for prompts that ask for none."
        )
    return text
