"""What all families share: which schedulers they are sampled with, and how long prompts may be."""

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from tiny_flux import tiny_flux_pipeline, tiny_klein_pipeline, tiny_kontext_pipeline
from tiny_models import tiny_sd3_pipeline
from tiny_qwen import tiny_qwen_image_pipeline, tiny_z_image_pipeline

from trl_flow.backbones import Schedule, get_backbone


FLOW_PIPELINES = {
    "sd3": tiny_sd3_pipeline,
    "flux": tiny_flux_pipeline,
    "kontext": tiny_kontext_pipeline,
    "klein": tiny_klein_pipeline,
    "qwen-image": tiny_qwen_image_pipeline,
    "z-image": tiny_z_image_pipeline,
}


@pytest.mark.parametrize(
    ("scheduler", "found"),
    [
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "with stochastic_sampling,"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "with invert_sigmas,"),
        (FlowMatchHeunDiscreteScheduler(), "FlowMatchHeunDiscreteScheduler,"),
        (FlowMatchLCMScheduler(), "FlowMatchLCMScheduler,"),
        (UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), "UniPCMultistepScheduler,"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), "DPMSolverMultistep"),
    ],
    ids=lambda value: value.split("Scheduler")[0] if isinstance(value, str) else "",
)
def test_a_scheduler_that_takes_no_euler_steps_is_refused(scheduler, found):
    # They have sigmas and timesteps too, along which Euler steps give other images than the pipeline's
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match=f"scheduler is a .*{found}.* must be the FlowMatchEulerDiscreteScheduler"):
        Schedule.of(scheduler, torch.device("cpu"))


@pytest.mark.parametrize("make", FLOW_PIPELINES.values(), ids=FLOW_PIPELINES)
def test_every_flow_family_refuses_it(make):
    pipeline = make()
    pipeline.scheduler = FlowMatchLCMScheduler()
    backbone = get_backbone(pipeline, height=16, width=16, max_sequence_length=16)
    with pytest.raises(ValueError, match="must be the FlowMatchEulerDiscreteScheduler"):
        backbone.schedule(3)


@pytest.mark.parametrize(
    ("make", "limit"),
    [
        (tiny_sd3_pipeline, 512),
        (tiny_flux_pipeline, 512),
        (tiny_kontext_pipeline, 512),
        (tiny_qwen_image_pipeline, 1024),
    ],
    ids=["sd3", "flux", "kontext", "qwen-image"],
)
def test_prompts_may_be_as_long_as_in_the_pipeline(make, limit):
    pipeline = make()
    get_backbone(pipeline, height=16, width=16, max_sequence_length=limit)
    with pytest.raises(ValueError, match=f"max_sequence_length is {limit + 1}, but .*Pipeline takes {limit} at most"):
        get_backbone(pipeline, height=16, width=16, max_sequence_length=limit + 1)
    with pytest.raises(ValueError, match=f"`max_sequence_length` cannot be greater than {limit}"):
        pipeline(prompt="a cat", height=16, width=16, max_sequence_length=limit + 1)
