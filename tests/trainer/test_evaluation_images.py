"""In every family the trainer's evaluation draws the images that `trl-flow evaluate` draws with the same settings."""

from functools import partial

import numpy as np
import pytest
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from PIL import Image
from tiny_flux import tiny_flux_pipeline, tiny_klein_pipeline, tiny_kontext_pipeline, tiny_kontext_sizes
from tiny_models import tiny_sd3_pipeline
from tiny_qwen import (
    smaller_input_images,
    tiny_qwen_edit_pipeline,
    tiny_qwen_image_pipeline,
    tiny_z_image_pipeline,
)
from tiny_training import brightness, prompts, tiny_trainer
from tiny_unets import tiny_sd_pipeline, tiny_sdxl_pipeline

from trl_flow.evaluation.drawing import draw


# Pipeline, side of the images, prompt tokens
FAMILIES = {
    "sd3": (tiny_sd3_pipeline, 16, 16),
    "sd": (tiny_sd_pipeline, 32, 16),
    "sdxl": (tiny_sdxl_pipeline, 32, 16),
    "flux": (tiny_flux_pipeline, 16, 16),
    "schnell": (partial(tiny_flux_pipeline, guidance_embeds=False), 16, 16),
    "kontext": (tiny_kontext_pipeline, 16, 16),
    "klein": (tiny_klein_pipeline, 16, 24),
    "klein distilled": (partial(tiny_klein_pipeline, is_distilled=True), 16, 24),
    "qwen-image": (tiny_qwen_image_pipeline, 16, 16),
    "qwen-image-edit": (partial(tiny_qwen_edit_pipeline, QwenImageEditPipeline), 64, 16),
    "qwen-image-edit-plus": (partial(tiny_qwen_edit_pipeline, QwenImageEditPlusPipeline), 64, 16),
    "z-image": (tiny_z_image_pipeline, 16, 48),
}


@pytest.fixture(autouse=True)
def small_inputs(monkeypatch):
    smaller_input_images(monkeypatch)
    with tiny_kontext_sizes():
        yield


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=int) for image in images])


@pytest.mark.parametrize("name", FAMILIES)
def test_evaluation_draws_what_draw_does(name, tmp_path):
    make, side, tokens = FAMILIES[name]
    rng, shown = np.random.default_rng(0), []

    def reward(prompts, images, **kwargs):
        shown.extend(images)
        return brightness(prompts, images)

    inputs = [Image.fromarray(rng.integers(0, 256, (2 * side, 2 * side, 3), dtype=np.uint8)) for _ in range(2)]
    dataset = prompts(2, image=inputs)
    sizes = {"height": side, "width": side, "max_sequence_length": tokens}
    trainer = tiny_trainer(
        tmp_path,
        pipeline=make(),
        reward_funcs=reward,
        train_dataset=dataset,
        eval_dataset=dataset,
        num_generations_eval=2,
        per_device_eval_batch_size=3,
        seed=5,
        guidance_scale=7.0,  # of training: not the evaluation's
        **sizes,
    )
    takes_image, takes_negative = trainer.backbone.takes_image, trainer.backbone.takes_negative_prompt
    pipeline, by_settings = make(), []
    for guidance_scale, negative_prompt in ((1.0, None), (30.0, None), (30.0, "a moth" if takes_negative else None)):
        trainer.args.eval_guidance_scale, trainer.args.negative_prompt = guidance_scale, negative_prompt
        shown.clear()
        trainer.evaluate()
        expected = draw(
            pipeline,
            dataset["prompt"][:],
            seed=5,
            num_images_per_prompt=2,
            num_inference_steps=2,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            images=inputs if takes_image else None,
            batch_size=3,
            **sizes,
        )
        difference = abs(pixels(shown) - pixels(expected))
        assert difference.max() <= 2 and difference.mean() < 0.02
        by_settings.append(pixels(shown))
    plain, guided, negative = by_settings
    # The settings matter, where the family has them
    ignores_guidance = name in ("schnell", "klein distilled")
    assert (abs(plain - guided).mean() > 0.05) != ignores_guidance
    assert (abs(guided - negative).mean() > 0.05) == takes_negative
