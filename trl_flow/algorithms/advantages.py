"""From rewards to advantages, for every algorithm: several rewards, VGPO's values per step, SLAS's shaping."""

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from trl_flow.algorithms.base import PhaseScores
from trl_flow.functional import (
    adapt_power,
    combine_rewards,
    cumulative_values,
    dual_advantages,
    effective_sample_share,
    fill_missing,
    group_advantages,
    normalize_then_sum,
    super_linear,
    value_share,
)
from trl_flow.rewards.checks import RewardError


if TYPE_CHECKING:
    from trl_flow.trainer.flow_grpo_config import FlowGRPOConfig


class AdvantageEstimator:
    """Advantages as a config describes them, with weights `(K,)` of the reward functions."""

    def __init__(self, args: "FlowGRPOConfig", reward_weights: torch.Tensor):
        self.args, self.reward_weights = args, reward_weights
        self.power = AdaptivePower(args.target_kl) if args.advantage_power == "auto" else None

    def __call__(self, scores: PhaseScores) -> tuple[torch.Tensor, dict[str, float]]:
        """The advantages of all processes' samples, `(N,)`, or with `scores.instant` `(N, T)`, one for each of the
        steps, and their metrics. Raises `RewardError` if VGPO's weights have no meaning for a reward below 0."""
        advantages, stats = self._terminal(scores.rewards_per_func) if scores.instant is None else self._dense(scores)
        # Clamped first: the bound is the one that Corollary 1 of SLAS asks for
        advantages = advantages.clamp(-self.args.advantage_clip, self.args.advantage_clip)
        power = self.args.advantage_power
        if self.power is not None:
            power = stats["advantage_power"] = self.power.choose()
        shaped = super_linear(advantages, power)
        stats["advantage/effective_share"] = effective_sample_share(shaped).item()
        return shaped, stats

    def _terminal(self, rewards_per_func: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        weights, number = self.reward_weights.to(rewards_per_func.device), self.args.group_size
        if self.args.multi_objective_aggregation == "normalize_then_sum":
            return normalize_then_sum(rewards_per_func, weights, number), {}
        rewards = combine_rewards(rewards_per_func, weights)
        return group_advantages(rewards, number, scale_rewards=self.args.scale_rewards), {}

    def _dense(self, scores: PhaseScores) -> tuple[torch.Tensor, dict[str, float]]:
        number, scale = self.args.group_size, self.args.value_scale
        rewards = combine_rewards(scores.instant, self.reward_weights.to(scores.instant.device))
        self._check_sign(scores, rewards)
        values = cumulative_values(fill_missing(rewards, number), self.args.value_discount)
        scale = torch.tensor(scale, dtype=torch.float64)
        has_scale = self.args.has_value_scale
        share = {"advantage/value_share": value_share(values, number, scale=scale).item()} if has_scale else {}
        return dual_advantages(values, number, scale=scale), share

    def _check_sign(self, scores: PhaseScores, rewards: torch.Tensor) -> None:
        """VGPO's weights (Eq. 12) are shares of a sample's values, which must not be negative."""
        lowest = rewards.nan_to_num(0.0)
        if lowest.min() >= 0:
            return
        sample, step = divmod(int(lowest.argmin()), lowest.shape[1])
        weighted = scores.instant[sample, step] * self.reward_weights.to(rewards.device)
        parts = {name: value for name, value in zip(scores.names, weighted.tolist(), strict=True) if value < 0}
        # What a negative weight turns around needs an offset that is turned around, too
        positive = self.reward_weights[scores.names.index(next(iter(parts)))] > 0
        sign, offset = ("positive", "+") if positive else ("negative, as its weight is", "-")
        gave = " and ".join(f"the reward function {name!r} gave {value:g}" for name, value in parts.items())
        raise RewardError(
            f"With dense_rewards, VGPO's weights need rewards of one sign, but {gave} (weight included) for an "
            f"unfinished image. Add an offset that makes all its values {sign}, such as `lambda prompts, images, "
            f"**kwargs: [value {offset} 5 for value in reward(prompts=prompts, images=images, **kwargs)]`, or set "
            "dense_rewards=False."
        )


class AdaptivePower:
    """SLAS's power, adapted once a sampling phase so that the KL that an update causes stays at a target (the paper's
    Appendix E couples the two), by default at the first that is measured. The KL is that of the transitions to those
    of sampling, so that it is known from the second update of a phase on."""

    GAIN, MAX_POWER = 0.1, 2.0

    def __init__(self, target_kl: float | None):
        self._given_target = target_kl
        self.load_state_dict({})

    def observe(self, kl: torch.Tensor, num_updates: int) -> None:
        """Notes the KL `(B,)` of a micro-batch to the sampling policy, `num_updates` updates after sampling."""
        if num_updates == 1:
            self._own_sum += kl.detach().cpu().double().sum().item()
            self._own_count += len(kl)

    def gather(self) -> None:
        """After an update: adds what all processes have observed since the last call, so that all know the same."""
        for own_sum, own_count in gather_object([(self._own_sum, self._own_count)]):
            self._sum += own_sum
            self._count += own_count
        self._own_sum, self._own_count = 0.0, 0

    def choose(self) -> float:
        """The power of the phase that begins. Equal on all processes."""
        self.gather()
        kl = self._sum / self._count if self._count > 0 else 0.0
        if kl > 0:
            self.target_kl = kl if self.target_kl is None else self.target_kl
            self.power = adapt_power(self.power, kl, self.target_kl, gain=self.GAIN, max_power=self.MAX_POWER)
        self._sum, self._count = 0.0, 0
        return self.power

    def state_dict(self) -> dict[str, Any]:
        return {"power": self.power, "target_kl": self.target_kl, "sum": self._sum, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.power = state.get("power", 0.0)
        self.target_kl = state.get("target_kl") if self._given_target is None else self._given_target
        self._sum, self._count = state.get("sum", 0.0), state.get("count", 0)
        self._own_sum, self._own_count = 0.0, 0
