"""[`DiffusionNFTConfig`] and [`AWMConfig`]: the switches of learning on noised images."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from trl_flow.descriptions import described
from trl_flow.trainer.flow_rl_config import FlowRLConfig, derived


# Settings of the policy gradient that have no meaning where nothing is known of the steps of sampling
_TRANSITIONS = (
    *("sde_type", "noise_level", "train_last_step", "sde_window_size", "sde_window_range", "sde_window_schedule"),
    *("sde_window_interval", "sde_window_stride", "timestep_fraction", "timestep_fraction_per_sample", "ratio_probe"),
    "scale_epsilon",
)
_WHY = dict.fromkeys(_TRANSITIONS, "it is about stochastic steps of sampling, and here sampling follows the ODE")
_WHY |= dict.fromkeys(
    ("dense_rewards", "value_discount", "value_scale", "projection_vae"),
    "VGPO's values belong to the steps of a sampled trajectory, and here only the finished image is kept",
)
_WHY["importance_ratio"] = (
    "GRPO-Guard's ratio is that of Gaussian transitions, and here no transition has a probability"
)
_WHY |= dict.fromkeys(
    ("timestep_weighting", "epsilon", "epsilon_high"), "it is about a ratio of likelihoods, and here there are none"
)


@described
@dataclass
class ForwardProcessConfig(FlowRLConfig):
    r"""
    What [`DiffusionNFTConfig`] and [`AWMConfig`] share: [`FlowRLConfig`] and what follows. Images are sampled along
    the ODE; each is then noised to some levels, at which the model is trained.

    Other defaults than in [`FlowRLConfig`]: `guidance_scale` 1.0, as both papers train without guidance (Z-Image needs
    0.0 for none; FLUX.1-dev is told a scale, its own is 3.5), and one update for each sampling phase.

    Parameters:
        timestep_sampling (`str`, *optional*, defaults to `"schedule"`):
            Where the noise levels come from: `"schedule"`, the steps of the sampling schedule, each at most once for
            an image; `"uniform"`, anywhere between them, and `"logit_normal"`, mostly in the middle. The schedule's
            shift is in all of them.
        timesteps_per_sample (`int`, *optional*):
            Noise levels at which each image is trained on; `None`: all steps but one (AWM: 6 at most).
        timestep_range (`list[int]`, *optional*):
            `[first, end]`: the levels are those of the steps `first ... end - 1`, or between `first` and `end`.
            `None`: all.
        beta (`float`, *optional*):
            Coefficient of `mean((v - v_ref)^2)`, the KL towards the initial model but for a factor of the noise level.
            With `0.0` no reference forward is run.
        old_decay (`float`, *optional*):
            How much of itself the old policy keeps at the end of a sampling phase, in [0, 1], once it has grown to
            that; the rest is the trained one's.
        old_decay_rate (`float`, *optional*, defaults to `0.001`):
            By how much that share grows with each update, from 0.
        old_decay_start (`int`, *optional*, defaults to `0`):
            Updates before it begins to grow.
    """

    _DEFAULT_UPDATES = 1
    _MOST_TIMESTEPS = 1000  # by default

    guidance_scale: float = 1.0
    timestep_sampling: Literal["schedule", "uniform", "logit_normal"] = "schedule"
    timesteps_per_sample: int | None = None
    timestep_range: list[int] | None = None
    beta: float = 0.0
    old_decay: float = 0.5
    old_decay_rate: float = 0.001
    old_decay_start: int = 0

    @classmethod
    def why_not(cls, name: str) -> str | None:
        """Why a setting of `FlowGRPOConfig` is none of this config, if it is one."""
        return None if name in cls.__dataclass_fields__ else _WHY.get(name)

    def __new__(cls, *args: Any, **kwargs: Any):
        for name in kwargs:
            if why := cls.why_not(name):
                raise TypeError(f"{cls.__name__} has no {name}: {why}. Leave it out, or use FlowGRPOConfig.")
        return super().__new__(cls)

    def __post_init__(self):
        super().__post_init__()
        if self.advantage_power == "auto":
            what = "which follows the KL between transitions of sampling; here there are none"
            raise ValueError(f"advantage_power is 'auto', {what}. Set a number.")
        if self.share_initial_noise:
            what = "but sampling follows the ODE: all images of a group would be one and the same"
            raise ValueError(f"share_initial_noise is True, {what}. Set it to False.")
        if self.diagnostics_steps:
            what = "but an update's gradients are of noise levels that each image draws, not of steps"
            raise ValueError(f"diagnostics_steps is {self.diagnostics_steps}, {what}. Set it to 0.")
        for name in ("beta", "old_decay_rate", "old_decay_start"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        self._check("old_decay", 0 <= self.old_decay <= 1, "in [0, 1]")
        self._check_timesteps()

    @property
    def keeps_old(self) -> bool:
        """Whether there is an old policy."""
        return True

    def kept_weights(self, *, half_precision: bool, is_adapter: bool) -> dict[str, int]:
        # Of an adapter the trained weights are put aside, too, while others are in their place
        return {"weights of the old policy": 2 if is_adapter else 1} if self.keeps_old else {}

    def _check_timesteps(self) -> None:
        steps = self.num_inference_steps
        if self._given("timestep_range") is None:
            self.timestep_range = derived([0, steps])
        if isinstance(self.timestep_range, tuple):  # YAML gives a list
            self.timestep_range = list(self.timestep_range)
        pair = self.timestep_range
        ok = isinstance(pair, list) and len(pair) == 2 and all(type(step) is int for step in pair)
        ok = ok and 0 <= pair[0] < pair[1] <= steps
        self._check("timestep_range", ok, f"[first, end] with 0 <= first < end <= num_inference_steps ({steps})")
        number = pair[1] - pair[0]
        if self._given("timesteps_per_sample") is None:
            self.timesteps_per_sample = derived(max(1, min(number, steps - 1, self._MOST_TIMESTEPS)))
        most, wanted = math.inf, "at least 1"
        if self.timestep_sampling == "schedule":
            most, wanted = number, f"at least 1 and at most {number}, the steps that there are to draw from"
        self._check("timesteps_per_sample", 1 <= self.timesteps_per_sample <= most, wanted)


@described
@dataclass
class DiffusionNFTConfig(ForwardProcessConfig):
    """
    Configuration of [`DiffusionNFTTrainer`]: [`ForwardProcessConfig`] with the settings of the authors' released runs
    on Stable Diffusion 3.5 Medium, and what follows. Two or more updates with each phase's images can be made
    (`steps_per_generation`); the old policy moves after the last.

    Parameters:
        nft_beta (`float`, *optional*, defaults to `1.0`):
            How far the implicit positive and negative policies are from the old one (the paper's β), above 0. The
            smaller, the larger the step that is aimed at: 0.1 for OCR and several rewards.
        self_normalized (`bool`, *optional*, defaults to `True`):
            Whether the loss compares predicted and sampled latents, divided by their distance, rather than velocities.

    Example:

    ```pycon
    >>> from trl_flow import DiffusionNFTConfig
    >>> args = DiffusionNFTConfig("outputs/run", num_inference_steps=10, use_cpu=True)
    >>> args.guidance_scale, args.timesteps_per_sample
    (1.0, 9)
    ```
    """

    beta: float = 1e-4
    nft_beta: float = 1.0
    self_normalized: bool = True

    def __post_init__(self):
        super().__post_init__()
        self._check("nft_beta", self.nft_beta > 0, "above 0")


@described
@dataclass
class AWMConfig(ForwardProcessConfig):
    """
    Configuration of [`AWMTrainer`]: [`ForwardProcessConfig`] with the settings of the authors' released runs on Stable
    Diffusion 3.5 Medium (14 steps, 6 noise levels for each image), and what follows.

    Parameters:
        beta_old (`float`, *optional*, defaults to `1.0`):
            As `beta`, towards the old policy. With `0.0` there is none.
        timestep_weighting (`str`, *optional*, defaults to `"t"`):
            Weight of a noise level in the log-probability: `"t"`, the level itself, or `"none"`.
        huber_power (`float`, *optional*, defaults to `0.25`):
            The power of the squared error that stands for it, in (0, 1]: below 1 images that are far off count less.
        epsilon (`float`, *optional*, defaults to `1.0`):
            Clip range of the ratio, which is 1 in the first update of a sampling phase.
        epsilon_high (`float`, *optional*):
            Upper clip range; `None` means `epsilon`.

    Example:

    ```pycon
    >>> from trl_flow import AWMConfig
    >>> args = AWMConfig("outputs/run", num_inference_steps=10, use_cpu=True)
    >>> args.guidance_scale, args.timesteps_per_sample
    (1.0, 6)
    ```
    """

    _MOST_TIMESTEPS = 6

    num_inference_steps: int = 14
    beta: float = 0.003
    old_decay: float = 0.3
    beta_old: float = 1.0
    timestep_weighting: Literal["none", "t"] = "t"
    huber_power: float = 0.25
    epsilon: float = 1.0
    epsilon_high: float | None = None

    @property
    def keeps_old(self) -> bool:
        return self.beta_old > 0

    def kept_weights(self, *, half_precision: bool, is_adapter: bool) -> dict[str, int]:
        kept = super().kept_weights(half_precision=half_precision, is_adapter=is_adapter)
        if is_adapter and self.updates_per_generation > 1:
            kept["weights of sampling"] = 1 if self.keeps_old else 2  # with the trained ones, put aside
        return kept

    def __post_init__(self):
        super().__post_init__()
        self._check("beta_old", self.beta_old >= 0, "0 or more")
        self._check("huber_power", 0 < self.huber_power <= 1, "in (0, 1]")
        self._check("epsilon", self.epsilon > 0, "above 0")
        self._check("epsilon_high", self.epsilon_high is None or self.epsilon_high > 0, "above 0, or None")
