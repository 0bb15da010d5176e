"""One file a pipeline family; the class of the pipeline chooses it."""

from diffusers import DiffusionPipeline

from trl_flow.backbones.base import Backbone
from trl_flow.backbones.flux import FluxBackbone, FluxKontextBackbone
from trl_flow.backbones.flux2_klein import Flux2KleinBackbone
from trl_flow.backbones.qwen_image import QwenImageBackbone, QwenImageEditBackbone, QwenImageEditPlusBackbone
from trl_flow.backbones.schedules import DDIMSchedule, Schedule
from trl_flow.backbones.sd3 import StableDiffusion3Backbone
from trl_flow.backbones.stable_diffusion import StableDiffusionBackbone, StableDiffusionXLBackbone
from trl_flow.backbones.wan import WanBackbone, WanImageToVideoBackbone
from trl_flow.backbones.z_image import ZImageBackbone


__all__ = ["BACKBONES", "Backbone", "DDIMSchedule", "Flux2KleinBackbone", "FluxBackbone", "FluxKontextBackbone"]
__all__ += ["QwenImageBackbone", "QwenImageEditBackbone", "QwenImageEditPlusBackbone", "Schedule"]
__all__ += ["StableDiffusion3Backbone", "StableDiffusionBackbone", "StableDiffusionXLBackbone"]
__all__ += ["WanBackbone", "WanImageToVideoBackbone", "ZImageBackbone"]
__all__ += ["get_backbone"]

BACKBONES: dict[str, type[Backbone]] = {
    "Flux2KleinPipeline": Flux2KleinBackbone,
    "FluxKontextPipeline": FluxKontextBackbone,
    "FluxPipeline": FluxBackbone,
    "QwenImageEditPipeline": QwenImageEditBackbone,
    "QwenImageEditPlusPipeline": QwenImageEditPlusBackbone,
    "QwenImagePipeline": QwenImageBackbone,
    "StableDiffusion3Pipeline": StableDiffusion3Backbone,
    "StableDiffusionPipeline": StableDiffusionBackbone,
    "StableDiffusionXLPipeline": StableDiffusionXLBackbone,
    "WanImageToVideoPipeline": WanImageToVideoBackbone,
    "WanPipeline": WanBackbone,
    "ZImagePipeline": ZImageBackbone,
}
"""The backbone for each pipeline class, by the name of the class."""


def get_backbone(pipeline: DiffusionPipeline, **settings: int | float | str | None) -> Backbone:
    """
    The backbone for a loaded pipeline, chosen by its class (or a base class of it).

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): a loaded pipeline.
        settings: `height`, `width`, `max_sequence_length`, and of some families others, as for their [`Backbone`];
            `None` is the pipeline's default.

    Raises:
        ValueError: if no backbone is written for the pipeline's class, or it refuses the settings.

    Example:

    ```pycon
    >>> from trl_flow.backbones import get_backbone
    >>> from trl_flow.shapes import load_pipeline
    >>> backbone = get_backbone(load_pipeline(), height=64, width=64, max_sequence_length=16)
    >>> type(backbone).__name__, backbone.schedule(4).num_steps
    ('StableDiffusion3Backbone', 4)
    ```
    """
    for cls in type(pipeline).__mro__:
        if cls.__name__ in BACKBONES:
            backbone = BACKBONES[cls.__name__]
            given = {name: value for name, value in settings.items() if value is not None}
            for name in given.keys() - set(backbone.settings):
                raise ValueError(f"{name} is {given[name]!r}, but {cls.__name__} takes none. Leave {name} out.")
            return backbone(pipeline, **given)
    raise ValueError(
        f"{type(pipeline).__name__} is not supported. Supported pipelines: {', '.join(sorted(BACKBONES))}. "
        "Load the model as one of these, or write a backbone (one file, see trl_flow/backbones/sd3.py)."
    )
