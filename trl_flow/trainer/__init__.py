"""Configs and trainers: the only stateful part of the package."""

from trl_flow.trainer.flow_grpo_config import FlowGRPOConfig, GuardConfig, SLASConfig, VGPOConfig
from trl_flow.trainer.flow_grpo_trainer import FlowGRPOTrainer
from trl_flow.trainer.flow_rl_config import FlowRLConfig
from trl_flow.trainer.flow_rl_trainer import FlowRLTrainer
from trl_flow.trainer.forward_process_config import AWMConfig, DiffusionNFTConfig
from trl_flow.trainer.forward_process_trainers import AWMTrainer, DiffusionNFTTrainer
from trl_flow.trainer.over_optimization import OverOptimizationCallback


__all__ = [
    "AWMConfig",
    "AWMTrainer",
    "DiffusionNFTConfig",
    "DiffusionNFTTrainer",
    "FlowGRPOConfig",
    "FlowGRPOTrainer",
    "FlowRLConfig",
    "FlowRLTrainer",
    "GuardConfig",
    "OverOptimizationCallback",
    "SLASConfig",
    "VGPOConfig",
]
