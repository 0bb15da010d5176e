"""What is run, as one literal table: sections, their arms, and the settings in which the arms of a section differ.

An arm is trained once for each seed. Sections share arms by name, so that nothing is trained twice.
"""

from dataclasses import dataclass, field
from typing import Any


# Bump when proxies.py or training.py change what a run gives: finished runs are then repeated
VERSION = 1


@dataclass(frozen=True)
class Scale:
    """
    How much is spent on a run.

    Attributes:
        updates (`int`): updates.
        prompts, num_generations (`int`): prompts in a sampling phase, and images for each.
        eval_steps (`int`): updates between two evaluations.
        eval_prompts (`int`): held-out prompts in an evaluation, at most 108.
    """

    updates: int
    prompts: int
    num_generations: int
    eval_steps: int
    eval_prompts: int


FULL = Scale(updates=64, prompts=8, num_generations=12, eval_steps=8, eval_prompts=108)
# One sampling phase: the least that has ratios other than 1
QUICK = Scale(updates=4, prompts=4, num_generations=6, eval_steps=4, eval_prompts=24)

# Fields of FlowGRPOConfig that all runs have in common. A sampling phase is trained on in two halves, twice: from the
# second update on the policy is no longer the one that sampled, which is what ratios and clipping are about.
COMMON: dict[str, Any] = {
    "steps_per_generation": 2,
    "num_iterations": 2,
    "num_inference_steps": 6,
    "eval_num_inference_steps": 6,
    "num_generations_eval": 2,
    "per_device_eval_batch_size": 108,
    "guidance_scale": 1.0,
    "noise_level": 0.7,
    "height": 32,
    "width": 32,
    "max_sequence_length": 1,
    # One learning rate for all: Adam takes the scale of a loss away, so that what differs between the methods is how
    # they share a step of the same size among samples and time steps
    "learning_rate": 1e-3,
    "scale_rewards": "group",
    "scale_epsilon": False,  # the ranges below are for the bundled model's latents
    "train_last_step": True,  # as when the results were measured
}

# Clip ranges by importance_ratio and sde_type. One rule for all: `run.py --only ratios` measures the ratios of one
# batch after an unclipped update, and the range is the one that a fifth of them, over all steps, lie outside of.
EPSILON: dict[tuple[str, str], float] = {
    ("standard", "flow"): 7e-4,
    ("mean_revised", "flow"): 7e-4,
    ("ratio_norm", "flow"): 1.2e-4,
    ("standard", "dance"): 1.3e-3,
}

# What section "ratios" measures, for each of two seeds: updates between sampling and measuring, and the learning rate
RATIO_SEEDS = 2
RATIOS: list[dict[str, Any]] = [
    {"sde_type": "flow", "updates": 1, "learning_rate": 1e-3},
    {"sde_type": "flow", "updates": 3, "learning_rate": 1e-3},
    {"sde_type": "dance", "updates": 1, "learning_rate": 1e-3},
    {"sde_type": "dance", "updates": 3, "learning_rate": 1e-3},
    {"sde_type": "flow", "updates": 1, "learning_rate": 1e-4},
    {"sde_type": "flow", "updates": 1, "learning_rate": 3e-4},
]


@dataclass(frozen=True)
class Arm:
    """
    One way to train.

    Attributes:
        proxy (`str`): a key of `training.PROXIES`.
        config (`dict[str, Any]`): fields of `FlowGRPOConfig` on top of `COMMON`. Without an `epsilon` it is that of
            `EPSILON`.
    """

    proxy: str
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def full_config(self) -> dict[str, Any]:
        """All fields that do not depend on the scale of the run."""
        config = {"importance_ratio": "standard", "timestep_weighting": "none", "sde_type": "flow"}
        config |= COMMON | self.config
        return {"epsilon": EPSILON[config["importance_ratio"], config["sde_type"]]} | config


@dataclass(frozen=True)
class Section:
    """
    Arms that are compared with each other.

    Attributes:
        title (`str`): heading in the report.
        claim (`str`): what the paper says.
        arms (`tuple[str, ...]`): names of arms, all with the same proxy; the first is the baseline.
        seeds (`int`): seeds 0 ... `seeds - 1`.
        slow (`tuple[str, ...]`): arms that are left out when the common proxy level is chosen (see report.py).
    """

    title: str
    claim: str
    arms: tuple[str, ...]
    seeds: int
    slow: tuple[str, ...] = ()


# The ablation of GRPO-Guard's Table 2
ABLATION: dict[str, dict[str, str]] = {
    "baseline": {},
    "temp-reweight": {"timestep_weighting": "temp"},
    "guard-reweight": {"timestep_weighting": "inverse_dt"},
    "mean-revised": {"importance_ratio": "mean_revised"},
    "ratio-norm": {"importance_ratio": "ratio_norm"},
    "guard": {"importance_ratio": "ratio_norm", "timestep_weighting": "inverse_dt"},
}

# GRPO-Guard's setting: Flow-SDE, a proxy that can be climbed honestly for a while and then hacked
_GUARD_ARMS = {f"guard/{name}": Arm("colors", dict(config)) for name, config in ABLATION.items()}
# The published clip range of 2e-6, for latents of 65,536 dimensions, at the bundled model's 1,024
_RANGE_ARMS = {"guard/guard-published-range": Arm("colors", ABLATION["guard"] | {"epsilon": 1.6e-5})}
_KL_ARMS = {f"guard/{name}+kl": Arm("colors", ABLATION[name] | {"beta": 0.04}) for name in ("baseline", "guard")}

# SLAS's setting: DanceGRPO's dynamics. Group scaling and power 0 is DanceGRPO itself.
DANCE: dict[str, Any] = {
    "sde_type": "dance",
    "noise_level": 0.3,
    "share_initial_noise": True,
    "timestep_fraction": 0.6,
}
_BATCH: dict[str, Any] = DANCE | {"scale_rewards": "batch"}
_SLAS_ARMS = {
    "slas/dance-grpo": Arm("colors", DANCE | {"scale_rewards": "group"}),
    "slas/power-0": Arm("colors", _BATCH),
    "slas/power-0.25": Arm("colors", _BATCH | {"advantage_power": 0.25}),
    "slas/power-0.5": Arm("colors", _BATCH | {"advantage_power": 0.5}),
    "slas/power-1": Arm("colors", _BATCH | {"advantage_power": 1.0}),
    "slas/power-2": Arm("colors", _BATCH | {"advantage_power": 2.0}),
    "slas/power-auto": Arm("colors", _BATCH | {"advantage_power": "auto", "target_kl": 1e-4}),
}

# Proposition 1 of SLAS: prompts whose rewards hardly differ, and noise
_NOISE_ARMS = {
    f"noise/{name}": Arm("small-spread", config)
    for name, config in {
        "group": {"scale_rewards": "group"},
        "batch": {"scale_rewards": "batch"},
        "none": {"scale_rewards": "none"},
        "slas": {"scale_rewards": "batch", "advantage_power": 0.5},
    }.items()
}

# VGPO's setting: its advantages are always scaled by the group, its initial noise is shared. ADAE alone (Table 2) is
# the terminal reward at every step: `dense` off and no discount, so that all weights are 1 and only the absolute value
# is added.
SHARED: dict[str, Any] = {"share_initial_noise": True}
TCRM: dict[str, Any] = SHARED | {"dense_rewards": True, "value_discount": 0.9, "value_scale": 0.0}
VGPO: dict[str, Any] = SHARED | {"dense_rewards": True, "value_discount": 0.9, "value_scale": 0.1}
_VGPO_ARMS = {
    "vgpo/flow-grpo": Arm("colors", SHARED),
    "vgpo/tcrm": Arm("colors", TCRM),
    "vgpo/adae": Arm("colors-terminal", VGPO | {"value_discount": 0.0}),
    "vgpo/vgpo": Arm("colors", VGPO),
}
_SWEEP_ARMS = {
    "vgpo/discount-0.5": Arm("colors", VGPO | {"value_discount": 0.5}),
    "vgpo/discount-0.99": Arm("colors", VGPO | {"value_discount": 0.99}),
    "vgpo/scale-0.05": Arm("colors", VGPO | {"value_scale": 0.05}),
    "vgpo/scale-0.3": Arm("colors", VGPO | {"value_scale": 0.3}),
}

# No paper: two and three at once, all with Guard's setting and shared noise, beside their parts
_SLAS_SHAPE: dict[str, Any] = {"scale_rewards": "batch", "advantage_power": 0.5}
_COMBINED_ARMS = {
    "combined/guard": Arm("colors", SHARED | ABLATION["guard"]),
    "combined/slas": Arm("colors", SHARED | _SLAS_SHAPE),
    "combined/guard+slas": Arm("colors", SHARED | ABLATION["guard"] | _SLAS_SHAPE),
    "combined/guard+vgpo": Arm("colors", VGPO | ABLATION["guard"]),
    "combined/guard+slas+vgpo": Arm("colors", VGPO | ABLATION["guard"] | _SLAS_SHAPE),
}

# Clipping that acts on rounding: the same in float32, in bfloat16, and in bfloat16 with the ratio's probe
_PRECISION: dict[str, Any] = ABLATION["guard"] | {"train_last_step": False}
_PRECISION_ARMS = {
    "precision/float32": Arm("colors", _PRECISION),
    "precision/bfloat16": Arm("colors", _PRECISION | {"bf16": True, "ratio_probe": 0}),
    "precision/bfloat16-probe": Arm("colors", _PRECISION | {"bf16": True}),
}

# Other proxies: is what the colors show a matter of that one?
_PROXY_ARMS = {
    f"{proxy}/{name}": Arm(proxy, dict(ABLATION[name]))
    for proxy in ("learned", "jpeg")
    for name in ("baseline", "guard")
}

ARMS: dict[str, Arm] = (
    _GUARD_ARMS
    | _RANGE_ARMS
    | _SWEEP_ARMS
    | _KL_ARMS
    | _SLAS_ARMS
    | _NOISE_ARMS
    | _VGPO_ARMS
    | _COMBINED_ARMS
    | _PROXY_ARMS
    | _PRECISION_ARMS
)

SECTIONS: dict[str, Section] = {
    "guard": Section(
        title="GRPO-Guard: its ablation, and KL",
        claim=(
            "At equal proxy Guard keeps a higher gold score than its baseline, also with KL; mean-revised < RatioNorm "
            "< Guard; temp-reweight is the fastest and the most hacked (Tables 1 and 2, Figure 9, supplement 5)."
        ),
        arms=tuple(_GUARD_ARMS) + tuple(_KL_ARMS),
        seeds=3,
        slow=("guard/guard-reweight", *_KL_ARMS),
    ),
    "precision": Section(
        title="GRPO-Guard in bfloat16, without and with the ratio's probe",
        claim="None of a paper: without the probe the clipping acts on rounding, with it as in float32.",
        arms=tuple(_PRECISION_ARMS),
        seeds=2,
    ),
    "range": Section(
        title="GRPO-Guard with its published clip range",
        claim="2e-6 for 65,536 dimensions (supplement 2), which is 1.6e-5 for 1,024.",
        arms=("guard/baseline", "guard/guard", *_RANGE_ARMS),
        seeds=2,
    ),
    "learned": Section(
        title="GRPO-Guard with a learned reward",
        claim="As above.",
        arms=("learned/baseline", "learned/guard"),
        seeds=2,
    ),
    "jpeg": Section(
        title="GRPO-Guard with JPEG compressibility",
        claim="As above.",
        arms=("jpeg/baseline", "jpeg/guard"),
        seeds=1,
    ),
    "slas": Section(
        title="SLAS against DanceGRPO: the power",
        claim="SLAS learns faster and generalizes better than DanceGRPO (Tables 1 and 2).",
        arms=tuple(_SLAS_ARMS),
        seeds=2,
    ),
    "noise": Section(
        title="Small spread and noise",
        claim="Scaling by the group's standard deviation amplifies noise where rewards hardly differ (Proposition 1).",
        arms=tuple(_NOISE_ARMS),
        seeds=2,
    ),
    "vgpo": Section(
        title="VGPO and its parts",
        claim=(
            "VGPO converges in fewer updates and keeps diversity; TCRM and ADAE each help, both together most (Figure "
            "3, Table 2)."
        ),
        arms=tuple(_VGPO_ARMS),
        seeds=2,
    ),
    "sweep": Section(
        title="VGPO: discount and scale",
        claim="None: both are tuned per task, and the values are not given.",
        arms=("vgpo/vgpo", "vgpo/tcrm", *_SWEEP_ARMS),
        seeds=1,
    ),
    "combined": Section(
        title="Combinations",
        claim="None: no paper has tried them.",
        arms=("vgpo/flow-grpo", "combined/guard", "combined/slas", "vgpo/vgpo", *list(_COMBINED_ARMS)[2:]),
        seeds=1,
    ),
}
