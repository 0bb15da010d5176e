"""Ratios, clipping and gradients of every variant, step by step, on the same rollouts (GRPO-Guard, Figures 2 and 3).

In training each variant soon has a policy, and so images, of its own. Here one batch is sampled, the policy is moved
a little by plain unclipped updates on it, and then all variants look at the same samples, the same policy and the same
advantages: what differs is their formula alone.
"""

from typing import Any

import torch
from experiments import COMMON
from peft import LoraConfig, get_peft_model
from proxies import ColorsOnlyReward

from trl_flow.backbones import get_backbone
from trl_flow.dynamics import FlowDynamics
from trl_flow.functional import Transition, clipped_loss, group_advantages, log_ratio, timestep_weight
from trl_flow.rollout import Rollout, StepPlan, draw_noise, rollout, sample_generator
from trl_flow.shapes import load_pipeline, load_prompts


# (noise_level, variants as importance_ratio and timestep_weighting)
VARIANTS: dict[str, tuple[float, dict[str, tuple[str, str]]]] = {
    "flow": (
        0.7,
        {
            "baseline": ("standard", "none"),
            "temp-reweight": ("standard", "temp"),
            "guard-reweight": ("standard", "inverse_dt"),
            "mean-revised": ("mean_revised", "none"),
            "ratio-norm": ("ratio_norm", "none"),
            "guard": ("ratio_norm", "inverse_dt"),
        },
    ),
    "dance": (
        0.3,
        {
            "baseline": ("standard", "none"),
            "ratio-norm": ("ratio_norm", "none"),
            "guard, beta/dt": ("ratio_norm", "beta_over_dt"),
            "guard, 1/(beta dt)": ("ratio_norm", "inverse_beta_dt"),
        },
    ),
}


# Share of the ratios that a clip range is meant to leave outside, see `experiments.EPSILON`
CLIPPED_SHARE = 0.2


def measure(
    sde_type: str,
    *,
    prompts: int,
    num_generations: int,
    updates: int,
    learning_rate: float,
    num_steps: int,
    seed: int,
) -> dict[str, Any]:
    """
    Everything that section "ratios" reports of one kind of dynamics.

    Args:
        sde_type (`str`): `"flow"` or `"dance"`.
        prompts, num_generations (`int`): size of the one batch.
        updates, learning_rate (`int`, `float`): of AdamW, between sampling and measuring.
        num_steps (`int`): sampling steps, all of them trained.
        seed (`int`): of prompts, noise and adapter.

    Returns:
        `dict`: for each `importance_ratio` in `"ratios"` mean and std of `r - 1` per step, `epsilon` by the rule, and
        the shares above and below that range per step; for each variant in `"gradients"` the norm of its loss's
        gradient per step; `"dimensions"` of a latent, and `"by_dimensions"` for the samples
        that the policy was moved on and for fresh ones of the same prompts.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    noise_level, variants = VARIANTS[sde_type]
    pipeline = load_pipeline()
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    backbone = get_backbone(
        pipeline,
        height=COMMON["height"],
        width=COMMON["width"],
        max_sequence_length=COMMON["max_sequence_length"],
    )
    policy = get_peft_model(
        backbone.model,
        LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian", target_modules=backbone.lora_target_modules),
    )
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    dynamics = FlowDynamics(backbone.schedule(num_steps), sde_type, noise_level)
    steps = list(range(num_steps))

    rows = load_prompts("train").shuffle(seed=seed).select(range(prompts))
    rows = [row for row in rows for _ in range(num_generations)]
    unique = {row["prompt"]: backbone.encode_prompt(row["prompt"]) for row in rows}
    condition = {key: torch.cat([unique[row["prompt"]][key] for row in rows]) for key in next(iter(unique.values()))}

    def generators(key: int) -> list[torch.Generator]:
        return [sample_generator(seed, key, i) for i in range(len(rows))]

    def predict(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return backbone.guided_prediction(policy, latents, timestep, condition)

    def sample(key: int) -> Rollout:
        noise = draw_noise(backbone.latent_shape(), generators(key), torch.device("cpu"))
        plan = StepPlan(stochastic=tuple(steps), kept=tuple(steps))
        return rollout(predict, dynamics, noise, plan, generators=generators(key + 1))

    def transition(samples: Rollout, step: int) -> Transition:
        """A step's transition under the current policy."""
        latents = samples.latents[:, step]
        return dynamics.transition(predict(latents, dynamics.schedule.timesteps[step]), latents, step)

    trajectory, fresh = sample(0), sample(2)
    with torch.no_grad():
        images = backbone.decode(trajectory.final)
    rewards = ColorsOnlyReward()([], images, objects=[row["objects"] for row in rows])
    advantages = group_advantages(torch.tensor(rewards), num_generations, scale_rewards="group")

    def move(samples: Rollout, step: int) -> torch.Tensor:
        """`-Delta * eps` of a step under the current policy, whose mean over a latent is RatioNorm's log-ratio."""
        mean, std = transition(samples, step)
        noise = samples.next_latents[:, step] - samples.means[:, step]
        return ((mean - samples.means[:, step]) * noise).flatten(1) / std[:, None]

    def log_ratios(step: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-ratios and standard deviations of a step under the current policy, both `(B,)`."""
        mean, std = transition(trajectory, step)
        return log_ratio(trajectory.next_latents[:, step], mean, trajectory.means[:, step], std, kind=kind), std

    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-4)
    for _ in range(updates):
        optimizer.zero_grad()
        for step in steps:
            (-(log_ratios(step, "standard")[0].exp() * advantages).mean() / num_steps).backward()
        optimizer.step()

    report: dict[str, Any] = {"dimensions": trajectory.final[0].numel(), "ratios": {}, "gradients": {}}
    report["by_dimensions"] = {}
    for name, samples in (("trained", trajectory), ("fresh", fresh)):
        with torch.no_grad():
            products = torch.stack([move(samples, step) for step in steps])
        report["by_dimensions"][name] = by_dimensions(products, torch.Generator().manual_seed(seed))
    for kind in dict.fromkeys(ratio for ratio, _ in variants.values()):
        with torch.no_grad():
            deviations = torch.stack([log_ratios(step, kind)[0].double().expm1() for step in steps])
        epsilon = deviations.abs().quantile(1 - CLIPPED_SHARE).item()
        report["ratios"][kind] = {
            "mean": deviations.mean(dim=1).tolist(),
            "std": deviations.std(dim=1).tolist(),
            "epsilon": epsilon,
            "above": (deviations > epsilon).double().mean(dim=1).tolist(),
            "below": (deviations < -epsilon).double().mean(dim=1).tolist(),
        }
    for name, (kind, weighting) in variants.items():
        norms = []
        for step in steps:
            ratios, std = log_ratios(step, kind)
            weight = timestep_weight(weighting, std=std, dt=dynamics.dt(step), beta=dynamics.beta(step))
            epsilon = report["ratios"][kind]["epsilon"]
            loss = clipped_loss(ratios, advantages, epsilon=epsilon, weight=weight).mean()
            gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
            norms.append(torch.stack([g.square().sum() for g in gradient if g is not None]).sum().sqrt().item())
        report["gradients"][name] = norms
    return report


def by_dimensions(products: torch.Tensor, generator: torch.Generator) -> dict[str, float]:
    """
    Spread of the ratio if latents had fewer dimensions: of means over random ones of them.

    Args:
        products (`torch.Tensor`): `-Delta * eps`, `(steps, samples, D)`.
        generator (`torch.Generator`): chooses the dimensions.

    Returns:
        `dict[str, float]`: standard deviation over samples, mean over steps, by number of dimensions.
    """
    total = products.shape[2]
    spreads = {}
    for number in (total // 64, total // 16, total // 4, total):
        # Several choices of few dimensions: one alone would be noisy
        chosen = [torch.randperm(total, generator=generator)[:number] for _ in range(total // number)]
        deviations = [products[:, :, dims].mean(dim=2).std(dim=1) for dims in chosen]
        spreads[str(number)] = torch.stack(deviations).mean().item()
    return spreads
