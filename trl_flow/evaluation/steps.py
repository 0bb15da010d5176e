"""What models take the finished image for at every step of sampling (GRPO-Guard, Figure 11)."""

import os
from collections.abc import Callable, Mapping, Sequence

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from trl_flow.backbones import Backbone
from trl_flow.backbones.contract import encoded, scheduled
from trl_flow.evaluation.adapters import BASE, Adapter, loaded_adapter, parse_adapters
from trl_flow.evaluation.drawing import draw_batch
from trl_flow.evaluation.grids import comparison_grid, evenly
from trl_flow.evaluation.inputs import (
    DrawingOptions,
    check_images_to_edit,
    loaded_backbone,
    loading_options,
    prompt_sets,
)
from trl_flow.images import Sample, frame_of, to_rgb
from trl_flow.quiet import shows_bars
from trl_flow.rollout import decode


# Width of the images in a grid, all steps together, and what an image has at most and at least
_WIDTH, _LARGEST, _SMALLEST = 2048, 256, 96


@torch.no_grad()
def predict_steps(
    backbone: Backbone,
    prompt: str,
    *,
    seed: int,
    index: int = 0,
    num_inference_steps: int,
    guidance_scale: float,
    negative_prompt: str | None = None,
    image: Image.Image | None = None,
    on_step: Callable[[int], None] | None = None,
) -> list[Sample]:
    """
    The clean image, or video, as the model predicts it in one step from every state of sampling (GRPO-Guard, Figure
    11; the projection is VGPO's Eq. 10): image `i` is decoded from `x_t - t v(x_t, t)` before step `i`, for U-Nets
    from the `x_0` that they predict.

    Sampling is the evaluation's: along the ODE, so that nothing but the model moves the states. The last image of a
    flow model is the one that [`~trl_flow.evaluation.drawing.draw`] gives for the same seed and index.

    Args:
        backbone ([`Backbone`]): of a loaded pipeline, with or without an adapter.
        prompt (`str`): the prompt.
        seed, index (`int`): of the noise, non-negative.
        num_inference_steps, guidance_scale, negative_prompt: as for [`~trl_flow.evaluation.drawing.draw`].
        image (`PIL.Image.Image`, *optional*): the one to be edited, for pipelines that do.
        on_step (`Callable[[int], None]`, *optional*): called with the index of each step before it is taken.

    Returns:
        `list[Sample]`: one for each of the `num_inference_steps` steps, the noisiest first.

    Example:

    ```pycon
    >>> from trl_flow.backbones import get_backbone
    >>> from trl_flow.evaluation import predict_steps
    >>> from trl_flow.shapes import load_pipeline
    >>> pipeline = load_pipeline()
    >>> pipeline.set_progress_bar_config(disable=True)
    >>> backbone = get_backbone(pipeline, height=64, width=64, max_sequence_length=16)
    >>> images = predict_steps(backbone, "a red circle", seed=0, num_inference_steps=4, guidance_scale=2.0)
    >>> len(images), images[-1].size
    (4, (64, 64))
    ```
    """
    edited = [] if image is None else [to_rgb(image)]
    negative = None
    if backbone.uses_guidance(guidance_scale):
        negative = encoded(backbone, negative_prompt or "", *edited)
    latents: list[torch.Tensor] = []
    draw_batch(
        backbone,
        backbone.model,
        encoded(backbone, prompt, *edited),
        negative,
        seed=seed,
        indices=[index],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        on_step=on_step,
        predictions=latents,
    )
    return decode(backbone, torch.cat(latents))


def steps_grid(
    model: str | os.PathLike | DiffusionPipeline,
    adapters: Sequence[str | os.PathLike] | Mapping[str, str | os.PathLike] = (),
    *,
    prompts: Dataset | Mapping[str, Dataset],
    path: str | os.PathLike | None = None,
    options: DrawingOptions | None = None,
    backbone: Backbone | None = None,
    num_prompts: int = 4,
    progress: bool = True,
) -> Image.Image:
    """
    [`predict_steps`] of a base model and adapters side by side, from the same noise: one block for each prompt, in it
    one row for each model and one column for each step, with the model's input of the time `t` above. Of videos the
    frame in the middle is shown.

    Args:
        model, adapters, prompts, options, backbone, progress: as for [`~trl_flow.evaluation.evaluate_models`]. Of the
            images of a prompt it is the first, from the noise that this one has there.
        path (`str` or `os.PathLike`, *optional*): PNG file to write as well; its folder is made if need be.
        num_prompts (`int`): prompts of each set, spread evenly over it; all if there are fewer.

    Raises:
        ValueError: if something does not fit, before anything is drawn.

    Example:

    ```pycon
    >>> from trl_flow.evaluation import steps_grid
    >>> from trl_flow.shapes import load_prompts, pipeline_path
    >>> prompts = load_prompts("test").select(range(2))
    >>> grid = steps_grid(pipeline_path(), prompts=prompts, path="steps.png", num_prompts=2, progress=False)
    ```
    """
    adapters, sets = parse_adapters(adapters), prompt_sets(prompts)
    loading = loading_options(model, adapters)
    backbone, options, _ = loaded_backbone(model, options or DrawingOptions(), backbone, adapters, loading)
    check_images_to_edit(sets, backbone)
    return draw_steps(backbone, adapters, sets, options, path, num_prompts=num_prompts, progress=progress)


def draw_steps(
    backbone: Backbone,
    adapters: Sequence[Adapter],
    sets: Mapping[str, Dataset],
    options: DrawingOptions,
    path: str | os.PathLike | None,
    *,
    num_prompts: int = 4,
    progress: bool = True,
) -> Image.Image:
    """[`steps_grid`] of a backbone, adapters and prompt sets that have been checked."""
    if num_prompts < 1:
        raise ValueError(f"num_prompts is {num_prompts!r}, but must be a whole number of at least 1.")
    timesteps = scheduled(backbone, options.num_inference_steps).timesteps.tolist()
    names = ("seed", "num_inference_steps", "guidance_scale", "negative_prompt")
    settings = {name: getattr(options, name) for name in names}
    blocks = [(name, row) for name, dataset in sets.items() for row in evenly(len(dataset), num_prompts)]
    models = [BASE, *(adapter.name for adapter in adapters)]
    drawn: dict[tuple[str, str, int], list[Image.Image]] = {}
    total = len(models) * len(blocks) * len(timesteps)
    with tqdm(total=total, desc="steps", unit="step", disable=not (progress and shows_bars())) as bar:
        for model, adapter in zip(models, [None, *adapters], strict=True):
            bar.set_postfix_str(model)
            with loaded_adapter(backbone, adapter):
                for name, row in blocks:
                    example, index = sets[name][row], row * options.num_images_per_prompt
                    image = example["image"] if backbone.takes_image else None
                    one = {"index": index, "image": image, "on_step": lambda step: bar.update(), **settings}
                    drawn[model, name, row] = list(map(frame_of, predict_steps(backbone, example["prompt"], **one)))
    captions = []
    for name, row in blocks:
        prompt = sets[name][row]["prompt"]
        captions += [prompt if len(sets) == 1 else f"{name}: {prompt}", *[""] * (len(models) - 1)]
    return comparison_grid(
        [drawn[model, name, row] for name, row in blocks for model in models],
        [f"step {step}\nt = {timestep:.4g}" for step, timestep in enumerate(timesteps)],
        captions,
        path=path,
        cell=max(_SMALLEST, min(_LARGEST, _WIDTH // len(timesteps))),
        names=models * len(blocks),
    )
