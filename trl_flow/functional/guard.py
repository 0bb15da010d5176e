"""GRPO-Guard (arXiv:2510.22319): importance ratios that clip evenly at all steps, and the weight of a step.

The two choices, `kind` of `log_ratio` and `kind` of `timestep_weight`, span the paper's Table 2; GRPO-Guard itself is
`"ratio_norm"` with `"inverse_dt"`.
"""

from typing import Literal

import torch

from trl_flow.functional._checks import (
    check_latents,
    check_same_shape,
    check_vector,
    is_free_to_read,
    latent_mean,
    per_sample,
    promote,
)


def log_ratio(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    mean: torch.Tensor,
    old_mean: torch.Tensor,
    std: torch.Tensor,
    *,
    kind: Literal["standard", "mean_revised", "ratio_norm"],
) -> torch.Tensor:
    """Log of the importance ratio of one step, per sample.

    With `Delta = old_mean - mean`, `eps` the noise that was drawn and means over the latent's dimensions:

    | `kind` | log-ratio | where |
    | --- | --- | --- |
    | `"standard"` | `log p - log p_old` | Flow-GRPO, DanceGRPO; GRPO-Guard Eq. 7 |
    | `"mean_revised"` | `log p - log p_old + mean(Delta^2) / (2 std^2)` | GRPO-Guard Table 2 |
    | `"ratio_norm"` | `std` times that, `= -mean(Delta eps)` | GRPO-Guard Eq. 8 |

    Exactly 0 while the model is the one that sampled, whatever the kind.

    Args:
        log_prob: `(B,)`, `gaussian_log_prob` of the stored sample under the trained model.
        old_log_prob: `(B,)`, the same as stored at rollout.
        mean: `(B, ...)`, the trained model's mean of the step.
        old_mean: `(B, ...)`, the mean stored at rollout.
        std: `(B,)`, the standard deviation of the step, above 0.
        kind: which ratio.

    Returns:
        `(B,)`.

    Raises:
        ValueError: a shape does not fit; `kind` is unknown; a `std` on the CPU is not above 0.
    """
    check_vector("log_prob", log_prob)
    check_same_shape("old_log_prob", old_log_prob, "log_prob", log_prob)
    check_same_shape("std", std, "log_prob", log_prob)
    check_same_shape("mean", mean, "old_mean", old_mean)
    check_latents("mean", mean)
    if mean.shape[0] != log_prob.shape[0]:
        raise ValueError(
            f"mean has shape {tuple(mean.shape)} and log_prob has shape {tuple(log_prob.shape)}: "
            "they must have the same batch size."
        )
    new, old, current, previous, scale = promote(log_prob, old_log_prob, mean, old_mean, std)
    if is_free_to_read(scale) and not bool((scale > 0).all()):
        raise ValueError(f"std is {scale.tolist()}: it must be above 0, a deterministic step has no importance ratio.")
    if kind == "standard":
        return new - old
    revised = new - old + latent_mean((previous - current) ** 2) / (2 * scale**2)
    if kind == "mean_revised":
        return revised
    if kind == "ratio_norm":
        return scale * revised
    raise ValueError(f'kind is {kind!r}: it must be "standard", "mean_revised" or "ratio_norm".')


def timestep_weight(
    kind: Literal["none", "temp", "inverse_dt", "beta_over_dt", "inverse_beta_dt"],
    *,
    std: torch.Tensor,
    dt: float | torch.Tensor,
    beta: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight `delta` of a step in the loss (GRPO-Guard Eq. 12).

    | `kind` | weight | where |
    | --- | --- | --- |
    | `"none"` | 1 | Flow-GRPO, DanceGRPO |
    | `"temp"` | `std` | TempFlow-GRPO (arXiv:2508.04324), in GRPO-Guard's Table 2 |
    | `"inverse_dt"` | `1 / dt` | GRPO-Guard for Flow-SDE |
    | `"beta_over_dt"` | `beta / dt` | GRPO-Guard for Dance-SDE, as printed |
    | `"inverse_beta_dt"` | `1 / (beta dt)` | what makes the gradient equal over the steps of Dance-SDE |

    Args:
        kind: which weight.
        std: `(B,)`, standard deviation of the step; says what B is.
        dt: `(B,)` or scalar, length of the step, above 0.
        beta: `(B,)` or scalar, `1 + eta^2 (1 - t) / (2 t)` for Dance-SDE; only the two kinds that name it look at it.

    Returns:
        `(B,)`.

    Raises:
        ValueError: a shape does not fit; `kind` is unknown; `beta` is missing; a `dt` on the CPU is not above 0.
    """
    check_vector("std", std)
    (scale,) = promote(std)
    step = per_sample("dt", dt, scale, "std")
    if is_free_to_read(step) and not bool((step > 0).all()):
        raise ValueError(
            f"dt is {step.tolist()}: it must be above 0, the sigma before the step minus the sigma after it."
        )
    if kind == "none":
        return torch.ones_like(scale)
    if kind == "temp":
        return scale
    if kind == "inverse_dt":
        return 1 / step
    if kind not in ("beta_over_dt", "inverse_beta_dt"):
        raise ValueError(
            f'kind is {kind!r}: it must be "none", "temp", "inverse_dt", "beta_over_dt" or "inverse_beta_dt".'
        )
    if beta is None:
        raise ValueError(f"kind {kind!r} needs beta, 1 + eta^2 (1 - t) / (2 t), and none was given.")
    factor = per_sample("beta", beta, scale, "std")
    return factor / step if kind == "beta_over_dt" else 1 / (factor * step)
