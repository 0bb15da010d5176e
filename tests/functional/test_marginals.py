"""Do the samplers keep the marginals of the flow? Measured on Gaussian data, whose exact velocity is known.

With `x_0 ~ N(m, s^2)` the marginal at `t` is `N((1 - t) m, V)`, `V = (1 - t)^2 s^2 + t^2`, and the exact velocity is
`E[x_1 - x_0 | x_t] = -m + (t - (1 - t) s^2) / V (x_t - (1 - t) m)`. It is affine in `x_t`, so the transitions' mean
is too, and the mean and variance of a whole walk follow from the transitions alone, without any sampling error:
`a x + b` and `std` take the moments `(mu, V)` to `(a mu + b, a^2 V + std^2)`. What is left is the error of the
discretisation, which has to halve when the number of steps doubles.
"""

import math

import pytest
import torch

from trl_flow.functional import (
    cps_transition,
    dance_sde_transition,
    ddim_transition,
    flow_sde_transition,
    ode_transition,
)


MEAN, VARIANCE = 1.5, 0.64
START = 0.95  # the Flow-SDE is singular at 1; what happens there has a test of its own


def flow_variance(t, variance=VARIANCE):
    return (1 - t) ** 2 * variance + t**2


def exact_velocity(x, t, variance=VARIANCE):
    return -MEAN + (t - (1 - t) * variance) / flow_variance(t, variance) * (x - (1 - t) * MEAN)


def flow(x, t, u, eta, variance=VARIANCE):
    return flow_sde_transition(exact_velocity(x, t, variance), x, t, u, noise_level=eta, sigma_max=START)


def dance(x, t, u, eta, variance=VARIANCE):
    return dance_sde_transition(exact_velocity(x, t, variance), x, t, u, noise_level=eta)


def cps(x, t, u, eta, variance=VARIANCE):
    return cps_transition(exact_velocity(x, t, variance), x, t, u, noise_level=eta)


def schedule(steps, start=START):
    return [start * (1 - i / steps) for i in range(steps)] + [0.0]


def moment_errors(transition, levels, marginal):
    """Walks over `levels` from the exact marginal: errors of mean and variance after every step."""
    mean, variance = marginal(levels[0])
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    errors = []
    for level, level_next in zip(levels, levels[1:], strict=False):
        (at_zero, at_one), std = transition(probe, level, level_next)
        slope, offset = (at_one - at_zero).item(), at_zero.item()
        mean, variance = slope * mean + offset, slope**2 * variance + std[0].item() ** 2
        true_mean, true_variance = marginal(level_next)
        errors.append((abs(mean - true_mean), abs(variance - true_variance)))
    return torch.tensor(errors, dtype=torch.float64).T


def flow_marginal(t):
    return (1 - t) * MEAN, flow_variance(t)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("transition", [flow, dance])
def test_sde_keeps_the_marginals_at_every_noise_level(transition, eta):
    def walk(steps):
        return moment_errors(lambda x, t, u: transition(x, t, u, eta), schedule(steps), flow_marginal)

    mean_error, variance_error = walk(400)
    assert mean_error.max() < 1e-12  # the mean moves on a straight line, which Euler steps follow exactly
    # First order in the step: at most 2.4 / steps at the worst of all steps, and halved by twice the steps.
    assert variance_error.max() < 2.4 / 400
    assert walk(800)[1].max() / variance_error.max() == pytest.approx(0.5, abs=0.03)


def test_marginals_are_lost_without_the_drift_that_makes_up_for_the_noise():
    # The measure above can tell: noise on top of the ODE, a fault of its own, is not forgiven by more steps.
    def faulty(x, t, u):
        std = dance(x, t, u, 0.7).std
        return ode_transition(exact_velocity(x, t), x, t, u).mean, std

    errors = [moment_errors(faulty, schedule(steps), flow_marginal)[1].max() for steps in (400, 800)]
    assert min(errors) > 0.2


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("transition", [flow, dance])
def test_drawn_samples_have_the_marginals(transition, eta):
    # 20,000 samples: the sample mean has a standard error of sqrt(V / n), the sample variance of V sqrt(2 / n).
    # Tolerance: four of them, and for the variance the 2.4 / steps of the discretisation.
    count, steps = 20_000, 200
    generator = torch.Generator().manual_seed(0)
    levels = schedule(steps)
    x = (1 - START) * MEAN + math.sqrt(flow_variance(START)) * torch.randn(
        count, 1, generator=generator, dtype=torch.float64
    )
    for step, (t, u) in enumerate(zip(levels, levels[1:], strict=False)):
        mean, std = transition(x, t, u, eta)
        x = mean + std.view(-1, 1) * torch.randn(count, 1, generator=generator, dtype=torch.float64)
        if (step + 1) % 50 == 0:
            true_mean, true_variance = flow_marginal(u)
            assert x.mean().item() == pytest.approx(true_mean, abs=4 * math.sqrt(true_variance / count))
            tolerance = 4 * true_variance * math.sqrt(2 / count) + 2.4 / steps
            assert x.var().item() == pytest.approx(true_variance, abs=tolerance)


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_first_flow_step_from_pure_noise_adds_a_quarter_of_eta_to_the_fourth(eta):
    # Uniform schedule of N steps: sigma_t^2 = eta^2 N and dt = 1 / N, so x_1 - sigma_t^2 / 2 x_1 dt keeps
    # 1 - eta^2 / 2 of the noise and eta of fresh noise comes in: (1 - eta^2 / 2)^2 + eta^2 = 1 + eta^4 / 4.
    # Point data at 0 has v = x_1 at t = 1, which takes another 1 / N.
    steps = 1000
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    second = 1 - 1 / steps
    mean, std = flow_sde_transition(x, x, 1.0, second, noise_level=eta, sigma_max=second)
    kept = (mean[1] - mean[0]).item()
    assert kept == pytest.approx(1 - eta**2 / 2 - 1 / steps, rel=1e-9)
    assert std[0].item() == pytest.approx(eta, rel=1e-9)
    assert kept**2 + std[0].item() ** 2 == pytest.approx(1 + eta**4 / 4, abs=3 / steps)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("steps", [4, 50])
def test_cps_keeps_the_marginals_of_point_data_exactly(eta, steps):
    # The predictions are exact, x0 = m and x1 = (x_t - (1 - t) m) / t, so that after the step the noise has the
    # coefficient sqrt(t'^2 - std^2) on the old noise and std on the fresh: t' together, however long the step is.
    errors = moment_errors(
        lambda x, t, u: cps(x, t, u, eta, variance=0.0),
        schedule(steps, start=1.0),
        lambda t: ((1 - t) * MEAN, t**2),
    )
    assert errors.max() < 1e-12


@pytest.mark.parametrize("eta, lost", [(0.3, (0.04, 0.09)), (0.7, (0.26, 0.31)), (1.0, (0.49, 0.53))])
def test_cps_keeps_the_mean_of_spread_data_and_loses_variance_that_steps_do_not_bring_back(eta, lost):
    for steps in (100, 400):
        mean_error, variance_error = moment_errors(
            lambda x, t, u: cps(x, t, u, eta), schedule(steps, start=1.0), flow_marginal
        )
        assert mean_error.max() < 1e-12
        assert lost[0] < variance_error[-1].item() / VARIANCE < lost[1]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_keeps_the_marginals_at_every_noise_level(eta, prediction_type):
    # x_t = sqrt(a) x_0 + sqrt(1 - a) e, variance a s^2 + 1 - a; the exact noise prediction is
    # E[e | x_t] = sqrt(1 - a) / (a s^2 + 1 - a) (x_t - sqrt(a) m). The alphas are squared cosines of even angles.
    def marginal(a):
        return math.sqrt(a) * MEAN, a * VARIANCE + 1 - a

    def transition(x, a, a_next):
        noise_pred = math.sqrt(1 - a) / (a * VARIANCE + 1 - a) * (x - math.sqrt(a) * MEAN)
        # v = sqrt(a) e - sqrt(1 - a) x0, and sqrt(a) x0 = x - sqrt(1 - a) e
        v = (noise_pred - math.sqrt(1 - a) * x) / math.sqrt(a)
        prediction = v if prediction_type == "v_prediction" else noise_pred
        return ddim_transition(prediction, x, a, a_next, noise_level=eta, prediction_type=prediction_type)

    def walk(steps):
        alphas = [math.cos(1.5 * (1 - i / steps)) ** 2 for i in range(steps + 1)]
        return moment_errors(transition, alphas, marginal)

    mean_error, variance_error = walk(400)
    # the transition keeps the mean exactly when the prediction does: sqrt(a') m whatever the step
    assert mean_error.max() < 1e-12
    assert variance_error.max() < 3.6 / 400
    assert walk(800)[1].max() / variance_error.max() == pytest.approx(0.5, abs=0.03)
