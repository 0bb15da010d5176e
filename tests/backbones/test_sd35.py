"""Stable Diffusion 3.5 Medium and Large as released: their configs, in full size without weights and made small."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model
from tiny_models import CLIP_TOKENS, JOINT_WIDTH, POOLED_WIDTH, tiny_sd3_pipeline
from tiny_training import distance, tiny_lora, tiny_trainer, trained_weights

from trl_flow import FlowGRPOConfig, GuardConfig, SLASConfig, VGPOConfig
from trl_flow.backbones import StableDiffusion3Backbone, get_backbone
from trl_flow.rollout import Dynamics, draw_noise, rollout, sample_generator


# transformer/config.json, vae/config.json and scheduler/scheduler_config.json of the two repositories. The last two
# are the same in both.
MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12),
    "qk_norm": "rms_norm",
}
LARGE = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 38,
    "attention_head_dim": 64,
    "num_attention_heads": 38,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 2432,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "force_upcast": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SCHEDULER = {"num_train_timesteps": 1000, "shift": 3.0}

# What makes them small: one block of each kind, two heads of 8. Positions stay 6 and 3 times the model's own size.
SMALL = {
    "sample_size": 8,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": JOINT_WIDTH,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 2 * POOLED_WIDTH,
}
MODELS = {
    "medium": (MEDIUM, {"dual_attention_layers": (0,), "pos_embed_max_size": 24}),
    "large": (LARGE, {"pos_embed_max_size": 12}),
}
PROMPTS = ["a red circle", "two blue squares"]
STEPS = 3

each_model = pytest.mark.parametrize("name", MODELS)


def small_pipeline(name: str) -> StableDiffusion3Pipeline:
    """A complete pipeline with random weights that draws 64 x 64 pictures from latents of shape `(16, 8, 8)`."""
    pipeline = tiny_sd3_pipeline()
    released, smaller = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(**released | SMALL | smaller).eval()
        vae = AutoencoderKL(**VAE | {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 4, "sample_size": 64})
    pipeline = StableDiffusion3Pipeline(
        **pipeline.components
        | {
            "transformer": transformer,
            "vae": vae.eval(),
            "scheduler": FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        }
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def full_size_pipeline(name: str) -> StableDiffusion3Pipeline:
    """The transformer in full size on the meta device, with a small VAE and no text encoders."""
    small = small_pipeline(name)
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**MODELS[name][0])
    components = dict.fromkeys(small.components) | {"vae": small.vae, "scheduler": small.scheduler}
    return StableDiffusion3Pipeline(**components | {"transformer": transformer})


# ---- Full size ----


@pytest.mark.parametrize(
    ("name", "trained", "published"),
    # what is trained, and with the table of positions what the checkpoint holds: "2.5 billion", "8.1 billion"
    [("medium", 2_243_171_520, 2.5e9), ("large", 8_056_627_520, 8.1e9)],
)
def test_the_full_size_has_the_published_number_of_parameters(name, trained, published):
    model = full_size_pipeline(name).transformer
    assert sum(p.numel() for p in model.parameters()) == trained
    assert sum(value.numel() for value in model.state_dict().values()) == pytest.approx(published, rel=0.02)


@each_model
def test_the_full_size_draws_what_the_papers_draw(name):
    # 512 x 512 while training, in 10 steps with a shift of 3
    backbone = get_backbone(full_size_pipeline(name), height=512, width=512, max_sequence_length=128)
    assert type(backbone) is StableDiffusion3Backbone
    assert backbone.latent_shape() == (16, 64, 64)
    schedule = backbone.schedule(10)
    uniform = torch.linspace(1, 1 / 1000, 1000, dtype=torch.float64)
    # the shift is applied to the training levels and, once more, to the evenly spaced ones between their ends
    ends = 3 * uniform[[0, -1]] / (1 + 2 * uniform[[0, -1]])
    spaced = torch.linspace(*ends.tolist(), 10, dtype=torch.float64)
    expected = torch.cat([3 * spaced / (1 + 2 * spaced), torch.zeros(1)]).float()
    torch.testing.assert_close(schedule.sigmas, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(schedule.timesteps, 1000 * expected[:-1], rtol=0, atol=1e-3)
    assert Dynamics(schedule, "flow", 0.7).stochastic_steps == list(range(10))
    assert Dynamics(schedule, "cps", 0.7).stochastic_steps == list(range(9))


@pytest.mark.parametrize(("name", "largest"), [("medium", 6144), ("large", 3072)])
def test_sizes_go_as_far_as_the_positions_do(name, largest):
    pipeline = full_size_pipeline(name)
    for size in (512, 1024, largest):
        assert get_backbone(pipeline, height=size, width=size, max_sequence_length=128).latent_shape()[1] == size // 8
    message = f"multiples of 16 pixels up to {largest}; its own size is 1024 x 1024"
    for height, width in ((largest + 16, 512), (520, 512)):
        with pytest.raises(ValueError, match=message):
            get_backbone(pipeline, height=height, width=width, max_sequence_length=128)


@each_model
def test_the_default_targets_are_flow_grpos(name):
    # The joint attention of every block, not Medium's second attention of the image stream; rank 32, alpha 64
    model = full_size_pipeline(name).transformer
    with torch.device("meta"):
        policy = get_peft_model(
            model, LoraConfig(r=32, lora_alpha=64, target_modules=StableDiffusion3Backbone.lora_target_modules)
        )
    layers, width = MODELS[name][0]["num_layers"], MODELS[name][0]["caption_projection_dim"]
    adapted = {n.rpartition(".lora_A")[0] for n, p in policy.named_parameters() if p.requires_grad and "lora_A" in n}
    # the last block has no text stream left to write to
    assert len(adapted) == 8 * layers - 1
    assert all(".attn." in layer for layer in adapted)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert trained == (8 * layers - 1) * 2 * 32 * width


# ---- Small ----


def make_backbone(pipeline, **size):
    return get_backbone(pipeline, **{"height": 64, "width": 64, "max_sequence_length": CLIP_TOKENS} | size)


def conditions(backbone, texts):
    encoded = [backbone.encode_prompt(text) for text in texts]
    return {key: torch.cat([condition[key] for condition in encoded]) for key in encoded[0]}


@each_model
@pytest.mark.parametrize("size", [{}, {"height": 48, "width": 96}], ids=str)
@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@torch.no_grad()
def test_a_rollout_without_noise_draws_the_pipelines_own_images(name, size, guidance_scale):
    backbone = make_backbone(small_pipeline(name), **size)
    generators = [sample_generator(1, i) for i in range(2)]
    noise = draw_noise(backbone.latent_shape(), generators, torch.device("cpu"))
    final = rollout(
        backbone,
        backbone.model,
        Dynamics(backbone.schedule(STEPS), sde_type="flow", noise_level=0.7),
        conditions(backbone, PROMPTS),
        conditions(backbone, ["", ""]) if guidance_scale > 1 else None,
        guidance_scale=guidance_scale,
        initial_noise=noise,
        generators=generators,
        stochastic_steps=[],
        trained_steps=[],
    ).final
    call = {
        "height": backbone.height,
        "width": backbone.width,
        "num_inference_steps": STEPS,
        "guidance_scale": guidance_scale,
        "max_sequence_length": CLIP_TOKENS,
        "latents": noise,
    }
    expected = backbone.pipeline(PROMPTS, output_type="latent", **call).images
    torch.testing.assert_close(final, expected, rtol=0, atol=1e-5)
    for image, other in zip(backbone.decode(final), backbone.pipeline(PROMPTS, **call).images, strict=True):
        assert image.size == (backbone.width, backbone.height)
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int)).max() <= 1


@pytest.mark.parametrize(
    ("name", "cls", "dtype"),
    [
        ("medium", FlowGRPOConfig, torch.float32),
        ("medium", GuardConfig, torch.bfloat16),
        ("medium", SLASConfig, torch.float32),
        ("medium", VGPOConfig, torch.float32),
        ("large", GuardConfig, torch.bfloat16),
    ],
    ids=str,
)
def test_every_config_trains(name, cls, dtype, tmp_path):
    pipeline = small_pipeline(name)
    pipeline.transformer.to(dtype)
    trainer = tiny_trainer(
        tmp_path, pipeline=pipeline, cls=cls, height=64, width=64, bf16=dtype == torch.bfloat16, beta=0.04
    )
    before = trained_weights(trainer)
    trainer.train()
    assert distance(trained_weights(trainer), before) > 1e-4
    logs = trainer.state.log_history
    assert logs[0]["ratio/first_update_deviation"] == 0
    assert logs[0]["kl"] == 0
    assert logs[1]["kl"] > 0
    assert all(value.isfinite().all() for value in trained_weights(trainer).values())


@each_model
def test_the_adapter_draws_the_same_images_in_the_stock_pipeline(name, tmp_path):
    pipeline = small_pipeline(name)

    def images_of(pipeline):
        generator = torch.Generator().manual_seed(0)
        call = {"height": 64, "width": 64, "num_inference_steps": STEPS, "max_sequence_length": CLIP_TOKENS}
        return [np.asarray(image) for image in pipeline(PROMPTS, generator=generator, **call).images]

    untrained = images_of(pipeline)
    trainer = tiny_trainer(
        tmp_path, pipeline=pipeline, lora=tiny_lora(lora_alpha=16), height=64, width=64, save_strategy="steps"
    )
    trainer.train()
    loaded = small_pipeline(name)
    loaded.load_lora_weights(tmp_path)
    for image, other, before in zip(images_of(loaded), images_of(trainer.pipeline), untrained, strict=True):
        assert np.array_equal(image, other)
        assert not np.array_equal(image, before)
