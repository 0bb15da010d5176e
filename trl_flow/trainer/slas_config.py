"""SLAS's published recipe as defaults of [`FlowGRPOConfig`]."""

from dataclasses import dataclass
from typing import Literal

from trl_flow.trainer.flow_grpo_config import FlowGRPOConfig
from trl_flow.trainer.flow_rl_config import described


@described
@dataclass
class SLASConfig(FlowGRPOConfig):
    """
    [`FlowGRPOConfig`] with the defaults of SLAS (super-linear advantage shaping): DanceGRPO's dynamics (constant
    diffusion of 0.3, one initial noise for each group, 0.6 of the steps trained), advantages scaled by the standard
    deviation of the whole batch and raised to the power `1 + advantage_power` (Eq. 20). On U-Nets (Stable Diffusion
    1.4 in the paper) the dynamics are DDIM's, and `noise_level` is its η.
    """

    sde_type: Literal["flow", "dance", "cps"] = "dance"
    noise_level: float = 0.3
    timestep_fraction: float = 0.6
    share_initial_noise: bool = True
    advantage_power: float | str | None = 0.25
