"""What is measured without training: clipping by the lag of the policy, and the mean gradient of the absolute term."""

import math
from itertools import islice
from typing import Any

import torch
from experiments import ABLATION, COMMON, DENSE, FLOW_GRPO, ONE_RATE
from peft import LoraConfig, get_peft_model
from proxies import RecallReward

from trl_flow.algorithms.policy_gradient import REFERENCE_DIM
from trl_flow.backbones import get_backbone
from trl_flow.dynamics import FlowDynamics
from trl_flow.functional import (
    clipped_loss,
    cumulative_values,
    group_advantages,
    log_ratio,
    timestep_weight,
    value_weights,
)
from trl_flow.rollout import Rollout, StepPlan, draw_noise, rollout, sample_generator
from trl_flow.shapes import load_pipeline, load_prompts
from trl_flow.shapes.bundled import DRAWING_SETTINGS


NUM_STEPS, NOISE_LEVEL, DISCOUNT = COMMON["num_inference_steps"], COMMON["noise_level"], DENSE["value_discount"]
STEPS = tuple(range(NUM_STEPS - 1))  # those that are trained
RATE = FLOW_GRPO["learning_rate"]
RATIOS = ("standard", "mean_revised", "ratio_norm")
# GRPO-Guard's ablation: `importance_ratio` and `timestep_weighting`
VARIANTS = {
    name: (fields.get("importance_ratio", "standard"), fields.get("timestep_weighting", "none"))
    for name, fields in islice(ABLATION.items(), 6)
}
# Clip ranges for the rate above and latents of 65,536 dimensions
PUBLISHED = dict.fromkeys(RATIOS, FLOW_GRPO["epsilon"]) | {"ratio_norm": ONE_RATE["epsilon"]}


class Policy:
    """The bundled model with a fresh adapter, as the trainers make it."""

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        self.seed = seed
        pipeline = load_pipeline()
        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False)
        size = {name: DRAWING_SETTINGS[name] for name in ("height", "width", "max_sequence_length")}
        self.backbone = get_backbone(pipeline, **size)
        targets = self.backbone.lora_target_modules
        lora = LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian", target_modules=targets)
        self.model = get_peft_model(self.backbone.model, lora)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.dynamics = FlowDynamics(self.backbone.schedule(NUM_STEPS), "flow", NOISE_LEVEL)

    def sample(self, rows: list[dict[str, Any]], number: int, key: int, *, shared: bool) -> "Samples":
        """`number` images of each row's prompt; with `shared` they start from one noise."""
        rows = [row for row in rows for _ in range(number)]
        prompts = {row["prompt"]: self.backbone.encode_prompt(row["prompt"]) for row in rows}
        names = next(iter(prompts.values()))
        condition = {name: torch.cat([prompts[row["prompt"]][name] for row in rows]) for name in names}

        def generators(key: int, each: int = 1) -> list[torch.Generator]:
            return [sample_generator(self.seed, key, i // each) for i in range(len(rows))]

        cpu, starts = torch.device("cpu"), generators(key, number if shared else 1)
        noise = draw_noise(self.backbone.latent_shape(), starts, cpu)

        def predict(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.backbone.guided_prediction(self.model, latents, timestep, condition)

        kept = rollout(predict, self.dynamics, noise, StepPlan(STEPS, STEPS), generators=generators(key + 1))
        with torch.no_grad():
            images = self.backbone.decode(kept.final)
        objects = [row["objects"] for row in rows]
        rewards = torch.tensor(RecallReward()([row["prompt"] for row in rows], images, objects=objects))
        return Samples(self, kept, predict, group_advantages(rewards, number, scale_rewards="group"))


class Samples:
    """What was sampled, and the ratios of its steps under the present policy."""

    def __init__(self, policy: Policy, kept: Rollout, predict, advantages: torch.Tensor):
        self.policy, self.kept, self.predict, self.advantages = policy, kept, predict, advantages

    def transition(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        dynamics, latents = self.policy.dynamics, self.kept.latents[:, step]
        return dynamics.transition(self.predict(latents, dynamics.schedule.timesteps[step]), latents, step)

    def log_ratios(self, step: int, kind: str, moved: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        mean, std = moved or self.transition(step)
        return log_ratio(self.kept.next_latents[:, step], mean, self.kept.means[:, step], std, kind=kind)

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """Of the adapter, as one vector."""
        parts = torch.autograd.grad(loss, self.policy.parameters, allow_unused=True, retain_graph=True)
        return torch.cat([part.flatten() for part in parts if part is not None])


def lag(*, seed: int, prompts: int, num_generations: int, lags: list[int]) -> dict[str, Any]:
    """
    Ratios of one batch under a policy that is ever more updates away, unclipped ones of the plain loss, and the
    gradients of all variants one update away.

    A step's means have moved by `delta` standard deviations, rms over the latent's D dimensions, and the standard
    ratio is shifted by `delta sqrt(D) / 2` of its spread. To see the clipping of 65,536 dimensions at their lag,
    `delta sqrt(D)` has to be the same, not `delta`. What is called `published` is that of those dimensions one update
    away. Clip ranges are the published ones, scaled to the dimensions and, as the spread is, in proportion to `delta`.

    Returns:
        `dict`: `"published"`, and for each of `"lags"` columns over the trained steps: `"move"`, `delta sqrt(D)`; by
        ratio `"shift"`, the mean over the spread, and the shares `"below"` and `"above"`; in `"gradients"` the norms
        over the steps by variant.
    """
    policy = Policy(seed)
    rows = list(load_prompts("train").shuffle(seed=seed).select(range(prompts)))
    samples = policy.sample(rows, num_generations, 0, shared=False)
    dimensions = samples.kept.final[0].numel()
    optimizer = torch.optim.AdamW(policy.parameters, lr=RATE, weight_decay=1e-4)
    result: dict[str, Any] = {"dimensions": dimensions, "lags": {}}
    for update in range(1, max(lags) + 1):
        optimizer.zero_grad()
        for step in STEPS:
            (-(samples.log_ratios(step, "standard").exp() * samples.advantages).mean() / NUM_STEPS).backward()
        optimizer.step()
        if update == 1:
            first = moves(samples)
            result["gradients"] = gradients(samples, math.sqrt(REFERENCE_DIM / dimensions))
            result["published"] = (first * math.sqrt(REFERENCE_DIM)).tolist()
        if update in lags:
            now = moves(samples)
            scale = math.sqrt(REFERENCE_DIM / dimensions) * (now / first).mean().item()
            result["lags"][str(update)] = {"move": (now * math.sqrt(dimensions)).tolist()} | outside(samples, scale)
    return result


@torch.no_grad()
def moves(samples: Samples) -> torch.Tensor:
    """`delta` of each step."""
    found = []
    for step in STEPS:
        mean, std = samples.transition(step)
        moved = (mean - samples.kept.means[:, step]).flatten(1) / std[:, None]
        found.append(moved.square().mean().sqrt())
    return torch.stack(found)


@torch.no_grad()
def outside(samples: Samples, scale: float) -> dict[str, dict[str, list[float]]]:
    """By ratio its shift, and the shares outside of the clip range, over the steps."""
    shares = {kind: {"shift": [], "below": [], "above": []} for kind in RATIOS}
    for step in STEPS:
        moved = samples.transition(step)
        for kind, columns in shares.items():
            log_ratios, epsilon = samples.log_ratios(step, kind, moved).double(), scale * PUBLISHED[kind]
            deviations = log_ratios.expm1()
            columns["shift"].append((log_ratios.mean() / log_ratios.std()).item())
            columns["below"].append((deviations < -epsilon).double().mean().item())
            columns["above"].append((deviations > epsilon).double().mean().item())
    return shares


def gradients(samples: Samples, scale: float) -> dict[str, list[float]]:
    """By variant the norms of its loss's gradient over the steps."""
    dynamics, norms = samples.policy.dynamics, {name: [] for name in VARIANTS}
    for step in STEPS:
        for name, (kind, weighting) in VARIANTS.items():
            mean, std = samples.transition(step)
            weight = timestep_weight(weighting, std=std, dt=dynamics.dt(step), beta=dynamics.beta(step))
            ratios = samples.log_ratios(step, kind, (mean, std))
            loss = clipped_loss(ratios, samples.advantages, epsilon=scale * PUBLISHED[kind], weight=weight)
            norms[name].append(samples.gradient(loss.mean()).norm().item())
    return norms


def absolute_term(*, seed: int, groups: int, chunk: int, num_generations: int) -> dict[str, Any]:
    """
    The gradient of VGPO's absolute term where all images of a group have the reward 1 at all steps, and that of the
    relative one with real rewards, on the samples of the policy itself.

    A signal's mean over more and more groups tends to a vector, a random walk's falls as one over the root.

    Returns:
        `dict`: of `"absolute"` and `"relative"` the norm of the mean over the first groups, by their number, and
        `"signal"`, the share of the squared norm at the end that is not what a random walk would have (0 for one).
    """
    policy, found = Policy(seed), {"absolute": [], "relative": []}
    values = cumulative_values(torch.ones(1, NUM_STEPS), DISCOUNT)
    absolute = (value_weights(values) * values)[0]
    for number in range(groups // chunk):
        prompts = load_prompts("train").shuffle(seed=seed + number).select(range(chunk))
        samples = policy.sample(list(prompts), num_generations, 2 * number, shared=True)
        sums = dict.fromkeys(found, 0.0)
        for step in STEPS:
            log_ratios = samples.log_ratios(step, "standard")
            sums["absolute"] += absolute[step] * log_ratios.mean()
            sums["relative"] += (samples.advantages * log_ratios).mean()
        for name, total in sums.items():
            found[name].append(samples.gradient(total))
    return {name: walk(torch.stack(gradients).double(), chunk) for name, gradients in found.items()}


def walk(gradients: torch.Tensor, chunk: int) -> dict[str, Any]:
    """Of independent gradients `(n, P)` of `chunk` groups each, see `absolute_term`."""
    number = len(gradients)
    sums = gradients.cumsum(dim=0)
    norms = {str((i + 1) * chunk): (sums[i].norm() / (i + 1)).item() for i in marks(number)}
    squared = sums[-1].norm().square()
    # Products of different chunks have the squared norm of the expectation as theirs
    between = (squared - gradients.square().sum()) / (number * (number - 1))
    return {"norms": norms, "signal": (between / (squared / number**2)).item()}


def marks(number: int) -> list[int]:
    """Places at about equal ratios, the last included."""
    return sorted({round(number ** (i / 6)) - 1 for i in range(7)})
