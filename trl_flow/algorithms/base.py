"""The interface between the training loop and what is learned."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from trl_flow.dynamics import Dynamics
from trl_flow.rollout import Rollout, StepPlan


if TYPE_CHECKING:
    from trl_flow.trainer.policy import Condition, Policy


@dataclass(frozen=True)
class MicroBatch:
    """
    `B` samples of one sampling phase: the input of one forward and backward pass for each unit.

    Attributes:
        prompts (`list[str]`): length `B`.
        steps (`tuple[int, ...]`): the kept steps, length `S`.
        tensors (`dict[str, torch.Tensor]`): what [`Algorithm.keep`] kept, each `(B, ...)`.
        advantages (`torch.Tensor`): what [`Algorithm.advantages`] returned for these samples, float32, `(B, ...)`.
        images (`list[PIL.Image.Image]` or `None`): the images that are edited, RGB, length `B`.
        samples (`tuple[int, ...]`): their indices among the samples of all processes, length `B`: what random numbers
            are drawn by, so that neither processes nor micro-batches change them.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.algorithms import MicroBatch
    >>> batch = MicroBatch(["a cat"], steps=(0,), tensors={"clean": torch.zeros(1, 4)}, advantages=torch.ones(1))
    >>> batch.tensors["clean"].shape
    torch.Size([1, 4])
    ```
    """

    prompts: list[str]
    steps: tuple[int, ...]
    tensors: dict[str, torch.Tensor]
    advantages: torch.Tensor
    images: list[Image.Image] | None = None
    samples: tuple[int, ...] = ()


@dataclass(frozen=True)
class PhaseScores:
    """
    The rewards of one sampling phase, for the `N` samples of all processes that are trained on. The images of a group
    are next to each other: `args.group_size` of them.

    Attributes:
        rewards_per_func (`torch.Tensor`): `(N, K)`, float32, NaN where a reward function does not apply.
        names (`list[str]`): of the `K` reward functions.
        plan ([`StepPlan`]): by which the samples were drawn.
        instant (`torch.Tensor` or `None`): with `plan.project`, rewards of the images that were predicted after each
            of the `T` steps, `(N, T, K)`, NaN as above; of the last step they are `rewards_per_func`.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.algorithms import PhaseScores, StepPlan
    >>> scores = PhaseScores(torch.tensor([[0.2], [0.9]]), names=["pickscore"], plan=StepPlan())
    >>> scores.rewards_per_func.mean()
    tensor(0.5500)
    ```
    """

    rewards_per_func: torch.Tensor
    names: list[str]
    plan: StepPlan
    instant: torch.Tensor | None = None

    def of(self, samples: torch.Tensor) -> "PhaseScores":
        """The scores of these samples, by their indices `(M,)`."""
        instant = None if self.instant is None else self.instant[samples]
        return replace(self, rewards_per_func=self.rewards_per_func[samples], instant=instant)

    def replaced(self, samples: list[int], others: "PhaseScores") -> "PhaseScores":
        """These scores with `others`, `(M, ...)`, in the places of the `M` samples."""
        rewards = self.rewards_per_func.clone()
        rewards[samples] = others.rewards_per_func
        instant = None if self.instant is None else self.instant.clone()
        if instant is not None:
            instant[samples] = others.instant
        return replace(self, rewards_per_func=rewards, instant=instant)


@dataclass(frozen=True)
class LossOutput:
    """A `loss` to minimize, `(B,)`; `stats` without gradients, which are summed over the samples for the metrics, each
    `(B,)`, or `(B, K)` for counts that only go to the run's own log; `regularization`, the part of the loss that is
    not the policy's, such as a KL, `(B,)`; and `counted`, if the samples' stats belong to several units: for each unit
    which samples count there, bool, `(B,)`.

    Example:

    ```pycon
    >>> import torch
    >>> from trl_flow.algorithms import LossOutput
    >>> loss, kl = torch.tensor([0.5, 0.3]), torch.tensor([0.1, 0.1])
    >>> output = LossOutput(loss, stats={"kl": kl}, regularization=kl)
    >>> output.policy_loss
    tensor([0.4000, 0.2000])
    ```
    """

    loss: torch.Tensor
    stats: dict[str, torch.Tensor] = field(default_factory=dict)
    regularization: torch.Tensor | None = None
    counted: dict[int, torch.Tensor] | None = None

    @property
    def policy_loss(self) -> torch.Tensor:
        """The loss without regularization, `(B,)`: the gradient norms of the steps are measured on it."""
        return self.loss if self.regularization is None else self.loss - self.regularization


class StepSums:
    """Sums of the samples' statistics: for each unit and name the number of values, their sum, and that of squares.

    Example:

    ```pycon
    >>> from trl_flow.algorithms import StepSums
    >>> sums = StepSums({0: {"kl": (2, 0.4, 0.1)}, 1: {"kl": (2, 0.8, 0.4)}})  # number, sum, sum of squares
    >>> round(sums.mean("kl"), 3), round(sums.mean("kl", unit=0), 3)
    (0.3, 0.2)
    ```
    """

    def __init__(self, sums: Mapping[int, Mapping[str, Sequence[float]]]):
        self._sums = sums

    @property
    def units(self) -> list[int]:
        return sorted(unit for unit, sums in self._sums.items() if any(count > 0 for count, *_ in sums.values()))

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for unit in self.units for name in self._sums[unit]))

    def _total(self, name: str, unit: int | None) -> tuple[float, float, float]:
        rows = [self._sums[u][name] for u in self.units if unit in (None, u) and name in self._sums[u]]
        return tuple(map(sum, zip(*rows, strict=True)))

    def mean(self, name: str, unit: int | None = None) -> float:
        """The mean over all samples of one unit, or of all units."""
        count, total, _ = self._total(name, unit)
        return total / count

    def std(self, name: str, unit: int | None = None) -> float:
        """The standard deviation (of the population) of the values that [`mean`] averages."""
        count, total, squares = self._total(name, unit)
        return max(squares / count - (total / count) ** 2, 0.0) ** 0.5

    def ratio_metrics(self) -> dict[str, float]:
        """Metrics from `functional.ratio_statistics`: the spread of the ratios, and the share that is clipped."""
        low, high = self.mean("low"), self.mean("high")
        metrics = {"ratio/mean": 1 + self.mean("deviation"), "ratio/std": self.std("deviation")}
        return metrics | {
            "clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high,
        }  # fmt: skip

    def units_of(self, name: str) -> list[int]:
        """The units that have values of this name."""
        return [unit for unit in self.units if self._sums[unit].get(name, [0])[0] > 0]

    def root_mean_square(self, name: str, unit: int | None = None) -> float:
        count, _, squares = self._total(name, unit)
        return (squares / count) ** 0.5


class Algorithm(ABC):
    """
    How a model learns from a sampled batch. The loop calls, in this order, [`plan`], [`keep`], [`advantages`], and
    [`loss`] for each unit of a micro-batch. A trainer says which one it uses: see `FlowRLTrainer.create_algorithm`.

    Attributes:
        dynamics ([`FlowDynamics`] or [`DDIMDynamics`]): what samples during training; the constructor sets it.
        needs_reference (`bool`): whether the loss asks for `policy.at("reference")`.
        needs_old (`bool`): whether it asks for `policy.at("old")`, which it moves by `policy.old.move`.
        sampled_by (`str`): the weights that sample, as a name for `policy.at`.

    Example:

    ```pycon
    >>> from trl_flow.algorithms import Algorithm, LossOutput, StepPlan
    >>> class BestOnly(Algorithm):  # learns only from images above the mean
    ...     def plan(self, generation):
    ...         return StepPlan()
    ...
    ...     def keep(self, rollout):
    ...         return {"clean": rollout.final}
    ...
    ...     def advantages(self, scores):
    ...         rewards = scores.rewards_per_func.nansum(dim=1)
    ...         return (rewards > rewards.mean()).float(), {}
    ...
    ...     def loss(self, policy, batch, unit, condition):
    ...         return LossOutput(batch.advantages * 0.0)
    ...
    >>> BestOnly().plan(generation=0).kept
    ()
    ```
    """

    dynamics: Dynamics
    needs_reference: bool = False
    needs_old: bool = False
    sampled_by: str = "trained"

    @abstractmethod
    def plan(self, generation: int) -> StepPlan:
        """The steps of sampling phase number `generation`. Must be equal on all processes."""

    @abstractmethod
    def keep(self, rollout: Rollout) -> dict[str, torch.Tensor]:
        """The parts of a rollout of `B` samples that training needs: names and tensors `(B, ...)`."""

    @abstractmethod
    def advantages(self, scores: PhaseScores) -> tuple[torch.Tensor, dict[str, float]]:
        """The advantages of all processes' samples, `(N,)` or `(N, S)`, and metrics. Equal on all processes."""

    def units(self, batch: MicroBatch) -> Sequence[int]:
        """The parts of `batch` that get a forward and backward pass each; by default every kept step."""
        return batch.steps

    @abstractmethod
    def loss(self, policy: "Policy", batch: MicroBatch, unit: int, condition: "Condition") -> LossOutput:
        """The loss of one unit. `policy.predict` runs the model, `policy.at("reference")` the one before training."""

    def needs_sampling_weights(self, policy: "Policy") -> bool:
        """Whether the losses of the phase that begins ask for `policy.at("probe", scale)`."""
        return False

    def after_update(self, policy: "Policy") -> dict[str, float]:
        """Called after each optimizer step; returns metrics."""
        return {}

    def summarize(self, sums: StepSums) -> dict[str, float]:
        """Metrics from the sums of the losses' `stats`; by default the mean for each name."""
        return {name: sums.mean(name) for name in sums.names}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: JSON values and tensors by name."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what [`state_dict`] returned; `{}` when training starts from the beginning."""
        return
