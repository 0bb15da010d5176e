"""The pipeline that comes with the package."""

from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline


def pipeline_path() -> str:
    """
    Folder of the bundled `StableDiffusion3Pipeline`.

    Raises:
        FileNotFoundError: when the package was installed without its data.
    """
    folder = Path(__file__).parent / "pipeline"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"the bundled pipeline is missing from {folder}; reinstall trl_flow, or train it anew with "
            f"`python -m trl_flow.shapes.train --output-dir {folder}`"
        )
    return str(folder)


def load_pipeline() -> "StableDiffusion3Pipeline":
    """
    The bundled text-to-image model, in float32 on the CPU.

    Loaded with diffusers alone: `StableDiffusion3Pipeline.from_pretrained(pipeline_path())` gives the same.
    """
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(pipeline_path())
