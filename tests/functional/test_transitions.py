"""Transitions by hand-computed values, against diffusers' own schedulers, and at the edges of their domain."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_flow.functional import (
    Transition,
    cps_transition,
    dance_sde_transition,
    ddim_transition,
    flow_sde_transition,
    gaussian_log_prob,
    ode_transition,
    project_to_data,
)


SHAPES = [(3, 5), (3, 7, 4), (3, 4, 6, 6), (3, 2, 4, 3, 3)]  # rows, packed Flux latents, image latents, video latents
few = settings(deadline=None, derandomize=True, max_examples=60)


def flow(velocity, latents, sigma, sigma_next, noise_level=0.7):
    return flow_sde_transition(velocity, latents, sigma, sigma_next, noise_level=noise_level, sigma_max=0.9)


def dance(velocity, latents, sigma, sigma_next, noise_level=0.7):
    return dance_sde_transition(velocity, latents, sigma, sigma_next, noise_level=noise_level)


def cps(velocity, latents, sigma, sigma_next, noise_level=0.7):
    return cps_transition(velocity, latents, sigma, sigma_next, noise_level=noise_level)


def ddim(noise_pred, latents, sigma, sigma_next, noise_level=0.7):
    # any decreasing map of sigma to alpha will do where only shapes and dtypes matter
    return ddim_transition(noise_pred, latents, 1 - sigma, 1 - sigma_next, noise_level=noise_level)


def ode(velocity, latents, sigma, sigma_next):
    return ode_transition(velocity, latents, sigma, sigma_next)


ALL = [flow, dance, cps, ddim, ode]


def single(value, dtype=torch.float64):
    return torch.tensor([[value]], dtype=dtype)


# One number as a latent: x_t = 2, v = 1, from t = 0.5 to t' = 0.25, so dt = 0.25 and (1 - t) v = 0.5.


def test_flow_sde_by_hand():
    # sigma_t^2 = 1 * 0.5 / 0.5 = 1; drift = 1 + 1 / (2 * 0.5) * (2 + 0.5) = 3.5; mean = 2 - 3.5 * 0.25
    mean, std = flow_sde_transition(single(1.0), single(2.0), 0.5, 0.25, noise_level=1.0, sigma_max=0.75)
    torch.testing.assert_close(mean, single(1.125))
    torch.testing.assert_close(std, torch.tensor([0.5], dtype=torch.float64))  # 1 * sqrt(0.25)


def test_flow_sde_at_sigma_one_uses_the_second_sigma_in_the_diffusion_only():
    # sigma_t^2 = 1 / (1 - 0.75) = 4; drift = 1 + 4 / 2 * (2 + 0 * 1) = 5; mean = 2 - 5 * 0.25; std = 2 * 0.5
    mean, std = flow_sde_transition(single(1.0), single(2.0), 1.0, 0.75, noise_level=1.0, sigma_max=0.75)
    torch.testing.assert_close(mean, single(0.75))
    torch.testing.assert_close(std, torch.tensor([1.0], dtype=torch.float64))


def test_flow_sde_leaves_sigma_max_alone_below_sigma_one():
    sde = [
        flow_sde_transition(single(1.0), single(2.0), 0.99, 0.5, noise_level=0.7, sigma_max=limit)
        for limit in (0.2, 0.98)
    ]
    assert torch.equal(sde[0].mean, sde[1].mean)
    assert torch.equal(sde[0].std, sde[1].std)


def test_dance_sde_by_hand():
    # eta^2 / (2 t) = 4; drift = 1 + 4 * (2 + 0.5) = 11; mean = 2 - 11 * 0.25; std = 2 * 0.5
    mean, std = dance_sde_transition(single(1.0), single(2.0), 0.5, 0.25, noise_level=2.0)
    torch.testing.assert_close(mean, single(-0.75))
    torch.testing.assert_close(std, torch.tensor([1.0], dtype=torch.float64))


def test_cps_by_hand():
    # sin(pi / 6) = 1/2, so std = 0.125; x0 = 2 - 0.5 = 1.5; x1 = 2 + 0.5 = 2.5;
    # mean = 0.75 * 1.5 + sqrt(0.0625 - 0.015625) * 2.5 = 1.125 + 0.2165063509 * 2.5
    mean, std = cps_transition(single(1.0), single(2.0), 0.5, 0.25, noise_level=1 / 3)
    torch.testing.assert_close(mean, single(1.6662658774), rtol=0, atol=1e-9)
    torch.testing.assert_close(std, torch.tensor([0.125], dtype=torch.float64))


def test_ode_by_hand():
    mean, std = ode_transition(single(1.0), single(2.0), 0.5, 0.25)
    torch.testing.assert_close(mean, single(1.75))
    assert std.tolist() == [0.0]


def test_ddim_by_hand():
    # a = 0.36, a' = 0.64: x0 = (2 - 0.8) / 0.6 = 2; std^2 = 0.36 / 0.64 * (1 - 0.5625) = 0.24609375;
    # 1 - a' - std^2 = 0.11390625 = 0.3375^2; mean = 0.8 * 2 + 0.3375 * 1
    mean, std = ddim_transition(single(1.0), single(2.0), 0.36, 0.64, noise_level=1.0)
    torch.testing.assert_close(mean, single(1.9375))
    torch.testing.assert_close(std, torch.tensor([math.sqrt(0.24609375)], dtype=torch.float64))


@few
@given(
    x=st.floats(-5, 5),
    v=st.floats(-5, 5),
    t=st.floats(0.05, 0.95),
    fraction=st.floats(0, 1),
    eta=st.floats(0, 1),
)
def test_transitions_are_the_published_formulas(x, v, t, fraction, eta):
    # the same formulas in Python's floats, word for word as printed
    u = t * fraction
    dt = t - u
    for diffusion, (mean, std) in [
        (eta * math.sqrt(t / (1 - t)), flow(single(v), single(x), t, u, eta)),
        (eta, dance(single(v), single(x), t, u, eta)),
    ]:
        printed = x - (v + diffusion**2 / (2 * t) * (x + (1 - t) * v)) * dt
        assert mean.item() == pytest.approx(printed, abs=1e-9)
        assert std.item() == pytest.approx(diffusion * math.sqrt(dt), abs=1e-9)
    mean, std = cps_transition(single(v), single(x), t, u, noise_level=eta)
    noise = u * math.sin(eta * math.pi / 2)
    printed = (1 - u) * (x - t * v) + math.sqrt(max(u**2 - noise**2, 0)) * (x + (1 - t) * v)
    assert mean.item() == pytest.approx(printed, abs=1e-7)  # the printed square root loses digits near eta = 1
    assert std.item() == pytest.approx(noise, abs=1e-12)


@pytest.mark.parametrize("transition", [flow, dance, cps])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sigma, sigma_next", [(1.0, 0.9), (0.6, 0.35), (0.1, 0.0)])
def test_noise_level_zero_is_exactly_the_ode(transition, dtype, sigma, sigma_next):
    generator = torch.Generator().manual_seed(0)
    latents, velocity = torch.randn(2, 3, 4, 8, 8, generator=generator).to(dtype)
    mean, std = transition(velocity, latents, sigma, sigma_next, noise_level=0.0)
    assert torch.equal(mean, ode_transition(velocity, latents, sigma, sigma_next).mean)
    assert std.tolist() == [0.0, 0.0, 0.0]


def test_ode_walks_with_diffusers_flow_matching_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 6, 6, generator=generator)
    for step, timestep in enumerate(scheduler.timesteps):
        velocity = torch.randn(2, 4, 6, 6, generator=generator)
        ours = ode_transition(velocity, latents, scheduler.sigmas[step], scheduler.sigmas[step + 1]).mean
        latents = scheduler.step(velocity, timestep, latents).prev_sample
        torch.testing.assert_close(ours, latents, rtol=0, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    "config",
    [
        {"prediction_type": "epsilon"},
        {"prediction_type": "v_prediction"},
        # noise without any signal at the first step: a = 0
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ],
    ids=str,
)
def test_ddim_walks_with_diffusers_ddim_scheduler(config, eta):
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = DDIMScheduler(clip_sample=False, **betas, **config)
    scheduler.set_timesteps(8)
    alphas = [scheduler.alphas_cumprod[step] for step in scheduler.timesteps] + [scheduler.final_alpha_cumprod]
    assert (alphas[0] == 0) == ("rescale_betas_zero_snr" in config)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 6, 6, generator=generator)
    for step, timestep in enumerate(scheduler.timesteps):
        prediction, noise = torch.randn(2, 2, 4, 6, 6, generator=generator)
        levels = {"alpha_cumprod": alphas[step], "prediction_type": config["prediction_type"]}
        mean, std = ddim_transition(
            prediction, latents, alpha_cumprod_next=alphas[step + 1], noise_level=eta, **levels
        )
        projected = ddim_transition(prediction, latents, alpha_cumprod_next=1.0, noise_level=0.0, **levels).mean
        output = scheduler.step(prediction, timestep, latents, eta=eta, variance_noise=noise)
        torch.testing.assert_close(projected, output.pred_original_sample, rtol=1e-5, atol=1e-5)
        latents = output.prev_sample
        torch.testing.assert_close(mean + std.view(2, 1, 1, 1) * noise, latents, rtol=1e-5, atol=1e-5)


def test_ddim_of_v_by_hand():
    # a = 0.36, a' = 0.64, x = 2, v = 1: x0 = 0.6 * 2 - 0.8 * 1 = 0.4; e = 0.6 * 1 + 0.8 * 2 = 2.2; without noise
    # mean = 0.8 * 0.4 + 0.6 * 2.2
    mean, std = ddim_transition(single(1.0), single(2.0), 0.36, 0.64, noise_level=0.0, prediction_type="v_prediction")
    torch.testing.assert_close(mean, single(1.64))
    assert std.tolist() == [0.0]


def test_ddim_refuses_a_prediction_that_it_does_not_know():
    with pytest.raises(ValueError, match="prediction_type is 'sample'"):
        ddim_transition(single(1.0), single(2.0), 0.36, 0.64, noise_level=0.5, prediction_type="sample")


@pytest.mark.parametrize("transition", ALL)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_sample_has_its_own_sigma(transition, shape):
    generator = torch.Generator().manual_seed(0)
    velocity, latents = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    sigma, sigma_next = torch.tensor([[0.9, 0.5, 0.3], [0.6, 0.4, 0.1]], dtype=torch.float64)
    mean, std = transition(velocity, latents, sigma, sigma_next)
    assert mean.shape == shape
    assert std.shape == (3,)
    for i in range(3):
        alone = transition(velocity[i : i + 1], latents[i : i + 1], sigma[i].item(), sigma_next[i])
        torch.testing.assert_close(mean[i : i + 1], alone.mean)
        torch.testing.assert_close(std[i : i + 1], alone.std)


@pytest.mark.parametrize("transition", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_computed_in_float32_and_double_stays(transition, dtype):
    generator = torch.Generator().manual_seed(0)
    velocity, latents = torch.randn(2, 2, 4, generator=generator).to(dtype)
    mean, std = transition(velocity, latents, 0.7, 0.4)
    inside = torch.float64 if dtype == torch.float64 else torch.float32
    assert mean.dtype == std.dtype == inside
    widened = transition(velocity.to(inside), latents.to(inside), 0.7, 0.4)
    assert torch.equal(mean, widened.mean)
    assert torch.equal(std, widened.std)


@pytest.mark.parametrize("transition", ALL)
def test_mean_carries_gradient_to_the_prediction_and_std_does_not(transition):
    # Every mean is affine in the prediction: its derivative is the difference of the means at predictions 1 and 0.
    prediction = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    latents = torch.ones(2, 3, dtype=torch.float64)
    mean, std = transition(prediction, latents, 0.7, 0.4)
    (gradient,) = torch.autograd.grad(mean.sum(), prediction)
    ones = transition(torch.ones_like(latents), latents, 0.7, 0.4).mean
    torch.testing.assert_close(gradient, (ones - mean).detach())
    assert not std.requires_grad


def test_gradient_of_the_sde_means_is_minus_beta_dt():
    # GRPO-Guard, before Eq. 10: beta = 1 + eta^2 / 2 for Flow-SDE, 1 + eta^2 (1 - t) / (2 t) for Dance-SDE
    velocity = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    latents = torch.ones(1, 1, dtype=torch.float64)
    for transition, beta in [(flow, 1 + 0.7**2 / 2), (dance, 1 + 0.7**2 * 0.8 / (2 * 0.2))]:
        (gradient,) = torch.autograd.grad(transition(velocity, latents, 0.2, 0.15).mean.sum(), velocity)
        assert gradient.item() == pytest.approx(-beta * 0.05, rel=1e-12)


@pytest.mark.parametrize("transition", ALL)
def test_wrong_shapes_are_refused_with_both_shapes(transition):
    velocity, latents = torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 8, 8)
    with pytest.raises(ValueError, match=r"(?s)\(4, 3, 8\).*\(4, 3, 8, 8\)"):
        transition(velocity[..., 0], latents, 0.7, 0.4)
    with pytest.raises(ValueError, match=r"(?s)\(1, 3, 8, 8\).*\(4, 3, 8, 8\)"):
        transition(velocity[:1], latents, 0.7, 0.4)  # would broadcast
    with pytest.raises(ValueError, match=r"(?s)\(4, 1, 1, 1\).*\(4, 3, 8, 8\)"):
        transition(velocity, latents, torch.full((4, 1, 1, 1), 0.7), 0.4)
    with pytest.raises(ValueError, match=r"(?s)\(8,\).*\(4, 3, 8, 8\)"):
        transition(velocity, latents, 0.7, torch.full((8,), 0.4))  # fits the last dimension, not the batch
    with pytest.raises(ValueError, match=r"\(4,\).*at least one more"):
        transition(torch.zeros(4), torch.zeros(4), 0.7, 0.4)


@pytest.mark.parametrize("transition", [flow, dance, cps, ode])
def test_a_step_towards_noise_is_refused(transition):
    latents = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="from noise to data"):
        transition(latents, latents, 0.4, 0.7)
    with pytest.raises(ValueError, match="from noise to data"):
        transition(latents, latents, torch.tensor([0.7, 0.3]), 0.4)


@pytest.mark.parametrize("transition", [flow, dance, cps, ode])
def test_timesteps_in_place_of_sigmas_are_refused(transition):
    with pytest.raises(ValueError, match="sigma is"):
        transition(torch.zeros(2, 3), torch.zeros(2, 3), 900.0, 800.0)


@pytest.mark.parametrize(
    "transition, noise_level",
    [(flow, -0.1), (dance, -0.1), (cps, -0.1), (cps, 1.1), (ddim, -0.1), (ddim, 1.1), (flow, math.nan)],
)
def test_noise_level_out_of_its_domain_is_refused(transition, noise_level):
    with pytest.raises(ValueError, match=f"noise_level is {noise_level}"):
        transition(torch.zeros(2, 3), torch.zeros(2, 3), 0.7, 0.4, noise_level=noise_level)


def test_the_last_step_has_noise_in_flow_and_dance_and_none_in_cps_and_ddim():
    latents = torch.ones(1, 2, dtype=torch.float64)
    assert flow(latents, latents, 0.2, 0.0).std.item() == pytest.approx(0.7 * math.sqrt(0.2 / 0.8 * 0.2))
    assert dance(latents, latents, 0.2, 0.0).std.item() == pytest.approx(0.7 * math.sqrt(0.2))
    assert cps(latents, latents, 0.2, 0.0).std.item() == 0
    assert ddim(latents, latents, 0.2, 0.0).std.item() == 0


# Log-probability


def test_log_prob_by_hand():
    # std 2, deviations 1 and 3: mean(-1/8, -9/8) = -0.625; log 2 = 0.6931471806; log(2 pi) / 2 = 0.9189385332
    transition = Transition(torch.zeros(1, 2), torch.tensor([2.0]))
    torch.testing.assert_close(
        gaussian_log_prob(torch.tensor([[1.0, 3.0]]), transition), torch.tensor([-2.2370857138])
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_log_prob_is_the_mean_of_the_normal_density_per_sample(shape):
    generator = torch.Generator().manual_seed(0)
    sample, mean = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    std = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    expected = [torch.distributions.Normal(mean[i], std[i]).log_prob(sample[i]).mean() for i in range(3)]
    torch.testing.assert_close(gaussian_log_prob(sample, Transition(mean, std)), torch.stack(expected))


def test_log_prob_of_half_precision_samples_is_taken_at_the_stored_value():
    generator = torch.Generator().manual_seed(0)
    mean, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    stored = (mean + 0.3 * noise).to(torch.bfloat16)
    transition = Transition(mean, torch.full((3,), 0.3))
    log_prob = gaussian_log_prob(stored, transition)
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob, gaussian_log_prob(stored.float(), transition), rtol=0, atol=1e-6)
    assert (log_prob - gaussian_log_prob(mean + 0.3 * noise, transition)).abs().min() > 1e-5


def test_log_prob_ratio_of_flow_cps_is_that_of_a_gaussian_with_half_variance():
    # Flow-CPS scores by -mean((x - mean)^2): the same up to a constant when 2 std^2 = 1
    generator = torch.Generator().manual_seed(0)
    sample, new, old = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
    std = torch.full((2,), math.sqrt(0.5), dtype=torch.float64)
    published = -((sample - new) ** 2).mean(1) + ((sample - old) ** 2).mean(1)
    ours = gaussian_log_prob(sample, Transition(new, std)) - gaussian_log_prob(sample, Transition(old, std))
    torch.testing.assert_close(ours, published)


def test_a_deterministic_step_has_no_log_prob():
    latents = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="no log-probability"):
        gaussian_log_prob(latents, ode_transition(latents, latents, 0.7, 0.4))
    with pytest.raises(ValueError, match="no log-probability"):
        gaussian_log_prob(latents, cps(latents, latents, 0.2, 0.0))


def test_log_prob_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"(?s)\(4, 3, 8, 8\).*\(1, 3, 8, 8\)"):
        gaussian_log_prob(torch.zeros(4, 3, 8, 8), Transition(torch.zeros(1, 3, 8, 8), torch.ones(4)))
    with pytest.raises(ValueError, match=r"(?s)\(4, 1, 1, 1\).*\(4, 3, 8, 8\)"):
        gaussian_log_prob(torch.zeros(4, 3, 8, 8), Transition(torch.zeros(4, 3, 8, 8), torch.ones(4, 1, 1, 1)))


# Projection


def test_projection_by_hand():
    projected = project_to_data(torch.tensor([[2.0], [2.0]]), torch.tensor([0.5, 0.25]), torch.tensor([[1.0], [4.0]]))
    assert projected.tolist() == [[1.5], [1.0]]


@pytest.mark.parametrize("shape", SHAPES)
def test_projection_returns_the_data_that_the_velocity_came_from(shape):
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.2, 0.7, 1.0], dtype=torch.float64)
    t = sigma.view(3, *[1] * (len(shape) - 1))
    torch.testing.assert_close(project_to_data((1 - t) * data + t * noise, sigma, noise - data), data)


def test_projection_at_sigma_zero_is_the_identity():
    latents = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(project_to_data(latents, 0.0, torch.full_like(latents, 1e6)), latents)


def test_projection_is_the_ode_step_to_zero():
    generator = torch.Generator().manual_seed(0)
    velocity, latents = torch.randn(2, 3, 4, generator=generator)
    assert torch.equal(project_to_data(latents, 0.3, velocity), ode_transition(velocity, latents, 0.3, 0.0).mean)


def test_projection_refuses_mismatched_shapes():
    with pytest.raises(ValueError, match=r"(?s)\(1, 3\).*\(4, 3\)"):
        project_to_data(torch.zeros(4, 3), 0.5, torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"(?s)\(4, 1\).*\(4, 3\)"):
        project_to_data(torch.zeros(4, 3), torch.full((4, 1), 0.5), torch.zeros(4, 3))
