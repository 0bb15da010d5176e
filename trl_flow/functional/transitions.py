"""The Gaussian transitions that turn a latent at one noise level into the next, and their log-probability.

| symbol in the papers | here | meaning |
| --- | --- | --- |
| `x_t` | `latents` | latent at noise level `t`: `(1 - t) x_0 + t x_1`, `x_1` unit Gaussian noise |
| `t`, `t'` | `sigma`, `sigma_next` | the scheduler's sigma before and after the step, `0 <= t' <= t <= 1` |
| `dt` | `sigma - sigma_next` | length of the step, never negative |
| `v` | `velocity` | the model's prediction of `x_1 - x_0`, guidance included |
| `sigma_t` | `diffusion` | diffusion coefficient of the SDE, not the scheduler's sigma |
| `eta` | `noise_level` | how much noise a step adds; 0 is the ODE |
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trl_flow.functional._checks import check_choice, check_number, check_on_cpu, check_shapes
from trl_flow.functional._tensors import Number, latent_mean, noise_scale, over_latent, per_sample, promote


class Transition(NamedTuple):
    """The Gaussian `N(mean, std^2 I)` from which the next latent is drawn, `mean + std * noise`.

    Attributes:
        mean: `(B, ...)`, the shape of the latents; float32 (float64 from float64 input). Differentiable in the model's
            prediction.
        std: `(B,)`, the same dtype; one standard deviation per sample. 0 where the step is deterministic.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import Transition, gaussian_log_prob
    >>> transition = Transition(mean=torch.zeros(1, 3), std=torch.tensor([0.5]))
    >>> next_latents = transition.mean + transition.std[:, None] * torch.ones(1, 3)
    >>> gaussian_log_prob(next_latents, transition)
    tensor([-0.7258])
    ```
    """

    mean: Tensor
    std: Tensor


def flow_sde_transition(
    velocity: Tensor, latents: Tensor, sigma: Number, sigma_next: Number, *, noise_level: float, sigma_max: Number
) -> Transition:
    """One Euler-Maruyama step of Flow-GRPO's SDE (Flow-GRPO, arXiv:2505.05470; GRPO-Guard Eq. 3, VGPO Eq. 7).

        sigma_t = eta sqrt(t / (1 - t))
        mean = x_t - [v + sigma_t^2 / (2 t) (x_t + (1 - t) v)] dt
        std = sigma_t sqrt(dt)

    The SDE has the marginals of the ODE at every noise level as the steps get short. Where `t` is 1, `sigma_t` would
    be infinite; Flow-GRPO then uses the schedule's second sigma in its denominator, and only there. That first step
    adds the same noise however short it is, and on a uniform schedule raises the variance by `eta^4 / 4`.

    Args:
        velocity: `(B, ...)`, predicted at `latents` and `sigma`.
        latents: `(B, ...)`, `x_t`.
        sigma: `(B,)` or scalar, `t`.
        sigma_next: `(B,)` or scalar, `t'`.
        noise_level: `eta`, at least 0. 0 gives `ode_transition` exactly.
        sigma_max: `(B,)` or scalar, below 1: the schedule's second sigma, in place of a `sigma` that equals 1.

    Raises:
        ValueError: a shape does not fit; `noise_level` is negative; sigmas on the CPU are out of order or out of
            `[0, 1]`.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import flow_sde_transition
    >>> latents, velocity = torch.ones(1, 2), torch.full((1, 2), 2.0)
    >>> transition = flow_sde_transition(velocity, latents, 0.8, 0.6, noise_level=0.7, sigma_max=0.9)
    >>> transition.mean, transition.std
    (tensor([[0.2570, 0.2570]]), tensor([0.6261]))
    ```
    """
    check_number("noise_level", noise_level, 0)
    x, v, t, t_next = _prepare(velocity, latents, sigma, sigma_next)
    limit = per_sample("sigma_max", sigma_max, x)
    dt = t - t_next
    # sigma_t^2 / (2 t), written without the division by t
    half_rate = noise_level**2 / (2 * (1 - torch.where(t == 1, limit, t)))
    drift = v + over_latent(half_rate, x) * (x + over_latent(1 - t, x) * v)
    return Transition(x - drift * over_latent(dt, x), (2 * half_rate * t * dt).sqrt())


def dance_sde_transition(
    velocity: Tensor, latents: Tensor, sigma: Number, sigma_next: Number, *, noise_level: float
) -> Transition:
    """One Euler-Maruyama step of DanceGRPO's SDE (arXiv:2505.07818): `flow_sde_transition` with `sigma_t = eta`.

        mean = x_t - [v + eta^2 / (2 t) (x_t + (1 - t) v)] dt
        std = eta sqrt(dt)

    The gradient of `mean` in `v` is `-beta dt` with `beta = 1 + eta^2 (1 - t) / (2 t)`.

    Args:
        velocity, latents, sigma, sigma_next: as for `flow_sde_transition`; `sigma` above 0.
        noise_level: `eta`, at least 0. 0 gives `ode_transition` exactly.

    Raises:
        ValueError: as `flow_sde_transition`.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import dance_sde_transition
    >>> latents, velocity = torch.ones(1, 2), torch.full((1, 2), 2.0)
    >>> transition = dance_sde_transition(velocity, latents, 0.8, 0.6, noise_level=0.3)
    >>> transition.mean, transition.std
    (tensor([[0.5843, 0.5843]]), tensor([0.1342]))
    ```
    """
    check_number("noise_level", noise_level, 0)
    x, v, t, t_next = _prepare(velocity, latents, sigma, sigma_next)
    dt = t - t_next
    drift = v + over_latent(noise_level**2 / (2 * t), x) * (x + over_latent(1 - t, x) * v)
    return Transition(x - drift * over_latent(dt, x), noise_level * dt.sqrt())


def cps_transition(
    velocity: Tensor, latents: Tensor, sigma: Number, sigma_next: Number, *, noise_level: float
) -> Transition:
    """One step of coefficients-preserving sampling (Flow-CPS, arXiv:2509.05952).

        x0 = x_t - t v,  x1 = x_t + (1 - t) v
        std = t' sin(eta pi / 2)
        mean = (1 - t') x0 + sqrt(t'^2 - std^2) x1

    The predicted data keeps the weight `1 - t'`, and the predicted and the fresh noise together keep `t'`: the noise
    level after the step is right for every step length. Where the data is one point, so that the predictions are
    exact, this keeps the marginals exactly. It is not the discretization of an SDE, though, `std` does not shrink with
    the step: of data that spreads it keeps the mean, but loses a part of the variance that more steps do not bring
    back (Gaussian data, exact velocity, 100 to 400 steps: 6 to 8 percent at a noise level of 0.3, 28 at 0.7).

    The step to `t' = 0` is deterministic, `std = 0`. Flow-CPS as published scores a sample by
    `-mean((x - mean)^2)`; up to a constant, which no ratio sees, that is `gaussian_log_prob` with a `std` of
    `sqrt(1 / 2)`.

    Args:
        velocity, latents, sigma, sigma_next: as for `flow_sde_transition`.
        noise_level: `eta` in `[0, 1]`. 0 gives `ode_transition` exactly; 1 replaces all of the noise.

    Raises:
        ValueError: as `flow_sde_transition`; `noise_level` is not in `[0, 1]`.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import cps_transition
    >>> latents, velocity = torch.ones(1, 2), torch.full((1, 2), 2.0)
    >>> transition = cps_transition(velocity, latents, 0.8, 0.6, noise_level=0.8)
    >>> transition.mean, transition.std
    (tensor([[0.0196, 0.0196]]), tensor([0.5706]))
    ```
    """
    check_number("noise_level", noise_level, 0, 1)
    x, v, t, t_next = _prepare(velocity, latents, sigma, sigma_next)
    noise_prediction = x + over_latent(1 - t, x) * v
    # sqrt(t'^2 - std^2) = t' cos(eta pi / 2), and (1 - t') x0 + t' x1 = x - v dt: what is left of the published mean
    # is the share of the predicted noise that fresh noise replaces, 1 - cos(eta pi / 2) = 2 sin(eta pi / 4)^2.
    replaced = 2 * math.sin(noise_level * math.pi / 4) ** 2
    mean = x - v * over_latent(t - t_next, x) - over_latent(replaced * t_next, x) * noise_prediction
    return Transition(mean, t_next * math.sin(noise_level * math.pi / 2))


def ode_transition(velocity: Tensor, latents: Tensor, sigma: Number, sigma_next: Number) -> Transition:
    """One Euler step of the flow's ODE: `mean = x_t - v dt`, `std = 0`. It has no log-probability.

    Args:
        velocity, latents, sigma, sigma_next: as for `flow_sde_transition`.

    Raises:
        ValueError: as `flow_sde_transition`.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import ode_transition
    >>> latents, velocity = torch.ones(1, 2), torch.full((1, 2), 2.0)
    >>> transition = ode_transition(velocity, latents, 0.8, 0.6)
    >>> transition.mean, transition.std
    (tensor([[0.6000, 0.6000]]), tensor([0.]))
    ```
    """
    x, v, t, t_next = _prepare(velocity, latents, sigma, sigma_next)
    return Transition(x - v * over_latent(t - t_next, x), torch.zeros_like(t))


def ddim_transition(
    noise_pred: Tensor,
    latents: Tensor,
    alpha_cumprod: Number,
    alpha_cumprod_next: Number,
    *,
    noise_level: float,
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
) -> Transition:
    """One stochastic DDIM step for models that predict the noise (DDIM, arXiv:2010.02502, Eq. 12 and 16).

        x0 = (x_t - sqrt(1 - a) e) / sqrt(a)
        std = eta sqrt((1 - a') / (1 - a) (1 - a / a'))
        mean = sqrt(a') x0 + sqrt(1 - a' - std^2) e

    With `prediction_type="v_prediction"` the model predicts `v = sqrt(a) e - sqrt(1 - a) x_0` (arXiv:2202.00512), so
    that `x0 = sqrt(a) x_t - sqrt(1 - a) v` and `e = sqrt(a) v + sqrt(1 - a) x_t`, also where `a` is 0.

    The gradient of `mean` in `e` is `-(sqrt(a' (1 - a) / a) - sqrt(1 - a' - std^2))`, in `v` it is `sqrt(a)` times
    that. A step to `a' = 1` without noise gives the predicted data, `mean = x0`.

    Args:
        noise_pred: `(B, ...)`, `e`, guidance included; `v` with `prediction_type="v_prediction"`.
        latents: `(B, ...)`, `x_t = sqrt(a) x_0 + sqrt(1 - a) noise`.
        alpha_cumprod: `(B,)` or scalar, `a` before the step, above 0 (at least 0 for `v`) and below 1.
        alpha_cumprod_next: `(B,)` or scalar, `a'` after the step, above 0, at least `a` and at most 1.
        noise_level: `eta` in `[0, 1]`; 0 is deterministic DDIM, 1 has the variance of DDPM.
        prediction_type: what the model predicts, diffusers' names.

    Raises:
        ValueError: a shape does not fit; `noise_level` is not in `[0, 1]`; `prediction_type` is unknown.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import ddim_transition
    >>> latents, noise_pred = torch.ones(1, 2), torch.full((1, 2), 0.5)
    >>> transition = ddim_transition(noise_pred, latents, 0.5, 0.8, noise_level=1.0)
    >>> transition.mean, transition.std
    (tensor([[0.9295, 0.9295]]), tensor([0.3873]))
    ```
    """
    check_number("noise_level", noise_level, 0, 1)
    check_choice("prediction_type", prediction_type, ("epsilon", "v_prediction"))
    check_shapes("(B, ...)", noise_pred=noise_pred, latents=latents)
    x, prediction = promote(latents, noise_pred)
    a = per_sample("alpha_cumprod", alpha_cumprod, x)
    a_next = per_sample("alpha_cumprod_next", alpha_cumprod_next, x)
    std = noise_level * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()
    signal, noise = over_latent(a.sqrt(), x), over_latent((1 - a).sqrt(), x)
    if prediction_type == "epsilon":
        data_prediction, noise_prediction = (x - noise * prediction) / signal, prediction
    else:
        data_prediction, noise_prediction = signal * x - noise * prediction, signal * prediction + noise * x
    # never negative for eta <= 1, but rounding may make it so where it is 0
    direction = (1 - a_next - std**2).clamp(min=0).sqrt()
    mean = over_latent(a_next.sqrt(), x) * data_prediction + over_latent(direction, x) * noise_prediction
    return Transition(mean, std)


def gaussian_log_prob(sample: Tensor, transition: Transition) -> Tensor:
    """Log-density of `sample`, averaged over the latent's dimensions (GRPO-Guard Eq. 6, with a mean for the sum).

        log p = mean(-(x - mean)^2 / (2 std^2) - log std - log(2 pi) / 2)

    Args:
        sample: `(B, ...)`, the next latent, rounded to the dtype in which it is stored.
        transition: where it was drawn from, or what the trained model makes of the same step.

    Returns:
        `(B,)`.

    Raises:
        ValueError: a shape does not fit; a `std` on the CPU is not above 0: a deterministic step has no
            log-probability. On an accelerator, which is not made to wait, the result is NaN or infinite instead.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import Transition, gaussian_log_prob
    >>> transition = Transition(mean=torch.zeros(2, 3), std=torch.ones(2))
    >>> gaussian_log_prob(torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), transition)
    tensor([-0.9189, -1.4189])
    ```
    """
    check_shapes("(B, ...)", sample=sample, mean=transition.mean)
    x, mean = promote(sample, transition.mean)
    std = noise_scale(transition.std, x)
    scaled = (x - mean) / over_latent(std, x)
    return -0.5 * latent_mean(scaled**2) - std.log() - 0.5 * math.log(2 * math.pi)


def project_to_data(latents: Tensor, sigma: Number, velocity: Tensor) -> Tensor:
    """The data that one ODE step to the end predicts, `x0_hat = x_t - t v` (VGPO Eq. 10).

    Args:
        latents: `(B, ...)`, `x_t`.
        sigma: `(B,)` or scalar, `t`; 0 gives the latents back.
        velocity: `(B, ...)`, predicted at `latents` and `sigma`.

    Returns:
        `(B, ...)`.

    Raises:
        ValueError: a shape does not fit.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import project_to_data
    >>> data, noise = torch.zeros(1, 3), torch.ones(1, 3)
    >>> latents = 0.4 * data + 0.6 * noise
    >>> project_to_data(latents, 0.6, noise - data)
    tensor([[0., 0., 0.]])
    ```
    """
    check_shapes("(B, ...)", velocity=velocity, latents=latents)
    x, v = promote(latents, velocity)
    return x - over_latent(per_sample("sigma", sigma, x), x) * v


def _prepare(
    velocity: Tensor, latents: Tensor, sigma: Number, sigma_next: Number
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gives latents and velocity in one dtype and the two sigmas as `(B,)`."""
    check_shapes("(B, ...)", velocity=velocity, latents=latents)
    x, v = promote(latents, velocity)
    t = per_sample("sigma", sigma, x)
    t_next = per_sample("sigma_next", sigma_next, x)
    rule = "a step goes from noise to data, 1 >= sigma >= sigma_next >= 0."
    check_on_cpu((t_next >= 0) & (t_next <= t) & (t <= 1), rule, sigma=t, sigma_next=t_next)
    return x, v, t, t_next
