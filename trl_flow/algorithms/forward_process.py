"""DiffusionNFT and AWM: learning on noised images, without likelihoods or trajectories of sampling."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from trl_flow.algorithms.advantages import AdvantageEstimator
from trl_flow.algorithms.base import Algorithm, LossOutput, MicroBatch, PhaseScores, StepSums
from trl_flow.algorithms.noising import NoisedLatents, Noising, draw_places
from trl_flow.backbones import Backbone
from trl_flow.backbones.schedules import DDIMSchedule, Schedule
from trl_flow.dynamics import make_dynamics
from trl_flow.functional import (
    clipped_loss,
    generalized_huber,
    matching_log_prob,
    nft_loss,
    optimality,
    ratio_statistics,
)
from trl_flow.functional._tensors import latent_mean
from trl_flow.rollout import RandomStream, Rollout, StepPlan, draw_noise, sample_generator


if TYPE_CHECKING:
    from trl_flow.trainer.forward_process_config import AWMConfig, DiffusionNFTConfig, ForwardProcessConfig
    from trl_flow.trainer.policy import Condition, Policy


class ForwardProcess(Algorithm):
    """What DiffusionNFT and AWM share. Images are sampled along the ODE, and only the finished latents are kept.
    The update adds noise to each at a few levels, the units, and computes a loss from the prediction there. An old
    policy slowly follows the trained one. It takes a backbone's schedule and latents, and reward weights `(K,)`.

    Example:

    ```pycon
    >>> from trl_flow.algorithms import AdvantageWeightedMatching, ForwardProcess, NegativeAwareFinetuning
    >>> issubclass(AdvantageWeightedMatching, ForwardProcess), issubclass(NegativeAwareFinetuning, ForwardProcess)
    (True, True)
    ```
    """

    def __init__(self, args: "ForwardProcessConfig", backbone: Backbone, reward_weights: torch.Tensor):
        self.args = args
        schedule = backbone.schedule(args.num_inference_steps)
        self.dynamics = make_dynamics(schedule, sde_type="flow", noise_level=0.0)
        self.noising = Noising(schedule, backbone)
        self.first_place, self.end_place, self.number = self._levels(schedule, backbone.component)
        self.estimator = AdvantageEstimator(args, reward_weights)
        self._num_updates = 0

    def _levels(self, schedule: Schedule | DDIMSchedule, component: str) -> tuple[int, float, int]:
        """Between which places of the schedule noise levels are drawn, and how many for each sample: of two experts
        those of the trained one's steps, and no more of them than there are."""
        (first, end), number, last = self.args.timestep_range, self.args.timesteps_per_sample, self.noising.last_place
        if schedule.frozen:
            steps = [step for step in range(first, end) if step not in schedule.frozen]
            if not steps:
                raise ValueError(
                    f"timestep_range is {self.args.timestep_range}, but the {component} takes none of these steps. "
                    "Widen the range, or raise num_inference_steps."
                )
            # Behind the last of its steps that is not the last of all, a level may be the other one's
            last = last if steps[-1] == schedule.num_steps - 1 else steps[-1]
            first, end = steps[0], steps[-1] + 1
        if self.args.timestep_sampling == "schedule":
            return first, end, min(number, end - first)
        return first, min(end, last), number

    @property
    def needs_reference(self) -> bool:
        return self.args.beta > 0

    @property
    def needs_old(self) -> bool:
        return self.args.keeps_old

    def plan(self, generation: int) -> StepPlan:
        return StepPlan()

    def keep(self, rollout: Rollout) -> dict[str, torch.Tensor]:
        return {"clean": rollout.final}

    def advantages(self, scores: PhaseScores) -> tuple[torch.Tensor, dict[str, float]]:
        """As shares of the largest, so that a run that resumes with other settings reads them correctly."""
        advantages, metrics = self.estimator(scores)
        # The largest as it is after SLAS's shaping
        return advantages / self.args.advantage_clip ** (1 + self.args.advantage_power), metrics

    # ---- Noise levels ----

    def units(self, batch: MicroBatch) -> Sequence[int]:
        return range(self.number)

    def noised(self, policy: "Policy", batch: MicroBatch, unit: int) -> NoisedLatents:
        """The samples at their `unit`-th noise level. Levels and noise belong to the sample, its sampling phase and
        the update, whatever micro-batch or process has it."""
        args, clean = self.args, batch.tensors["clean"]
        key = args.seed, policy.generation, RandomStream.NOISED, policy.updates_since_sampling
        drawn = args.timestep_sampling, self.number, self.first_place, self.end_place
        places = [draw_places(*drawn, sample_generator(*key, sample))[unit] for sample in batch.samples]
        noise = draw_noise(clean.shape[1:], [sample_generator(*key, s, unit) for s in batch.samples], clean.device)
        # Apple's GPUs have no float64
        return self.noising(clean, noise, torch.stack(places).float().to(clean.device))

    # ---- Loss ----

    def loss(self, policy: "Policy", batch: MicroBatch, unit: int, condition: "Condition") -> LossOutput:
        noised, others = self.noised(policy, batch, unit), {}
        # Before the forward whose gradient is taken: no weights change between it and its backward
        for name, scale in self._asked(policy).items():
            with policy.at(name, scale):
                others[name] = policy.predict(noised.latents, noised.timestep, condition)
        prediction = policy.predict(noised.latents, noised.timestep, condition)
        loss, stats = self.policy_loss(prediction, others, noised, batch)
        regularization = None
        for name, beta, key in (("reference", self.args.beta, "kl"), ("old", self._beta_old, "old/kl")):
            if name in others:
                kl = latent_mean((prediction - others[name]).square())
                stats[key] = kl.detach()
                if beta > 0:
                    regularization = beta * kl if regularization is None else regularization + beta * kl
        return LossOutput(loss if regularization is None else loss + regularization, stats, regularization)

    @property
    def _beta_old(self) -> float:
        """The coefficient of the KL to the old policy."""
        return 0.0

    def _asked(self, policy: "Policy") -> dict[str, float]:
        """The weights whose predictions the loss needs besides, each with the scale for `policy.at`."""
        asked = {"old": 1.0} if self.needs_old else {}
        return asked | ({"reference": 1.0} if self.needs_reference else {})

    @abstractmethod
    def policy_loss(
        self, prediction: torch.Tensor, others: dict[str, torch.Tensor], noised: NoisedLatents, batch: MicroBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss without regularization, `(B,)`, and statistics. `others` are predictions of other weights."""

    # ---- The old policy ----

    def after_update(self, policy: "Policy") -> dict[str, float]:
        """Moves the old policy at the end of a sampling phase, as in the authors' code: until then it is the one that
        sampled."""
        self._num_updates += 1
        args = self.args
        if not self.needs_old or policy.updates_since_sampling + 1 < args.updates_per_generation:
            return {}
        decay = min(max(self._num_updates - args.old_decay_start, 0) * args.old_decay_rate, args.old_decay)
        policy.old.move(decay)
        return {"old/decay": decay}

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self._num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._num_updates = state.get("num_updates", 0)


class NegativeAwareFinetuning(ForwardProcess):
    """DiffusionNFT (arXiv:2509.16117): the old policy samples, and the trained one moves toward good images and away
    from bad ones.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow import DiffusionNFTConfig
    >>> from trl_flow.algorithms import NegativeAwareFinetuning
    >>> from trl_flow.backbones import get_backbone
    >>> from trl_flow.shapes import load_pipeline
    >>> args = DiffusionNFTConfig("run", use_cpu=True, bf16=False)
    >>> backbone = get_backbone(load_pipeline(), height=64, width=64, max_sequence_length=16)
    >>> algorithm = NegativeAwareFinetuning(args, backbone, reward_weights=torch.ones(1))
    >>> algorithm.plan(generation=0).stochastic  # sampling follows the ODE
    ()
    ```
    """

    args: "DiffusionNFTConfig"
    sampled_by = "old"

    def policy_loss(self, prediction, others, noised, batch):
        args, share = self.args, optimality(batch.advantages, clip=1.0)
        loss = nft_loss(
            prediction, others["old"], noised.scaled, batch.tensors["clean"], noised.scale, share,
            beta=args.nft_beta, self_normalized=args.self_normalized,
        )  # fmt: skip
        # As in the authors' code: so that neither changes how much the KL weighs
        return loss * args.advantage_clip / args.nft_beta, {}


class AdvantageWeightedMatching(ForwardProcess):
    """AWM (arXiv:2509.25050): GRPO's clipped objective, with the pre-training loss in place of the log-likelihood.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow import AWMConfig
    >>> from trl_flow.algorithms import AdvantageWeightedMatching
    >>> from trl_flow.backbones import get_backbone
    >>> from trl_flow.shapes import load_pipeline
    >>> args = AWMConfig("run", use_cpu=True, bf16=False, timesteps_per_sample=4)
    >>> backbone = get_backbone(load_pipeline(), height=64, width=64, max_sequence_length=16)
    >>> algorithm = AdvantageWeightedMatching(args, backbone, reward_weights=torch.ones(1))
    >>> algorithm.args.timesteps_per_sample
    4
    ```
    """

    args: "AWMConfig"

    @property
    def _beta_old(self) -> float:
        return self.args.beta_old

    def needs_sampling_weights(self, policy: "Policy") -> bool:
        return self.args.updates_per_generation > 1

    def _asked(self, policy: "Policy") -> dict[str, float]:
        asked = super()._asked(policy)
        # In the first update the policy is the one that has sampled, and so are weights as far from those as 0 times
        return asked | ({"probe": 0.0} if policy.updates_since_sampling > 0 else {})

    def policy_loss(self, prediction, others, noised, batch):
        args, log_prob = self.args, self._log_prob(prediction, noised)
        sampled = self._log_prob(others["probe"], noised) if "probe" in others else log_prob.detach()
        log_ratio, clip_range = log_prob - sampled, {"epsilon": args.epsilon, "epsilon_high": args.epsilon_high}
        stats = ratio_statistics(log_ratio.detach(), batch.advantages, **clip_range)
        return clipped_loss(log_ratio, batch.advantages, **clip_range), stats

    def _log_prob(self, prediction: torch.Tensor, noised: NoisedLatents) -> torch.Tensor:
        log_prob = generalized_huber(matching_log_prob(prediction, noised.target), self.args.huber_power)
        return noised.level * log_prob if self.args.timestep_weighting == "t" else log_prob

    def summarize(self, sums: StepSums) -> dict[str, float]:
        return sums.ratio_metrics() | {name: sums.mean(name) for name in ("kl", "old/kl") if name in sums.names}
