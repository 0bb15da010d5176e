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
    Decides when the amplified probe (`trl_flow.functional.probed_mean`) is run, and with which `k`.

    The difference between a log-ratio with the probe and without it is the rounding of the latter, and its root mean
    square the noise floor. With `"auto"` the probe is run in half precision where an adapter is trained, with the
    power of 2 that divides the floor to a quarter of the clip range. Elsewhere it is run once, half an update away, to
    measure the floor: on a longer way it would be the model's curvature.

    Args:
        given (`float` or `"auto"`): `k`; 0 for no probe.
        half_precision (`bool`): whether forwards are run in bfloat16 or float16.
        clip_range (`float`): the narrower one.
    """

    TOLERANCE = 0.25  # the share of the clip range that rounding may have
    FIRST_SCALE, MIN_SCALE, MAX_SCALE = 32.0, 8.0, 128.0
    MEASURING_SCALE = 0.5

    def __init__(self, given: float | Literal["auto"], *, half_precision: bool, clip_range: float):
        self._given, self._half_precision, self._clip_range = given, half_precision, clip_range
        self.load_state_dict({})

    def is_active(self, policy: "Policy") -> bool:
        """Whether the ratios are the probe's."""
        return self._half_precision and policy.can_probe if self._given == "auto" else self._given > 0

    def is_wanted(self, policy: "Policy") -> bool:
        """Whether it is run in updates whose ratios are not 1: for the ratios, or to measure the floor."""
        return self.is_active(policy) or (self.floor is None and policy.can_probe)

    def scale(self, policy: "Policy") -> float:
        """`k`."""
        if not self.is_active(policy):
            return self.MEASURING_SCALE
        return self._scale if self._given == "auto" else self._given

    def rounding(self, plain: torch.Tensor, probed: torch.Tensor, policy: "Policy") -> torch.Tensor:
        """That of log-ratios `(B,)` without the probe, by those with it, `(B,)`; what the floor is measured of."""
        rounding = (plain - probed).detach()
        if not self.is_active(policy):
            # With e the rounding of a forward: e(1) - e(0) - 2 (e(1/2) - e(0)), of a variance of 6 rather than 2
            rounding = rounding / 3**0.5
        self._squares = self._squares + rounding.square().sum()  # on the device, without waiting for it
        self._count += len(rounding)
        return rounding

    def after_update(self, policy: "Policy") -> dict[str, float]:
        """Where something was observed, measures the floor, and chooses `k` or warns. To be called on all processes;
        returns metrics."""
        if not self.is_wanted(policy):
            return {}
        squares, counts = map(sum, zip(*gather_object([(float(self._squares), self._count)]), strict=True))
        self._squares, self._count = 0.0, 0
        if squares == 0:  # an update whose ratios are 1, or one that moved nothing
            return {}
        self.floor = math.sqrt(squares / counts)
        if self.is_active(policy):
            used = self.scale(policy)
            wanted = 2.0 ** math.ceil(math.log2(self.floor / (self.TOLERANCE * self._clip_range)))
            self._scale = min(max(wanted, self.MIN_SCALE), self.MAX_SCALE)
            return {"ratio/probe_scale": used}
        if self.floor > self.TOLERANCE * self._clip_range:
            logger.warning(
                f"The noise floor of the importance ratio is {self.floor:.1e}, and the clip range "
                f"{self._clip_range:.1e}: clipping acts on the rounding of the forward rather than on what an update "
                "has changed. In this order: set ratio_probe='auto' (for an adapter in half precision) or "
                "ratio_probe=32, which divides the rounding; or train in float16 (fp16=True), which has an eighth of "
                "bfloat16's; or in float32, without TF32."
            )
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self._scale, "floor": self.floor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scale: float = state.get("scale", self.FIRST_SCALE)
        self.floor: float | None = state.get("floor")
        self._squares: float | torch.Tensor = 0.0
        self._count = 0
