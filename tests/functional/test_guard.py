"""GRPO-Guard: the ratios' identities from first principles, the weights, and the faults that public code has had."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_flow.functional import (
    Transition,
    clipped_loss,
    cps_transition,
    dance_sde_transition,
    flow_sde_transition,
    gaussian_log_prob,
    log_ratio,
    timestep_weight,
)


KINDS = ["standard", "mean_revised", "ratio_norm"]
SHAPES = [(3, 5), (3, 7, 4), (3, 4, 6, 6), (3, 2, 4, 3, 3)]
few = settings(deadline=None, derandomize=True, max_examples=60)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def step(shape, move, seed=0, dtype=torch.float64):
    """One sampled step: noise, sample, new and old mean, std. `move` is how far the mean has gone since."""
    generator = torch.Generator().manual_seed(seed)
    old_mean, direction, noise = torch.randn(3, *shape, generator=generator, dtype=torch.float64).to(dtype)
    std = torch.linspace(0.1, 0.9, shape[0], dtype=dtype)
    sample = old_mean + std.view(-1, *[1] * (len(shape) - 1)) * noise
    return noise, sample, old_mean + move * direction, old_mean, std


def difference_of_log_probs(sample, mean, old_mean, std):
    """GRPO-Guard Eq. 5 word for word."""
    return gaussian_log_prob(sample, Transition(mean, std)) - gaussian_log_prob(sample, Transition(old_mean, std))


def test_ratios_by_hand():
    # One sample of two dimensions. std 0.5, eps (1, -2), old mean (0, 0), so x = (0.5, -1); new mean (0.1, 0.3), so
    # Delta = (-0.1, -0.3).
    # log p - log p_old = mean(-(0.4^2, 1.3^2) + (0.5^2, 1^2)) / (2 * 0.25) = mean(0.09, -0.69) / 0.5 = -0.6
    # mean(Delta^2) / (2 * 0.25) = 0.05 / 0.5 = 0.1, so mean-revised is -0.5 and RatioNorm 0.5 * -0.5 = -0.25;
    # and -mean(Delta eps) = -(-0.1 * 1 + -0.3 * -2) / 2 = -0.25.
    sample, mean, old_mean = double([[0.5, -1]]), double([[0.1, 0.3]]), double([[0, 0]])
    for kind, expected in [("standard", -0.6), ("mean_revised", -0.5), ("ratio_norm", -0.25)]:
        for std in (double([0.5]), 0.5):
            assert log_ratio(sample, mean, old_mean, std, kind=kind).item() == pytest.approx(expected, abs=1e-12)


@few
@given(seed=st.integers(0, 2**31), move=st.floats(1e-4, 3), shape=st.sampled_from(SHAPES))
def test_ratios_are_those_of_the_log_probabilities(seed, move, shape):
    # Eq. 5 and 7, Table 2 and Eq. 8, from the densities and from the noise, which log_ratio is never told
    noise, sample, mean, old_mean, std = step(shape, move, seed)
    delta = old_mean - mean
    standard = difference_of_log_probs(sample, mean, old_mean, std)
    revised = standard + (delta**2).flatten(1).mean(1) / (2 * std**2)
    normalized = -(delta * noise).flatten(1).mean(1)
    for kind, expected in [("standard", standard), ("mean_revised", revised), ("ratio_norm", normalized)]:
        ratio = log_ratio(sample, mean, old_mean, std, kind=kind)
        torch.testing.assert_close(ratio, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(std * revised, normalized, rtol=1e-9, atol=1e-12)


def test_float32_keeps_the_digits_that_a_difference_of_log_probabilities_loses():
    # 65,536 dimensions (512 x 512 in SD3.5) and a typical log-ratio: two numbers of order 1 that differ by about 1e-6
    generator = torch.Generator().manual_seed(0)
    old_mean, direction, noise = torch.randn(3, 16, 16, 64, 64, generator=generator)
    std = torch.full((16,), 0.3)
    sample, mean = old_mean + 0.3 * noise, old_mean + 1e-4 * direction
    exact = difference_of_log_probs(sample.double(), mean.double(), old_mean.double(), std.double())
    assert 1e-7 < exact.abs().mean() < 1e-5
    error = (log_ratio(sample, mean, old_mean, std, kind="standard") - exact).square().mean().sqrt()
    error_of_difference = (difference_of_log_probs(sample, mean, old_mean, std) - exact).square().mean().sqrt()
    assert error < error_of_difference / 1000
    assert error < 1e-3 * exact.abs().mean()


def test_flow_cps_without_the_variance_is_the_standard_ratio_with_half_a_variance():
    # Flow-CPS scores by -mean((x - mean)^2). By hand: x 2, new mean 1, old mean 0: -1 + 4
    std = math.sqrt(1 / 2)
    assert log_ratio(double([[2]]), double([[1]]), double([[0]]), std, kind="standard").item() == pytest.approx(3)
    _, sample, mean, old_mean, _ = step((3, 4, 6, 6), 0.3)
    published = ((sample - old_mean) ** 2 - (sample - mean) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(log_ratio(sample, mean, old_mean, std, kind="standard"), published)


def test_mean_revision_takes_the_bias_out_of_the_ratio():
    # over many draws of eps the standard log-ratio averages to -mean(Delta^2) / (2 std^2), the others to 0
    count, dims = 4000, 16
    noise = torch.randn(count, dims, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    old_mean, mean = torch.zeros_like(noise), torch.full_like(noise, 0.2)
    averages = {kind: log_ratio(0.5 * noise, mean, old_mean, 0.5, kind=kind).mean().item() for kind in KINDS}
    # standard deviation over draws: 0.2 / 0.5 / sqrt(16) = 0.1; four standard errors of the mean
    tolerance = 4 * 0.1 / math.sqrt(count)
    assert averages["standard"] == pytest.approx(-0.08, abs=tolerance)  # 0.04 / (2 * 0.25)
    assert averages["mean_revised"] == pytest.approx(0, abs=tolerance)
    assert averages["ratio_norm"] == pytest.approx(0, abs=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_ratio_of_the_sampling_model_itself_is_exactly_one(kind, dtype):
    _, sample, mean, old_mean, std = step((3, 4, 6, 6), 0.0, dtype=dtype)
    ratio = log_ratio(sample, mean, old_mean, std, kind=kind)
    assert ratio.tolist() == [0.0, 0.0, 0.0]
    assert ratio.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_has_its_own_difference_of_means(kind):
    # A difference averaged over the whole batch, as public code had it, shows when one sample has not moved.
    _, sample, mean, old_mean, std = step((3, 4, 6, 6), 0.3)
    mean[0] = old_mean[0]
    together = log_ratio(sample, mean, old_mean, std, kind=kind)
    assert together.shape == (3,)
    assert together[0].item() == 0.0
    for i in range(3):
        one = slice(i, i + 1)
        alone = log_ratio(sample[one], mean[one], old_mean[one], std[one], kind=kind)
        torch.testing.assert_close(together[one], alone)


def test_shapes_that_would_broadcast_are_refused():
    # A scale of (B, 1, 1, 1) against (B,), as public code had it, would give a ratio of (B, 1, 1, B)
    _, sample, mean, old_mean, std = step((3, 4, 6, 6), 0.3)
    for kind in KINDS:
        with pytest.raises(ValueError, match=r"std has shape \(3, 1, 1, 1\): .*\(3,\)"):
            log_ratio(sample, mean, old_mean, std.view(3, 1, 1, 1), kind=kind)
    with pytest.raises(ValueError, match=r"std has shape \(6,\)"):  # fits the last dimension, not the batch
        log_ratio(sample, mean, old_mean, torch.ones(6), kind="standard")
    with pytest.raises(ValueError, match=r"mean has shape \(3, 4, 6, 6\) and old_mean has shape \(1, 4, 6, 6\)"):
        log_ratio(sample, mean, old_mean[:1], std, kind="ratio_norm")
    with pytest.raises(ValueError, match=r"sample has shape \(2, 4, 6, 6\)"):
        log_ratio(sample[:2], mean, old_mean, std, kind="ratio_norm")
    with pytest.raises(ValueError, match=r"\(3,\).*\(B, \.\.\.\)"):
        log_ratio(sample[:, 0, 0, 0], mean[:, 0, 0, 0], old_mean[:, 0, 0, 0], std, kind="ratio_norm")


def test_unknown_kinds_and_deterministic_steps_are_refused():
    _, sample, mean, old_mean, _ = step((3, 5), 0.3)
    with pytest.raises(ValueError, match="kind is 'guard'.*'ratio_norm'"):
        log_ratio(sample, mean, old_mean, 0.5, kind="guard")
    with pytest.raises(ValueError, match="std is .* above 0"):
        log_ratio(sample, mean, old_mean, double([0.1, 0.0, 0.1]), kind="ratio_norm")


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_the_ratios_in_the_mean(shape):
    # From Eq. 7 and 8, over the n dimensions of a sample: RatioNorm eps / n, mean-revised eps / (std n), standard
    # (Delta + std eps) / (std^2 n)
    noise, sample, mean, old_mean, std = step(shape, 0.3)
    s, n = std.view(-1, *[1] * (len(shape) - 1)), math.prod(shape[1:])
    expected = {
        "ratio_norm": noise / n,
        "mean_revised": noise / (s * n),
        "standard": (old_mean - mean + s * noise) / (s**2 * n),
    }
    for kind in KINDS:
        current = mean.clone().requires_grad_()
        ratio = log_ratio(sample, current, old_mean, std, kind=kind)
        (gradient,) = torch.autograd.grad(ratio.sum(), current)
        torch.testing.assert_close(gradient, expected[kind])


# Time-step weights


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("none", [1.0, 1.0]),
        ("temp", [0.5, 0.25]),
        ("inverse_dt", [10.0, 4.0]),
        ("beta_over_dt", [15.0, 8.0]),  # 1.5 / 0.1, 2 / 0.25
        ("inverse_beta_dt", [1 / 0.15, 2.0]),  # 1 / (1.5 * 0.1), 1 / (2 * 0.25)
    ],
)
def test_weights_by_hand(kind, expected):
    weight = timestep_weight(kind, std=double([0.5, 0.25]), dt=double([0.1, 0.25]), beta=double([1.5, 2.0]))
    torch.testing.assert_close(weight, double(expected))


def test_weights_take_scalars():
    std = torch.tensor([0.5, 0.25])
    assert timestep_weight("inverse_dt", std=std, dt=0.25).tolist() == [4.0, 4.0]
    assert timestep_weight("beta_over_dt", std=std, dt=torch.tensor(0.25), beta=2.0).tolist() == [8.0, 8.0]


def test_weights_refuse_what_does_not_fit():
    std = torch.tensor([0.5, 0.25])
    with pytest.raises(ValueError, match="'beta_over_dt' needs beta"):
        timestep_weight("beta_over_dt", std=std, dt=0.1)
    with pytest.raises(ValueError, match="'dt'.*inverse_dt"):
        timestep_weight("dt", std=std, dt=0.1)
    with pytest.raises(ValueError, match=r"\(2, 1, 1, 1\).*\(B,\)"):
        timestep_weight("temp", std=std.view(2, 1, 1, 1), dt=0.1)
    with pytest.raises(ValueError, match=r"(?s)\(2, 1, 1, 1\).*\(2,\)"):
        timestep_weight("inverse_dt", std=std, dt=torch.ones(2, 1, 1, 1))


# What the weights are for: the size of the policy gradient in the velocity, step by step (GRPO-Guard Table 2).

UNEVEN = [0.95, 0.9, 0.8, 0.6, 0.5, 0.2, 0.0]  # steps of 0.05 to 0.3


def gradient_scales(transition, kind, weighting, beta, gain=lambda t, u: None, sigmas=UNEVEN):
    """Norm of the loss gradient in the velocity over that of advantage times noise, on-policy, for every step."""
    generator = torch.Generator().manual_seed(0)
    latents, velocity, noise = torch.randn(3, 2, 4, 6, 6, generator=generator, dtype=torch.float64)
    advantages = double([1.5, -0.7])
    scales = []
    for t, u in zip(sigmas, sigmas[1:], strict=False):
        old = transition(velocity, latents, t, u)
        sample = old.mean + old.std.view(2, 1, 1, 1) * noise
        current = velocity.clone().requires_grad_()
        new = transition(current, latents, t, u)
        ratio = log_ratio(sample, new.mean, old.mean, new.std, kind=kind)
        weight = timestep_weight(weighting, std=new.std, dt=t - u, beta=beta(t), gain=gain(t, u))
        loss = clipped_loss(ratio, advantages, epsilon=2e-6, weight=weight)
        (gradient,) = torch.autograd.grad(loss.sum(), current)
        reference = advantages.view(2, 1, 1, 1) * noise / noise[0].numel()
        scale = (gradient / reference).flatten()
        torch.testing.assert_close(scale, scale[:1].expand_as(scale))  # the gradient is parallel to the noise
        scales.append(scale[0].item())
    return scales


def flow(velocity, latents, sigma, sigma_next):
    return flow_sde_transition(velocity, latents, sigma, sigma_next, noise_level=0.7, sigma_max=0.95)


def dance(velocity, latents, sigma, sigma_next):
    return dance_sde_transition(velocity, latents, sigma, sigma_next, noise_level=0.7)


def flow_beta(t):
    return 1 + 0.7**2 / 2


def dance_beta(t):
    return 1 + 0.7**2 * (1 - t) / (2 * t)


def test_guard_gives_every_flow_step_the_same_gradient():
    # beta eps (Table 2, last row): without the 1 / dt the steps of 0.05 and 0.3 would differ by a factor of 6
    scales = gradient_scales(flow, "ratio_norm", "inverse_dt", flow_beta)
    assert scales == pytest.approx([flow_beta(0)] * 6, rel=1e-9)


def test_ratio_norm_alone_leaves_the_length_of_the_step_in_the_gradient():
    scales = gradient_scales(flow, "ratio_norm", "none", flow_beta)
    steps = [t - u for t, u in zip(UNEVEN, UNEVEN[1:], strict=False)]
    assert scales == pytest.approx([flow_beta(0) * dt for dt in steps], rel=1e-9)


def test_temp_weight_gives_the_on_policy_gradient_of_ratio_norm():
    # Table 2: weighting the standard ratio by std leaves beta dt eps on-policy
    assert gradient_scales(flow, "standard", "temp", flow_beta) == pytest.approx(
        gradient_scales(flow, "ratio_norm", "none", flow_beta), rel=1e-9
    )


def test_dance_steps_are_equalized_by_the_inverse_of_beta_not_by_the_printed_weight():
    equal = gradient_scales(dance, "ratio_norm", "inverse_beta_dt", dance_beta)
    printed = gradient_scales(dance, "ratio_norm", "beta_over_dt", dance_beta)
    assert equal == pytest.approx([1.0] * 6, rel=1e-9)
    assert printed == pytest.approx([dance_beta(t) ** 2 for t in UNEVEN[:-1]], rel=1e-9)


def cps(velocity, latents, sigma, sigma_next):
    return cps_transition(velocity, latents, sigma, sigma_next, noise_level=0.8)


def test_one_over_the_gain_equalizes_the_steps_of_every_dynamics():
    # GRPO-Guard's weight of Flow-SDE leaves CPS uneven: d mean / d v = -(dt + (1 - cos(eta pi / 2)) t' (1 - t))
    def cps_gain(t, u):
        return (t - u) + (1 - math.cos(0.8 * math.pi / 2)) * u * (1 - t)

    def dance_gain(t, u):
        return dance_beta(t) * (t - u)

    assert gradient_scales(dance, "ratio_norm", "inverse_gain", dance_beta, dance_gain) == pytest.approx([1.0] * 6)
    steps = UNEVEN[:-1]  # the last one of CPS is deterministic
    equal = gradient_scales(cps, "ratio_norm", "inverse_gain", flow_beta, cps_gain, sigmas=steps)
    assert equal == pytest.approx([1.0] * 5, rel=1e-9)
    uneven = gradient_scales(cps, "ratio_norm", "inverse_dt", flow_beta, sigmas=steps)
    assert max(uneven) > 1.5 * min(uneven)


def test_the_gain_must_be_given():
    with pytest.raises(ValueError, match="'inverse_gain' needs gain"):
        timestep_weight("inverse_gain", std=torch.ones(2), dt=0.1)
