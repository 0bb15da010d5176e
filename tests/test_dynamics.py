"""A step for the whole batch and one for each sample; the gain of each dynamics."""

import pytest
import torch
from tiny_models import tiny_sd3_pipeline
from tiny_unets import tiny_sd_pipeline

from trl_flow.backbones import get_backbone
from trl_flow.dynamics import make_dynamics


STEPS = 5
KINDS = ["flow", "dance", "cps", "ddim"]


@pytest.fixture(scope="module")
def dynamics():
    flow = get_backbone(tiny_sd3_pipeline(), height=16, width=16, max_sequence_length=16).schedule(STEPS)
    made = {kind: make_dynamics(flow, sde_type=kind, noise_level=0.8) for kind in KINDS[:3]}
    unet = get_backbone(tiny_sd_pipeline(), height=16, width=16).schedule(STEPS)
    return made | {"ddim": make_dynamics(unet, sde_type="flow", noise_level=0.8)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_for_each_sample_is_that_step_for_it_alone(kind, dynamics):
    own = dynamics[kind]
    prediction, latents = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([0, 3, 1, 0])
    together = own.transition(prediction, latents, steps)
    for sample, step in enumerate(steps.tolist()):
        alone = own.transition(prediction[sample : sample + 1], latents[sample : sample + 1], step)
        torch.testing.assert_close(together.mean[sample], alone.mean[0])
        torch.testing.assert_close(together.std[sample], alone.std[0])
        for name in ("dt", "beta", "gain"):
            torch.testing.assert_close(getattr(own, name)(steps)[sample], getattr(own, name)(step))
        diffusion = own.diffusion(together, steps)
        torch.testing.assert_close(diffusion[sample], own.diffusion(alone, step)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_gain_is_the_gradient_of_the_mean(kind, dynamics):
    own = dynamics[kind]
    prediction, latents = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for step in range(STEPS - 1):
        prediction.requires_grad_(True)
        (gradient,) = torch.autograd.grad(own.transition(prediction, latents, step).mean.sum(), prediction)
        assert own.gain(step) > 0
        torch.testing.assert_close(gradient, -own.gain(step).expand_as(gradient), rtol=1e-4, atol=1e-6)


def test_gains_by_hand(dynamics):
    t, u = dynamics["cps"].schedule.sigmas[1:3]
    angle = torch.tensor(0.8 * torch.pi / 2)
    torch.testing.assert_close(dynamics["cps"].gain(1), t - u + (1 - torch.cos(angle)) * u * (1 - t))
    torch.testing.assert_close(dynamics["dance"].gain(1), dynamics["dance"].beta(1) * (t - u))
    torch.testing.assert_close(dynamics["flow"].gain(1), (1 + 0.8**2 / 2) * (t - u))
