"""Reward functions: plain callables over PIL images, called by keyword, one number (or None) per image."""

from trl_flow.rewards.jpeg import JPEGCompressibilityReward, JPEGIncompressibilityReward
from trl_flow.rewards.shapes import ShapesReward


__all__ = ["JPEGCompressibilityReward", "JPEGIncompressibilityReward", "ShapesReward"]
