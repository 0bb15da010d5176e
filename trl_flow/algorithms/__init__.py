"""What is learned from a sampled batch: one class for a family of methods, behind one interface."""

from trl_flow.algorithms.base import Algorithm, LossOutput, MicroBatch, PhaseScores, StepSums
from trl_flow.algorithms.policy_gradient import ClippedPolicyGradient
from trl_flow.rollout import StepPlan


__all__ = ["Algorithm", "ClippedPolicyGradient", "LossOutput", "MicroBatch", "PhaseScores", "StepPlan", "StepSums"]
