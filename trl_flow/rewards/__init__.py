"""Reward functions: plain callables over PIL images, called by keyword, one number (or None) per image.

The names below are loaded when they are first used, so that a reward without a model does not wait for those with one.
"""

from importlib import import_module
from typing import Any


_GENEVAL_SCORES = ("nonnegative", "strict", "correct")
_AXES = ("alignment", "coherence", "style")

# Everything public: its module and, for a reward that commands and recipes can name, its names there, each with the
# positional arguments that it stands for
PUBLIC: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "AestheticReward": ("aesthetic", {"aesthetic": ()}),
    "CLIPScoreReward": ("clip", {"clipscore": (), "clipscore_dfn5b": ("apple/DFN5B-CLIP-ViT-H-14-378",)}),
    "ChatModel": ("chat", {}),
    "CheckpointError": ("base", {}),
    "DeQAReward": ("judge", {"deqa": ()}),
    "FrameReward": ("frames", {}),
    "GenEvalReward": ("geneval", {"geneval": (), **{f"geneval_{score}": (score,) for score in _GENEVAL_SCORES}}),
    "HPSv2Reward": ("hps", {"hpsv2": (), "hpsv2.1": ("v2.1",)}),
    "ImageReward": ("image_reward", {"imagereward": ()}),
    "JPEGCompressibilityReward": ("jpeg", {"jpeg_compressibility": ()}),
    "JPEGIncompressibilityReward": ("jpeg", {"jpeg_incompressibility": ()}),
    "JudgeError": ("chat", {}),
    "MotionReward": ("motion", {"motion": ()}),
    "OCRReward": ("ocr", {"ocr": ()}),
    "PickScoreReward": ("clip", {"pickscore": ()}),
    "RemoteReward": ("remote", {}),
    "RewardServerError": ("remote", {}),
    "ShapesReward": ("shapes", {f"shapes_{score}": (score,) for score in ("soft", "strict", "fidelity")}),
    # The judges ask the server at OPENAI_BASE_URL
    "UniGenBenchReward": ("unigenbench", {"unigenbench": ()}),
    "UnifiedReward": ("judge", {"unifiedreward": (), **{f"unifiedreward_{axis}": (axis,) for axis in _AXES}}),
    "UnifiedRewardComparer": ("preference", {}),
    "UnreadableAnswer": ("judge", {}),
    "VLMComparer": ("preference", {}),
    "VLMJudgeReward": ("judge", {}),
    "VideoJudgeReward": ("judge", {"video_judge": ()}),
    "WinRateReward": ("preference", {"win_rate": ()}),
}

__all__ = list(PUBLIC)


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return getattr(import_module(f"{__name__}.{PUBLIC[name][0]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
