"""Dtypes of frozen parts, quantized weights as far as a CPU goes, and the VAE's switches."""

import importlib.util

import pytest
import torch
from diffusers import PipelineQuantizationConfig
from tiny_models import tiny_sd3_pipeline
from tiny_training import brightness, tiny_config, tiny_trainer

from trl_flow.trainer.loading import component_dtypes, quantization_settings


@pytest.mark.parametrize(
    ("fields", "frozen"), [({}, torch.float32), ({"bf16": True}, torch.bfloat16)], ids=["float32", "bfloat16"]
)
def test_frozen_parts_have_the_dtype_of_training_but_for_the_vae(fields, frozen, tmp_path, tiny_sd3_path):
    trainer = tiny_trainer(tmp_path, pipeline=tiny_sd3_path, **fields)
    assert trainer.pipeline.text_encoder.dtype == trainer.backbone.dtype == frozen
    assert trainer.pipeline.vae.dtype == torch.float32
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_weights_that_are_trained_are_in_float32(tmp_path, tiny_sd3_path):
    trainer = tiny_trainer(tmp_path, pipeline=tiny_sd3_path, lora=None, bf16=True)
    assert trainer.pipeline.text_encoder.dtype == torch.bfloat16
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_which_dtypes_are_loaded(tmp_path):
    def dtypes(trains_adapter=True, **fields):
        return component_dtypes(tiny_config(tmp_path, **fields), trains_adapter=trains_adapter)

    half, single = torch.bfloat16, torch.float32
    assert dtypes() == {"default": single, "vae": single}
    assert dtypes(bf16=True) == {"default": half, "vae": single}
    trained = {"transformer": single, "unet": single}
    assert dtypes(trains_adapter=False, bf16=True) == {"default": half, "vae": single} | trained
    # one that is given decides for all parts, or for each
    assert dtypes(bf16=True, model_init_kwargs={"dtype": "float32"}) == {"default": single}
    assert dtypes(model_init_kwargs={"torch_dtype": "float16"}) == {"default": torch.float16}
    each = {"transformer": "bfloat16", "vae": torch.float16}
    expected = {"default": single, "transformer": half, "vae": torch.float16}
    assert dtypes(model_init_kwargs={"dtype": each}) == expected


@pytest.mark.parametrize("dtype", ["int8", "float64", "no_dtype"])
def test_dtypes_that_are_not_trained_in(tmp_path, tiny_sd3_path, dtype):
    with pytest.raises(ValueError, match=f"dtype '{dtype}', but must be float32, bfloat16 or float16"):
        tiny_trainer(tmp_path, pipeline=tiny_sd3_path, model_init_kwargs={"dtype": dtype})


def quantized(tmp_path, path, settings, **kwargs):
    return tiny_trainer(tmp_path, pipeline=path, model_init_kwargs={"quantization_config": settings}, **kwargs)


def test_quantized_weights_are_not_trained(tmp_path, tiny_sd3_path):
    with pytest.raises(ValueError, match="without a peft_config all weights are trained.*Train an adapter"):
        quantized(tmp_path, tiny_sd3_path, {"load_in_4bit": True}, lora=None)


def test_nor_are_those_of_a_loaded_pipeline(tmp_path):
    pipeline = tiny_sd3_pipeline()
    pipeline.transformer.is_quantized = True  # as loading does
    with pytest.raises(ValueError, match="transformer has quantized weights, which cannot be trained"):
        tiny_trainer(tmp_path, pipeline=pipeline, lora=None)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_the_extra_is_named(tmp_path, tiny_sd3_path):
    with pytest.raises(ValueError, match=r"pip install trl_flow\[quantization\]"):
        quantized(tmp_path, tiny_sd3_path, {"load_in_4bit": True})


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
def test_a_gpu_is_asked_for(tmp_path, tiny_sd3_path, monkeypatch):
    monkeypatch.setattr("trl_flow.trainer.loading.is_bitsandbytes_available", lambda: True)
    with pytest.raises(ValueError, match="need a GPU, and torch sees none here"):
        quantized(tmp_path, tiny_sd3_path, {"load_in_8bit": True})


def test_settings_of_quantization():
    compute = torch.bfloat16
    expected = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute}
    assert quantization_settings({"load_in_4bit": True}, compute) == expected
    own = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "float16"}
    assert quantization_settings(own, compute) == own


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "one of load_in_4bit and load_in_8bit"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "one of load_in_4bit and load_in_8bit"),
        ({"load_in_4bits": True}, "has load_in_4bits, but only"),
        ("4bit", "quantization_config is a str, but must be a diffusers.PipelineQuantizationConfig"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, tiny_sd3_path, settings, words):
    with pytest.raises(ValueError, match=words):
        quantized(tmp_path, tiny_sd3_path, settings)


def test_diffusers_own_object_is_passed_on(tmp_path, tiny_sd3_path, monkeypatch):
    given = PipelineQuantizationConfig(quant_backend="bitsandbytes_8bit", quant_kwargs={"load_in_8bit": True})
    seen = {}

    def load(path, **kwargs):
        seen.update(kwargs)
        return tiny_sd3_pipeline()

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", load)
    quantized(tmp_path, tiny_sd3_path, given)
    assert seen["quantization_config"] is given


def test_slices_and_tiles_of_the_vae(tmp_path):
    trainer = tiny_trainer(tmp_path / "a", enable_vae_slicing=True, enable_vae_tiling=True)
    assert trainer.pipeline.vae.use_slicing and trainer.pipeline.vae.use_tiling
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = trainer.backbone.decode(latents)
    assert brightness([], images) == pytest.approx(
        brightness([], tiny_trainer(tmp_path / "b").backbone.decode(latents))
    )


def test_a_vae_that_cannot_be_sliced(tmp_path):
    pipeline = tiny_sd3_pipeline()
    del pipeline.vae.use_slicing
    with pytest.raises(ValueError, match="enable_vae_slicing is set, but the pipeline's VAE .AutoencoderKL. cannot"):
        tiny_trainer(tmp_path, pipeline=pipeline, enable_vae_slicing=True)
