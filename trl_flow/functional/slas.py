"""SLAS, super-linear advantage shaping: large advantages count more, and how much more a trust region allows."""

import math
from collections.abc import Callable

import torch
from scipy.special import lambertw
from torch import Tensor

from trl_flow.functional._checks import check_finite, check_number
from trl_flow.functional._tensors import promote


def super_linear(advantages: Tensor, power: float) -> Tensor:
    """The shaped advantage `sign(A) |A|^(1 + gamma)` (SLAS Eq. 20, the metric weight `|A|^gamma` of Eq. 17).

    Meant for advantages scaled by the batch's standard deviation. It widens those above 1 and shrinks those below.

    Args:
        advantages: any shape.
        power: `gamma`, at least 0; 0 gives the advantages back as they are.

    Returns:
        The shape of `advantages`.

    Raises:
        ValueError: `power` is negative or not finite.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import super_linear
    >>> super_linear(torch.tensor([-2.0, 0.5, 1.0, 4.0]), power=0.5)
    tensor([-2.8284,  0.3536,  1.0000,  8.0000])
    ```
    """
    check_number("power", power, 0)
    (values,) = promote(advantages)
    if power == 0:
        return values
    # not A |A|^gamma: its gradient at A = 0 is 0 * inf for gamma below 1
    return values.sign() * values.abs().pow(1 + power)


def effective_sample_share(advantages: Tensor) -> Tensor:
    """The effective sample size of (shaped) advantages, as a share of the samples, `sum(|A|)^2 / (N sum(A^2))`.

    1 where all samples count alike, `1 / N` where one of `N` counts alone; the wider the shaping, the smaller.

    Args:
        advantages: any shape.

    Returns:
        A scalar tensor; 0 where all advantages are 0.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import effective_sample_share
    >>> effective_sample_share(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    tensor(1.)
    >>> effective_sample_share(torch.tensor([3.0, 0.0, 0.0, 0.0]))
    tensor(0.2500)
    ```
    """
    (values,) = promote(advantages)
    squares = values.numel() * values.square().sum()
    return values.abs().sum() ** 2 / squares.clamp(min=torch.finfo(values.dtype).tiny)


def adapt_power(power: float, kl: float, target_kl: float, *, gain: float, max_power: float) -> float:
    """The next power, so that the KL that an update causes comes to its target (SLAS Appendix E: a power coupled with
    the KL). It rises by `gain log(target_kl / kl)` where the KL is below the target and falls likewise above it.

    Where the optimizer's step follows the gradient, `log kl` changes by 1 to 2 for each unit of the power (Gaussian
    advantages: log 3 from 0 to 1, log 5 from 1 to 2): a gain of 0.2 cannot swing.

    Args:
        power: `gamma` of the last update, at least 0.
        kl: what it caused, at least 0; from `transition_kl`.
        target_kl: what it should cause, above 0.
        gain: the change for a factor of e between the two, at most which the power moves at once.
        max_power: the power stays in `[0, max_power]`; `inf` for no limit.

    Returns:
        The power of the next update.

    Example:

    ```pycon
    >>> from trl_flow.functional import adapt_power
    >>> round(adapt_power(0.25, kl=1e-4, target_kl=2e-4, gain=0.2, max_power=1.0), 3)
    0.389
    ```
    """
    distance = math.log(target_kl / kl) if kl > 0 else math.inf
    return min(max(power + gain * min(max(distance, -1.0), 1.0), 0.0), max_power)


def max_advantage_power(
    advantages: Tensor, *, grad_sq_norm: float, fisher_eigenvalue: float, learning_rate: float, max_kl: float
) -> float:
    """The largest power with which an update stays in its trust region (SLAS Theorem 4).

    A first-order update moves the average KL by at most `lr^2 lambda_max B E[|A|^(2 (1 + gamma))] / 2`. So it stays
    within `max_kl` if

        E[|A|^(2 (1 + gamma))] <= C,  C = 2 max_kl / (lr^2 lambda_max B)

    The left side is log-convex in gamma, so the powers that are allowed form one interval. It need not begin at 0:
    shaping shrinks advantages below 1, and advantages too large for `C` as they are may fit it once shaped.

    Args:
        advantages: any shape, the linear ones (before shaping), finite; read on the CPU.
        grad_sq_norm: `B`, a bound of the expected squared norm of the gradient of the log-probability, at least 0.
        fisher_eigenvalue: `lambda_max`, the largest eigenvalue of the Fisher matrix, at least 0.
        learning_rate: `lr`, at least 0.
        max_kl: the KL an update may cause, above 0.

    Returns:
        The upper end of the interval: a number at least 0. 0 if no power satisfies the bound, or none above 0 does;
        `inf` if there is no upper limit, because no advantage is above 1 in magnitude or the update has length 0.

    Raises:
        ValueError: there are no advantages, one is NaN or infinite, or a number is out of its domain.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import max_advantage_power
    >>> advantages = torch.tensor([-1.5, -0.5, 0.5, 1.5])
    >>> bounds = {"grad_sq_norm": 1.0, "fisher_eigenvalue": 1.0, "learning_rate": 0.1, "max_kl": 0.02}
    >>> round(max_advantage_power(advantages, **bounds), 3)
    1.56
    ```
    """
    log_limit = _log_limit(grad_sq_norm, fisher_eigenvalue, learning_rate, max_kl)
    check_finite("advantages", advantages)
    if advantages.numel() == 0:
        raise ValueError(f"advantages has shape {tuple(advantages.shape)}: there is nothing to take the mean of.")
    magnitudes = advantages.detach().to(device="cpu", dtype=torch.float64).abs().flatten()
    logs = magnitudes[magnitudes > 0].log()  # an advantage of 0 adds nothing to the mean, whatever the power
    if log_limit == math.inf or logs.numel() == 0:
        return math.inf
    log_count = math.log(magnitudes.numel())
    if logs.max() <= 0:
        # The moments fall towards the share of advantages that are exactly 1 in magnitude, and reach it only if there
        # are no others: then every power has that moment.
        ones = int((logs == 0).sum())
        limit = (math.log(ones) if ones else -math.inf) - log_count - log_limit
        return math.inf if limit < 0 or (limit == 0 and ones == logs.numel()) else 0.0

    # In p = 2 (1 + gamma), from 2 on, and in logarithms: high powers overflow
    def is_too_large(p: float) -> bool:
        return torch.logsumexp(p * logs, dim=0).item() - log_count > log_limit

    def is_rising(p: float) -> bool:
        return (torch.softmax(p * logs, dim=0) * logs).sum().item() >= 0

    lowest = 2.0 if is_rising(2.0) else _last_before(2.0, is_rising)
    return 0.0 if is_too_large(lowest) else _last_before(lowest, is_too_large) / 2 - 1


def max_advantage_power_bounded(
    bound: float, *, grad_sq_norm: float, fisher_eigenvalue: float, learning_rate: float, max_kl: float
) -> float:
    """The largest power with which an update stays in its trust region whatever its advantages are, as long as none is
    larger than `bound` (SLAS Corollary 1).

        |A| <= M, M > 1:  gamma <= log C / (2 log M) - 1,  C = 2 max_kl / (lr^2 lambda_max B)

    It is `max_advantage_power` of advantages that all have the magnitude `M`, the worst case.

    Args:
        bound: `M`, at least 0, of the linear advantages: the range that they are clamped to, for example.
        grad_sq_norm, fisher_eigenvalue, learning_rate, max_kl: as for `max_advantage_power`.

    Returns:
        A number at least 0. 0 if no power is safe for all such advantages, or none above 0 is; `inf` for `M < 1`, for
        `M = 1` if `C >= 1`, and for an update of length 0.

    Raises:
        ValueError: a number is out of its domain.

    Example:

    ```pycon
    >>> from trl_flow.functional import max_advantage_power_bounded
    >>> bounds = {"grad_sq_norm": 1.0, "fisher_eigenvalue": 1.0, "learning_rate": 0.01, "max_kl": 0.02}
    >>> round(max_advantage_power_bounded(5.0, **bounds), 3)  # advantages are clamped to 5
    0.861
    ```
    """
    check_number("bound", bound, 0)
    log_limit = _log_limit(grad_sq_norm, fisher_eigenvalue, learning_rate, max_kl)
    if bound < 1 or log_limit == math.inf or (bound == 1 and log_limit >= 0):
        return math.inf
    return 0.0 if bound == 1 else max(log_limit / (2 * math.log(bound)) - 1, 0.0)


def max_advantage_power_sub_gaussian(
    norm: float,
    *,
    grad_sq_norm: float,
    fisher_eigenvalue: float,
    learning_rate: float,
    max_kl: float,
    constant: float = 1.0,
) -> float:
    """The largest power with which an update stays in its trust region for sub-Gaussian advantages (SLAS Corollary 2).

    With the Orlicz norm `K = inf {s: E exp(A^2 / s^2) <= 2}` the moments are bounded by `E |A|^p <= (c K sqrt(p))^p`,
    so that Theorem 4 holds with `p = 2 (1 + gamma)` if

        p log(c K sqrt(p)) <= log C,  C = 2 max_kl / (lr^2 lambda_max B)

    whose largest solution is `p = exp(W(2 c^2 K^2 log C)) / (c^2 K^2)`, `W` being Lambert's function: the power grows
    more slowly than `log C`, as the paper says.

    Args:
        norm: `K`, from 1e-100 to 1e100, of the linear advantages; that of a Gaussian is `sqrt(8 / 3)` times its
            standard deviation.
        grad_sq_norm, fisher_eigenvalue, learning_rate, max_kl: as for `max_advantage_power`.
        constant: `c`, from 1e-50 to 1e50. The paper leaves it open; 1 is enough for every `p` from 2 on, because
            `E |A|^p` is at most `2 K^p Gamma(p / 2 + 1)`.

    Returns:
        A number at least 0. 0 if no power is safe, or none above 0 is; `inf` for an update of length 0.

    Raises:
        ValueError: a number is out of its domain.

    Example:

    ```pycon
    >>> from trl_flow.functional import max_advantage_power_sub_gaussian
    >>> bounds = {"grad_sq_norm": 1.0, "fisher_eigenvalue": 1.0, "learning_rate": 0.01, "max_kl": 0.02}
    >>> round(max_advantage_power_sub_gaussian((8 / 3) ** 0.5, **bounds), 3)  # Gaussian advantages
    1.364
    ```
    """
    check_number("norm", norm, 1e-100, 1e100)
    check_number("constant", constant, 1e-50, 1e50)
    log_limit = _log_limit(grad_sq_norm, fisher_eigenvalue, learning_rate, max_kl)
    if log_limit == math.inf:
        return math.inf
    scale = (constant * norm) ** 2
    # With y = scale p: y log y <= 2 scale log C, whose left side is at least -1 / e
    if 2 * scale * log_limit < -1 / math.e:
        return 0.0
    return max(math.exp(lambertw(2 * scale * log_limit).real) / (2 * scale) - 1, 0.0)


def _log_limit(grad_sq_norm: float, fisher_eigenvalue: float, learning_rate: float, max_kl: float) -> float:
    """`log C` of Theorem 4; infinite for an update of length 0."""
    check_number("grad_sq_norm", grad_sq_norm, 0)
    check_number("fisher_eigenvalue", fisher_eigenvalue, 0)
    check_number("learning_rate", learning_rate, 0)
    check_number("max_kl", max_kl, math.ulp(0.0))
    if 0 in (grad_sq_norm, fisher_eigenvalue, learning_rate):
        return math.inf
    # One logarithm for each: the product may be too small for a float
    return math.log(2 * max_kl) - 2 * math.log(learning_rate) - math.log(fisher_eigenvalue) - math.log(grad_sq_norm)


def _last_before(start: float, is_beyond: Callable[[float], bool]) -> float:
    """The largest number from `start` on that is not beyond, given that `start` is not and all large ones are."""
    low, high = start, start + 1
    while not is_beyond(high):
        low, high = high, 2 * high - start
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if is_beyond(middle) else (middle, high)
    return low
