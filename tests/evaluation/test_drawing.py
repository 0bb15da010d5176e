"""One way of drawing for every family: what it computes, and that it depends on seed, index and settings alone."""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline
from PIL import Image
from tiny_comparisons import assert_same_images
from tiny_flux import tiny_flux_pipeline, tiny_klein_pipeline, tiny_kontext_pipeline, tiny_kontext_sizes
from tiny_models import tiny_sd3_pipeline
from tiny_qwen import (
    smaller_input_images,
    tiny_qwen_edit_pipeline,
    tiny_qwen_image_pipeline,
    tiny_z_image_pipeline,
)
from tiny_unets import tiny_sd_pipeline, tiny_sdxl_pipeline

from trl_flow.backbones import get_backbone
from trl_flow.evaluation.drawing import draw, draw_batch
from trl_flow.rollout import RandomStream, sample_generator


PROMPTS = ["a cat", "two dogs", "a bird"]
SD3 = {"height": 16, "width": 16, "max_sequence_length": 16}

# Pipeline and settings of each
FAMILIES = {
    "sd3": (tiny_sd3_pipeline, SD3),
    "sd": (tiny_sd_pipeline, SD3 | {"height": 32, "width": 32}),
    "sdxl": (tiny_sdxl_pipeline, SD3 | {"height": 32, "width": 32}),
    "flux": (tiny_flux_pipeline, SD3),
    "klein": (tiny_klein_pipeline, SD3 | {"max_sequence_length": 40}),
    "kontext": (tiny_kontext_pipeline, SD3),
    "qwen-image": (tiny_qwen_image_pipeline, SD3 | {"max_sequence_length": 40}),
    "qwen-image-edit": (partial(tiny_qwen_edit_pipeline, QwenImageEditPipeline), SD3 | {"height": 64, "width": 64}),
    "qwen-image-edit-plus": (
        partial(tiny_qwen_edit_pipeline, QwenImageEditPlusPipeline),
        SD3 | {"height": 64, "width": 64},
    ),
    "z-image": (tiny_z_image_pipeline, SD3 | {"max_sequence_length": 48}),
}


@pytest.fixture
def small_inputs(monkeypatch):
    smaller_input_images(monkeypatch)
    with tiny_kontext_sizes():
        yield


def noise_images(number: int, side: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(number)]


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=int) for image in images])


def drawn(pipeline: DiffusionPipeline, prompts: list[str] = PROMPTS, **options) -> np.ndarray:
    return pixels(
        draw(pipeline, prompts, **{"seed": 0, "num_inference_steps": 2, "guidance_scale": 2.0, **SD3} | options)
    )


@torch.no_grad()
def expected_image(backbone, prompt: str, image, negative_prompt: str, index: int) -> Image.Image:
    """One image of two steps at guidance 2 and seed 7, from the family's own parts, step by step."""
    edited = [] if image is None else [image]
    condition = backbone.encode_prompt(prompt, *edited)
    negative = backbone.encode_prompt(negative_prompt, *edited) if backbone.uses_guidance(2.0) else None
    schedule = backbone.schedule(2)
    latents = torch.randn(backbone.latent_shape(), generator=sample_generator(7, RandomStream.EVALUATION, index))[None]
    for step in range(2):
        prediction = backbone.guided_prediction(
            backbone.model, latents, schedule.timesteps[step], condition, negative, 2.0
        )
        if hasattr(schedule, "sigmas"):
            latents = latents + (schedule.sigmas[step + 1] - schedule.sigmas[step]) * prediction
        else:
            latents = backbone.scheduler.step(prediction, schedule.timesteps[step], latents, eta=0.0).prev_sample
    return backbone.decode(latents)[0]


@pytest.mark.usefixtures("small_inputs")
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_draws_what_its_parts_compute(name):
    make, sizes = FAMILIES[name]
    pipeline = make()
    backbone = get_backbone(pipeline, **sizes)
    images = noise_images(2, 2 * backbone.height) if backbone.takes_image else None
    options = {
        "seed": 7,
        "num_images_per_prompt": 2,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "images": images,
    }
    negative = "a bird" if backbone.takes_negative_prompt else None
    found = pixels(draw(pipeline, PROMPTS[:2], negative_prompt=negative, batch_size=3, **options, **sizes))
    again = pixels(draw(backbone, PROMPTS[:2], negative_prompt=negative, batch_size=3, **options))
    assert_same_images(found, again)
    expected = pixels(
        [
            expected_image(backbone, PROMPTS[i // 2], None if images is None else images[i // 2], negative or "", i)
            for i in range(4)
        ]
    )
    assert_same_images(found, expected)
    # The noise of a neighbor changes far more
    assert min(abs(found[i] - expected[i - 1]).mean() for i in range(4)) > 0.3


def test_a_batch_says_which_step_it_takes(tiny_sd3):
    backbone = get_backbone(tiny_sd3, **SD3)
    with torch.no_grad():
        condition = backbone.encode_prompt("a cat")
    steps = []
    settings = {"seed": 0, "num_inference_steps": 3, "guidance_scale": 1.0}
    (image,) = draw_batch(backbone, backbone.model, condition, None, indices=[5], on_step=steps.append, **settings)
    assert steps == [0, 1, 2]
    assert_same_images([image], draw(backbone, ["a cat"], first_index=5, **settings))


def test_the_batch_size_changes_no_image(tiny_sd3):
    one, many = drawn(tiny_sd3, batch_size=1, num_images_per_prompt=2), drawn(tiny_sd3, num_images_per_prompt=2)
    assert len(one) == 6
    assert_same_images(one, many)


def test_every_image_is_another_and_depends_on_the_seed(tiny_sd3):
    images = drawn(tiny_sd3, ["a cat"], num_images_per_prompt=3)
    others = drawn(tiny_sd3, ["a cat"], num_images_per_prompt=3, seed=1)
    everything = [*images, *others]
    assert all(abs(everything[i] - everything[j]).mean() > 5 for i in range(6) for j in range(i)), (
        "two images from different noise are nearly equal"
    )


def test_images_of_one_prompt_are_next_to_each_other(tiny_sd3):
    # Index 2 is the first image of the second prompt: changing that prompt changes images 2 and 3 only
    images = drawn(tiny_sd3, ["a cat", "two dogs"], num_images_per_prompt=2, guidance_scale=30.0)
    changed = drawn(tiny_sd3, ["a cat", "something else"], num_images_per_prompt=2, guidance_scale=30.0)
    assert [abs(a - b).mean() > 0.5 for a, b in zip(images, changed, strict=True)] == [False, False, True, True]


def test_a_set_that_is_drawn_piece_by_piece_is_the_same(tiny_sd3):
    whole = drawn(tiny_sd3, batch_size=1)
    pieces = [drawn(tiny_sd3, PROMPTS[i : i + 1], first_index=i, batch_size=1) for i in range(3)]
    assert_same_images(whole, np.concatenate(pieces))


def test_each_setting_changes_the_images(tiny_sd3):
    plain = drawn(tiny_sd3)
    assert abs(plain - drawn(tiny_sd3, num_inference_steps=3)).mean() > 0.1
    guided = drawn(tiny_sd3, guidance_scale=30.0)
    assert abs(plain - guided).mean() > 0.1
    assert abs(guided - drawn(tiny_sd3, guidance_scale=30.0, negative_prompt="a cat")).mean() > 0.1
    assert drawn(tiny_sd3, height=8, width=12).shape == (3, 8, 12, 3)


def test_each_prompt_is_encoded_once(tiny_sd3, monkeypatch):
    backbone = get_backbone(tiny_sd3, **SD3)
    encoded = []
    encode = type(backbone).encode_prompt
    monkeypatch.setattr(type(backbone), "encode_prompt", lambda self, text: encoded.append(text) or encode(self, text))
    draw(backbone, PROMPTS, seed=0, num_images_per_prompt=3, num_inference_steps=1, batch_size=2)
    assert sorted(encoded) == sorted(["", *PROMPTS])


@pytest.mark.usefixtures("small_inputs")
def test_images_are_edited_each_with_its_prompt():
    inputs = noise_images(2, 32)
    pipeline = tiny_kontext_pipeline()
    images = drawn(pipeline, PROMPTS[:2], images=inputs, num_images_per_prompt=2)
    swapped = drawn(pipeline, PROMPTS[:2], images=inputs[::-1], num_images_per_prompt=2)
    assert (
        min(abs(a - b).mean() for a, b in zip(images, swapped, strict=True)) > 0.03
    )  # rounding moves less than 1 value in 100
    gray = [image.convert("L") for image in inputs]
    colored = [image.convert("RGB") for image in gray]
    assert_same_images(drawn(pipeline, PROMPTS[:2], images=gray), drawn(pipeline, PROMPTS[:2], images=colored))
    with pytest.raises(ValueError, match="2 images for 3 prompts"):
        draw(pipeline, PROMPTS, seed=0, images=inputs, **SD3)
    with pytest.raises(ValueError, match="draws from an image"):
        draw(pipeline, PROMPTS, seed=0, **SD3)


def test_what_does_not_fit_is_refused(tiny_sd3):
    with pytest.raises(ValueError, match="draws from no image"):
        draw(tiny_sd3, PROMPTS, seed=0, images=noise_images(3, 16), **SD3)
    with pytest.raises(ValueError, match="the backbone's own"):
        draw(get_backbone(tiny_sd3, **SD3), PROMPTS, seed=0, height=16)

    class OtherPipeline(DiffusionPipeline):
        pass

    with pytest.raises(ValueError, match="OtherPipeline is not supported"):
        draw(OtherPipeline(), PROMPTS, seed=0)


def test_a_bar_is_shown_in_a_terminal_when_it_has_a_name(tiny_sd3, capfd, monkeypatch):
    monkeypatch.setattr("trl_flow.evaluation.drawing.shows_bars", lambda: True)
    drawn(tiny_sd3)
    assert capfd.readouterr().err == ""
    drawn(tiny_sd3, progress="All images", batch_size=2)
    assert "All images" in capfd.readouterr().err
