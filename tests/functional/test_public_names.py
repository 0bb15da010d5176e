"""The names and signatures that other people's trainers may rely on."""

import inspect
import re

import pytest

from trl_flow import functional


SIGNATURES = {
    "flow_sde_transition": "velocity, latents, sigma, sigma_next, *, noise_level, sigma_max",
    "dance_sde_transition": "velocity, latents, sigma, sigma_next, *, noise_level",
    "cps_transition": "velocity, latents, sigma, sigma_next, *, noise_level",
    "ode_transition": "velocity, latents, sigma, sigma_next",
    "ddim_transition": (
        "noise_pred, latents, alpha_cumprod, alpha_cumprod_next, *, noise_level, prediction_type='epsilon'"
    ),
    "gaussian_log_prob": "sample, transition",
    "log_ratio": "sample, mean, old_mean, std, *, kind",
    "timestep_weight": "kind, *, std, dt, beta=None, gain=None",
    "clipped_loss": "log_ratio, advantages, *, epsilon, epsilon_high=None, weight=None",
    "ratio_histogram": "log_ratio, *, epsilon, epsilon_high=None",
    "ratio_statistics": "log_ratio, advantages, *, epsilon, epsilon_high=None",
    "gaussian_kl": "mean, ref_mean, diffusion",
    "transition_kl": "mean, old_mean, std",
    "group_advantages": "rewards, num_generations, *, scale_rewards",
    "combine_rewards": "rewards_per_func, weights",
    "fill_missing": "rewards, num_generations",
    "frac_zero_std": "rewards, num_generations",
    "normalize_then_sum": "rewards, weights, num_generations",
    "super_linear": "advantages, power",
    "effective_sample_share": "advantages",
    "adapt_power": "power, kl, target_kl, *, gain, max_power",
    "project_to_data": "latents, sigma, velocity",
    "cumulative_values": "instant_rewards, discount",
    "value_weights": "values",
    "dual_advantages": "values, num_generations, *, scale",
    "value_share": "values, num_generations, *, scale",
    "max_advantage_power": "advantages, *, grad_sq_norm, fisher_eigenvalue, learning_rate, max_kl",
    "max_advantage_power_bounded": "bound, *, grad_sq_norm, fisher_eigenvalue, learning_rate, max_kl",
    "max_variance_subset": "rewards, num_generations, num_kept",
    "max_advantage_power_sub_gaussian": (
        "norm, *, grad_sq_norm, fisher_eigenvalue, learning_rate, max_kl, constant=1.0"
    ),
    "best_probe_scale": "variance, curvature",
    "probe_error": "scale, variance, curvature",
    "rounding_and_curvature": "near, far, *, scale",
    "optimality": "advantages, *, clip",
    "implicit_policies": "prediction, old_prediction, *, beta",
    "nft_loss": ("prediction, old_prediction, noised, clean, sigma, optimality, *, beta, self_normalized=True"),
    "matching_log_prob": "prediction, target, *, weight=None",
    "generalized_huber": "log_prob, power",
    "probed_mean": "mean, probe_mean, old_mean, *, scale",
}


def test_exported_names():
    assert set(functional.__all__) == {*SIGNATURES, "Transition"}
    assert functional.Transition._fields == ("mean", "std")


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    signature = inspect.signature(getattr(functional, name))
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == f"({SIGNATURES[name]})"


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_typed_and_documented(name):
    function = getattr(functional, name)
    signature = inspect.signature(function)
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())
    assert signature.return_annotation is not inspect.Signature.empty
    arguments = inspect.getdoc(function).partition("Args:")[2]
    assert all(re.search(rf"\b{parameter}\b", arguments) for parameter in signature.parameters)
