"""VGPO's published recipe as defaults of [`FlowGRPOConfig`]."""

from dataclasses import dataclass

from trl_flow.trainer.flow_grpo_config import FlowGRPOConfig
from trl_flow.trainer.flow_rl_config import described


@described
@dataclass
class VGPOConfig(FlowGRPOConfig):
    """
    [`FlowGRPOConfig`] with VGPO's defaults: a reward for each step from the one-step projection (Eq. 9, 10),
    discounted values (Eq. 11), and advantages that keep a share of the absolute value (Eq. 14); one initial noise for
    each group (Algorithm 1).
    """

    dense_rewards: bool = True
    value_discount: float = 0.9
    value_scale: float = 0.05
    share_initial_noise: bool = True
