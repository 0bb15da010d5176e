"""A bundled world of colored shapes: renderer, rule-based checker, prompt set and a small text-to-image pipeline."""

from trl_flow.shapes.bundled import load_pipeline, pipeline_path
from trl_flow.shapes.checker import CheckResult, Detection, check, detect
from trl_flow.shapes.prompts import load_prompts, make_caption, parse_caption, prompt_kind
from trl_flow.shapes.world import COLORS, IMAGE_SIZE, RELATIONS, SHAPES, PlacedShape, render


__all__ = [
    "COLORS", "IMAGE_SIZE", "RELATIONS", "SHAPES", "CheckResult", "Detection", "PlacedShape", "check", "detect",
    "load_pipeline", "load_prompts", "make_caption", "parse_caption", "pipeline_path", "prompt_kind", "render",
]  # fmt: skip
