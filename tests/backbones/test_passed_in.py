"""Pipelines that were changed before they are passed in: as they were loaded again, or refused with the remedy."""

from functools import partial

import numpy as np
import pytest
import torch
from accelerate.utils import compile_regions, is_compiled_module
from diffusers import FirstBlockCacheConfig, UNet2DConditionModel
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor, FluxTransformer2DModel
from families import FAMILIES as ALL
from family_checks import Family, conditions, initial_noise, random_lora
from peft import inject_adapter_in_model
from tiny_flux import tiny_flux_pipeline, tiny_klein_pipeline, tiny_kontext_pipeline
from tiny_models import CLIP_WIDTH, tiny_sd3_pipeline
from tiny_qwen import tiny_qwen_image_pipeline, tiny_z_image_pipeline
from tiny_sd35 import tiny_sd35_pipeline
from tiny_training import assert_equal, brightness, prompts, tiny_config, tiny_lora, tiny_trainer, train, warnings_of
from tiny_unets import tiny_sd_pipeline, tiny_sdxl_pipeline

from trl_flow import FlowGRPOTrainer
from trl_flow.evaluation.drawing import draw


FAMILIES = {
    "sd3": Family(tiny_sd3_pipeline),
    "sd35-medium": Family(partial(tiny_sd35_pipeline, "medium"), size=(64, 64)),
    "sd": Family(tiny_sd_pipeline, size=(32, 32)),
    "sdxl": Family(tiny_sdxl_pipeline, size=(32, 32)),
    "flux": Family(tiny_flux_pipeline),
    "kontext": Family(tiny_kontext_pipeline),
    "klein": Family(tiny_klein_pipeline, max_sequence_length=24),
    "qwen-image": Family(tiny_qwen_image_pipeline, max_sequence_length=40),
    "wan": ALL["wan21"],
    "z-image": Family(tiny_z_image_pipeline, max_sequence_length=48),
}

# ---- Compiled and wrapped ----


def whole(pipeline):
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")


def in_place(pipeline):
    pipeline.transformer.compile(backend="eager")


def regions(pipeline):
    pipeline.transformer = compile_regions(pipeline.transformer, backend="eager")


def blocks(pipeline):
    for i, block in enumerate(pipeline.transformer.transformer_blocks):
        pipeline.transformer.transformer_blocks[i] = torch.compile(block, backend="eager")


def blocks_in_place(pipeline):
    for block in pipeline.transformer.transformer_blocks:
        block.compile(backend="eager")


def forward(pipeline):
    pipeline.transformer.forward = torch.compile(pipeline.transformer.forward, backend="eager")


def frozen_parts(pipeline):
    for name in ("vae", "text_encoder", "text_encoder_3"):
        setattr(pipeline, name, torch.compile(getattr(pipeline, name), backend="eager"))


def data_parallel(pipeline):
    pipeline.transformer = torch.nn.DataParallel(pipeline.transformer)


def both(pipeline):
    pipeline.transformer = torch.nn.DataParallel(torch.compile(pipeline.transformer, backend="eager"))


WRAPPERS = [whole, in_place, regions, blocks, blocks_in_place, forward, frozen_parts, data_parallel, both]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The weights that training an untouched pipeline gives."""
    return train(tmp_path_factory.mktemp("plain"), max_steps=1)


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
def test_a_compiled_or_wrapped_pipeline_is_as_it_was_loaded(wrap):
    pipeline, untouched = tiny_sd3_pipeline(), tiny_sd3_pipeline()
    wrap(pipeline)
    backbone = FAMILIES["sd3"].backbone(pipeline=pipeline)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_3"):
        part, expected = getattr(pipeline, name), getattr(untouched, name)
        assert type(part) is type(expected)
        assert part.state_dict().keys() == expected.state_dict().keys()
        assert not any(is_compiled_module(module) or module._compiled_call_impl for module in part.modules())
    assert backbone.model.forward.__func__ is type(backbone.model).forward


def test_it_trains_as_another_and_its_adapter_loads_in_a_stock_pipeline(plain, tmp_path):
    pipeline = tiny_sd3_pipeline()
    both(pipeline)
    with warnings_of("trl_flow") as warnings:
        trainer = tiny_trainer(tmp_path, pipeline=pipeline, max_steps=1)
    assert [message for message in warnings if "transformer came from torch.compile" in message]
    trainer.train()
    trainer.save_model()
    assert_equal({name: p for name, p in trainer.model.named_parameters() if p.requires_grad}, plain)
    stock = tiny_sd3_pipeline()
    stock.load_lora_weights(tmp_path)
    assert stock.get_active_adapters()


def test_what_was_done_after_the_backbone_was_made(tmp_path):
    pipeline = tiny_sd3_pipeline()
    backbone = FAMILIES["sd3"].backbone(pipeline=pipeline)
    whole(pipeline)
    trainer = FlowGRPOTrainer(pipeline, brightness, tiny_config(tmp_path), prompts(), backbone=backbone)
    assert type(trainer.model) is type(tiny_sd3_pipeline().transformer)


def test_a_reference_is_a_copy_whose_forward_is_its_own(tmp_path):
    # torch.compile(model.forward) is bound to the model that it was taken from
    pipeline = tiny_sd3_pipeline()
    forward(pipeline)
    trainer = tiny_trainer(tmp_path, pipeline=pipeline, lora=None, beta=0.1)
    assert trainer.policy._reference.forward.__self__ is trainer.policy._reference


@pytest.mark.parametrize("kind", ["FullyShardedDataParallel", "DeepSpeedEngine"])
def test_weights_that_are_split_over_processes_are_refused(kind):
    pipeline = tiny_sd3_pipeline()
    pipeline.transformer = type(kind, (torch.nn.Module,), {})()  # as these wrappers are called
    with pytest.raises(ValueError, match=f"transformer is a {kind}, whose weights are split over processes"):
        FAMILIES["sd3"].backbone(pipeline=pipeline)


# ---- Fused projections ----


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "z-image"])  # which cannot be fused
@pytest.mark.usefixtures("small_input_images")
def test_fused_projections_are_separate_again(name):
    family = FAMILIES[name]
    pipeline, untouched = family.make_pipeline(), family.backbone()
    getattr(pipeline, untouched.component).fuse_qkv_projections()
    backbone = family.backbone(pipeline=pipeline)
    assert backbone.model.state_dict().keys() == untouched.model.state_dict().keys()
    with torch.no_grad():
        condition = conditions(backbone, ["a cat"])
    told = initial_noise(backbone, 1), torch.tensor(500.0), condition
    with torch.no_grad():
        expected = untouched.guided_prediction(untouched.model, *told)
        torch.testing.assert_close(backbone.guided_prediction(backbone.model, *told), expected, rtol=0, atol=1e-6)
    model = random_lora(backbone)
    backbone.guided_prediction(model, *told).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_pipelines_own_method_too():
    pipeline = tiny_sd_pipeline()
    pipeline.fuse_qkv_projections()
    FAMILIES["sd"].backbone(pipeline=pipeline)
    assert not any(hasattr(module, "to_qkv") for module in pipeline.unet.modules())


def test_what_was_fused_twice_is_refused():
    pipeline = tiny_sd3_pipeline()
    pipeline.transformer.fuse_qkv_projections()
    pipeline.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="fused query, key and value projections .*Load the pipeline again"):
        FAMILIES["sd3"].backbone(pipeline=pipeline)


# ---- IP-Adapters ----


def ip_adapter_of_a_unet(pipeline):
    unet, state = pipeline.unet, {}
    width = unet.config.cross_attention_dim
    for number, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
            state |= {f"{number}.to_{key}_ip.weight": torch.zeros(hidden, width) for key in "kv"}
    norm = {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    proj = {"proj.weight": torch.zeros(4 * width, 8), "proj.bias": torch.zeros(4 * width)}
    unet._load_ip_adapter_weights([{"image_proj": proj | norm, "ip_adapter": state}])


def ip_adapter_of_sd3(pipeline):
    options = {"hidden_size": 16, "ip_hidden_states_dim": 16, "head_dim": 8, "timesteps_emb_dim": 8}
    names = pipeline.transformer.attn_processors
    pipeline.transformer.set_attn_processor({name: SD3IPAdapterJointAttnProcessor2_0(**options) for name in names})


def ip_adapter_of_flux(pipeline):
    of_the_adapter = {
        name: FluxIPAdapterAttnProcessor(hidden_size=16, cross_attention_dim=16)
        if name.startswith("transformer_blocks")
        else processor
        for name, processor in pipeline.transformer.attn_processors.items()
    }
    pipeline.transformer.set_attn_processor(of_the_adapter)


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("sd", ip_adapter_of_a_unet),
        ("sdxl", ip_adapter_of_a_unet),
        ("sd3", ip_adapter_of_sd3),
        ("flux", ip_adapter_of_flux),
        ("kontext", ip_adapter_of_flux),
    ],
)
def test_an_ip_adapter_is_refused_until_it_is_taken_out(name, load):
    family, pipeline = FAMILIES[name], FAMILIES[name].make_pipeline()
    load(pipeline)
    with pytest.raises(ValueError, match=r"has an IP-Adapter.*pipeline\.unload_ip_adapter\(\)"):
        family.backbone(pipeline=pipeline)
    pipeline.unload_ip_adapter()
    family.backbone(pipeline=pipeline)


# ---- Models that take more than a prompt ----


def with_unet(make=tiny_sd_pipeline, **config):
    pipeline = make()
    own = {name: value for name, value in pipeline.unet.config.items() if not name.startswith("_")}
    pipeline.unet = UNet2DConditionModel(**own | config).eval()
    return pipeline


def with_flux(in_channels):
    pipeline = tiny_flux_pipeline()
    own = {name: value for name, value in pipeline.transformer.config.items() if not name.startswith("_")}
    pipeline.transformer = FluxTransformer2DModel(**own | {"in_channels": in_channels, "out_channels": 16}).eval()
    return pipeline


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_unet(in_channels=9), "unet takes 9 channels, but the VAE's latents have 4: .*inpainting"),
        (lambda: with_unet(in_channels=8), "unet takes 8 channels"),
        (lambda: with_unet(tiny_sdxl_pipeline, in_channels=9), "unet takes 9 channels"),
        (lambda: with_unet(num_class_embeds=3), "num_class_embeds=3.* besides the prompt"),
        (lambda: with_unet(class_embed_type="timestep"), "class_embed_type='timestep'"),
        (lambda: with_unet(encoder_hid_dim_type="image_proj", encoder_hid_dim=CLIP_WIDTH), "'image_proj'"),
        (lambda: with_flux(32), "transformer takes 32 channels, but the VAE's latents have 16.*control"),
        (lambda: with_flux(96), "transformer takes 96 channels"),
    ],
    ids=["inpainting", "pix2pix", "xl-inpainting", "classes", "class-type", "image", "control", "fill"],
)
def test_a_model_that_takes_more_than_a_prompt_is_refused(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path / "out", pipeline=make(), height=32, width=32)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=message):
        draw(make(), ["a cat"], seed=0, num_inference_steps=1, height=32, width=32, max_sequence_length=16)


# ---- Offloading ----


def group_offload(pipeline, kind="leaf_level", **options):
    for name in ("transformer", "vae", "text_encoder"):
        apply_group_offloading(getattr(pipeline, name), torch.device("cpu"), offload_type=kind, **options)


OFFLOADING = {
    "model": lambda pipeline: pipeline.enable_model_cpu_offload(device="cpu"),
    "leaves": group_offload,
    "blocks": lambda pipeline: group_offload(pipeline, "block_level", num_blocks_per_group=1),
}


def images_of(pipeline):
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "max_sequence_length": 16}
    images = draw(pipeline, ["a cat", "two dogs"], seed=0, **options)
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("offload", OFFLOADING.values(), ids=OFFLOADING)
def test_an_offloaded_pipeline_draws_as_another(offload):
    pipeline = tiny_sd3_pipeline()
    offload(pipeline)
    assert np.array_equal(images_of(pipeline), images_of(tiny_sd3_pipeline()))


def test_an_offloaded_pipeline_runs_where_its_hooks_say():
    pipeline = tiny_sd3_pipeline()
    pipeline.enable_sequential_cpu_offload(device="cpu")
    assert pipeline.vae.device.type == "meta"
    assert FAMILIES["sd3"].backbone(pipeline=pipeline).device.type == "cpu"


@pytest.mark.parametrize("kind", ["leaves", "blocks"])  # the others are in tests/trainer/test_bad_input.py
def test_a_pipeline_that_is_offloaded_in_groups_trains_as_another(kind, plain, tmp_path):
    pipeline = tiny_sd3_pipeline()
    OFFLOADING[kind](pipeline)
    assert_equal(train(tmp_path, pipeline=pipeline, max_steps=1), plain)


def test_weights_that_are_on_the_disk_are_refused(tmp_path):
    pipeline = tiny_sd3_pipeline()
    group_offload(pipeline, offload_to_disk_path=str(tmp_path / "weights"))
    with pytest.raises(ValueError, match="is offloaded to disk in groups.*Load the pipeline again without"):
        tiny_trainer(tmp_path / "out", pipeline=pipeline)


def test_weights_without_values_are_not_drawn_with():
    pipeline = tiny_sd3_pipeline()
    pipeline.text_encoder.to("meta")
    with pytest.raises(ValueError, match="text_encoder has weights on the meta device"):
        images_of(pipeline)


# ---- What would not be saved with the adapter ----


def freeu(pipeline):
    pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def cache(pipeline):
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))


@pytest.mark.parametrize(
    ("make", "change", "remedy"),
    [
        (tiny_sd_pipeline, freeu, "has FreeU switched on.*pipeline.disable_freeu()"),
        (tiny_flux_pipeline, cache, "has a cache between steps .*pipeline.transformer.disable_cache()"),
    ],
)
def test_what_changes_the_forward_is_refused(make, change, remedy, tmp_path):
    pipeline = make()
    change(pipeline)
    with pytest.raises(ValueError, match=remedy):
        tiny_trainer(tmp_path / "out", pipeline=pipeline, height=32, width=32)
    assert not (tmp_path / "out").exists()


def test_weights_in_a_smaller_dtype_between_forwards(tmp_path):
    pipeline = tiny_sd3_pipeline()
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match="enable_layerwise_casting.*Train an adapter"):
        tiny_trainer(tmp_path / "out", pipeline=pipeline, lora=None)
    train(tmp_path / "adapter", pipeline=pipeline, max_steps=1)


def test_a_lora_that_was_fused_is_refused_until_it_is_a_model_of_its_own(tmp_path):
    tiny_trainer(tmp_path / "lora").save_model()
    pipeline = tiny_sd3_pipeline()
    pipeline.load_lora_weights(tmp_path / "lora", adapter_name="style")
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()
    with pytest.raises(ValueError, match=r"has been fused .*\(.*style.*\).*save_pretrained\('folder'\)"):
        tiny_trainer(tmp_path / "out", pipeline=pipeline)
    pipeline.save_pretrained(tmp_path / "fused")
    tiny_trainer(tmp_path / "out", pipeline=str(tmp_path / "fused"))


def test_an_adapter_of_a_text_encoder_is_refused(tmp_path):
    pipeline = tiny_sd3_pipeline()
    inject_adapter_in_model(tiny_lora(target_modules=["q_proj"]), pipeline.text_encoder)
    with pytest.raises(ValueError, match="text_encoder has adapters, which would not be saved.*unload_lora_weights"):
        tiny_trainer(tmp_path / "out", pipeline=pipeline)


def test_what_diffusers_sets_on_a_config_stays_there(tmp_path):
    pipeline = tiny_sd3_pipeline()
    pipeline.transformer.config.sample_size = 7  # as an attribute: the dictionary has another
    assert tiny_trainer(tmp_path, pipeline=pipeline).backbone.model.config.sample_size == 7
