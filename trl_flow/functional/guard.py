"""GRPO-Guard (arXiv:2510.22319): importance ratios that clip evenly at all steps, and the weight of a step.

The two choices, `kind` of `log_ratio` and `kind` of `timestep_weight`, span the paper's Table 2; GRPO-Guard itself is
`"ratio_norm"` with `"inverse_dt"`.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from trl_flow.functional._checks import check_choice, check_shapes
from trl_flow.functional._tensors import Number, latent_mean, noise_scale, over_latent, per_sample, promote


def log_ratio(
    sample: Tensor,
    mean: Tensor,
    old_mean: Tensor,
    std: Number,
    *,
    kind: Literal["standard", "mean_revised", "ratio_norm"],
) -> Tensor:
    """Log of the importance ratio of one step, per sample, from the means of its transition.

    With `Delta = old_mean - mean`, `eps = (sample - old_mean) / std`, the noise that was drawn, and means over the
    latent's dimensions:

    | `kind` | log-ratio | where |
    | --- | --- | --- |
    | `"standard"` | `-mean(Delta^2) / (2 std^2) - mean(Delta eps) / std`, `= log p - log p_old` | GRPO-Guard Eq. 7 |
    | `"mean_revised"` | `-mean(Delta eps) / std` | GRPO-Guard Table 2 |
    | `"ratio_norm"` | `-mean(Delta eps)` | GRPO-Guard Eq. 8 |

    Flow-GRPO and DanceGRPO have the standard one. No log-probability is needed: these are numbers of order 1 whose
    difference is of order 1e-7 at 65,536 dimensions, so that in float32 it would be a tenth rounding. Exactly 0 while
    the model is the one that sampled, whatever the kind.

    Flow-CPS (arXiv:2509.05952) scores a sample by `-mean((sample - mean)^2)`, without the variance. Its ratio is
    `"standard"` with a `std` of `sqrt(1 / 2)`.

    Args:
        sample: `(B, ...)`, the next latent as stored at rollout.
        mean: `(B, ...)`, the trained model's mean of the step.
        old_mean: `(B, ...)`, the mean stored at rollout.
        std: `(B,)` or scalar, the standard deviation of the step, above 0.
        kind: which ratio.

    Returns:
        `(B,)`, float32 (float64 from float64 input).

    Raises:
        ValueError: a shape does not fit; `kind` is unknown; a `std` on the CPU is not above 0.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import log_ratio
    >>> old_mean = torch.zeros(2, 4)
    >>> sample = old_mean + 0.1  # one standard deviation of noise
    >>> log_ratio(sample, old_mean, old_mean, 0.1, kind="ratio_norm")  # before the first update
    tensor([0., 0.])
    >>> log_ratio(sample, old_mean + 0.02, old_mean, 0.1, kind="ratio_norm")
    tensor([0.0200, 0.0200])
    ```
    """
    check_shapes("(B, ...)", sample=sample, mean=mean, old_mean=old_mean)
    check_choice("kind", kind, ("standard", "mean_revised", "ratio_norm"))
    x, current, previous = promote(sample, mean, old_mean)
    scale = noise_scale(std, x)
    move = current - previous
    normalized = latent_mean(move * ((x - previous) / over_latent(scale, x)))
    if kind == "ratio_norm":
        return normalized
    revised = normalized / scale
    return revised if kind == "mean_revised" else revised - latent_mean(move**2) / (2 * scale**2)


def probed_mean(mean: Tensor, probe_mean: Tensor, old_mean: Tensor, *, scale: float) -> Tensor:
    """The mean of a transition with its rounding divided by `scale`, for `log_ratio`: the amplified probe.

    Two forwards of a network differ by rounding as soon as their weights do. It does not grow with the distance of the
    weights; what an update has changed does. With `k = scale` and the forward at `theta_old + k (theta - theta_old)`

        mean ~ old_mean + (probe_mean - old_mean) / k

    as long as the model is linear so far. The value is this one's, the gradient that of `mean`.

    Args:
        mean: `(B, ...)`, the trained model's, with its gradient.
        probe_mean: `(B, ...)`, that of the amplified weights.
        old_mean: `(B, ...)`, the mean stored at rollout.
        scale: `k`, above 0.

    Returns:
        `(B, ...)`, float32 (float64 from float64 input).

    Raises:
        ValueError: a shape does not fit.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import probed_mean
    >>> old_mean = torch.zeros(1, 4)
    >>> mean = old_mean + 0.0117  # an update of 0.01, with rounding
    >>> probed_mean(mean, old_mean + 0.1617, old_mean, scale=16)  # the same rounding, divided by 16
    tensor([[0.0101, 0.0101, 0.0101, 0.0101]])
    ```
    """
    check_shapes("(B, ...)", mean=mean, probe_mean=probe_mean, old_mean=old_mean)
    current, probed, previous = promote(mean, probe_mean, old_mean)
    return previous + (probed - previous) / scale + (current - current.detach())


# Of r(2) - 3 r(1) + 2 r(1/2), in units of the variance of one forward's rounding: (1/2)^2 + 3^2 + 4^2 + (3/2)^2
NEAR_VARIANCE = 27.5


def rounding_and_curvature(near: float, far: float, *, scale: float) -> tuple[float, float]:
    """How much rounding a forward has, and how much curvature the model, from log-ratios at several distances.

    With `e(x)` the rounding of the forward at `theta_old + x (theta - theta_old)`, of variance `v`, and a curvature of
    the model that adds `c x^2` to a log-ratio, that of a probe of scale `k` is `r(k) = r + k c + (e(k) - e(0)) / k`.
    Of three near ones a combination has rounding alone, and the difference of two far ones shows the curvature:

        near = mean((r(2) - 3 r(1) + 2 r(1/2))^2) = 27.5 v
        far = mean((r(k) - r(k / 2))^2) = 6 v / k^2 + (k c / 2)^2

    What of `far` may be the rounding's, half as much again as is expected of it, is not taken for curvature.

    Args:
        near, far: these mean squares, at least 0.
        scale: `k`, above 1.

    Returns:
        `(v, c^2)`, both at least 0. The noise floor of a log-ratio without a probe is `sqrt(2 v)`.

    Example:

    ```pycon
    >>> from trl_flow.functional import rounding_and_curvature
    >>> rounding_and_curvature(near=2.75e-11, far=3e-14, scale=16)  # no curvature shows
    (1e-12, 0.0)
    ```
    """
    variance = near / NEAR_VARIANCE
    return variance, max(far - 9 * variance / scale**2, 0.0) * 4 / scale**2


def probe_error(scale: float, variance: float, curvature: float) -> float:
    """Root mean square of the error of a log-ratio with the probe, `sqrt(2 v / k^2 + (k - 1)^2 c^2)`.

    Args:
        scale: `k`, at least 1, which is no probe.
        variance, curvature: `v` and `c^2`, from `rounding_and_curvature`.

    Example:

    ```pycon
    >>> from trl_flow.functional import probe_error
    >>> f"{probe_error(1, variance=1e-12, curvature=0.0):.1e}"  # without a probe
    '1.4e-06'
    >>> f"{probe_error(16, variance=1e-12, curvature=0.0):.1e}"
    '8.8e-08'
    ```
    """
    return math.sqrt(2 * variance / scale**2 + (scale - 1) ** 2 * curvature)


def best_probe_scale(variance: float, curvature: float) -> float:
    """The power of 2 from 1 to 128 with the least `probe_error`.

    Args:
        variance, curvature: `v` and `c^2`, from `rounding_and_curvature`.

    Example:

    ```pycon
    >>> from trl_flow.functional import best_probe_scale
    >>> best_probe_scale(variance=1e-12, curvature=1e-16)
    16.0
    >>> best_probe_scale(variance=1e-12, curvature=0.0)
    128.0
    ```
    """
    return min((2.0**n for n in range(8)), key=lambda scale: probe_error(scale, variance, curvature))


def timestep_weight(
    kind: Literal["none", "temp", "inverse_dt", "beta_over_dt", "inverse_beta_dt", "inverse_gain"],
    *,
    std: Tensor,
    dt: Number,
    beta: Number | None = None,
    gain: Number | None = None,
) -> Tensor:
    """The weight `delta` of a step in the loss (GRPO-Guard Eq. 12).

    | `kind` | weight | where |
    | --- | --- | --- |
    | `"none"` | 1 | Flow-GRPO, DanceGRPO |
    | `"temp"` | `std` | TempFlow-GRPO (arXiv:2508.04324), in GRPO-Guard's Table 2 |
    | `"inverse_dt"` | `1 / dt` | GRPO-Guard for Flow-SDE |
    | `"beta_over_dt"` | `beta / dt` | GRPO-Guard for Dance-SDE, as printed |
    | `"inverse_beta_dt"` | `1 / (beta dt)` | what makes the gradient equal over the steps of Dance-SDE |
    | `"inverse_gain"` | `1 / gain` | what makes RatioNorm's gradient equal over the steps of any dynamics |

    Args:
        kind: which weight.
        std: `(B,)`, standard deviation of the step; says what B is.
        dt: `(B,)` or scalar, length of the step, above 0.
        beta: `(B,)` or scalar, `1 + eta^2 (1 - t) / (2 t)` for Dance-SDE; only the two kinds that name it look at it.
        gain: `(B,)` or scalar, above 0, for `"inverse_gain"`: the factor with which the prediction enters the mean,
            `-d mean / d prediction`; `beta dt` for Dance-SDE, `dt + (1 - cos(eta pi / 2)) t' (1 - t)` for CPS.

    Returns:
        `(B,)`.

    Raises:
        ValueError: a shape does not fit; `kind` is unknown; `beta` or `gain` is missing.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import timestep_weight
    >>> timestep_weight("inverse_dt", std=torch.tensor([0.2, 0.3]), dt=torch.tensor([0.1, 0.25]))
    tensor([10.,  4.])
    ```
    """
    check_shapes("(B,)", std=std)
    check_choice("kind", kind, ("none", "temp", "inverse_dt", "beta_over_dt", "inverse_beta_dt", "inverse_gain"))
    (scale,) = promote(std)
    step = per_sample("dt", dt, scale)
    if kind == "none":
        return torch.ones_like(scale)
    if kind == "temp":
        return scale
    if kind == "inverse_dt":
        return 1 / step
    if kind == "inverse_gain":
        if gain is None:
            raise ValueError("kind 'inverse_gain' needs gain, -d mean / d prediction, and none was given.")
        return 1 / per_sample("gain", gain, scale)
    if beta is None:
        raise ValueError(f"kind {kind!r} needs beta, 1 + eta^2 (1 - t) / (2 t), and none was given.")
    factor = per_sample("beta", beta, scale)
    return factor / step if kind == "beta_over_dt" else 1 / (factor * step)
