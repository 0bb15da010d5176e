"""VGPO's published recipe as defaults of [`FlowGRPOConfig`]."""

from dataclasses import dataclass, field

from trl_flow.trainer.flow_grpo_config import FlowGRPOConfig


@dataclass
class VGPOConfig(FlowGRPOConfig):
    """
    [`FlowGRPOConfig`] with VGPO's defaults: a reward for each step from the one-step projection (Eq. 9, 10),
    discounted values (Eq. 11), and advantages that keep a share of the absolute value (Eq. 14); one initial noise for
    each group (Algorithm 1).
    """

    dense_rewards: bool = field(default=True, metadata={"help": "VGPO's reward for each step."})
    value_discount: float = field(default=0.9, metadata={"help": "VGPO's discount gamma, in [0, 1)."})
    value_scale: float = field(default=0.05, metadata={"help": "VGPO's k; needs dense_rewards."})
    share_initial_noise: bool = field(default=True, metadata={"help": "One initial noise for the whole group."})
