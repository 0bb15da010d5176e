"""With a schedule of DDIM, everything around the U-Net is DDIM's: held against diffusers' own scheduler."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from tiny_unets import tiny_sd_pipeline

from trl_flow.backbones import DDIMSchedule, Schedule, get_backbone
from trl_flow.dynamics import DDIMDynamics, FlowDynamics, make_dynamics
from trl_flow.functional import clipped_loss, gaussian_kl, log_ratio, timestep_weight
from trl_flow.rollout import StepPlan, draw_noise, rollout, sample_generator


STEPS = 4
PREDICTION_TYPES = ["epsilon", "v_prediction"]
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def make_backbone(prediction_type="epsilon", **config):
    pipeline = tiny_sd_pipeline(prediction_type=prediction_type)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **config)
    return get_backbone(pipeline, height=32, width=32, max_sequence_length=16)


def dynamics_of(backbone, noise_level=0.7, steps=STEPS) -> DDIMDynamics:
    return DDIMDynamics(backbone.schedule(steps), noise_level)


def one_step_schedule(a, a_next, prediction_type="epsilon") -> DDIMSchedule:
    return DDIMSchedule(
        alphas_cumprod=torch.tensor([a]),
        alphas_cumprod_next=torch.tensor([a_next]),
        timesteps=torch.tensor([500]),
        prediction_type=prediction_type,
    )


def one_step(a, a_next, prediction_type="epsilon", noise_level=1.0) -> DDIMDynamics:
    return DDIMDynamics(one_step_schedule(a, a_next, prediction_type), noise_level)


# ---- Sampling ----


@pytest.mark.parametrize(
    ("prediction_type", "config"),
    [("epsilon", {}), ("v_prediction", {}), ("v_prediction", ZERO_SNR), ("epsilon", {"timestep_spacing": "linspace"})],
    ids=str,
)
def test_a_rollout_is_a_walk_of_diffusers_scheduler(prediction_type, config):
    backbone, eta, window = make_backbone(prediction_type, **config), 0.6, (0, 2)
    dynamics = dynamics_of(backbone, eta)
    condition = backbone.encode_prompt("a cat")
    x = draw_noise(backbone.latent_shape(), [sample_generator(0)], torch.device("cpu"))
    t = rollout(
        lambda latents, timestep: backbone.guided_prediction(backbone.model, latents, timestep, condition),
        dynamics,
        x,
        StepPlan(window, window, project=True),
        generators=[sample_generator(1)],
    )
    scheduler, generator = backbone.pipeline.scheduler, sample_generator(1)
    scheduler.set_timesteps(STEPS)
    for step, timestep in enumerate(scheduler.timesteps):
        with torch.no_grad():
            prediction = backbone.model(x, timestep, **condition).sample
        stochastic = step in window
        noise = draw_noise(backbone.latent_shape(), [generator], torch.device("cpu")) if stochastic else None
        output = scheduler.step(prediction, timestep, x, eta=eta if stochastic else 0.0, variance_noise=noise)
        if step > 0:
            # what was predicted of the result of the step before
            torch.testing.assert_close(
                t.pred_original_samples[:, step - 1], output.pred_original_sample, rtol=1e-5, atol=1e-5
            )
        if stochastic:
            index = window.index(step)
            torch.testing.assert_close(t.latents[:, index], x, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(t.next_latents[:, index], output.prev_sample, rtol=1e-5, atol=1e-5)
            mean = scheduler.step(prediction, timestep, x, eta=eta, variance_noise=torch.zeros_like(x)).prev_sample
            torch.testing.assert_close(t.means[:, index], mean, rtol=1e-5, atol=1e-5)
            std = eta * scheduler._get_variance(timestep, timestep - 1000 // STEPS).sqrt()
            own = dynamics.transition(prediction, x, step).std
            torch.testing.assert_close(own, std.expand(1), rtol=1e-4, atol=1e-6)
        x = output.prev_sample
    torch.testing.assert_close(t.final, x, rtol=1e-5, atol=1e-5)
    assert torch.equal(t.pred_original_samples[:, -1], t.final)


def test_a_transition_by_hand():
    prediction, x = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    transition = one_step(0.36, 0.64).transition(prediction, x, 0)
    # a = 0.36, a' = 0.64: as the functional test by hand has it
    torch.testing.assert_close(transition.std, torch.full((2,), math.sqrt(0.24609375)))
    torch.testing.assert_close(transition.mean, 0.8 * (x - 0.8 * prediction) / 0.6 + 0.3375 * prediction)


@pytest.mark.parametrize("sde_type", ["flow", "dance", "cps"])
def test_the_schedule_decides_and_not_the_sde_type(sde_type):
    schedule = one_step_schedule(0.36, 0.64)
    assert make_dynamics(schedule, sde_type=sde_type, noise_level=1.0) == DDIMDynamics(schedule, 1.0)


def test_more_noise_than_ddim_has_is_refused():
    with pytest.raises(ValueError, match=r"noise_level is 1.2: it must be a finite number, between 0 and 1"):
        _ = one_step(0.36, 0.64, noise_level=1.2).stochastic_steps


@pytest.mark.parametrize(
    ("config", "stochastic"),
    [
        # The releases: the last step goes from timestep 1 to 0
        ({}, [0, 1, 2, 3]),
        # to a' = 1, where no noise is left
        ({"set_alpha_to_one": True}, [0, 1, 2]),
        # from timestep 0 to 0
        ({"steps_offset": 0}, [0, 1, 2]),
        ({"timestep_spacing": "trailing"}, [0, 1, 2, 3]),
        ({"timestep_spacing": "trailing", "set_alpha_to_one": True}, [0, 1, 2]),
    ],
    ids=str,
)
def test_steps_that_add_noise(config, stochastic):
    backbone = make_backbone(**config)
    assert dynamics_of(backbone).stochastic_steps == stochastic
    scheduler = backbone.pipeline.scheduler
    scheduler.set_timesteps(STEPS)
    variances = [scheduler._get_variance(t, t - 1000 // STEPS) for t in scheduler.timesteps]
    assert [step for step in range(STEPS) if variances[step] > 0] == stochastic


@pytest.mark.parametrize(("sde_type", "stochastic"), [("flow", [0, 1, 2]), ("dance", [0, 1, 2]), ("cps", [0, 1])])
def test_steps_of_flow_models_that_add_noise(sde_type, stochastic):
    schedule = Schedule(sigmas=torch.tensor([1.0, 0.7, 0.3, 0.0]), timesteps=torch.tensor([1000.0, 700.0, 300.0]))
    assert FlowDynamics(schedule, sde_type, 0.7).stochastic_steps == stochastic


# ---- Training ----


def test_dt_by_hand():
    # a = 0.36, a' = 0.64: sqrt(a' (1 - a) / a) = 0.64 / 0.6, less sqrt(1 - a') = 0.6, or 0.3375 with eta = 1
    assert one_step(0.36, 0.64, noise_level=0.0).dt(0).item() == pytest.approx(0.64 / 0.6 - 0.6)
    assert one_step(0.36, 0.64, noise_level=1.0).dt(0).item() == pytest.approx(0.64 / 0.6 - 0.3375)
    assert one_step(0.36, 0.64, "v_prediction").dt(0).item() == pytest.approx(0.6 * (0.64 / 0.6 - 0.3375))
    # without noise it is sqrt(a') times the step in sqrt((1 - a) / a), 4/3 - 3/4 here
    assert 0.8 * (4 / 3 - 3 / 4) == pytest.approx(0.64 / 0.6 - 0.6)


@pytest.mark.parametrize("noise_level", [0.3, 1.0])
@pytest.mark.parametrize(
    ("prediction_type", "config"), [("epsilon", {}), ("v_prediction", {}), ("v_prediction", ZERO_SNR)], ids=str
)
def test_dt_is_the_gradient_of_the_mean(prediction_type, config, noise_level):
    dynamics = dynamics_of(make_backbone(prediction_type, **config), noise_level, steps=10)
    assert len(dynamics.stochastic_steps) == 10
    prediction, x = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for step in range(10):
        prediction.requires_grad_(True)
        mean = dynamics.transition(prediction, x, step).mean
        (gradient,) = torch.autograd.grad(mean.sum(), prediction)
        assert dynamics.dt(step) > 0
        torch.testing.assert_close(gradient, -dynamics.dt(step).expand_as(gradient), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["inverse_dt", "inverse_beta_dt", "beta_over_dt"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_guards_gradient_is_the_same_at_every_step(prediction_type, kind):
    # With RatioNorm and the weight 1 / dt the loss is -A (1 - mean(Delta eps) / dt) to first order, and
    # d mean / d prediction = -dt: whatever the step, d loss / d prediction = A eps / D.
    dynamics = dynamics_of(make_backbone(prediction_type), 0.3, steps=10)
    prediction, x, noise = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    advantages = torch.tensor([1.5, -0.5])
    expected = advantages.view(-1, 1, 1, 1) * noise / noise[0].numel()
    unweighted = []
    for step in dynamics.stochastic_steps:
        prediction = prediction.detach().requires_grad_(True)
        transition = dynamics.transition(prediction, x, step)
        old = transition.mean.detach()
        sample = old + transition.std.view(-1, 1, 1, 1) * noise
        log_ratios = log_ratio(sample, transition.mean, old, transition.std, kind="ratio_norm")
        weight = timestep_weight(kind, std=transition.std, dt=dynamics.dt(step), beta=dynamics.beta(step))
        loss = clipped_loss(log_ratios, advantages, epsilon=1e-4).sum()
        unweighted.append(torch.autograd.grad(loss, prediction, retain_graph=True)[0].norm().item())
        loss = clipped_loss(log_ratios, advantages, epsilon=1e-4, weight=weight).sum()
        torch.testing.assert_close(torch.autograd.grad(loss, prediction)[0], expected, rtol=2e-3, atol=1e-6)
    assert max(unweighted) > 10 * min(unweighted)  # what the weight makes up for


def test_kl_is_that_of_the_gaussians():
    dynamics = one_step(0.36, 0.64)
    prediction, reference, x = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    transition, ref_mean = dynamics.transition(prediction, x, 0), dynamics.transition(reference, x, 0).mean
    std = transition.std.view(-1, 1, 1, 1)
    normals = (torch.distributions.Normal(mean, std) for mean in (transition.mean, ref_mean))
    expected = torch.distributions.kl_divergence(*normals).flatten(1).mean(1)
    kl = gaussian_kl(transition.mean, ref_mean, dynamics.diffusion(transition, 0))
    torch.testing.assert_close(kl, expected)


def test_kl_of_flow_models_is_measured_in_the_diffusion_coefficient():
    # sigma_t = 0.3 for Dance-SDE at any t
    schedule = Schedule(sigmas=torch.tensor([1.0, 0.4, 0.0]), timesteps=torch.tensor([1000.0, 400.0]))
    dynamics = FlowDynamics(schedule, "dance", 0.3)
    for step in (0, 1):
        transition = dynamics.transition(torch.zeros(2, 3), torch.zeros(2, 3), step)
        torch.testing.assert_close(dynamics.diffusion(transition, step), torch.full((2,), 0.3))
