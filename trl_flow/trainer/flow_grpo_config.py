"""[`FlowGRPOConfig`]: the switches of the clipped policy gradient. The presets below it only change defaults."""

from dataclasses import dataclass
from typing import Literal

from trl_flow.trainer.flow_rl_config import FlowRLConfig, described


@described
@dataclass
class FlowGRPOConfig(FlowRLConfig):
    r"""
    Configuration of [`FlowGRPOTrainer`]: [`FlowRLConfig`] and what follows.

    Parameters:
        sde_type (`str`, *optional*, defaults to `"flow"`):
            `"flow"` (Flow-GRPO), `"dance"` (DanceGRPO: constant diffusion) or `"cps"` (coefficients-preserving
            sampling, whose last step is deterministic and not trained). These are for flow models: U-Nets that predict
            noise (Stable Diffusion 1, 2 and XL) always have the stochastic transitions of DDIM, whatever is set here.
        noise_level (`float`, *optional*, defaults to `0.7`):
            Strength of the noise, η. For U-Nets it is DDIM's η, in (0, 1]; DDPO and DanceGRPO have 1 there.
        sde_window_size (`int`, *optional*):
            Number of consecutive steps that are stochastic and trained, the rest being ODE steps. `None`: all.
        sde_window_range (`list[int]`, *optional*):
            `[first, end]`: the window lies in steps `first ... end - 1`. `None`: anywhere.
        sde_window_schedule (`str`, *optional*, defaults to `"random"`):
            Where in that range the window begins: `"random"`, drawn anew for each generation batch (Flow-GRPO-Fast),
            or `"progressive"`, from the noisiest steps on to the last, where it stays (MixGRPO).
        sde_window_interval (`int`, *optional*):
            Generation batches after which a progressive window moves on; `None`: 25 (MixGRPO's shift interval).
        sde_window_stride (`int`, *optional*):
            Steps by which a progressive window moves; `None`: 1.
        timestep_fraction (`float`, *optional*, defaults to `1.0`):
            Share of the stochastic steps that are trained, drawn anew for each generation batch, in (0, 1].

        importance_ratio (`str`, *optional*, defaults to `"standard"`):
            `"standard"`, `"mean_revised"` or `"ratio_norm"` (GRPO-Guard, Eq. 8).
        timestep_weighting (`str`, *optional*, defaults to `"none"`):
            `"none"`, `"temp"` (the transition's standard deviation), `"inverse_dt"` (GRPO-Guard, Eq. 12),
            `"beta_over_dt"` or `"inverse_beta_dt"` (for `sde_type="dance"`). For U-Nets the last three are the same:
            one over the factor with which the prediction enters the mean of the DDIM step.
        epsilon (`float`, *optional*, defaults to `1e-4`):
            Clip range. Log-probabilities are means over the latent's dimensions, so it is far smaller than for text.
        epsilon_high (`float`, *optional*):
            Upper clip range; `None` means `epsilon`.
        scale_epsilon (`bool`, *optional*, defaults to `True`):
            Whether the clip ranges are for latents of 65,536 dimensions, as in the papers (512 x 512 images in Stable
            Diffusion 3.5), and are multiplied by `sqrt(65536 / D)` for latents of `D`, whose means spread that more.
        beta (`float`, *optional*, defaults to `0.0`):
            KL coefficient towards the initial model. With `0.0` no reference forward is run. The KL of flow models is
            Flow-GRPO's, in units of the diffusion coefficient; that of U-Nets is the KL of the two Gaussians.

        dense_rewards (`bool`, *optional*, defaults to `False`):
            VGPO's reward for each step, from the one-step projection to the image. A reward function with an attribute
            `dense = False` cannot score unfinished images, and counts with its reward of the finished one.
        value_discount (`float`, *optional*, defaults to `0.9`):
            VGPO's discount, in [0, 1).
        value_scale (`float`, *optional*, defaults to `0.0`):
            VGPO's k: share of the absolute value in the advantage. Needs `dense_rewards`.
    """

    sde_type: Literal["flow", "dance", "cps"] = "flow"
    noise_level: float = 0.7
    sde_window_size: int | None = None
    sde_window_range: list[int] | None = None
    sde_window_schedule: Literal["random", "progressive"] = "random"
    sde_window_interval: int | None = None
    sde_window_stride: int | None = None
    timestep_fraction: float = 1.0
    importance_ratio: Literal["standard", "mean_revised", "ratio_norm"] = "standard"
    timestep_weighting: Literal["none", "temp", "inverse_dt", "beta_over_dt", "inverse_beta_dt"] = "none"
    epsilon: float = 1e-4
    epsilon_high: float | None = None
    scale_epsilon: bool = True
    beta: float = 0.0
    dense_rewards: bool = False
    value_discount: float = 0.9
    value_scale: float = 0.0

    def __post_init__(self):
        if isinstance(self.sde_window_range, tuple):  # YAML gives a list
            self.sde_window_range = list(self.sde_window_range)
        super().__post_init__()
        noise = "above 0: without noise there is no log-probability to train on (evaluation always follows the ODE)"
        self._check("noise_level", self.noise_level > 0, noise)
        if self.sde_type == "cps":
            self._check("noise_level", self.noise_level <= 1, "at most 1 for sde_type='cps'")
        self._check("timestep_fraction", 0 < self.timestep_fraction <= 1, "in (0, 1]")
        self._check("epsilon", self.epsilon > 0, "above 0")
        self._check("epsilon_high", self.epsilon_high is None or self.epsilon_high > 0, "above 0, or None")
        self._check("beta", self.beta >= 0, "0 or more")
        self._check("value_discount", 0 <= self.value_discount < 1, "in [0, 1)")
        self._check("value_scale", self.value_scale >= 0, "0 or more")
        self._check_combinations()
        self._check_window()

    @property
    def num_stochastic_steps(self) -> int:
        """Steps that can be stochastic: all, but for the last of CPS, which is deterministic."""
        return self.num_inference_steps - (1 if self.sde_type == "cps" else 0)

    def _check_combinations(self) -> None:
        if self.value_scale > 0 and not self.dense_rewards:
            unused = f"value_scale is {self.value_scale}, but dense_rewards is False: there are no values to scale."
            raise ValueError(f"{unused} Set dense_rewards=True, or value_scale=0.")
        if self.timestep_weighting in ("beta_over_dt", "inverse_beta_dt") and self.sde_type != "dance":
            raise ValueError(
                f"timestep_weighting={self.timestep_weighting!r} needs the beta of Dance-SDE, but sde_type is "
                f"{self.sde_type!r}. Use timestep_weighting='inverse_dt', or sde_type='dance'."
            )
        if self.multi_objective_aggregation == "normalize_then_sum" and self.dense_rewards:
            raise ValueError(
                "multi_objective_aggregation is 'normalize_then_sum', but dense_rewards is True. VGPO weights steps "
                "by their share of the value (Eq. 12), which rewards normalized around 0 do not have. Use "
                "multi_objective_aggregation='sum_then_normalize', or dense_rewards=False."
            )

    def _check_window(self) -> None:
        if self.num_stochastic_steps < 1:
            why = "the last step of sde_type='cps' is deterministic: no step is left to train. Use at least 2 steps."
            raise ValueError(f"num_inference_steps is {self.num_inference_steps}, and {why}")
        for name, default in (("sde_window_interval", 25), ("sde_window_stride", 1)):
            value = getattr(self, name)
            if self.sde_window_schedule == "progressive":
                setattr(self, name, default if value is None else value)
                self._check(name, getattr(self, name) >= 1, "at least 1")
            elif value is not None:
                why = f"sde_window_schedule is {self.sde_window_schedule!r}: only a progressive window moves on"
                raise ValueError(f"{name} is {value}, but {why}. Set 'progressive', or leave {name} out.")
        if self.sde_window_size is None:
            if self.sde_window_range is not None or self.sde_window_schedule == "progressive":
                raise ValueError(
                    f"sde_window_range is {self.sde_window_range} and sde_window_schedule {self.sde_window_schedule!r}"
                    ", but sde_window_size is not set: there is no window. Set it, or leave the others out."
                )
            return
        if self.sde_window_range is None:
            self.sde_window_range = [0, self.num_stochastic_steps]
        steps = self.sde_window_range
        pair = isinstance(steps, list) and len(steps) == 2 and all(isinstance(step, int) for step in steps)
        self._check("sde_window_range", pair, "two whole numbers: [first, end]")
        first, end = steps
        if not 0 <= first < end <= self.num_stochastic_steps:
            raise ValueError(
                f"sde_window_range is {steps}, but must be [first, end] with 0 <= first < end <= "
                f"{self.num_stochastic_steps}, the number of steps that can be trained of num_inference_steps "
                f"({self.num_inference_steps}) with sde_type={self.sde_type!r}."
            )
        if not 1 <= self.sde_window_size <= end - first:
            wanted = f"must be at least 1 and fit into sde_window_range {steps}, which has {end - first}"
            raise ValueError(f"sde_window_size is {self.sde_window_size}, but {wanted}.")


@described
@dataclass
class GuardConfig(FlowGRPOConfig):
    """
    [`FlowGRPOConfig`] with GRPO-Guard's defaults: the normalized ratio (RatioNorm, Eq. 8), the gradient reweighting of
    Eq. 12, advantages scaled by the group, a clip range of 2e-6 and a learning rate of 1e-4 (Stable Diffusion 3.5
    Medium; 2e-4 for FLUX.1-dev).

    The weight is `"inverse_dt"` for `sde_type="flow"` and `"cps"`, and `"inverse_beta_dt"` for `"dance"`, where it
    cancels the factor `beta * dt` in the gradient of the transition's mean; the paper prints `"beta_over_dt"`, which
    can be set by hand. For U-Nets (Stable Diffusion 1, 2 and XL) all three are the same. The clip range belongs to
    latents of 65,536 dimensions and is scaled to the model's own by `scale_epsilon`.
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
