"""[`OldPolicy`]: a policy that follows the trained one slowly."""

import copy
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from trl_flow.trainer.policy import Policy


class OldPolicy:
    """A second set of an adapter's weights, or of a model whose weights are all trained a frozen copy, `module`; of
    sharded weights a second set either way."""

    def __init__(self, policy: "Policy"):
        self._policy, self._weights = policy, []
        copied = not policy.is_adapter and not policy.is_sharded
        self.module = copy.deepcopy(policy.module).requires_grad_(False).eval() if copied else None

    def weights(self) -> list[torch.Tensor]:
        """Of sharded ones this process's part; at first equal to the trained ones."""
        if self.module is not None:
            return [p.data for p in self.module.parameters()]
        if not self._weights:  # not before the model is wrapped, which is after this has been made
            self._weights = [own.to(torch.float32, copy=True) for own in self._policy.local_weights()]
        return self._weights

    @torch.no_grad()
    def move(self, decay: float) -> None:
        """Towards the trained policy: `old = decay old + (1 - decay) trained`."""
        for weights, own in zip(self.weights(), self._policy.local_weights(), strict=True):
            weights.lerp_(own.to(weights.dtype), 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """To be called on all processes: sharded weights are put together."""
        return self._policy.gathered("old", self.weights())

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what [`state_dict`] gave; of `{}` the trained weights as they are."""
        if self.module is not None and "old.0" not in state:
            self.module.load_state_dict(self._policy.module.state_dict())
        self._weights = []
        if "old.0" in state:
            for weights, saved in zip(self.weights(), self._policy.parts_of("old", state), strict=True):
                weights.copy_(saved)
