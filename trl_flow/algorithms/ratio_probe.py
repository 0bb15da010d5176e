"""The importance ratio with its rounding divided by a number: further forwards at amplified weights."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import gather_object
from transformers.utils import logging

from trl_flow.functional import best_probe_scale, probe_error, rounding_and_curvature
from trl_flow.functional.guard import NEAR_VARIANCE


if TYPE_CHECKING:
    from trl_flow.trainer.policy import Policy

logger = logging.get_logger(__name__)


class RatioProbe:
    """
    Decides when the amplified probe (`trl_flow.functional.probed_mean`) is run, and with which `k`.

    With `"auto"` it is run in half precision where an adapter is trained, with the `k` whose rounding and curvature
    together are least. In the first update with ratios other than 1 of the phases 1, 2, 4, 8 ... both are measured,
    probe or not, by two or four more forwards.

    Args:
        given (`float` or `"auto"`): `k`; 0 for no probe.
        half_precision (`bool`): whether forwards are run in bfloat16 or float16.
        clip_range (`float`): the narrower one.
    """

    # What of the clip range the error may be, without the probe and with it, which has done what can be done
    TOLERANCE, PROBED_TOLERANCE = 0.25, 2.0
    FIRST_SCALE = 32.0
    # Where rounding and curvature are measured; the latter is of use for choosing `k` alone
    NEAR, FAR = (0.5, 2.0), (64.0, 128.0)

    def __init__(self, given: float | Literal["auto"], *, half_precision: bool, clip_range: float):
        self._given, self._half_precision, self._clip_range = given, half_precision, clip_range
        self.load_state_dict({})

    def is_active(self, policy: "Policy") -> bool:
        """Whether the ratios are the probe's."""
        return self._half_precision and policy.is_adapter if self._given == "auto" else self._given > 0

    def measures(self, policy: "Policy") -> bool:
        """Whether rounding is measured in this phase."""
        number = policy.generation + 1
        return number & (number - 1) == 0

    @property
    def _scale(self) -> float:
        """`k` of the first update after sampling, with `"auto"`."""
        return self.FIRST_SCALE if self.variance is None else best_probe_scale(self.variance, self._curvature)

    def scale(self, policy: "Policy") -> float | None:
        """`k` of this update; `None` if its ratios are those of the ordinary forward."""
        if not self.is_active(policy):
            return None
        # As far from the weights that sampled, whatever the number of updates since
        k = self._scale / policy.updates_since_sampling if self._given == "auto" else self._given
        return k if k > 1 else None

    def scales(self, policy: "Policy") -> list[float]:
        """Of all forwards of this update besides the ordinary one."""
        own = self.scale(policy)
        scales = [] if own is None else [own]
        if self.measures(policy) and policy.updates_since_sampling == 1:
            scales += [k for k in self.NEAR + (self.FAR if self.is_active(policy) else ()) if k not in scales]
        return scales

    def observe(self, plain: torch.Tensor, probed: Mapping[float, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Takes log-ratios `(B,)` without the probe and with it, by its `k`; returns statistics of the samples."""
        if not probed.keys() >= set(self.NEAR):
            return {}
        (half, double), (farther, farthest) = self.NEAR, self.FAR
        near = (probed[double] - 3 * plain + 2 * probed[half]).detach()
        far = (probed[farthest] - probed[farther]).detach() if farthest in probed else torch.zeros_like(near)
        self._sums = self._sums + torch.stack([near, far]).square().sum(dim=1)
        self._count += len(plain)
        return {"rounding": near * (2 / NEAR_VARIANCE) ** 0.5}  # of the variance that a log-ratio's rounding has

    def after_update(self, policy: "Policy") -> dict[str, float]:
        """Measures what was observed, chooses `k`, and warns. To be called on all processes; returns metrics."""
        used = self.scale(policy) if policy.updates_since_sampling > 0 else None
        stats = {} if used is None else {"ratio/probe_scale": used}
        if self._count == 0:
            return stats
        own = [*self._sums.tolist(), self._count]
        near, far, count = map(sum, zip(*gather_object([own]), strict=True))
        self._sums, self._count = torch.zeros(()), 0
        if math.isfinite(near + far) and near > 0:  # else training has diverged, or nothing has moved
            scale = self.FAR[-1]
            self.variance, self._curvature = rounding_and_curvature(near / count, far / count, scale=scale)
            stats["ratio/noise_floor"] = math.sqrt(2 * self.variance)
            self._warn(self.scale(policy))
        return stats

    def _warn(self, scale: float | None) -> None:
        # Of float32 itself there is too little: what is found where an update is large is the model's curvature
        is_rounded = self._half_precision or torch.get_float32_matmul_precision() != "highest"
        error = probe_error(scale or 1.0, self.variance, self._curvature if scale else 0.0)
        tolerance = self.TOLERANCE if scale is None else self.PROBED_TOLERANCE
        if self._has_warned or not is_rounded or error <= tolerance * self._clip_range:
            return
        self._has_warned = True
        floor = f"The noise floor of the importance ratio is {math.sqrt(2 * self.variance):.1e}"
        probe = "" if scale is None else f", with ratio_probe={scale:g} the error is still {error:.1e}"
        logger.warning(
            f"{floor}{probe}, and the clip range is {self._clip_range:.1e}: clipping acts on the rounding of the "
            "forward rather than on what an update has changed. In this order: set ratio_probe='auto' (for an adapter "
            "in half precision) or a number such as ratio_probe=32; or train in float16 (fp16=True), which has an "
            "eighth of bfloat16's rounding; or in float32, without TF32."
        )

    def _settings(self) -> list:
        return [self._given, self._half_precision]

    def state_dict(self) -> dict[str, Any]:
        own = {"variance": self.variance, "curvature": self._curvature, "has_warned": self._has_warned}
        return own | {"settings": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("settings") != self._settings():  # in another precision there is another rounding
            state = {}
        self.variance: float | None = state.get("variance")
        self._curvature: float = state.get("curvature", 0.0)
        self._has_warned: bool = state.get("has_warned", False)
        self._sums, self._count = torch.zeros(()), 0
