"""What sampling settings mean for a family: which have an effect, and what they are where nobody has said."""

from collections.abc import Mapping, Sequence
from typing import Any

from trl_flow.backbones.base import Backbone
from trl_flow.shapes.bundled import DRAWING_SETTINGS, is_bundled


def own_settings(backbone: Backbone) -> dict[str, Any]:
    """The `num_inference_steps` (if it has any) and `guidance_scale` (if it has none, 1) that the pipeline's call has
    by default; of a distilled model those that it was distilled for."""
    found = {"num_inference_steps": backbone.call_default("num_inference_steps")}
    found["guidance_scale"] = backbone.call_default(backbone.guidance_argument)
    if backbone.distilled_steps is not None:
        found["num_inference_steps"] = backbone.distilled_steps
    if not backbone.takes_guidance or found["guidance_scale"] is None:
        found["guidance_scale"] = 1.0
    if is_bundled(backbone.pipeline.config.get("_name_or_path")):
        found |= {name: DRAWING_SETTINGS[name] for name in found}
    return {name: value for name, value in found.items() if value is not None}


def with_own_settings(backbone: Backbone, given: Mapping[str, Any]) -> dict[str, Any]:
    """`num_inference_steps` and `guidance_scale` as `given`, and where that is `None` the pipeline's own. `ValueError`
    if it has none."""
    found = own_settings(backbone)
    for name in ("num_inference_steps", "guidance_scale"):
        if given.get(name) is not None:
            found[name] = given[name]
        elif name not in found:
            raise ValueError(f"{name} is missing: {type(backbone.pipeline).__name__} has none of its own. Give it.")
    return found


def evaluation_steps(backbone: Backbone, training_steps: int) -> int:
    """Steps of an evaluation for which none are said: the training's for a model that draws in a few, distilled or the
    bundled one, and the pipeline's own for all others."""
    if backbone.distilled_steps is not None or is_bundled(backbone.pipeline.config.get("_name_or_path")):
        return training_steps
    return own_settings(backbone).get("num_inference_steps", training_steps)


def effective(backbone: Backbone, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, but for those that change no image of this pipeline."""
    scale, found = settings.get("guidance_scale"), dict(settings)
    guides = scale is None or backbone.uses_guidance(scale)
    used = {
        "guidance_scale": backbone.takes_guidance,
        "negative_prompt": bool(settings.get("negative_prompt")) and backbone.takes_negative_prompt and guides,
        "max_sequence_length": backbone.fixed_sequence_length is None,
    }
    return {name: value for name, value in found.items() if used.get(name, True)}


def check_settings(backbone: Backbone, given: Mapping[str, Any], scales: Sequence[float]) -> None:
    """
    Raises `ValueError` for a setting that changes no image of this pipeline.

    Args:
        given (`Mapping[str, Any]`): settings that somebody has asked for, by their names; `None` is none. The empty
            negative prompt, and a guidance scale of at most 1, ask for nothing.
        scales (`Sequence[float]`): the guidance scales that will be drawn with.
    """
    kind, negative = type(backbone.pipeline).__name__, given.get("negative_prompt")
    if negative and not backbone.takes_negative_prompt:
        raise ValueError(
            f"negative_prompt is {negative!r}, but {kind} takes none: this model's guidance leads away from no "
            "prompt, or from the empty one only. Leave negative_prompt out."
        )
    if negative and not any(map(backbone.uses_guidance, scales)):
        shown = " and ".join(f"{scale:g}" for scale in dict.fromkeys(scales))
        raise ValueError(
            f"negative_prompt is {negative!r}, but has no effect: with guidance_scale {shown} {kind} does not guide. "
            "Raise guidance_scale, or leave negative_prompt out."
        )
    for name in ("guidance_scale", "eval_guidance_scale"):
        if (scale := given.get(name)) is not None and scale > 1 and not backbone.takes_guidance:
            raise ValueError(
                f"{name} is {scale:g}, but has no effect: this {kind} is distilled and not guided. Leave {name} out, "
                "or set it to 1."
            )
    second = given.get("guidance_scale_2")
    if second is not None and second > 1 and not any(map(backbone.uses_guidance, scales)):
        raise ValueError(
            f"guidance_scale_2 is {second:g}, but has no effect: {kind} guides with both scales or with none, by "
            "guidance_scale. Raise guidance_scale above 1, or leave guidance_scale_2 out."
        )
    length = given.get("max_sequence_length")
    if length is not None and backbone.fixed_sequence_length not in (None, length):
        raise ValueError(
            f"max_sequence_length is {length}, but {kind} does not take it: its prompts have "
            f"{backbone.fixed_sequence_length} tokens. Leave max_sequence_length out."
        )
