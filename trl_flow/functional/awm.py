"""AWM, Advantage Weighted Matching (arXiv:2509.25050): the likelihood of an image is its loss in pre-training."""

from torch import Tensor

from trl_flow.functional._checks import check_number, check_shapes
from trl_flow.functional._tensors import latent_mean, promote


# Keeps the slope of the generalized Huber loss finite at 0 (the authors' code)
SMALLEST_ERROR = 1e-10


def matching_log_prob(prediction: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """In place of an image's log-likelihood, the loss of flow matching at one noise level (AWM).

        log p = -w mean((prediction - target)^2)

    Its difference to the sampling policy's, at the same noised image, is the `log_ratio` that `clipped_loss` takes.
    While they are equal, the gradient of that loss is the advantage times that of flow matching.

    Args:
        prediction: `(B, ...)`, of the noised image; a velocity, or what else the model predicts.
        target: `(B, ...)`, what it was trained to predict there: `e - x_0` of flow models.
        weight: `(B,)`, of the noise level; 1 if None.

    Returns:
        `(B,)`, at most 0 for a weight that is not negative.

    Raises:
        ValueError: a shape does not fit.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import matching_log_prob
    >>> prediction, target = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])
    >>> matching_log_prob(prediction, target)
    tensor([-0.2500])
    ```
    """
    check_shapes("(B, ...)", prediction=prediction, target=target)
    v, v_target = promote(prediction, target)
    log_prob = -latent_mean((v - v_target).square())
    if weight is None:
        return log_prob
    check_shapes("(B,)", weight=weight, log_prob=log_prob)
    return weight.to(log_prob.dtype) * log_prob


def generalized_huber(log_prob: Tensor, power: float) -> Tensor:
    """A log-probability whose slope falls with the error, so that samples that are far off count less (AWM's code).

        -((m + 1e-10)^p - 1e-10^p) / p,  m = -log_prob

    Args:
        log_prob: `(B,)`, from `matching_log_prob` without weight, at most 0.
        power: `p`, above 0 and at most 1; 1 leaves `log_prob` as it is, 1/4 is that of the released runs.

    Returns:
        `(B,)`, at most 0.

    Raises:
        ValueError: `log_prob` is not `(B,)`, or `power` is out of its domain.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import generalized_huber
    >>> generalized_huber(torch.tensor([-1.0, -16.0]), power=0.25)
    tensor([-3.9874, -7.9874])
    ```
    """
    check_shapes("(B,)", log_prob=log_prob)
    check_number("power", power, 0, 1)
    if power == 0:
        raise ValueError("power is 0: it must be above 0.")
    (value,) = promote(log_prob)
    if power == 1:
        return value
    return -((SMALLEST_ERROR - value) ** power - SMALLEST_ERROR**power) / power
