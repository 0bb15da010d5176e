"""The rewards of a sampling phase: computed while it is sampled, gathered from all processes, and measured."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import TrainerState
from transformers.utils import logging

from trl_flow.algorithms import PhaseScores
from trl_flow.backbones.projection import decoding_with
from trl_flow.functional import combine_rewards, frac_zero_std, max_variance_subset, normalize_then_sum
from trl_flow.images import Sample
from trl_flow.rewards.checks import RewardError, is_dense
from trl_flow.rewards.scorer import RewardLogs, RewardScorer, ScoringSession
from trl_flow.rollout import StepPlan, decode
from trl_flow.trainer.flow_rl_config import FlowRLConfig
from trl_flow.trainer.sampler import SampledPart, Sampler


logger = logging.get_logger(__name__)


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list]:
    """What reward functions are given besides the prompts: a list for each other column."""
    return {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}


def gather_rewards(
    accelerator: Accelerator, score: Callable[[], torch.Tensor], number: int | None = None
) -> torch.Tensor:
    """What `score` gives in all processes, each filled up with NaN to `number` samples where they have other numbers.
    An error in one is raised in all, so that none waits."""
    error = None
    try:
        rewards = score()
    except RewardError as own_error:
        error = own_error
    if accelerator.num_processes > 1:
        errors = [e for e in gather_object([None if error is None else str(error)]) if e is not None]
        if errors and error is None:
            raise RewardError(f"On another process: {errors[0]}")
    if error is not None:
        raise error
    if number is not None:
        rewards = torch.nn.functional.pad(rewards, (0, 0, 0, number - len(rewards)), value=torch.nan)
    return accelerator.gather(rewards.to(accelerator.device))


def reward_metrics(rewards_per_func: torch.Tensor, rewards: torch.Tensor, names: list[str]) -> dict[str, float]:
    """`reward`, `reward_std` and `rewards/{name}/mean` and `/std`, NaN where there is nothing to average, and
    `/frac_none`: of the functions' rewards `(N, K)` and their weighted sums `(N,)`."""
    none = rewards_per_func.isnan().float().mean(dim=0).tolist()
    metrics = {f"rewards/{name}/frac_none": share for name, share in zip(names, none, strict=True)}
    columns = {f"rewards/{name}/": rewards_per_func[:, i] for i, name in enumerate(names)}
    for name, values in {"": rewards, **columns}.items():
        values = values[~values.isnan()]
        mean, std = (f"{name}mean", f"{name}std") if name else ("reward", "reward_std")
        metrics[mean] = values.mean().item() if len(values) else math.nan
        metrics[std] = values.std().item() if len(values) > 1 else math.nan
    return metrics


@dataclass(eq=False)
class PhaseScorer:
    """Scores sampling phases by the optimized reward functions of `scorer`, whose weights are `(K,)`."""

    scorer: RewardScorer
    reward_weights: torch.Tensor
    sampler: Sampler
    args: FlowRLConfig
    accelerator: Accelerator
    projection_vae: torch.nn.Module | None = None  # decodes unfinished images in place of the pipeline's VAE
    _has_scored: bool = False

    @property
    def dense(self) -> list[int]:
        """The functions that score unfinished images: those that can, and whose scores count."""
        pairs = zip(self.scorer.reward_funcs, self.reward_weights.tolist(), strict=True)
        return [i for i, (func, weight) in enumerate(pairs) if is_dense(func) and weight != 0]

    @contextlib.contextmanager
    def phase(
        self, rows: list[dict[str, Any]], plan: StepPlan, state: TrainerState, *, number: int | None = None
    ) -> Iterator["ScoringPhase"]:
        """Scores one phase of this process's `rows`; a context manager around sampling. If processes have other
        numbers of rows, `number` is that of the most."""
        # Not in the first phase: the functions load their models then, and while one loads, the default dtype is
        # the model's. Nor with dropout, which draws from the global random generators, as the functions may.
        background = self.args.overlap_rewards and self.args.disable_dropout and self._has_scored
        is_first, self._has_scored, busy = not self._has_scored, True, False
        try:
            with self.scorer.session(background=background, trainer_state=state) as session:
                try:
                    yield ScoringPhase(self, rows, plan, state, session, is_first=is_first, number=number)
                finally:
                    busy = session.busy
        except torch.OutOfMemoryError as error:
            if not busy:
                raise
            instead = "set overlap_rewards=False, or lower per_device_train_batch_size."
            overlapped = f"{error} Rewards were being computed while images were sampled: {instead}"
            raise torch.OutOfMemoryError(overlapped) from error


@dataclass(eq=False)
class ScoringPhase:
    """One sampling phase: `add` the parts as they are sampled, then `finish`, and `measure`. `images` are the finished
    ones so far; `logs`, of this process's samples, are there once it is finished, and `metrics`, of all processes',
    once it is measured."""

    parent: PhaseScorer
    rows: list[dict[str, Any]]
    plan: StepPlan
    state: TrainerState
    session: ScoringSession
    is_first: bool = False  # of this run of the program
    number: int | None = None
    images: list[Sample] = field(default_factory=list)
    logs: RewardLogs = field(default_factory=RewardLogs)
    metrics: dict[str, float] = field(default_factory=dict)
    _submitted: int = 0
    # On the host, and as latents: the images of all steps at once would take gigabytes
    _predicted: list[torch.Tensor] = field(default_factory=list)

    def add(self, part: SampledPart) -> None:
        """Takes a part, and has the groups scored that are complete: a reward may compare a group's images."""
        self.images += part.images
        if part.rollout.pred_original_samples is not None and self.parent.dense:
            self._predicted += part.rollout.pred_original_samples.cpu().unbind()[: len(part.images)]
        # What this process has of a group that is split over processes is complete when its own images are
        end, number = len(self.images), self.parent.args.num_generations
        offset = self.parent.args.process_index * len(self.rows)
        if end < len(self.rows):
            end = max(0, (offset + end) // number * number - offset)
        if end > self._submitted:
            if not self.session.background:
                self.parent.sampler.show_stage("scoring")
            rows, images = self.rows[self._submitted : end], self.images[self._submitted : end]
            self.session.submit([row["prompt"] for row in rows], images, columns_of(rows))
            self._submitted = end
        if self.parent.accelerator.num_processes == 1:
            # Several processes raise at a common point, so that none waits for the others
            self.session.raise_error()

    def finish(self) -> PhaseScores:
        """Waits for the rewards; those of all processes' samples."""
        self.parent.sampler.show_stage("scoring")

        def collect() -> torch.Tensor:
            scores = self.session.result()
            self.logs = scores.logs
            unscored = self._combine(scores.rewards).isnan()
            if unscored.any():
                prompt = self.rows[int(unscored.nonzero()[0])]["prompt"]
                what = f"Every reward function that counts returned None for {prompt!r}"
                logger.warning(f"{what}: the sample is left out of its group.")
            return scores.rewards

        rewards_per_func = gather_rewards(self.parent.accelerator, collect, self.number)
        instant = self._instant(rewards_per_func) if self.plan.project else None
        return PhaseScores(rewards_per_func, self.parent.scorer.names, self.plan, instant)

    def choose(self, scores: PhaseScores) -> tuple[torch.Tensor | None, PhaseScores]:
        """The samples that are trained on, by their indices among all processes' samples, and their scores; `None`
        for all of them. What is compared is what their advantages are made of: the sum of the rewards, or of these
        normalized."""
        args = self.parent.args
        if args.group_size == args.num_generations:
            return None, scores
        if args.multi_objective_aggregation == "normalize_then_sum":
            weights = self.parent.reward_weights.to(scores.rewards_per_func.device)
            compared = normalize_then_sum(scores.rewards_per_func, weights, args.num_generations)
        else:
            compared = self._combine(scores.rewards_per_func)
        chosen = max_variance_subset(compared, args.num_generations, args.group_size)
        return chosen, scores.of(chosen)

    def _combine(self, rewards_per_func: torch.Tensor) -> torch.Tensor:
        return combine_rewards(rewards_per_func, self.parent.reward_weights.to(rewards_per_func.device))

    def _instant(self, terminal: torch.Tensor) -> torch.Tensor:
        """Rewards of the images predicted after each step (VGPO Eq. 10), of all processes' samples: `(N, T, K)`.
        Functions that cannot judge an unfinished image count with their reward of the finished one."""
        parent, steps, number = self.parent, [], self.parent.args.num_inference_steps
        # One step's images are decoded, scored and dropped before the next: no more are held than the finished ones
        for t in range(number):
            by_func = terminal
            if parent.dense and t < number - 1:
                parent.sampler.show_stage(f"scoring step {t + 1} of {number}")
                by_func = terminal.clone()
                scored = gather_rewards(parent.accelerator, lambda t=t: self._score_predicted(t), self.number)
                by_func[:, parent.dense] = scored[:, parent.dense]
            steps.append(by_func)
            rewards = self._combine(by_func)
            present = rewards[~rewards.isnan()]
            if len(present) > 1:
                self.metrics[f"instant_reward/mean_step_{t}"] = present.mean().item()
                self.metrics[f"instant_reward/std_step_{t}"] = present.std().item()
        return torch.stack(steps, dim=1)

    def _score_predicted(self, step: int) -> torch.Tensor:
        if not self.rows:
            return torch.empty(0, len(self.parent.scorer.names))
        latents = torch.stack([own[step] for own in self._predicted])
        backbone = self.parent.sampler.policy.backbone
        with decoding_with(backbone, self.parent.projection_vae):
            given = [row["prompt"] for row in self.rows], decode(backbone, latents)
        options = {"trainer_state": self.state, "only": self.parent.dense}
        scores = self.parent.scorer.score(*given, columns_of(self.rows), **options)
        for name, values in scores.logs.metrics.items():
            self.logs.metrics[name] += values
        return scores.rewards

    def compared(self, rewards_per_func: torch.Tensor, instant: torch.Tensor | None = None) -> torch.Tensor:
        """What must differ within a group for it to have advantages, `(N, M)`: the sum of the rewards, with `instant`
        at any step, or any of the rewards that count."""
        if self.parent.args.multi_objective_aggregation == "normalize_then_sum":
            return rewards_per_func[:, (self.parent.reward_weights != 0).to(rewards_per_func.device)]
        return self._combine(rewards_per_func)[:, None] if instant is None else self._combine(instant)

    def measure(self, rewards_per_func: torch.Tensor) -> None:
        """The metrics of the rewards `(N, K)`, of all processes."""
        parent, rewards = self.parent, self._combine(rewards_per_func)
        self.metrics |= reward_metrics(rewards_per_func, rewards, parent.scorer.names)
        silent = [name for name in parent.scorer.names if self.metrics[f"rewards/{name}/frac_none"] == 1]
        if silent and self.is_first and parent.accelerator.is_main_process:
            whose = f"all {len(rewards)} images of the first sampling phase by {', '.join(silent)}"
            so = "nothing is trained" if rewards.isnan().all() else "they train nothing"
            advice = "Look at the columns and prompts that they need; rewards/{name}/frac_none is the share of Nones."
            logger.warning(f"None was returned for {whose}: {so} while that stays so. {advice}")
        flat = frac_zero_std(self.compared(rewards_per_func), parent.args.num_generations)
        self.metrics["frac_reward_zero_std"] = flat.item()
        for name in sorted(set(gather_object(list(self.logs.metrics)))):
            values = gather_object(self.logs.metrics.get(name, []))
            self.metrics[name] = sum(values) / len(values)
