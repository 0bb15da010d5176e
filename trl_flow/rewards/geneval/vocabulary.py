"""What detectors call the classes of GenEval's prompts; the words of the prompts are in `prompt_words`."""

from trl_flow.prompt_words import CLASSES, COLORS, POSITIONS, TASKS


__all__ = ["CLASSES", "COLORS", "POSITIONS", "TASKS", "geneval_class"]

# What detectors call these classes: COCO's own names, and those of the older lists that some checkpoints carry
_OTHER_NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "tv monitor": "tv",
    "hair dryer": "hair drier",
}


def geneval_class(label: str) -> str:
    """What GenEval calls the class that a detector calls `label`; other labels come back in lower case."""
    name = label.strip().lower().replace("_", " ")
    return _OTHER_NAMES.get(name, name)
