"""Reward functions: plain callables over PIL images, called by keyword, one number (or None) per image.

The names below are loaded when they are first used, so that a reward without a model does not wait for those with one.
"""

from importlib import import_module
from typing import Any


# Everything public: its module and, for a reward that commands and recipes can name, its names there, each with the
# positional arguments that it stands for
PUBLIC: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "AestheticReward": ("aesthetic", {"aesthetic": ()}),
    "CLIPScoreReward": ("clip_score", {"clipscore": (), "clipscore_dfn5b": ("apple/DFN5B-CLIP-ViT-H-14-378",)}),
    "ChatModel": ("chat", {}),
    "CheckpointError": ("base", {}),
    "DeQAReward": ("judge", {"deqa": ()}),
    "GenEvalReward": (
        "geneval",
        {
            "geneval": (),
            "geneval_nonnegative": ("nonnegative",),
            "geneval_strict": ("strict",),
            "geneval_correct": ("correct",),
        },
    ),
    "HPSv2Reward": ("hps", {"hpsv2": (), "hpsv2.1": ("v2.1",)}),
    "ImageReward": ("image_reward", {"imagereward": ()}),
    "JPEGCompressibilityReward": ("jpeg", {"jpeg_compressibility": ()}),
    "JPEGIncompressibilityReward": ("jpeg", {"jpeg_incompressibility": ()}),
    "JudgeError": ("chat", {}),
    "OCRReward": ("ocr", {"ocr": ()}),
    "PickScoreReward": ("pick_score", {"pickscore": ()}),
    "RemoteReward": ("remote", {}),
    "RewardServerError": ("remote", {}),
    "ShapesReward": (
        "shapes",
        {"shapes_soft": ("soft",), "shapes_strict": ("strict",), "shapes_fidelity": ("fidelity",)},
    ),
    # The judges ask the server at OPENAI_BASE_URL
    "UnifiedReward": (
        "judge",
        {
            "unifiedreward": (),
            "unifiedreward_alignment": ("alignment",),
            "unifiedreward_coherence": ("coherence",),
            "unifiedreward_style": ("style",),
        },
    ),
    "UnifiedRewardComparer": ("preference", {}),
    "UnreadableAnswer": ("judge", {}),
    "VLMComparer": ("preference", {}),
    "VLMJudgeReward": ("judge", {}),
    "WinRateReward": ("preference", {"win_rate": ()}),
}

__all__ = list(PUBLIC)


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return getattr(import_module(f"{__name__}.{PUBLIC[name][0]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
