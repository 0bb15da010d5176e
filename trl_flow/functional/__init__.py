"""The papers' equations as pure functions on tensors: no state, no input or output, no trainer.

Latents are `(B, ...)` of any rank, per-sample numbers are `(B,)`; a `sigma` argument may be `(B,)` or a scalar.
Everything is computed and returned in float32 whatever the model's dtype, except that float64 stays float64. Squared
norms and inner products over a latent are means over its non-batch dimensions. A wrong shape raises `ValueError` with
both shapes in the message, a Python number out of its domain too. Values of tensors are looked at only where the
docstring says so. NaN among rewards says that a reward does not apply to a sample.
"""

from trl_flow.functional.awm import generalized_huber, matching_log_prob
from trl_flow.functional.grpo import (
    clipped_loss,
    gaussian_kl,
    group_advantages,
    ratio_histogram,
    ratio_statistics,
    transition_kl,
)
from trl_flow.functional.guard import (
    best_probe_scale,
    log_ratio,
    probe_error,
    probed_mean,
    rounding_and_curvature,
    timestep_weight,
)
from trl_flow.functional.nft import implicit_policies, nft_loss, optimality
from trl_flow.functional.rewards import combine_rewards, fill_missing, frac_zero_std, normalize_then_sum
from trl_flow.functional.selection import max_variance_subset
from trl_flow.functional.slas import (
    adapt_power,
    effective_sample_share,
    max_advantage_power,
    max_advantage_power_bounded,
    max_advantage_power_sub_gaussian,
    super_linear,
)
from trl_flow.functional.transitions import (
    Transition,
    cps_transition,
    dance_sde_transition,
    ddim_transition,
    flow_sde_transition,
    gaussian_log_prob,
    ode_transition,
    project_to_data,
)
from trl_flow.functional.vgpo import cumulative_values, dual_advantages, value_share, value_weights


__all__ = [
    "Transition",
    "adapt_power",
    "best_probe_scale",
    "clipped_loss",
    "combine_rewards",
    "cps_transition",
    "cumulative_values",
    "dance_sde_transition",
    "ddim_transition",
    "dual_advantages",
    "effective_sample_share",
    "fill_missing",
    "flow_sde_transition",
    "frac_zero_std",
    "gaussian_kl",
    "gaussian_log_prob",
    "generalized_huber",
    "group_advantages",
    "implicit_policies",
    "log_ratio",
    "matching_log_prob",
    "max_advantage_power",
    "max_advantage_power_bounded",
    "max_advantage_power_sub_gaussian",
    "max_variance_subset",
    "nft_loss",
    "normalize_then_sum",
    "ode_transition",
    "optimality",
    "probe_error",
    "probed_mean",
    "project_to_data",
    "ratio_histogram",
    "ratio_statistics",
    "rounding_and_curvature",
    "super_linear",
    "timestep_weight",
    "transition_kl",
    "value_share",
    "value_weights",
]
