"""GenEval: do the objects of a prompt appear, in the right number, colors and positions?

What needs models is loaded when it is first used, so that its words and rules do not wait for them.
"""

from importlib import import_module
from typing import Any

from trl_flow.prompt_words import CLASSES, COLORS, POSITIONS, TASKS
from trl_flow.rewards.geneval.rules import Detection, GenEvalResult


_LAZY = {
    "CLIPColorClassifier": "colors",
    "GenEvalReward": "reward",
    "Mask2FormerDetector": "detector",
    "crop_object": "colors",
}

__all__ = ["CLASSES", "COLORS", "Detection", "GenEvalResult", "POSITIONS", "TASKS", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
