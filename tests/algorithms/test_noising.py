"""Noise levels and noised latents, against diffusers' own schedulers."""

import math
from functools import partial

import pytest
import torch
from tiny_flux import tiny_flux_pipeline, tiny_klein_pipeline
from tiny_models import tiny_sd3_pipeline
from tiny_painter import tiny_painter_backbone
from tiny_qwen import tiny_qwen_image_pipeline, tiny_z_image_pipeline
from tiny_unets import tiny_sd_pipeline, tiny_sdxl_pipeline

from trl_flow.algorithms.noising import LOWEST_LEVEL, Noising, draw_places
from trl_flow.backbones import get_backbone


FLOW = {
    "sd3": tiny_sd3_pipeline,
    "flux": tiny_flux_pipeline,
    "klein": tiny_klein_pipeline,
    "qwen-image": tiny_qwen_image_pipeline,
    "z-image": tiny_z_image_pipeline,
}
UNETS = {
    "sd": tiny_sd_pipeline,
    "sd-v": partial(tiny_sd_pipeline, prediction_type="v_prediction"),
    "sdxl": tiny_sdxl_pipeline,
}
T = 5


def noised(make_pipeline, places):
    backbone = get_backbone(make_pipeline(), height=32, width=32)
    schedule = backbone.schedule(T)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, len(places), *backbone.latent_shape(), generator=generator)
    return backbone, schedule, clean, noise, Noising(schedule, backbone)(clean, noise, torch.tensor(places))


@pytest.mark.parametrize("name", FLOW)
def test_whole_places_are_the_steps_of_the_pipelines_schedule(name):
    backbone, schedule, clean, noise, found = noised(FLOW[name], [float(step) for step in range(T)])
    assert found.timestep.tolist() == schedule.timesteps.tolist()
    expected = backbone.pipeline.scheduler.scale_noise(clean, schedule.timesteps, noise)
    torch.testing.assert_close(found.latents, expected)
    torch.testing.assert_close(found.target, noise - clean)
    torch.testing.assert_close(found.level, schedule.sigmas[:-1])


@pytest.mark.parametrize("name", FLOW)
def test_between_two_steps_the_model_is_told_the_level_that_the_latents_have(name):
    places = [0.5, 1.25, 3.9]
    _, schedule, clean, noise, found = noised(FLOW[name], places)
    # These schedulers' timesteps are their noise levels times 1000
    torch.testing.assert_close(found.timestep, 1000 * found.level)
    low, high = schedule.sigmas[1:].tolist(), schedule.sigmas[:-1].tolist()
    assert all(low[int(p)] <= level <= high[int(p)] for p, level in zip(places, found.level.tolist(), strict=True))
    t = found.level.view(-1, *[1] * (clean.ndim - 1))
    torch.testing.assert_close(found.latents, (1 - t) * clean + t * noise)


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("places", [[0.0, 1.0, 4.0], [0.3, 2.6, 4.9]])
def test_unets_see_what_diffusers_scheduler_makes_and_predict_what_it_asks_for(name, places):
    backbone, schedule, clean, noise, found = noised(UNETS[name], places)
    scheduler = backbone.scheduler
    if places[0] == 0.0:
        assert found.timestep.tolist() == schedule.timesteps[[0, 1, 4]].tolist()
    torch.testing.assert_close(found.latents, scheduler.add_noise(clean, noise, found.timestep))
    of_v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(clean, noise, found.timestep) if of_v else noise
    torch.testing.assert_close(found.target, target)
    # (1 - t) : t as the signal's amplitude to the noise's
    alpha = scheduler.alphas_cumprod[found.timestep]
    torch.testing.assert_close(found.level / (1 - found.level), ((1 - alpha) / alpha).sqrt())


@pytest.mark.parametrize("name", [*FLOW, *UNETS])
def test_the_right_prediction_means_the_data(name):
    _, _, clean, _, found = noised((FLOW | UNETS)[name], [0.2, 1.0, 3.7])
    scale = found.scale.view(-1, *[1] * (clean.ndim - 1))
    torch.testing.assert_close(found.scaled - scale * found.target, clean, rtol=1e-3, atol=1e-3)


def test_a_backbone_of_ones_own_needs_nothing_for_it():
    backbone = tiny_painter_backbone()
    noising = Noising(backbone.schedule(1), backbone)  # a single step, from pure noise
    places = torch.tensor([0.0, noising.last_place])
    found = noising(torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8), places)
    torch.testing.assert_close(found.level, torch.tensor([1.0, LOWEST_LEVEL]))


# ---- Places ----


def drawn(kind, number, first, end, samples=2000):
    generator = torch.Generator().manual_seed(0)
    return torch.stack([draw_places(kind, number, first, end, generator) for _ in range(samples)])


def test_steps_of_the_schedule_are_drawn_once_each():
    places = drawn("schedule", 4, 1, 6)
    assert all(len(set(row)) == 4 for row in places.tolist())
    counts = torch.bincount(places.long().flatten(), minlength=7)
    assert counts[[0, 6]].sum() == 0
    # Each of 5 steps in 4 of 5 draws, +- 5 standard errors
    assert ((counts[1:6] / 2000 - 0.8).abs() < 5 * math.sqrt(0.8 * 0.2 / 2000)).all()


def test_uniform_places_have_one_in_each_part_in_any_order():
    places = drawn("uniform", 4, 2, 10)
    assert (places.sort(dim=1).values.sub(2).div(2).long() == torch.arange(4)).all()
    assert places.mean(dim=0).sub(6).abs().max() < 0.3 and places.std() == pytest.approx(8 / math.sqrt(12), rel=0.02)


def test_logit_normal_places_are_in_the_middle():
    places = drawn("logit_normal", 4, 0, 10)
    # One below and one above each quartile of the logistic of a standard normal
    quartiles = torch.sigmoid(torch.tensor([-0.6744898, 0.0, 0.6744898], dtype=torch.float64)) * 10
    parts = torch.bucketize(places, quartiles).sort(dim=1).values
    assert (parts == torch.arange(4)).all()
    assert 0 < places.min() and places.max() < 10
    logits = torch.logit(places / 10)
    assert logits.mean().abs() < 0.02 and logits.std() == pytest.approx(1.0, rel=0.03)
