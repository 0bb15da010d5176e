"""GRPO on flow models (Flow-GRPO, arXiv:2505.05470): advantages within a group, clipped loss, KL to the reference."""

from typing import Literal

import torch
from torch import Tensor

from trl_flow.functional._checks import check_choice, check_finite, check_number, check_shapes
from trl_flow.functional._tensors import (
    STD_EPSILON,
    Number,
    deviations,
    in_groups,
    latent_mean,
    noise_scale,
    per_sample,
    promote,
    spread,
)


# In clip ranges: 45 bins of 2/9, so that 0 is in the middle of one and -1 and 1, the clipping, are edges of two
RATIO_BIN_EDGES = tuple((2 * i - 45) / 9 for i in range(46))


def clipped_loss(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    epsilon: float,
    epsilon_high: float | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """The clipped surrogate, one loss per sample, to be minimized (GRPO-Guard Eq. 5; Eq. 12 with `weight`).

        loss = -weight min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A),  r = exp(log_ratio)

    Args:
        log_ratio: `(B,)`, from `log_ratio`.
        advantages: `(B,)`.
        epsilon: clip range below 1, at least 0; the published ones are as small as 2e-6.
        epsilon_high: clip range above 1, at least 0; `epsilon` if None.
        weight: `(B,)`, from `timestep_weight`; 1 if None.

    Returns:
        `(B,)`.

    Raises:
        ValueError: a shape is not `(B,)`, or a clip range is negative.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import clipped_loss
    >>> log_ratio = torch.tensor([0.0, 0.5, 0.5])
    >>> clipped_loss(log_ratio, torch.tensor([1.0, 1.0, -1.0]), epsilon=0.2)  # the second is clipped
    tensor([-1.0000, -1.2000,  1.6487])
    ```
    """
    check_shapes("(B,)", log_ratio=log_ratio, advantages=advantages, weight=weight)
    high = epsilon if epsilon_high is None else epsilon_high
    check_number("epsilon", epsilon, 0)
    check_number("epsilon_high", high, 0)
    log_r, a = promote(log_ratio, advantages)
    # r A = A + (r - 1) A. A clip range of 2e-6 is 17 steps of float32 next to 1; r - 1 itself has all its digits.
    excess = torch.expm1(log_r)
    loss = -(a + torch.minimum(excess * a, excess.clamp(-epsilon, high) * a))
    return loss if weight is None else weight.to(loss.dtype) * loss


def ratio_statistics(
    log_ratio: Tensor, advantages: Tensor, *, epsilon: float, epsilon_high: float | None = None
) -> dict[str, Tensor]:
    """How far the importance ratios are from 1, and what the clipping of `clipped_loss` does; means are for metrics.

    Args:
        log_ratio, advantages, epsilon, epsilon_high: as for `clipped_loss`.

    Returns:
        Tensors `(B,)`: `"deviation"`, `r - 1`, with all the digits that it would lose beside 1; and of 0 and 1
        `"above"`, `r > 1 + epsilon_high`, and `"below"`, `r < 1 - epsilon` (GRPO-Guard, Fig. 4 of the supplement),
        `"high"`, those above with a positive advantage, and `"low"`, those below with a negative one, on which the
        clipping acts (TRL's `clip_ratio`).

    Raises:
        ValueError: a shape is not `(B,)`.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import ratio_statistics
    >>> log_ratio, advantages = torch.tensor([0.0, 0.5, -0.5]), torch.tensor([1.0, 1.0, -1.0])
    >>> found = ratio_statistics(log_ratio, advantages, epsilon=0.2)
    >>> found["high"], found["low"]  # where the clipping acts
    (tensor([0., 1., 0.]), tensor([0., 0., 1.]))
    ```
    """
    check_shapes("(B,)", log_ratio=log_ratio, advantages=advantages)
    log_r, a = promote(log_ratio, advantages)
    excess = torch.expm1(log_r)
    above, below = excess > (epsilon if epsilon_high is None else epsilon_high), excess < -epsilon
    flags = {"above": above, "below": below, "high": above & (a > 0), "low": below & (a < 0)}
    return {"deviation": excess} | {name: flag.to(excess.dtype) for name, flag in flags.items()}


def ratio_histogram(log_ratio: Tensor, *, epsilon: float, epsilon_high: float | None = None) -> Tensor:
    """The bin of each importance ratio, as rows of one 1 each: their sum over samples is a histogram (GRPO-Guard,
    Figure 2).

    Bins are those of `(r - 1) / epsilon` below 1 and `(r - 1) / epsilon_high` above, so that the histograms of
    all runs, steps and clip ranges have the same ones, and counts may be added: 45 bins of 2/9 from -5 to 5
    (`RATIO_BIN_EDGES`), before them what is below and behind them what is above. The clipping begins at the edges -1
    and 1.

    Args:
        log_ratio, epsilon, epsilon_high: as for `clipped_loss`.

    Returns:
        `(B, 47)`, of 0 and 1, float32.

    Raises:
        ValueError: a shape is not `(B,)`.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import ratio_histogram
    >>> bins = ratio_histogram(torch.tensor([0.0, 0.0, 3e-4]), epsilon=1e-4)
    >>> bins.sum(dim=0).nonzero().flatten()  # two ratios of 1 in the middle bin, one above it
    tensor([23, 37])
    ```
    """
    check_shapes("(B,)", log_ratio=log_ratio)
    (log_r,) = promote(log_ratio)
    excess = torch.expm1(log_r)
    unit = torch.where(excess < 0, epsilon, epsilon if epsilon_high is None else epsilon_high)
    # A clip range of 0 has no inside but 1 itself
    in_ranges = torch.where(excess == 0, 0.0, excess / unit)
    edges = torch.tensor(RATIO_BIN_EDGES, dtype=in_ranges.dtype, device=in_ranges.device)
    return torch.nn.functional.one_hot(torch.bucketize(in_ranges, edges), len(edges) + 1).float()


def gaussian_kl(mean: Tensor, ref_mean: Tensor, diffusion: Number) -> Tensor:
    """Flow-GRPO's KL penalty between two transitions of the same step, `mean((mean - ref_mean)^2) / (2 sigma_t^2)`.

    `sigma_t` is the diffusion coefficient, `std / sqrt(dt)`. The true KL of the two Gaussians, `transition_kl`, has
    the variance of the step, `sigma_t^2 dt`, in its place; the published coefficients (0.04, 0.01) go with the form
    without `dt`.

    Args:
        mean: `(B, ...)`, the trained model's.
        ref_mean: `(B, ...)`, the frozen reference's.
        diffusion: `(B,)` or scalar, above 0.

    Returns:
        `(B,)`.

    Raises:
        ValueError: a shape does not fit.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import gaussian_kl
    >>> mean, ref_mean = torch.full((2, 4), 0.3), torch.zeros(2, 4)
    >>> gaussian_kl(mean, ref_mean, diffusion=0.5)
    tensor([0.1800, 0.1800])
    ```
    """
    check_shapes("(B, ...)", mean=mean, ref_mean=ref_mean)
    current, reference = promote(mean, ref_mean)
    return latent_mean((current - reference) ** 2) / (2 * per_sample("diffusion", diffusion, current) ** 2)


def transition_kl(mean: Tensor, old_mean: Tensor, std: Number) -> Tensor:
    """The KL divergence of two transitions of the same step, `mean((mean - old_mean)^2) / (2 std^2)`.

    A mean over the latent's dimensions, as `gaussian_log_prob` is. With the mean stored at rollout it is how far the
    updates since have moved the policy.

    Args:
        mean: `(B, ...)`, the trained model's.
        old_mean: `(B, ...)`, the one stored at rollout.
        std: `(B,)` or scalar, the standard deviation of the step, above 0.

    Returns:
        `(B,)`.

    Raises:
        ValueError: a shape does not fit; a `std` on the CPU is not above 0.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import transition_kl
    >>> mean, old_mean = torch.full((2, 4), 0.3), torch.zeros(2, 4)
    >>> transition_kl(mean, old_mean, std=0.1)
    tensor([4.5000, 4.5000])
    ```
    """
    check_shapes("(B, ...)", mean=mean, old_mean=old_mean)
    current, previous = promote(mean, old_mean)
    return latent_mean((current - previous) ** 2) / (2 * noise_scale(std, current) ** 2)


def group_advantages(
    rewards: Tensor, num_generations: int, *, scale_rewards: Literal["group", "batch", "batch_centered", "none"]
) -> Tensor:
    """Rewards relative to those of the same prompt's other samples.

    | `scale_rewards` | advantage | where |
    | --- | --- | --- |
    | `"group"` | `(R - mean_group) / (std_group + 1e-4)` | GRPO; GRPO-Guard Eq. 4 |
    | `"batch"` | `(R - mean_group) / (std(R) + 1e-4)`, over the batch | TRL, Flow-GRPO |
    | `"batch_centered"` | `(R - mean_group) / (std(R - mean_group) + 1e-4)`, over the batch | for SLAS, see below |
    | `"none"` | `R - mean_group` | SLAS Eq. 9 |

    The standard deviation of the raw rewards holds the differences between prompts, too. Where these are large, few
    advantages are above 1 in magnitude, so that SLAS's power shrinks all of them. Divided by that of the centered
    rewards they have a spread of 1, and a power amplifies the large ones. SLAS's text does not say which it has.

    Standard deviations are unbiased and the 1e-4 is TRL's, so that the numbers are those of its `GRPOTrainer`. A group
    of equal rewards has advantages of exactly 0; so has a group of one.

    Args:
        rewards: `(N,)` of all processes, the `num_generations` samples of a prompt contiguous; NaN where no reward
            applies to a sample. Such a sample is left out of all means and standard deviations.
        num_generations: samples per prompt.
        scale_rewards: what to divide by.

    Returns:
        `(N,)`; 0 for samples without a reward.

    Raises:
        ValueError: `rewards` is not `(N,)`, does not split into groups, or holds infinity (this check waits for an
            accelerator); `scale_rewards` is unknown.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.functional import group_advantages
    >>> rewards = torch.tensor([0.0, 1.0, 10.0, 12.0])  # two prompts, two images each
    >>> group_advantages(rewards, num_generations=2, scale_rewards="none")
    tensor([-0.5000,  0.5000, -1.0000,  1.0000])
    >>> group_advantages(rewards, num_generations=2, scale_rewards="group")
    tensor([-0.7070,  0.7070, -0.7071,  0.7071])
    ```
    """
    check_shapes("(N,)", rewards=rewards)
    check_choice("scale_rewards", scale_rewards, ("group", "batch", "batch_centered", "none"))
    grouped = in_groups("rewards", rewards, num_generations)
    check_finite("rewards", rewards, allow_nan=True)
    centered = deviations(grouped)
    if scale_rewards == "group":
        centered = centered / (spread(centered) + STD_EPSILON)
    elif scale_rewards == "batch":
        centered = centered / (spread(deviations(grouped.view(1, -1))) + STD_EPSILON)
    elif scale_rewards == "batch_centered":
        centered = centered / (spread(deviations(centered.view(1, -1))) + STD_EPSILON)
    return centered.nan_to_num(nan=0.0).view(-1)
