"""What is learned from a sampled batch: one class for a family of methods, behind one interface."""

from trl_flow.algorithms.base import Algorithm, LossOutput, MicroBatch, PhaseScores, StepSums
from trl_flow.algorithms.forward_process import (
    AdvantageWeightedMatching,
    ForwardProcess,
    NegativeAwareFinetuning,
)
from trl_flow.algorithms.policy_gradient import ClippedPolicyGradient
from trl_flow.rollout import StepPlan


__all__ = [
    "AdvantageWeightedMatching",
    "Algorithm",
    "ClippedPolicyGradient",
    "ForwardProcess",
    "LossOutput",
    "MicroBatch",
    "NegativeAwareFinetuning",
    "PhaseScores",
    "StepPlan",
    "StepSums",
]
