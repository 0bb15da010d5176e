"""Nothing that runs once a step looks at values on an accelerator, which would make it wait.

The meta device stands in for one: its tensors have shapes and no values, so that any look at one raises.
"""

import pytest
import torch

from trl_flow.functional import (
    Transition,
    clipped_loss,
    cps_transition,
    cumulative_values,
    dance_sde_transition,
    ddim_transition,
    flow_sde_transition,
    gaussian_kl,
    gaussian_log_prob,
    group_advantages,
    log_ratio,
    ode_transition,
    project_to_data,
    ratio_statistics,
    super_linear,
    timestep_weight,
    transition_kl,
    value_weights,
)


LATENTS = torch.empty(4, 3, 8, 8, device="meta")
NUMBERS = torch.empty(4, device="meta")
ON_CPU = torch.tensor(0.5)  # as a scheduler keeps its sigmas


@pytest.mark.parametrize("sigma", [0.5, ON_CPU, NUMBERS], ids=["float", "scalar on the CPU", "per sample"])
def test_transitions_read_no_value(sigma):
    for mean, std in [
        flow_sde_transition(LATENTS, LATENTS, sigma, 0.25, noise_level=0.7, sigma_max=0.9),
        flow_sde_transition(LATENTS, LATENTS, sigma, 0.25, noise_level=0.7, sigma_max=sigma),
        dance_sde_transition(LATENTS, LATENTS, sigma, 0.25, noise_level=0.7),
        cps_transition(LATENTS, LATENTS, sigma, 0.25, noise_level=0.7),
        ode_transition(LATENTS, LATENTS, sigma, 0.25),
        ddim_transition(LATENTS, LATENTS, sigma, 0.75, noise_level=0.7),
    ]:
        assert (mean.device, mean.shape) == (LATENTS.device, LATENTS.shape)
        assert (std.device, std.shape) == (NUMBERS.device, NUMBERS.shape)
    assert project_to_data(LATENTS, sigma, LATENTS).device == LATENTS.device


def test_losses_read_no_value():
    assert gaussian_log_prob(LATENTS, Transition(LATENTS, NUMBERS)).shape == (4,)
    weight = timestep_weight("beta_over_dt", std=NUMBERS, dt=NUMBERS, beta=NUMBERS)
    for kind in ("standard", "mean_revised", "ratio_norm"):
        ratio = log_ratio(LATENTS, LATENTS, LATENTS, NUMBERS, kind=kind)
        loss = clipped_loss(ratio, super_linear(NUMBERS, 0.5), epsilon=1e-4, weight=weight)
        assert (loss.device, loss.shape) == (NUMBERS.device, NUMBERS.shape)
        assert ratio_statistics(ratio, NUMBERS, epsilon=1e-4)["above"].shape == (4,)
    assert gaussian_kl(LATENTS, LATENTS, NUMBERS).shape == transition_kl(LATENTS, LATENTS, NUMBERS).shape == (4,)
    assert cumulative_values(torch.empty(4, 10, device="meta"), 0.9).shape == (4, 10)


def test_the_checks_of_a_batch_do_read_values():
    # they are documented to; and the stand-in can tell
    for function in (lambda: group_advantages(NUMBERS, 2, scale_rewards="none"), lambda: value_weights(LATENTS[0, 0])):
        with pytest.raises((RuntimeError, NotImplementedError)):
            function()
