"""Configs and the trainer: the only stateful part of the package."""

from trl_flow.trainer.flow_grpo_config import FlowGRPOConfig
from trl_flow.trainer.flow_grpo_trainer import FlowGRPOTrainer
from trl_flow.trainer.flow_rl_config import FlowRLConfig
from trl_flow.trainer.flow_rl_trainer import FlowRLTrainer
from trl_flow.trainer.guard_config import GuardConfig
from trl_flow.trainer.over_optimization import OverOptimizationCallback
from trl_flow.trainer.slas_config import SLASConfig
from trl_flow.trainer.vgpo_config import VGPOConfig


__all__ = [
    "FlowGRPOConfig",
    "FlowGRPOTrainer",
    "FlowRLConfig",
    "FlowRLTrainer",
    "GuardConfig",
    "OverOptimizationCallback",
    "SLASConfig",
    "VGPOConfig",
]
