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


# Straight, English, Swedish, German, French and East Asian quotation marks, each with the mark that closes it
_QUOTED = re.compile(
    r'"([^"]*)"|“([^“”]*)”|”([^“”]*)”|„([^„“”]*)[“”]|«([^«»]*)»|»([^«»]*)«|「([^「」]*)」|『([^『』]*)』'
)


def quoted_text(prompt: str) -> str:
    """
    The first text between double quotation marks in `prompt`: straight (`"OPEN"`) or typographic (`“OPEN”`, `”OPEN”`,
    `„OPEN“`, `«OPEN»`, `»OPEN«`, `「OPEN」`, `『OPEN』`).

    Raises:
        ValueError: if there is none, or nothing but white space in it.
    """
    match = _QUOTED.search(prompt)
    text = next(group for group in match.groups() if group is not None) if match else ""
    if not text.strip():
        raise ValueError(
            f"The prompt {prompt!r} has no text between double quotation marks, so there is nothing to look for in "
            'its image. Quote it (a sign that reads "OPEN"), or give the data set a column `text` with the text of '
            "each prompt, and None for prompts that ask for none."
        )
    return text
