"""The Qwen-Image-Edit backbones compute what the stock pipelines compute."""

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from family_checks import (
    STEPS,
    initial_noise,
    ode_latents,
)
from PIL import Image
from tiny_qwen import tiny_qwen_edit_pipeline

from trl_flow.backbones import QwenImageEditBackbone, QwenImageEditPlusBackbone, get_backbone


PROMPTS = ["a red circle", "two"]
TOKENS = 20
SIZE = {"height": 64, "width": 64}
BACKBONES = {QwenImageEditPipeline: QwenImageEditBackbone, QwenImageEditPlusPipeline: QwenImageEditPlusBackbone}
each_pipeline = pytest.mark.parametrize("cls", BACKBONES)


@pytest.fixture(autouse=True)
def no_grad():
    # as the trainer calls a backbone
    with torch.no_grad():
        yield


def random_image(index: int, width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def images_of(backbone) -> list[Image.Image]:
    """One for each prompt, of other sizes than what is drawn and of its aspect ratio."""
    return [
        random_image(i, backbone.width * factor // 4, backbone.height * factor // 4) for i, factor in enumerate((3, 5))
    ]


def make_backbone(cls, max_sequence_length=TOKENS, size=SIZE, **transformer_config) -> QwenImageEditBackbone:
    pipeline = tiny_qwen_edit_pipeline(cls, **transformer_config)
    return get_backbone(pipeline, max_sequence_length=max_sequence_length, **size)


def evaluated(backbone, guidance_scale: float, negative_prompt: str = "") -> torch.Tensor:
    return ode_latents(backbone, guidance_scale, PROMPTS, negative_prompt, images_of(backbone))


def drawn_by_the_pipeline(backbone, guidance_scale: float, output_type: str, negative_prompt: str = ""):
    # One after another: Plus takes no more at once, and its elder's batches show the text encoder other sizes
    rows = zip(PROMPTS, images_of(backbone), initial_noise(backbone, len(PROMPTS)).split(1), strict=True)
    return (
        backbone.pipeline(
            image,
            prompt,
            negative_prompt=negative_prompt if guidance_scale > 1 else None,
            true_cfg_scale=guidance_scale,
            height=backbone.height,
            width=backbone.width,
            num_inference_steps=STEPS,
            latents=latents,
            output_type=output_type,
        ).images[0]
        for prompt, image, latents in rows
    )


@each_pipeline
def test_images_of_several_sizes_are_edited_as_in_the_pipeline(cls, small_input_images):
    backbone = make_backbone(cls, size={"height": 64, "width": 96})
    assert type(backbone) is BACKBONES[cls]
    final = evaluated(backbone, 2.5)
    latents = torch.stack(list(drawn_by_the_pipeline(backbone, 2.5, "latent")))
    # Prompts are filled up, and all drawn in one batch
    torch.testing.assert_close(final, latents, rtol=0, atol=1e-5)


def test_an_input_image_of_a_megapixel():
    backbone = make_backbone(QwenImageEditPipeline)
    condition = backbone.encode_prompt(PROMPTS[0], images_of(backbone)[0])
    assert condition["image_latents"].shape == (1, (1024 // 32) ** 2, 16)
    final = ode_latents(backbone, 1.0, PROMPTS[:1], images=images_of(backbone)[:1])
    expected = next(iter(drawn_by_the_pipeline(backbone, 1.0, "latent")))
    torch.testing.assert_close(final[0], expected, rtol=0, atol=1e-5)


def test_a_transformer_that_takes_the_input_image_for_finished(small_input_images):
    # As Qwen-Image-Edit-2511's: the tokens of the input image are told the time 0
    backbone = make_backbone(QwenImageEditPlusPipeline, zero_cond_t=True)
    final = evaluated(backbone, 2.5)
    latents = torch.stack(list(drawn_by_the_pipeline(backbone, 2.5, "latent")))
    torch.testing.assert_close(final, latents, rtol=0, atol=1e-5)
    assert (final - evaluated(make_backbone(QwenImageEditPlusPipeline), 2.5)).abs().max() > 1e-3


@each_pipeline
def test_the_image_matters_to_the_text_encoder_and_beside_the_latents(cls, small_input_images):
    backbone = make_backbone(cls)
    one, other = (backbone.encode_prompt("two", random_image(i, 64, 64)) for i in range(2))
    assert (one["encoder_hidden_states"] - other["encoder_hidden_states"]).abs().max() > 1e-3
    x, timestep = initial_noise(backbone, len(PROMPTS))[:1], torch.tensor(500.0)
    velocity = backbone.guided_prediction(backbone.model, x, timestep, one)
    mixed = backbone.guided_prediction(backbone.model, x, timestep, one | {"image_latents": other["image_latents"]})
    assert (velocity - mixed).abs().max() > 1e-3


@each_pipeline
def test_conditions_do_not_depend_on_the_prompts_length_nor_the_images_size(cls, small_input_images):
    backbone = make_backbone(cls)
    one = backbone.encode_prompt("", random_image(0, 64, 64))
    other = backbone.encode_prompt("x" * TOKENS, random_image(0, 200, 200))
    assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in other.items()}
    # The longest prompt fills its place, the empty one leaves as much as it is long
    assert other["encoder_hidden_states_mask"].all()
    assert (~one["encoder_hidden_states_mask"]).sum() == TOKENS


@each_pipeline
def test_an_image_of_another_shape_is_refused(cls):
    backbone = make_backbone(cls)
    backbone.check_image_size(1000, 1010)
    with pytest.raises(
        ValueError, match="64 pixels high and 96 wide, but must have the aspect ratio of the drawn images"
    ):
        backbone.check_image_size(64, 96)
    with pytest.raises(ValueError, match="64 pixels high"):
        backbone.encode_prompt("two", random_image(0, 96, 64))


def test_an_image_that_only_the_text_encoder_would_see_at_another_size_is_refused():
    # The VAE gets both at 832 x 1248, Plus' text encoder one at 320 x 480 and the other at 320 x 448: by its tokens
    # the condition is longer
    size = {"height": 1248, "width": 832}
    plus, elder = (make_backbone(cls, size=size) for cls in (QwenImageEditPlusPipeline, QwenImageEditPipeline))
    assert plus._input_size(1248, 832) == plus._input_size(1214, 832) == (1248, 832)
    assert [plus._scaled(plus.seen_area, height, 832) for height in (1248, 1214)] == [(480, 320), (448, 320)]
    elder.check_image_size(1214, 832)
    plus.check_image_size(1250, 832)
    with pytest.raises(ValueError, match="1214 pixels high and 832 wide, but must have the aspect ratio"):
        plus.check_image_size(1214, 832)


def test_a_vae_of_another_dtype_than_the_text_encoders(small_input_images):
    # As the trainer loads them for half precision; the pipeline's own call would fail
    backbone, image = make_backbone(QwenImageEditPipeline), random_image(0, 64, 64)
    whole = backbone.encode_prompt("two", image)
    backbone.pipeline.text_encoder.to(torch.bfloat16)
    half = backbone.encode_prompt("two", image)
    torch.testing.assert_close(half["image_latents"], whole["image_latents"])
    torch.testing.assert_close(half["encoder_hidden_states"].float(), whole["encoder_hidden_states"], rtol=0, atol=0.1)
