"""The pipeline that comes with the package."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from trl_flow.shapes.world import IMAGE_SIZE


if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline


# Prompt tokens of its T5 encoder, of one layer for form's sake; the pipeline's default of 256 works too, but is slow
T5_TOKENS = 1
BUNDLED = "bundled"  # what commands and reports call it
TINY_DECODER = "tiny_decoder"  # folder in the pipeline's, of an AutoencoderTiny for `projection_vae`
# With which it draws its prompts best, where nothing else is said
DRAWING_SETTINGS = {
    **{"num_inference_steps": 10, "guidance_scale": 2.0},
    **{"height": IMAGE_SIZE, "width": IMAGE_SIZE, "max_sequence_length": T5_TOKENS},
}


def pipeline_path() -> str:
    """
    Folder of the bundled `StableDiffusion3Pipeline`; `FileNotFoundError` where the package has no data.

    `tiny_decoder` in it is an [`~diffusers.AutoencoderTiny`] that decodes the same latents several times as fast, for
    `projection_vae` of the configurations.

    Example:

    ```pycon
    >>> from diffusers import StableDiffusion3Pipeline
    >>> from trl_flow.shapes import pipeline_path
    >>> pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_path())
    ```
    """
    folder = Path(__file__).parent / "pipeline"
    if not (folder / "model_index.json").is_file():
        train = f"`python examples/bundled_model/train.py --output-dir {folder}` of a clone"
        raise FileNotFoundError(f"No bundled pipeline in {folder}. Reinstall trl_flow, or retrain it with {train}.")
    return str(folder)


def is_bundled(path: str | os.PathLike | None) -> bool:
    """Whether a hub id or a folder is that of the bundled pipeline."""
    return path is not None and Path(path).resolve() == Path(__file__).resolve().parent / "pipeline"


def load_pipeline() -> "StableDiffusion3Pipeline":
    """The bundled text-to-image model, in float32 on the CPU, as diffusers loads it from [`pipeline_path`].

    Example:

    ```pycon
    >>> from trl_flow.shapes import IMAGE_SIZE, load_pipeline
    >>> pipeline = load_pipeline()
    >>> pipeline.set_progress_bar_config(disable=True)
    >>> drawing = {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "num_inference_steps": 4}
    >>> image = pipeline("two red circles", guidance_scale=2.0, **drawing).images[0]
    >>> image.size
    (64, 64)
    ```
    """
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(pipeline_path())
