"""[`FlowGRPOConfig`]: the switches of the clipped policy gradient. The presets below it only change defaults."""

import contextlib
import json
import math
from dataclasses import dataclass
from typing import Literal

from transformers.utils import is_torch_bf16_gpu_available

from trl_flow.descriptions import described
from trl_flow.trainer.flow_rl_config import FlowRLConfig, derived


TimestepWeighting = Literal["none", "temp", "inverse_dt", "beta_over_dt", "inverse_beta_dt", "inverse_gain"]


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
            Strength of the noise, η. For U-Nets it is DDIM's η, in (0, 1]; DDPO and DanceGRPO use 1 there.
        train_last_step (`bool`, *optional*, defaults to `False`):
            Whether the last step, which ends at no noise, is stochastic and trained; else it is an ODE step. No
            released run trains it: its noise is invisible in the image, so its advantage is noise.
        sde_window_size (`int`, *optional*):
            Number of consecutive steps that are stochastic and trained, the rest being ODE steps. `None`: all that can
            be trained.
        sde_window_range (`list[int]`, *optional*):
            `[first, end]`: the window lies in steps `first ... end - 1`. `None`: anywhere.
        sde_window_schedule (`str`, *optional*, defaults to `"random"`):
            Where in that range the window begins: `"random"`, drawn again for each generation batch (Flow-GRPO-Fast),
            or `"progressive"`, moving from the noisiest steps to the last, where it stays (MixGRPO).
        sde_window_interval (`int`, *optional*):
            Generation batches after which a progressive window moves on; `None`: 25 (MixGRPO's shift interval).
        sde_window_stride (`int`, *optional*):
            Steps by which a progressive window moves; `None`: 1.
        timestep_fraction (`float`, *optional*, defaults to `1.0`):
            Share of the stochastic steps that are trained, in (0, 1], rounded down to whole steps, at least one, drawn
            again for each generation batch.
        timestep_fraction_per_sample (`bool`, *optional*, defaults to `False`):
            Whether each sample draws its own steps of this share (DanceGRPO).

        importance_ratio (`str`, *optional*, defaults to `"standard"`):
            `"standard"`, `"mean_revised"` or `"ratio_norm"` (GRPO-Guard, Eq. 8).
        timestep_weighting (`str`, *optional*, defaults to `"none"`):
            `"none"`, `"temp"` (the transition's standard deviation), `"inverse_dt"` (GRPO-Guard, Eq. 12),
            `"beta_over_dt"` (GRPO-Guard for `sde_type="dance"`), `"inverse_beta_dt"` (for `"dance"`), or
            `"inverse_gain"`: one over the factor by which the prediction enters the transition's mean, whatever the
            dynamics. For U-Nets the last four are the same:
            one over the factor with which the prediction enters the mean of the DDIM step.
        epsilon (`float`, *optional*, defaults to `1e-4`):
            Clip range. Log-probabilities are means over the latent's dimensions, so it is far smaller than for text.
        epsilon_high (`float`, *optional*):
            Upper clip range; `None` means `epsilon`.
        scale_epsilon (`bool`, *optional*, defaults to `True`):
            Whether the clip ranges are for latents of 65,536 dimensions, as in the papers (512 x 512 images in Stable
            Diffusion 3.5), and are multiplied by `sqrt(65536 / D)` for latents of `D`, whose means spread that more.
        ratio_probe (`float` or `"auto"`, *optional*, defaults to `"auto"`):
            Divides the rounding in the importance ratio by this number, for one more forward of the trained steps in
            each update but the first of a sampling phase: clipping acts on the ratio, and in half precision two
            forwards differ by more than a clip range of 2e-6. `"auto"`: for an adapter in half precision the number is
            chosen from measurements; 0: never. With full fine-tuning a number keeps two more copies
            of the weights in the host's memory.
        beta (`float`, *optional*, defaults to `0.0`):
            KL coefficient towards the initial model (or the base, see `reference`). With `0.0` no reference forward is
            run. The KL of flow models is Flow-GRPO's, in units of the diffusion coefficient; that of U-Nets is the KL
            of the two Gaussians.

        dense_rewards (`bool`, *optional*, defaults to `False`):
            VGPO's reward for each step, from the one-step projection to the image. A reward function with an attribute
            `dense = False` cannot score unfinished images, and counts with its reward of the finished one.
        value_discount (`float`, *optional*, defaults to `0.9`):
            VGPO's discount, in [0, 1).
        value_scale (`float` or `list[float]`, *optional*, defaults to `0.0`):
            VGPO's k: share of the absolute value in the advantage, or a list with one for each of the
            `num_inference_steps`. Needs `dense_rewards`.
        projection_vae (`str` or `torch.nn.Module`, *optional*):
            What decodes the unfinished images of `dense_rewards`, which are only scored: hub id, folder or module of
            a [`~diffusers.AutoencoderTiny`], such as `madebyollin/taesd3` for SD3 and `madebyollin/taef1` for FLUX;
            or a module of the class of the pipeline's VAE; in commands also `bundled`, that of the bundled model. By
            default the pipeline's VAE.

    Example:

    ```pycon
    >>> from trl_flow import FlowGRPOConfig
    >>> args = FlowGRPOConfig("outputs/run", num_inference_steps=10, sde_window_size=2, use_cpu=True)
    >>> args.sde_window_range  # the last step is not trained
    [0, 9]
    ```
    """

    sde_type: Literal["flow", "dance", "cps"] = "flow"
    noise_level: float = 0.7
    train_last_step: bool = False
    sde_window_size: int | None = None
    sde_window_range: list[int] | None = None
    sde_window_schedule: Literal["random", "progressive"] = "random"
    sde_window_interval: int | None = None
    sde_window_stride: int | None = None
    timestep_fraction: float = 1.0
    timestep_fraction_per_sample: bool = False
    importance_ratio: Literal["standard", "mean_revised", "ratio_norm"] = "standard"
    timestep_weighting: TimestepWeighting = "none"
    epsilon: float = 1e-4
    epsilon_high: float | None = None
    scale_epsilon: bool = True
    ratio_probe: float | str | None = "auto"  # as advantage_power
    beta: float = 0.0
    dense_rewards: bool = False
    value_discount: float = 0.9
    value_scale: float | str | list[float] | None = 0.0  # as advantage_power
    projection_vae: str | None = None

    def __post_init__(self):
        self._read_number("ratio_probe")
        ok = self.ratio_probe == "auto" or self.ratio_probe == 0 or 1 < self.ratio_probe < math.inf
        self._check("ratio_probe", ok, "'auto', 0 for none, or a number above 1")
        if self.importance_ratio == "ratio_norm" and self.ratio_probe == 0 and self.bf16 is None and not self.fp16:
            self.fp16 = is_torch_bf16_gpu_available()  # it has 8 times less rounding
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
        self._check_value_scale()
        self._check_combinations()
        self._check_window()

    @property
    def num_stochastic_steps(self) -> int:
        """Steps that can be stochastic: all but the last, unless it is trained."""
        return self.num_inference_steps - (0 if self.train_last_step else 1)

    def num_trained_steps(self, num_stochastic: int) -> int:
        """How many of the stochastic steps each sample is trained on."""
        return max(1, math.floor(self.timestep_fraction * num_stochastic + 1e-9))

    @property
    def num_kept_latents(self) -> int:
        """Those before and after each trained step, and the mean in between."""
        return 3 * self.num_trained_steps(self.sde_window_size or self.num_stochastic_steps)

    def kept_weights(self, *, half_precision: bool, is_adapter: bool) -> dict[str, int]:
        on = half_precision if self.ratio_probe == "auto" else self.ratio_probe
        probes = on and is_adapter and self.updates_per_generation > 1
        return {"weights of the ratio's probe": 2} if probes else {}

    def _check_value_scale(self) -> None:
        """A number, or a list with one for each step; command lines give text."""
        if isinstance(self.value_scale, str):
            with contextlib.suppress(ValueError):
                self.value_scale = json.loads(self.value_scale)
        is_list = isinstance(self.value_scale, list | tuple)
        numbers = list(self.value_scale) if is_list else [self.value_scale]
        ok = all(isinstance(k, int | float) and not isinstance(k, bool) and 0 <= k < math.inf for k in numbers)
        wanted = f"0 or more, or a list of such numbers with one for each of the {self.num_inference_steps} steps"
        self._check("value_scale", ok and (not is_list or len(numbers) == self.num_inference_steps), wanted)

    @property
    def has_value_scale(self) -> bool:
        return self.value_scale > 0 if isinstance(self.value_scale, int | float) else any(self.value_scale)

    def _check_combinations(self) -> None:
        if self.train_last_step and self.sde_type == "cps":
            why = "but the last step of sde_type='cps' adds no noise, and cannot be trained. Leave it out."
            raise ValueError(f"train_last_step is True, {why}")
        if self.has_value_scale and not self.dense_rewards:
            unused = f"value_scale is {self.value_scale}, but dense_rewards is False: there are no values to scale."
            raise ValueError(f"{unused} Set dense_rewards=True, or value_scale=0.")
        if self.projection_vae is not None and not self.dense_rewards:
            raise ValueError(
                "projection_vae is set, but dense_rewards is False: no unfinished image is decoded. Set "
                "dense_rewards=True, or leave projection_vae out."
            )
        if self.dynamic_sample and self.has_value_scale:
            flat = "gives groups without spread an advantage, too: they are not in vain"
            raise ValueError(
                f"dynamic_sample is True, but value_scale={self.value_scale} {flat}. Set value_scale=0, or "
                "dynamic_sample=False."
            )
        if self.timestep_weighting in ("beta_over_dt", "inverse_beta_dt") and self.sde_type != "dance":
            raise ValueError(
                f"timestep_weighting={self.timestep_weighting!r} needs the beta of Dance-SDE, but sde_type is "
                f"{self.sde_type!r}. Use timestep_weighting='inverse_gain', or sde_type='dance'."
            )
        if self.timestep_fraction_per_sample and self.timestep_fraction < 1 and self.diagnostics_steps > 0:
            why = (
                "but with timestep_fraction_per_sample a gradient is of several steps. Set one of them to 0 or False."
            )
            raise ValueError(f"diagnostics_steps is {self.diagnostics_steps}, {why}")
        if self.multi_objective_aggregation == "normalize_then_sum" and self.dense_rewards:
            raise ValueError(
                "multi_objective_aggregation is 'normalize_then_sum', but dense_rewards is True. VGPO weights steps "
                "by their share of the value (Eq. 12), which rewards normalized around 0 do not have. Use "
                "multi_objective_aggregation='sum_then_normalize', or dense_rewards=False."
            )

    def _check_window(self) -> None:
        if self.num_stochastic_steps < 1:
            why = "the last step is not trained: none is left. Use at least 2 steps."
            raise ValueError(f"num_inference_steps is {self.num_inference_steps}, and {why}")
        for name, default in (("sde_window_interval", 25), ("sde_window_stride", 1)):
            value = self._given(name)
            if self.sde_window_schedule == "progressive":
                setattr(self, name, derived(default) if value is None else value)
                self._check(name, getattr(self, name) >= 1, "at least 1")
            elif value is None:
                setattr(self, name, None)
            else:
                why = f"sde_window_schedule is {self.sde_window_schedule!r}: only a progressive window moves on"
                raise ValueError(f"{name} is {value}, but {why}. Set 'progressive', or leave {name} out.")
        self.sde_window_range = self._given("sde_window_range")
        if self.sde_window_size is None:
            if self.sde_window_range is not None or self.sde_window_schedule == "progressive":
                raise ValueError(
                    f"sde_window_range is {self.sde_window_range} and sde_window_schedule {self.sde_window_schedule!r}"
                    ", but sde_window_size is not set: there is no window. Set it, or leave the others out."
                )
            return
        if self.sde_window_range is None:
            self.sde_window_range = derived([0, self.num_stochastic_steps])
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

    The weight is the paper's: `"inverse_dt"` for `sde_type="flow"`, `"beta_over_dt"` for `"dance"`. For `"cps"`, which
    the paper has not, it is `"inverse_gain"`. For U-Nets (Stable Diffusion 1, 2 and XL) these are the same. The clip
    range belongs to latents of 65,536 dimensions and is scaled to the model's own by `scale_epsilon`.

    Example:

    ```pycon
    >>> from trl_flow import GuardConfig
    >>> args = GuardConfig("outputs/run", sde_type="dance", use_cpu=True)
    >>> args.importance_ratio, args.timestep_weighting
    ('ratio_norm', 'beta_over_dt')
    ```
    """

    importance_ratio: Literal["standard", "mean_revised", "ratio_norm"] = "ratio_norm"
    timestep_weighting: TimestepWeighting | None = None
    epsilon: float = 2e-6
    scale_rewards: Literal["group", "batch", "batch_centered", "none"] = "group"
    learning_rate: float = 1e-4

    def __post_init__(self):
        if self._given("timestep_weighting") is None:
            weightings = {"dance": "beta_over_dt", "cps": "inverse_gain"}
            self.timestep_weighting = derived(weightings.get(self.sde_type, "inverse_dt"))
        super().__post_init__()


@described
@dataclass
class SLASConfig(FlowGRPOConfig):
    """
    [`FlowGRPOConfig`] with the defaults of SLAS (super-linear advantage shaping): DanceGRPO's dynamics (constant
    diffusion of 0.3, one initial noise for each group, 0.6 of the steps trained, drawn for each sample), advantages
    scaled by the standard deviation of the whole batch and raised to the power `1 + advantage_power` (Eq. 20). On
    U-Nets (Stable Diffusion 1.4 in the paper) the dynamics are DDIM's, and `noise_level` is its η.

    The power of 0.25 is ours, from experiments on the bundled model: the paper's text does not say which it had. Nor
    does it say whether the standard deviation is that of the raw rewards (`"batch"`, as here) or of rewards less their
    group's mean (`"batch_centered"`).

    Example:

    ```pycon
    >>> from trl_flow import SLASConfig
    >>> args = SLASConfig("outputs/run", advantage_power="auto", use_cpu=True)
    >>> args.sde_type, args.noise_level
    ('dance', 0.3)
    ```
    """

    sde_type: Literal["flow", "dance", "cps"] = "dance"
    noise_level: float = 0.3
    timestep_fraction: float = 0.6
    timestep_fraction_per_sample: bool = True
    share_initial_noise: bool = True
    advantage_power: float | str | None = 0.25


@described
@dataclass
class VGPOConfig(FlowGRPOConfig):
    """
    [`FlowGRPOConfig`] with VGPO's defaults: a reward for each step from the one-step projection (Eq. 9, 10),
    discounted values (Eq. 11), and advantages that keep a share of the absolute value (Eq. 14); one initial noise for
    each group (Algorithm 1).

    The discount of 0.9 and the scale of 0.05 are ours, from experiments on the bundled model: the paper's text does
    not say which it had.

    Example:

    ```pycon
    >>> from trl_flow import VGPOConfig
    >>> args = VGPOConfig("outputs/run", value_discount=0.8, use_cpu=True)
    >>> args.dense_rewards, args.value_discount
    (True, 0.8)
    ```
    """

    dense_rewards: bool = True
    value_discount: float = 0.9
    value_scale: float | str | list[float] | None = 0.05
    share_initial_noise: bool = True
