"""DiffusionNFT (arXiv:2509.16117): learning on noised images, from good ones and away from bad ones."""

from torch import Tensor

from trl_flow.functional._checks import check_number, check_on_cpu, check_shapes
from trl_flow.functional._tensors import Number, latent_mean, over_latent, per_sample, promote


# Below this mean distance to the data the self-normalized loss is not divided by it (the authors' code)
SMALLEST_DISTANCE = 1e-5


def optimality(advantages: Tensor, *, clip: float) -> Tensor:
    """The share of a sample that counts as a good one (DiffusionNFT).

        r = clamp(A / clip, -1, 1) / 2 + 1 / 2

    Args:
        advantages: `(B,)`.
        clip: the advantage of a sample that is all good, above 0 (the authors' code: 5).

    Returns:
        `(B,)`, in [0, 1]; 1/2 where the advantage is 0.

    Raises:
        ValueError: `advantages` is not `(B,)`, or `clip` is not above 0.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import optimality
    >>> optimality(torch.tensor([-5.0, 0.0, 2.5]), clip=5.0)
    tensor([0.0000, 0.5000, 0.7500])
    ```
    """
    check_shapes("(B,)", advantages=advantages)
    check_number("clip", clip, 0)
    if clip == 0:
        raise ValueError("clip is 0: it must be above 0.")
    (a,) = promote(advantages)
    return (a / clip).clamp(-1, 1) / 2 + 0.5


def implicit_policies(prediction: Tensor, old_prediction: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """The predictions of the policies that the trained one stands for (DiffusionNFT).

        v_plus = (1 - beta) v_old + beta v,  v_minus = (1 + beta) v_old - beta v

    Args:
        prediction: `(B, ...)`, the trained policy's; a velocity, or what else the model predicts.
        old_prediction: `(B, ...)`, the sampling policy's, at the same latents and noise level.
        beta: above 0. The smaller, the further the optimum is from the sampling policy, by `1 / beta`.

    Returns:
        `(positive, negative)`, each `(B, ...)`.

    Raises:
        ValueError: the shapes differ, or `beta` is not above 0.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import implicit_policies
    >>> prediction, old_prediction = torch.tensor([[1.0]]), torch.tensor([[0.0]])
    >>> implicit_policies(prediction, old_prediction, beta=0.5)
    (tensor([[0.5000]]), tensor([[-0.5000]]))
    ```
    """
    check_shapes("(B, ...)", prediction=prediction, old_prediction=old_prediction)
    check_number("beta", beta, 0)
    if beta == 0:
        raise ValueError("beta is 0: it must be above 0, or nothing would be learned.")
    v, old = promote(prediction, old_prediction)
    return (1 - beta) * old + beta * v, (1 + beta) * old - beta * v


def nft_loss(
    prediction: Tensor,
    old_prediction: Tensor,
    noised: Tensor,
    clean: Tensor,
    sigma: Number,
    optimality: Tensor,
    *,
    beta: float,
    self_normalized: bool = True,
) -> Tensor:
    """DiffusionNFT's loss, to be minimized (self-normalized as in the authors' code).

        r d(v_plus) + (1 - r) d(v_minus),  d(v) = mean((x_0(v) - x_0)^2) / mean |x_0(v) - x_0|,  x_0(v) = x_t - t v

    and not self-normalized `d(v) = mean((v - (x_t - x_0) / t)^2)`, whose optimum at one noised image is `v_old + (1 /
    beta) E[(2 r - 1) (target - v_old)]`. The mean distance that divides is taken as a constant, at least 1e-5.

    Where `x_t = (1 - t) x_0 + t e`, the target is the velocity `e - x_0`. Any prediction from which the data follow
    as `a x_t - b prediction` can be given, such as a U-Net's, with `noised = a x_t` and `sigma = b`.

    Args:
        prediction: `(B, ...)`, the trained policy's; the only one that is differentiated.
        old_prediction: `(B, ...)`, the sampling policy's, at the same latents and noise level.
        noised: `(B, ...)`, `x_t`.
        clean: `(B, ...)`, the sampled `x_0`.
        sigma: `(B,)` or scalar, `t`, above 0.
        optimality: `(B,)`, `r` in [0, 1], from `optimality`.
        beta: as for `implicit_policies`.
        self_normalized: whether distances are those of the data, divided by their size.

    Returns:
        `(B,)`.

    Raises:
        ValueError: a shape does not fit, `beta` or a sigma on the CPU is not above 0.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import nft_loss, optimality
    >>> clean, noise = torch.zeros(2, 3), torch.ones(2, 3)
    >>> noised = 0.5 * clean + 0.5 * noise
    >>> old = torch.full((2, 3), 0.8)
    >>> prediction = old.clone().requires_grad_()
    >>> loss = nft_loss(prediction, old, noised, clean, 0.5, optimality(torch.tensor([5.0, -5.0]), clip=5.0), beta=1.0)
    >>> loss.sum().backward()
    >>> prediction.grad[:, 0]  # towards the velocity of 1 for the good image, away from it for the bad one
    tensor([-0.3333,  0.3333])
    ```
    """
    check_shapes("(B, ...)", prediction=prediction, old_prediction=old_prediction, noised=noised, clean=clean)
    check_shapes("(B,)", optimality=optimality)
    v, old, x_t, x_0, r = promote(prediction, old_prediction.detach(), noised, clean, optimality)
    t = per_sample("sigma", sigma, x_t)
    check_on_cpu(t > 0, "it must be above 0: a clean image has no noise to be predicted.", sigma=t)
    t, losses = over_latent(t, x_t), []
    for policy in implicit_policies(v, old, beta=beta):
        if self_normalized:
            error = x_t - t * policy - x_0
            losses.append(latent_mean(error.square()) / latent_mean(error.detach().abs()).clamp(min=SMALLEST_DISTANCE))
        else:
            losses.append(latent_mean((policy - (x_t - x_0) / t).square()))
    positive, negative = losses
    return r * positive + (1 - r) * negative
