"""The importance ratio with its rounding divided by a number: one further forward at amplified weights."""

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import gather_object
from transformers.utils import logging


if TYPE_CHECKING:
    from trl_flow.trainer.policy import Policy

logger = logging.get_logger(__name__)


class RatioProbe:
    """
    Estimates the mean of a transition from a forward at `theta_old + k (theta - theta_old)`.

    Two forwards of a network differ by rounding as soon as their weights do. That does not grow with the distance of
    the weights, what the update has changed does. So `mean_old + (mean_probe - mean_old) / k` is the updated mean with
    `1 / k` of the rounding, as long as the model is linear so far. In the first update whose ratios are not 1 by
    construction the rounding is measured: the root mean square of the difference between the log-ratio with the probe
    and without it is the noise floor of the latter. With `"auto"` the probe is used in half precision where an adapter
    is trained, and `k` then follows from the floor.

    Args:
        given (`float` or `"auto"`): `k`; 0 for no probe.
        half_precision (`bool`): whether forwards are run in bfloat16 or float16.
        clip_range (`float`): the narrower one, as a log-ratio.
    """

    FIRST_SCALE, MAX_SCALE = 32.0, 128.0
    # To measure the floor alone: a shorter way, on which the model is more nearly linear
    MEASURING_SCALE = 8.0
    # The share of the clip range that rounding may have
    TOLERANCE = 0.25

    def __init__(self, given: float | Literal["auto"], *, half_precision: bool, clip_range: float):
        self._given = given
        self._half_precision = half_precision
        self._clip_range = clip_range
        self.load_state_dict({})

    def is_active(self, policy: "Policy") -> bool:
        """Whether the ratios are the probe's."""
        if self._given == "auto":
            return self._half_precision and policy.can_probe
        return self._given > 0

    def is_wanted(self, policy: "Policy") -> bool:
        """Whether a further forward is run: for the ratios, or to measure the noise floor once."""
        return self.is_active(policy) or (self.floor is None and policy.can_probe)

    def scale(self, policy: "Policy") -> float:
        """`k`."""
        if not self.is_active(policy):
            return self.MEASURING_SCALE
        return self._scale if self._given == "auto" else self._given

    def observe(self, rounding: torch.Tensor) -> None:
        """Takes the difference `(B,)` between log-ratios without and with the probe."""
        if self.floor is None:
            self._squares += rounding.double().square().sum().item()
            self._count += len(rounding)

    def after_update(self, policy: "Policy") -> None:
        """After the first update in which something was observed: chooses `k`, or warns. On all processes."""
        if self.floor is not None:
            return
        squares, counts = zip(*gather_object([(self._squares, self._count)]), strict=True)
        if sum(counts) == 0:
            return
        self.floor = math.sqrt(sum(squares) / sum(counts))
        if self.is_active(policy):
            wanted = self.floor / (self.TOLERANCE * self._clip_range)
            self._scale = min(max(2.0 ** math.ceil(math.log2(max(wanted, 1.0))), self.MEASURING_SCALE), self.MAX_SCALE)
        elif self.floor > self.TOLERANCE * self._clip_range:
            logger.warning(
                f"The noise floor of the importance ratio is {self.floor:.1e}, and the clip range {self._clip_range:.1e}: "
                "clipping acts on the rounding of the forward, not on what the updates have changed. In this order: set "
                "ratio_probe='auto' (an adapter in half precision) or ratio_probe=32, which divides the rounding by 32 "
                "for one more forward in updates after the first of a sampling phase; train in float16 (fp16=True), "
                "which has 8 times less of it; or in float32 (bf16=False, fp16=False, without TF32)."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self._scale, "floor": self.floor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scale: float = state.get("scale", self.FIRST_SCALE)
        self.floor: float | None = state.get("floor")
        self._squares, self._count = 0.0, 0
