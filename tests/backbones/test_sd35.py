"""Stable Diffusion 3.5 Medium and Large as released: in full size without weights."""

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model
from tiny_sd35 import MODELS, tiny_sd35_pipeline

from trl_flow.backbones import StableDiffusion3Backbone, get_backbone
from trl_flow.dynamics import make_dynamics


each_model = pytest.mark.parametrize("name", MODELS)


def full_size_pipeline(name: str) -> StableDiffusion3Pipeline:
    """The transformer in full size on the meta device, with a small VAE and no text encoders."""
    small = tiny_sd35_pipeline(name)
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**MODELS[name][0])
    components = dict.fromkeys(small.components) | {"vae": small.vae, "scheduler": small.scheduler}
    return StableDiffusion3Pipeline(**components | {"transformer": transformer})


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
    for sde_type, steps in (("flow", 10), ("cps", 9)):
        dynamics = make_dynamics(schedule, sde_type=sde_type, noise_level=0.7)
        assert dynamics.stochastic_steps == list(range(steps))


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
