"""GRPO-Guard's published recipe (arXiv 2510.22319) as defaults of [`FlowGRPOConfig`]."""

from dataclasses import dataclass
from typing import Literal

from trl_flow.trainer.flow_grpo_config import FlowGRPOConfig
from trl_flow.trainer.flow_rl_config import described


@described
@dataclass
class GuardConfig(FlowGRPOConfig):
    """
    [`FlowGRPOConfig`] with GRPO-Guard's defaults: the normalized ratio (RatioNorm, Eq. 8), the gradient reweighting of
    Eq. 12, advantages scaled by the group, a clip range of 2e-6 and a learning rate of 1e-4 (Stable Diffusion 3.5
    Medium; 2e-4 for FLUX.1-dev).

    The weight is `"inverse_dt"` for `sde_type="flow"` and `"cps"`. With `sde_type="dance"` it becomes
    `"inverse_beta_dt"`, whose weight cancels the factor `beta * dt` that the gradient of the transition's mean
    carries; the paper prints `"beta_over_dt"`, which can be set by hand. For U-Nets (Stable Diffusion 1, 2 and XL) all
    three are one over the factor with which the prediction enters the mean of the DDIM step, so that the gradient is
    the same at every step there, too.

    The clip range belongs to latents of 65,536 dimensions (512 x 512 images in Stable Diffusion 3.5) and is scaled to
    the model's own by `scale_epsilon`.
    """

    importance_ratio: Literal["standard", "mean_revised", "ratio_norm"] = "ratio_norm"
    timestep_weighting: Literal["none", "temp", "inverse_dt", "beta_over_dt", "inverse_beta_dt"] | None = None
    epsilon: float = 2e-6
    scale_rewards: Literal["group", "batch", "none"] = "group"
    learning_rate: float = 1e-4

    def __post_init__(self):
        if self.timestep_weighting is None:
            self.timestep_weighting = "inverse_beta_dt" if self.sde_type == "dance" else "inverse_dt"
        super().__post_init__()
