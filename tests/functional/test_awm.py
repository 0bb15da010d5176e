"""AWM: the loss of pre-training as a log-likelihood."""

import pytest
import torch

from trl_flow.functional import clipped_loss, generalized_huber, matching_log_prob


def test_the_log_probability_by_hand():
    prediction, target = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert matching_log_prob(prediction, target).tolist() == [-2.5, 0.0]
    assert matching_log_prob(prediction, target, weight=torch.tensor([0.5, 3.0])).tolist() == [-1.25, 0.0]


def test_with_one_update_the_gradient_is_the_advantage_times_that_of_flow_matching():
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)
    advantages = torch.tensor([1.5, -0.3, 0.0, -2.0], dtype=torch.float64)
    prediction.requires_grad_()
    log_prob = matching_log_prob(prediction, target)
    loss = clipped_loss(log_prob - log_prob.detach(), advantages, epsilon=1.0)
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    matching = (prediction - target).square().flatten(1).mean(1)
    (expected,) = torch.autograd.grad((advantages * matching).sum(), prediction)
    torch.testing.assert_close(gradient, expected)


def test_the_generalized_huber_loss():
    log_prob = torch.tensor([-1.0, -16.0, 0.0], dtype=torch.float64)
    # -(m^(1/4) - 1e-10^(1/4)) / (1/4), with m^(1/4) = 1, 2 and 0.00316...
    rest = 1e-10**0.25
    expected = torch.tensor([-4 * (1 - rest), -4 * (2 - rest), 0.0], dtype=torch.float64)
    torch.testing.assert_close(generalized_huber(log_prob, 0.25), expected)
    assert generalized_huber(log_prob, 1.0).tolist() == log_prob.tolist()


def test_refused():
    with pytest.raises(ValueError, match="one shape for all"):
        matching_log_prob(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="one shape for all"):
        matching_log_prob(torch.zeros(2, 3), torch.zeros(2, 3), weight=torch.ones(3))
    with pytest.raises(ValueError, match="power is 0"):
        generalized_huber(torch.zeros(2), 0.0)
