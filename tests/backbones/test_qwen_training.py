"""Qwen-Image, its editing pipelines and Z-Image: trained by every config, and shared with the stock pipelines."""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from family_checks import (
    Family,
    check_adapter,
    check_training,
    conditions,
    family_trainer,
    images_to_edit,
    initial_noise,
    ode_latents,
    ratio_deviation,
)
from tiny_qwen import (
    smaller_input_images,
    tiny_qwen_edit_pipeline,
    tiny_qwen_image_pipeline,
    tiny_z_image_pipeline,
)
from tiny_training import assert_equal, tiny_lora, tiny_trainer, trained_weights

from trl_flow import FlowGRPOConfig, GuardConfig, SLASConfig, VGPOConfig


def qwen_call(backbone, noise, guidance_scale):
    # "" for the trainer's missing negative prompt; the pipeline's own None would leave guidance out
    return {"latents": noise, "true_cfg_scale": guidance_scale, "negative_prompt": [""] * len(noise)}


EDITING = {
    "qwen-image-edit": Family(partial(tiny_qwen_edit_pipeline, QwenImageEditPipeline), size=(64, 64)),
    "qwen-image-edit-plus": Family(partial(tiny_qwen_edit_pipeline, QwenImageEditPlusPipeline), size=(64, 64)),
}
DRAWING = {
    "qwen-image": Family(tiny_qwen_image_pipeline, call=qwen_call),
    # Captions of up to 33 tokens, which the transformer fills up to 32 or 64
    "z-image": Family(tiny_z_image_pipeline, max_sequence_length=48),
}
FAMILIES = DRAWING | EDITING
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture(autouse=True)
def small_input_images(monkeypatch):
    smaller_input_images(monkeypatch)


@each_family
@pytest.mark.parametrize("cls", [FlowGRPOConfig, GuardConfig, SLASConfig, VGPOConfig])
def test_every_config_trains(family, cls, tmp_path):
    check_training(family, cls, torch.float32, tmp_path)


@each_family
def test_training_in_half_precision(family, tmp_path):
    check_training(family, GuardConfig, torch.bfloat16, tmp_path)


@each_family
def test_every_weight_of_the_default_lora_is_reached_by_the_gradient(family, tmp_path):
    # One that is not would keep processes waiting for each other, see `ddp_find_unused_parameters`
    trainer = family_trainer(family, tmp_path)
    weights = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    layers = {name.split(".lora_")[0].rpartition("attn.")[2].rpartition("attention.")[2] for name in weights}
    text = {"add_k_proj", "add_q_proj", "add_v_proj"} if family is not FAMILIES["z-image"] else set()
    assert layers == text | {"to_k", "to_out.0", "to_q", "to_v"}
    backbone = trainer.backbone
    with torch.no_grad():
        condition = conditions(backbone, ["a cat"])
    velocity = backbone.guided_prediction(trainer.model, initial_noise(backbone, 1), torch.tensor(500.0), condition)
    velocity.square().mean().backward()
    assert [name for name, weight in weights.items() if weight.grad is None] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_family
def test_the_ratio_hardly_depends_on_the_batch(family, dtype):
    # Sums come in another order, and Z-Image's captions are filled up to the longest of the batch: velocities differ
    # by up to 6e-7 in float32. Measured on the ratio: 0, after the mean over the latents. Other devices may round it
    assert ratio_deviation(family, dtype) < (1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("family", [FAMILIES["z-image"], FAMILIES["qwen-image-edit"]], ids=["z-image", "qwen"])
def test_gradient_checkpointing_changes_nothing(family, tmp_path):
    weights = []
    for on in (False, True):
        trainer = family_trainer(family, tmp_path / str(on), gradient_checkpointing=on, max_steps=1)
        trainer.train()
        weights.append(trained_weights(trainer))
    assert_equal(weights[1], weights[0])


@pytest.mark.parametrize("family", DRAWING.values(), ids=DRAWING)
def test_the_adapter_draws_the_same_images_in_the_stock_pipeline(family, tmp_path):
    check_adapter(family, tmp_path)


@pytest.mark.parametrize("family", EDITING.values(), ids=EDITING)
def test_the_adapter_edits_the_same_images_in_the_stock_pipeline(family, tmp_path):
    # One at a time, as Plus takes no more
    def edited(pipeline) -> np.ndarray:
        kwargs = {"negative_prompt": "", "true_cfg_scale": 2.0, "num_inference_steps": 3}
        height, width = family.size
        generator = torch.Generator().manual_seed(0)
        images = pipeline(
            images_to_edit(1, family.size)[0], "a cat", height=height, width=width, generator=generator, **kwargs
        ).images
        return np.asarray(images[0])

    trainer = family_trainer(family, tmp_path, lora=tiny_lora(lora_alpha=16))  # not the rank
    trainer.train()
    trainer.save_model()
    stock = family.make_pipeline()
    untrained = edited(stock)
    stock.load_lora_weights(tmp_path)
    assert np.array_equal(edited(stock), edited(trainer.pipeline))
    assert not np.array_equal(edited(stock), untrained)
    assert all(config.lora_alpha == 16 for config in stock.transformer.peft_config.values())


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("family", DRAWING.values(), ids=DRAWING)
def test_the_model_cards_code_draws_as_in_training(family, guidance_scale, tmp_path):
    family.make_pipeline().save_pretrained(tmp_path / "base")
    trainer = tiny_trainer(
        tmp_path / "run",
        pipeline=str(tmp_path / "base"),
        guidance_scale=guidance_scale,
        max_sequence_length=family.max_sequence_length,
        max_steps=1,
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    code = (tmp_path / "run" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {"latents": initial_noise(trainer.backbone, 1)}
    code = code.replace("path/to", str(tmp_path))
    exec(code.replace('"a prompt"', '"a cat", latents=latents, output_type="latent"'), names)
    own, other = (ode_latents(trainer.backbone, scale, ["a cat"]) for scale in (guidance_scale, 4.0))
    torch.testing.assert_close(names["image"], own[0], rtol=0, atol=3e-6)
    assert (own - other).abs().max() > 1e-4


@pytest.mark.parametrize("family", EDITING.values(), ids=EDITING)
def test_the_model_cards_code_edits_a_picture(family, tmp_path):
    trainer = family_trainer(family, tmp_path)
    trainer.create_model_card()
    call = (tmp_path / "README.md").read_text().split("image = pipeline(")[1].split(").images")[0]
    expected = {"image=load_image", 'prompt="a prompt"', "true_cfg_scale=2.0", "negative_prompt=''"}
    assert [part for part in expected if part not in call] == []
    assert "guidance_scale" not in call.replace("true_cfg_scale", "")
