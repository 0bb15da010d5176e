"""[`OldPolicy`]: a policy that follows the trained one slowly."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


if TYPE_CHECKING:
    from trl_flow.trainer.policy import Policy


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor that may be sharded; what is written into it counts."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be sharded, put together. To be called on all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class OldPolicy:
    """A second set of an adapter's weights, or of a model whose weights are all trained a frozen copy, `module`."""

    def __init__(self, policy: "Policy"):
        self._policy, self._weights = policy, []
        self.module = None if policy.is_adapter else copy.deepcopy(policy.module).requires_grad_(False).eval()

    def weights(self) -> list[torch.Tensor]:
        """As the trained parameters are sharded or not; at first equal to them."""
        if self.module is not None:
            return list(self.module.parameters())
        if not self._weights:  # not before the model is wrapped, which is after this has been made
            self._weights = [p.detach().to(torch.float32, copy=True) for p in self._policy.whole_or_sharded()]
        return self._weights

    @torch.no_grad()
    def move(self, decay: float) -> None:
        """Towards the trained policy: `old = decay old + (1 - decay) trained`."""
        for weights, own in zip(map(local_part, self.weights()), self._policy.local_weights(), strict=True):
            weights.lerp_(own.to(weights.dtype), 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """To be called on all processes: sharded weights are put together."""
        return {f"old.{i}": whole(old.detach()) for i, old in enumerate(self.weights())}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what [`state_dict`] gave; of `{}` the trained weights as they are."""
        if self.module is not None and "old.0" not in state:
            self.module.load_state_dict(self._policy.module.state_dict())
        self._weights = []
        if "old.0" in state:
            for i, old in enumerate(self.weights()):
                saved = state[f"old.{i}"].to(old.device)
                if isinstance(old, DTensor):
                    saved = distribute_tensor(saved, old.device_mesh, old.placements)
                local_part(old).copy_(local_part(saved))
