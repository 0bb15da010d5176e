"""The Wan backbone: sizes and frames, the schedule, two experts, a first frame."""

import re

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
)
from families import FAMILIES
from family_checks import (
    STEPS,
    assert_schedule_of_the_pipeline,
    conditions,
    drawn_by_the_pipeline,
    images_to_edit,
    initial_noise,
    ode_latents,
    random_lora,
)
from tiny_models import tiny_sd3_pipeline
from tiny_training import PROMPTS
from tiny_wan import (
    SCHEDULER,
    tiny_wan_5b_pipeline,
    tiny_wan_experts_pipeline,
    tiny_wan_i2v_pipeline,
    tiny_wan_pipeline,
)

from trl_flow.backbones import get_backbone
from trl_flow.dynamics import make_dynamics
from trl_flow.evaluation.adapters import Adapter, loaded_adapter
from trl_flow.images import frames_of
from trl_flow.sharing import save_lora


SIZE = {"height": 16, "width": 16, "max_sequence_length": 8}


# ---- Sizes and frames ----


@pytest.mark.parametrize(
    ("make", "size", "message"),
    [
        (tiny_wan_pipeline, {"height": 24}, r"24 x 16, .* multiples of 16 x 16 pixels. Set height=32 and width=16"),
        (
            tiny_wan_5b_pipeline,
            {"height": 32, "width": 48},
            r"multiples of 32 x 32 pixels. Set height=32 and width=64",
        ),
        (tiny_wan_pipeline, {"num_frames": 8}, r"num_frames is 8, .* multiple of 4. Set num_frames=5 or 9"),
        (tiny_wan_pipeline, {"num_frames": 2}, r"Set num_frames=1 or 5"),
        (tiny_wan_pipeline, {"num_frames": 0}, r"num_frames is 0, .* Set num_frames=1 or 5"),
        (tiny_wan_pipeline, {"num_frames": -3}, r"num_frames is -3, .* Set num_frames=1 or 5"),
    ],
)
def test_what_the_pipeline_would_round_is_refused(make, size, message):
    with pytest.raises(ValueError, match=message):
        get_backbone(make(), **SIZE | size)


@pytest.mark.parametrize("num_frames", [1, 5, 9])
def test_a_video_has_as_many_frames_as_were_asked_for(num_frames):
    backbone = get_backbone(tiny_wan_pipeline(), **SIZE, num_frames=num_frames)
    final = ode_latents(backbone, 2.5, PROMPTS[:2])
    assert final.shape == (2, 4, (num_frames + 3) // 4, 2, 2)
    with torch.no_grad():
        videos = backbone.decode(final)
    assert [len(frames_of(video)) for video in videos] == [num_frames] * 2
    assert all(isinstance(video, list) for video in videos)  # of one frame, too


@pytest.mark.parametrize(("make", "fps"), [(tiny_wan_pipeline, 16), (tiny_wan_5b_pipeline, 24)])
def test_how_fast_videos_play(make, fps):
    assert get_backbone(make()).frames_per_second == fps


def test_models_of_images_take_no_frames():
    with pytest.raises(ValueError, match="num_frames is 5, but StableDiffusion3Pipeline takes none. Leave num_frames"):
        get_backbone(tiny_sd3_pipeline(), num_frames=5)


# ---- The schedule ----


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("kind", ["unipc", "euler"])
def test_the_noise_levels_are_those_of_the_pipelines_scheduler(kind, shift):
    pipeline = tiny_wan_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    if kind == "unipc":
        pipeline.scheduler = UniPCMultistepScheduler(**SCHEDULER | {"flow_shift": shift})
    own, backbone = pipeline.scheduler, get_backbone(pipeline, **SIZE, num_frames=5)
    own.set_timesteps(STEPS)
    schedule = backbone.schedule(STEPS)
    torch.testing.assert_close(schedule.sigmas, own.sigmas, rtol=0, atol=2e-6)
    assert torch.equal(schedule.timesteps, own.timesteps)
    assert schedule.sigmas[0] == 1 and schedule.sigmas[-1] == 0
    # So that the first step's noise is bounded: a millionth below 1 it would be a thousandfold
    dynamics = make_dynamics(schedule, sde_type="flow", noise_level=0.7)
    one = torch.ones(1, 1)
    assert dynamics.transition(one, one, 0).std < 1.5
    # And the stock pipeline draws the same with what the card says
    latents, _ = drawn_by_the_pipeline(FAMILIES["wan21"], backbone, 2.5, PROMPTS[:1])
    torch.testing.assert_close(ode_latents(backbone, 2.5, PROMPTS[:1]), latents, rtol=0, atol=1e-5)
    if kind == "euler":
        assert_schedule_of_the_pipeline(backbone)


def test_the_pipelines_own_scheduler_is_left_as_it_is():
    pipeline = tiny_wan_pipeline()
    backbone = get_backbone(pipeline, **SIZE, num_frames=5)
    assert pipeline.scheduler.config.solver_order == 2 and pipeline.scheduler is not backbone.scheduler
    # Of second order it draws other, sharper videos with the same weights
    settings = {**SIZE, "num_frames": 5, "num_inference_steps": STEPS, "guidance_scale": 2.5, "output_type": "latent"}
    with torch.no_grad():
        other = pipeline(PROMPTS[:1], latents=initial_noise(backbone, 1), **settings).frames
    assert (other - ode_latents(backbone, 2.5, PROMPTS[:1])).abs().max() > 1e-2


@pytest.mark.parametrize("scheduler", [FlowMatchLCMScheduler(), UniPCMultistepScheduler()], ids=["lcm", "noise"])
def test_a_scheduler_without_a_flows_noise_levels_is_refused(scheduler):
    pipeline = tiny_wan_pipeline()
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match="sets no noise levels of a flow. Give it the one that Wan is released with"):
        get_backbone(pipeline, **SIZE)


# ---- Two experts ----


@pytest.mark.parametrize(("component", "frozen"), [(None, (2,)), ("transformer", (2,)), ("transformer_2", (0, 1))])
def test_the_steps_of_the_other_expert_follow_the_ode(component, frozen):
    backbone = get_backbone(tiny_wan_experts_pipeline(), **SIZE, component=component)
    schedule = backbone.schedule(3)
    assert schedule.frozen == frozen
    stochastic = make_dynamics(schedule, sde_type="flow", noise_level=0.7).stochastic_steps
    assert stochastic == [step for step in range(3) if step not in frozen]


@pytest.mark.parametrize("step", range(3))
def test_each_step_is_its_experts(step):
    pipeline = tiny_wan_experts_pipeline()
    backbone = get_backbone(pipeline, **SIZE, num_frames=5, guidance_scale_2=1.5)
    with torch.no_grad():
        positive, negative = conditions(backbone, PROMPTS[:1]), conditions(backbone, [""])
        latents, timestep = initial_noise(backbone, 1), backbone.schedule(3).timesteps[step]
        expert = pipeline.transformer if step < 2 else pipeline.transformer_2
        told = {"timestep": timestep.expand(1), "return_dict": False}
        conditional, unconditional = (expert(latents, **told, **given)[0] for given in (positive, negative))
        found = backbone.guided_prediction(backbone.model, latents, timestep, positive, negative, 4.0)
    scale = 4.0 if step < 2 else 1.5
    torch.testing.assert_close(found, unconditional + scale * (conditional - unconditional), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (tiny_wan_pipeline, {"component": "transformer_2"}, "component is 'transformer_2', .* is transformer."),
        (tiny_wan_experts_pipeline, {"component": "vae"}, "component is 'vae', .* is transformer or transformer_2."),
        (tiny_wan_pipeline, {"guidance_scale_2": 3.0}, "guidance_scale_2 is 3, .* has no second expert. Leave"),
        (tiny_sd3_pipeline, {"component": "vae"}, "component is 'vae', but StableDiffusion3Pipeline takes none"),
    ],
)
def test_experts_that_are_not_there(make, settings, message):
    with pytest.raises(ValueError, match=message):
        get_backbone(make(), **settings)


def test_a_pipeline_of_two_experts_needs_both():
    pipeline = tiny_wan_experts_pipeline()
    pipeline.transformer_2 = None
    with pytest.raises(ValueError, match=r"no transformer_2, .* \(its boundary_ratio is 0.8\)"):
        get_backbone(pipeline)


def test_an_adapter_of_the_second_expert_goes_there_alone(tmp_path):
    backbone = FAMILIES["wan22-low"].backbone()
    save_lora(WanPipeline, random_lora(backbone), tmp_path, component="transformer_2")
    trained = ode_latents(backbone, 2.5, PROMPTS[:1])
    stock = tiny_wan_experts_pipeline()
    stock.load_lora_weights(str(tmp_path), load_into_transformer_2=True)
    assert not getattr(stock.transformer, "peft_config", None)
    latents, _ = drawn_by_the_pipeline(FAMILIES["wan22-low"], FAMILIES["wan22-low"].backbone(pipeline=stock), 2.5,
                                       PROMPTS[:1])  # fmt: skip
    torch.testing.assert_close(latents, trained, rtol=0, atol=1e-5)
    # And so it does where evaluations load it
    other = FAMILIES["wan22-low"].backbone()
    with loaded_adapter(other, Adapter("ours", str(tmp_path))):
        assert not getattr(other.pipeline.transformer, "peft_config", None)
        torch.testing.assert_close(ode_latents(other, 2.5, PROMPTS[:1]), trained, rtol=0, atol=1e-5)
    assert (ode_latents(other, 2.5, PROMPTS[:1]) - trained).abs().max() > 1e-2


# ---- A first frame ----


@pytest.mark.parametrize("name", ["wan21-i2v", "wan22-i2v"])
def test_the_first_frame_changes_the_video(name):
    backbone = FAMILIES[name].backbone()
    one, other = (ode_latents(backbone, 1.0, ["a cat"], images=[image]) for image in images_to_edit(2, (16, 32)))
    assert (one - other).abs().max() > 1e-3


def test_a_first_frame_that_is_given_and_not_drawn_is_refused():
    pipeline = tiny_wan_i2v_pipeline()
    pipeline.register_to_config(expand_timesteps=True)
    with pytest.raises(ValueError, match=re.escape("WanPipeline.from_pipe(pipeline)")):
        get_backbone(pipeline)


def test_a_transformer_of_the_other_kind_is_refused():
    pipeline = tiny_wan_pipeline()
    pipeline.transformer = tiny_wan_i2v_pipeline().transformer
    with pytest.raises(ValueError, match="takes 12 channels, but the VAE's latents have 4"):
        get_backbone(pipeline, **SIZE).latent_shape()
    pipeline = tiny_wan_i2v_pipeline()
    pipeline.transformer = tiny_wan_pipeline().transformer
    with pytest.raises(ValueError, match="takes 4 channels, but .* have 12. Load a model that draws videos from a"):
        get_backbone(pipeline, **SIZE).latent_shape()
