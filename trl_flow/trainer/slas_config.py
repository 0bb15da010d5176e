"""SLAS's published recipe as defaults of [`FlowGRPOConfig`]."""

from dataclasses import dataclass, field
from typing import Literal

from trl_flow.trainer.flow_grpo_config import FlowGRPOConfig


@dataclass
class SLASConfig(FlowGRPOConfig):
    """
    [`FlowGRPOConfig`] with the defaults of SLAS (super-linear advantage shaping): DanceGRPO's dynamics (constant
    diffusion of 0.3, one initial noise for each group, 0.6 of the steps trained), advantages scaled by the standard
    deviation of the whole batch and raised to the power `1 + advantage_power` (Eq. 20). On U-Nets (Stable Diffusion
    1.4 in the paper) the dynamics are DDIM's, and `noise_level` is its η.
    """

    sde_type: Literal["flow", "dance", "cps"] = field(default="dance", metadata={"help": "Dynamics while sampling."})
    noise_level: float = field(default=0.3, metadata={"help": "Strength of the noise (eta)."})
    timestep_fraction: float = field(default=0.6, metadata={"help": "Share of the stochastic steps that is trained."})
    share_initial_noise: bool = field(default=True, metadata={"help": "One initial noise for the whole group."})
    advantage_power: float | str | None = field(
        default=0.25, metadata={"help": "SLAS's gamma; 0 is linear, `auto` holds the KL per update at `target_kl`."}
    )
