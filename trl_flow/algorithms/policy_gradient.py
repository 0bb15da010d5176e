"""Flow-GRPO, DanceGRPO, Flow-CPS, windows, GRPO-Guard, SLAS, VGPO and their combinations."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers.utils import logging

from trl_flow.algorithms.advantages import AdvantageEstimator
from trl_flow.algorithms.base import Algorithm, LossOutput, MicroBatch, PhaseScores, StepSums
from trl_flow.algorithms.ratio_probe import RatioProbe
from trl_flow.backbones import Backbone
from trl_flow.dynamics import FlowDynamics, make_dynamics
from trl_flow.functional import (
    Transition,
    clipped_loss,
    gaussian_kl,
    log_ratio,
    probed_mean,
    ratio_histogram,
    ratio_statistics,
    timestep_weight,
    transition_kl,
)
from trl_flow.rollout import RandomStream, Rollout, StepPlan


if TYPE_CHECKING:
    from trl_flow.trainer.flow_grpo_config import FlowGRPOConfig
    from trl_flow.trainer.policy import Condition, Policy

logger = logging.get_logger(__name__)

# Dimensions of the latents for which the papers give their clip ranges: 512 x 512 images in Stable Diffusion 3.5
REFERENCE_DIM = 16 * 64 * 64


class ClippedPolicyGradient(Algorithm):
    """GRPO's clipped objective on the transitions of sampling (Flow-GRPO Eq. 5, GRPO-Guard Eq. 12), on schedule and
    latents of a backbone, with weights `(K,)` of the reward functions. Raises `ValueError` if no step of the
    schedule can be trained, or too few for the window.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow import GuardConfig
    >>> from trl_flow.algorithms import ClippedPolicyGradient
    >>> from trl_flow.backbones import get_backbone
    >>> from trl_flow.shapes import load_pipeline
    >>> args = GuardConfig("run", use_cpu=True, bf16=False, sde_window_size=2, sde_window_range=[0, 2])
    >>> backbone = get_backbone(load_pipeline(), height=64, width=64, max_sequence_length=16)
    >>> algorithm = ClippedPolicyGradient(args, backbone, reward_weights=torch.ones(1))
    >>> algorithm.plan(generation=0).kept
    (0, 1)
    ```
    """

    def __init__(self, args: "FlowGRPOConfig", backbone: Backbone, reward_weights: torch.Tensor):
        self.args = args
        schedule = backbone.schedule(args.num_inference_steps)
        self.dynamics = make_dynamics(schedule, sde_type=args.sde_type, noise_level=args.noise_level)
        self.stochastic_steps = self._checked_stochastic_steps(backbone.component)
        self.estimator = AdvantageEstimator(args, reward_weights)
        if self.estimator.power is not None and args.updates_per_generation < 2:
            logger.warning(
                "advantage_power is 'auto', which follows the KL of the first of several updates, but each sampling "
                "phase has one: the power stays 0. Set steps_per_generation to twice gradient_accumulation_steps."
            )
        # The spread of a mean over D dimensions falls with sqrt(D), and with it the clip range that does the same
        scale = math.sqrt(REFERENCE_DIM / math.prod(backbone.latent_shape())) if args.scale_epsilon else 1.0
        self.epsilon_low = args.epsilon * scale
        self.epsilon_high = self.epsilon_low if args.epsilon_high is None else args.epsilon_high * scale
        # Flow-CPS publishes its clip ranges for a log-probability without the variance, -mean((x' - mean)^2), which is
        # that of a Gaussian of variance 1/2; RatioNorm needs the variance
        is_cps = isinstance(self.dynamics, FlowDynamics) and args.sde_type == "cps"
        self._ratio_std = math.sqrt(0.5) if is_cps and args.importance_ratio == "standard" else None
        half_precision = args.bf16 or args.fp16 or backbone.dtype in (torch.bfloat16, torch.float16)
        clip_range = min(self.epsilon_low, self.epsilon_high)
        self.probe = RatioProbe(args.ratio_probe, half_precision=half_precision, clip_range=clip_range)
        if args.updates_per_generation <= 1 and args.importance_ratio != "standard":
            logger.warning(
                f"importance_ratio is {args.importance_ratio!r}, but each sampling phase has one update: every ratio "
                "is 1, and nothing will be clipped. Set steps_per_generation to twice gradient_accumulation_steps, "
                "which is the default, or num_iterations=2."
            )
        self._first_deviation: float | None = None
        self._ratio_checked = False

    def _checked_stochastic_steps(self, component: str) -> list[int]:
        args, last = self.args, self.args.num_inference_steps - 1
        steps = [step for step in self.dynamics.stochastic_steps if step != last or args.train_last_step]
        if not steps:
            whose = f"schedule that the {component} takes" if self.dynamics.schedule.frozen else "schedule"
            which, remedy = "step", "Use more steps"
            if last in self.dynamics.stochastic_steps:
                which, remedy = "step but the last", f"{remedy}, or set train_last_step=True"
            nothing = f"no {which} of this model's {whose} adds noise: there is nothing to train. {remedy}."
            raise ValueError(f"num_inference_steps is {args.num_inference_steps}, and {nothing}")
        first, end = args.sde_window_range or (0, 0)
        if args.sde_window_size is not None and min(end, len(steps)) - first < args.sde_window_size:
            why = f"the last of {args.num_inference_steps} steps is deterministic and not trained"
            if self.dynamics.schedule.frozen:
                why = f"the {component} takes {len(steps)} steps that can be trained, which the range counts"
            raise ValueError(
                f"sde_window_range is {args.sde_window_range}, but on this model's schedule {why}: a window of "
                f"{args.sde_window_size} steps does not fit. Use more steps, a smaller window or a lower start."
            )
        return steps

    # ---- Sampling ----

    @property
    def needs_reference(self) -> bool:
        return self.args.beta > 0

    def plan(self, generation: int) -> StepPlan:
        args, stochastic = self.args, self.stochastic_steps
        rng = np.random.default_rng([args.seed, generation, RandomStream.STEPS])
        if args.sde_window_size is not None:
            first, end = args.sde_window_range
            last = min(end, len(stochastic)) - args.sde_window_size
            if args.sde_window_schedule == "progressive":
                start = min(first + generation // args.sde_window_interval * args.sde_window_stride, last)
            else:
                start = int(rng.integers(first, last + 1))
            stochastic = stochastic[start : start + args.sde_window_size]
        number = args.num_trained_steps(len(stochastic))
        if args.timestep_fraction_per_sample and number < len(stochastic):
            return StepPlan(tuple(stochastic), tuple(stochastic), number, project=args.dense_rewards)
        kept = tuple(sorted(rng.choice(stochastic, size=number, replace=False).tolist()))
        return StepPlan(tuple(stochastic), kept, project=args.dense_rewards)

    def keep(self, rollout: Rollout) -> dict[str, torch.Tensor]:
        kept = {"latents": rollout.latents, "next_latents": rollout.next_latents, "means": rollout.means}
        return kept if rollout.chosen is None else kept | {"chosen": rollout.chosen}

    # ---- Advantages ----

    def advantages(self, scores: PhaseScores) -> tuple[torch.Tensor, dict[str, float]]:
        (advantages, stats), plan = self.estimator(scores), scores.plan
        if advantages.ndim == 1:
            return advantages[:, None].expand(-1, len(plan.kept)), stats
        return advantages[:, list(plan.kept)], stats

    # ---- Loss ----

    def units(self, batch: MicroBatch) -> Sequence[int]:
        """The kept steps, or where each sample has its own the places in these."""
        return range(batch.tensors["chosen"].shape[1]) if "chosen" in batch.tensors else batch.steps

    def needs_sampling_weights(self, policy: "Policy") -> bool:
        return self.args.updates_per_generation > 1 and (self.probe.is_active(policy) or self.probe.measures(policy))

    def loss(self, policy: "Policy", batch: MicroBatch, unit: int, condition: "Condition") -> LossOutput:
        args, dynamics = self.args, self.dynamics
        step, advantages, (latents, next_latents, old_mean) = self._part(batch, unit)
        timestep = dynamics.schedule.timesteps[step]

        def transition() -> Transition:
            return dynamics.transition(policy.predict(latents, timestep, condition), latents, step)

        # Before the forward whose gradient is taken: no weights change between it and its backward
        probe_means = {}
        if policy.updates_since_sampling > 0 and policy.sampling_weights:
            for scale in self.probe.scales(policy):
                with policy.at("probe", scale):
                    probe_means[scale] = transition().mean
        mean, std = current = transition()
        ratio_std = std if self._ratio_std is None else torch.full_like(std, self._ratio_std)

        def log_ratios_of(mean: torch.Tensor) -> torch.Tensor:
            return log_ratio(next_latents, mean, old_mean, ratio_std, kind=args.importance_ratio)

        log_ratios, stats, moved = log_ratios_of(mean), {}, mean.detach()
        if probe_means:
            means = {k: probed_mean(mean, probed, old_mean, scale=k) for k, probed in probe_means.items()}
            probed_ratios = {k: log_ratios_of(probed) for k, probed in means.items()}
            stats |= self.probe.observe(log_ratios, probed_ratios)
            used = self.probe.scale(policy)
            if used is not None:
                log_ratios, moved = probed_ratios[used], means[used].detach()
        of_step = {"dt": dynamics.dt(step), "beta": dynamics.beta(step), "gain": dynamics.gain(step)}
        weight = timestep_weight(args.timestep_weighting, std=std, **of_step)
        clip_range = {"epsilon": self.epsilon_low, "epsilon_high": self.epsilon_high}
        loss, regularization = clipped_loss(log_ratios, advantages, weight=weight, **clip_range), None

        stats |= ratio_statistics(log_ratios.detach(), advantages, **clip_range)
        # In the first update of a phase all ratios are 1, which would bury the others
        if policy.updates_since_sampling > 0:
            stats["ratio/histogram"] = ratio_histogram(log_ratios.detach(), **clip_range)
        if args.beta > 0:
            with policy.at("reference"):
                ref_mean = transition().mean
            kl = gaussian_kl(mean, ref_mean, dynamics.diffusion(current, step))
            regularization = args.beta * kl
            loss = loss + regularization
            stats["kl"] = kl.detach()
        if self.estimator.power is not None:
            self.estimator.power.observe(transition_kl(moved, old_mean, std), policy.updates_since_sampling)
        if not self._ratio_checked and policy.updates_since_sampling == 0:
            self._first_deviation = max(self._first_deviation or 0.0, stats["deviation"].abs().max().item())
        counted = {each: step == each for each in batch.steps} if isinstance(step, torch.Tensor) else None
        return LossOutput(loss, stats, regularization, counted)

    def _part(self, batch: MicroBatch, unit: int) -> tuple[int | torch.Tensor, torch.Tensor, Sequence[torch.Tensor]]:
        """The step of a unit, or of each sample `(B,)`, with the advantages, latents, next latents and means there."""
        if "chosen" in batch.tensors:
            index, places = unit, batch.tensors["chosen"][:, unit]
            step = torch.tensor(batch.steps, device=places.device)[places]
            advantages = batch.advantages.gather(1, places[:, None])[:, 0]
        else:
            index, step = batch.steps.index(unit), unit
            advantages = batch.advantages[:, index]
        return step, advantages, [batch.tensors[name][:, index] for name in ("latents", "next_latents", "means")]

    def after_update(self, policy: "Policy") -> dict[str, float]:
        """Before the first update the policy is the one that sampled: every ratio must have been 1."""
        if self.estimator.power is not None:
            self.estimator.power.gather()
        stats = self.probe.after_update(policy)
        if self._ratio_checked or self._first_deviation is None:
            return stats
        self._ratio_checked = True
        deviation = max(gather_object([self._first_deviation]))
        if deviation > 0.1 * min(self.epsilon_low, self.epsilon_high):
            logger.warning(
                f"Before the first update the importance ratio should be exactly 1, but it is off by up to "
                f"{deviation:.2e} (clip range {self.epsilon_low:g}): clipping will act on noise. Training and rollout "
                "run different arithmetic: dropout that is still on, a model that keeps state between calls or draws "
                "random numbers, other shapes, torch.compile, or half precision. Try bf16=False and fp16=False."
            )
        return stats | {"ratio/first_update_deviation": deviation}

    # ---- Metrics and state ----

    def summarize(self, sums: StepSums) -> dict[str, float]:
        """`clip_ratio/low_mean` and `high_mean` count the ratios that the clipping acts on (TRL's); those of a step
        all ratios outside of the range, whatever the advantage's sign (Guard's supplement, Fig. 4)."""
        metrics = sums.ratio_metrics()
        metrics |= {"kl": sums.mean("kl")} if "kl" in sums.names else {}
        for step in sums.units_of("rounding"):
            metrics[f"ratio/noise_floor_step_{step}"] = sums.root_mean_square("rounding", step)
        for step in sums.units:
            metrics[f"ratio/mean_step_{step}"] = 1 + sums.mean("deviation", step)
            metrics[f"ratio/std_step_{step}"] = sums.std("deviation", step)
            metrics[f"clip_ratio/low_step_{step}"] = sums.mean("below", step)
            metrics[f"clip_ratio/high_step_{step}"] = sums.mean("above", step)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        power = {} if self.estimator.power is None else self.estimator.power.state_dict()
        return power | {"probe": self.probe.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._ratio_checked, self._first_deviation = False, None
        self.probe.load_state_dict(state.get("probe", {}))
        if self.estimator.power is not None:
            self.estimator.power.load_state_dict(state)
