"""What is run, as tables: the arms, and the claims that compare them, the most important first.

An arm is trained once for each seed, whatever the number of claims that have it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


# Bump when proxies.py, training.py or mechanism.py change what a run gives: finished runs are then repeated
VERSION = 2
SEEDS = 5

# The one rule of scale: published learning rates and clip ranges are both multiplied by this, as the model is small
# and runs are short. Ratios spread in proportion to the rate, so that clipping acts as it would at the published ones;
# and the methods keep their proportions: Guard has a third of the baseline's rate. Clip ranges are scaled to the
# latent's dimensions besides, by the library (`scale_epsilon`).
STEP = 20 / 3

# As published for Stable Diffusion 3.5 with LoRA; the advantages are scaled by the group in all of GRPO-Guard's runs.
FLOW_GRPO: dict[str, Any] = {"learning_rate": 3e-4, "epsilon": 1e-4, "scale_rewards": "group"}
GUARD: dict[str, Any] = FLOW_GRPO | {
    "learning_rate": 1e-4,
    "epsilon": 2e-6,
    "importance_ratio": "ratio_norm",
    "timestep_weighting": "inverse_dt",
}
ONE_RATE: dict[str, Any] = {"learning_rate": 3e-4, "epsilon": 6e-6}  # Guard's, both multiplied by three

# Shared by all runs. Each phase is trained on in two halves, twice: shift over spread of the standard ratio grows with
# the lag and with the root of the dimensions, of which the model has a 64th of the paper's.
COMMON: dict[str, Any] = {"num_inference_steps": 6, "noise_level": 0.7, "guidance_scale": 1.0}
PHASE: dict[str, Any] = {"steps_per_generation": 2, "num_iterations": 2}


@dataclass(frozen=True)
class Arm:
    """
    One way to train.

    Attributes:
        proxy (`str`): a key of `training.PROXIES`.
        fields (`dict[str, Any]`): fields of the config on top of `COMMON`, as published.
        method (`str`): the trainer's name without its ending.
        updates (`int`): at most.
        prompts, num_generations (`int`): of a sampling phase.
        stop_gold (`float`): the run ends when two evaluations have less than this in their mean; what comes after is
            not compared. 0: never.
        rounding (`str` or `None`): the precision whose rounding the transformer has.
    """

    proxy: str
    fields: dict[str, Any] = field(default_factory=dict)
    method: Literal["FlowGRPO", "DiffusionNFT", "AWM"] = "FlowGRPO"
    updates: int = 128
    prompts: int = 8
    num_generations: int = 12
    stop_gold: float = 0.8
    rounding: str | None = None

    def settings(self, seed: int, quick: bool) -> dict[str, Any]:
        """All that a run's result depends on besides the bundled model, as JSON values."""
        fields = COMMON | (PHASE if self.method == "FlowGRPO" else {"steps_per_generation": 1}) | self.fields
        scaled = ("learning_rate", "epsilon") if self.method == "FlowGRPO" else ("learning_rate",)
        fields |= {name: fields[name] * STEP for name in scaled}
        own = {name: value for name, value in asdict(self).items() if name != "fields"}
        own |= {"kind": "training", "fields": fields, "seed": seed, "version": VERSION}
        own |= {"eval_updates": 16, "eval_prompts": 108, "eval_images": 4}
        if quick:
            own |= {"updates": 4, "prompts": 4, "num_generations": 6}
            own |= {"eval_updates": 4, "eval_prompts": 18, "eval_images": 2}
        return own


@dataclass(frozen=True)
class Measurement:
    """What is measured without training: a function of mechanism.py, and its arguments by size."""

    function: Literal["lag", "absolute_term"]
    full: dict[str, Any]
    quick: dict[str, Any]

    def settings(self, seed: int, quick: bool) -> dict[str, Any]:
        """As [`Arm.settings`]."""
        arguments = self.quick if quick else self.full
        return {"kind": self.function, "arguments": arguments, "seed": seed, "version": VERSION}


@dataclass(frozen=True)
class Claim:
    """
    Arms that are compared with each other: a table of the report.

    Attributes:
        title (`str`): heading.
        says (`str`): what is claimed, and by whom.
        short (`str`): the same in a few words, for the report's first paragraph.
        arms (`tuple[str, ...]`): names; the others are compared with the first one.
        subject (`str`): the arm that the claim is about.
        score (`str`): by which they are compared.
        at (`str`): `"proxy"`, at equal proxy, or `"updates"`, over the second half of the updates.
        sign (`int`): 1 if the subject is said to have more of the score, -1 less.
    """

    title: str
    says: str
    short: str
    arms: tuple[str, ...]
    subject: str
    score: str = "gold"
    at: Literal["proxy", "updates"] = "proxy"
    sign: int = 1


# ---- GRPO-Guard ----

ABLATION: dict[str, dict[str, Any]] = {
    "baseline": FLOW_GRPO,
    "temp-reweight": FLOW_GRPO | {"timestep_weighting": "temp"},
    "guard-reweight": FLOW_GRPO | {"timestep_weighting": "inverse_dt"},
    "mean-revised": FLOW_GRPO | {"importance_ratio": "mean_revised"},
    "ratio-norm": GUARD | {"timestep_weighting": "none"},
    "guard": GUARD,
    "guard, one rate": GUARD | ONE_RATE,
    "ratio-norm, one rate": GUARD | ONE_RATE | {"timestep_weighting": "none"},
    "baseline + KL": FLOW_GRPO | {"beta": 0.04},
    "guard + KL": GUARD | {"beta": 0.04},
    "baseline, guidance 2": FLOW_GRPO | {"guidance_scale": 2.0},
    "guard, guidance 2": GUARD | {"guidance_scale": 2.0},
}


def _longer(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Where the rate is a third, more updates."""
    return {"updates": 224} if fields["learning_rate"] == GUARD["learning_rate"] else {}


ARMS: dict[str, Arm | Measurement] = {
    f"{proxy}: {name}": Arm(proxy, fields, **_longer(fields))
    for proxy in ("learned", "recall")
    for name, fields in ABLATION.items()
}

# ---- Precision, and other methods, all with the learned scorer ----

_HALF = {
    "guard, float16": ("float16", 0),
    "guard, bfloat16": ("bfloat16", 0),
    "guard, bfloat16 and probe": ("bfloat16", 32),
}
ARMS |= {
    f"learned: {name}": Arm("learned", GUARD | {"ratio_probe": probe}, rounding=rounding, **_longer(GUARD))
    for name, (rounding, probe) in _HALF.items()
}
_NOISED: dict[str, Any] = {"learning_rate": 3e-4, "timesteps_per_sample": 4, "scale_rewards": "group"}
# One update a phase, and so more phases for as many updates
ARMS |= {f"learned: {name}": Arm("learned", _NOISED, method=name, updates=64) for name in ("DiffusionNFT", "AWM")}

# ---- VGPO: a binary reward, one initial noise for a group; its advantages are always scaled by the group ----

SHARED: dict[str, Any] = FLOW_GRPO | {"share_initial_noise": True}
DENSE: dict[str, Any] = SHARED | {"dense_rewards": True, "value_discount": 0.9}
VGPO: dict[str, dict[str, Any]] = {
    "flow-grpo": SHARED,
    "tcrm": DENSE | {"value_scale": 0.0},
    "k = 0.05": DENSE | {"value_scale": 0.05},
    "k = 0.3": DENSE | {"value_scale": 0.3},
}
ARMS |= {f"binary: {name}": Arm("binary", fields, stop_gold=0) for name, fields in VGPO.items()}
# The reward of the finished image at each step: the weights of Eq. 12 are then the same for all images
ARMS["binary: fixed weights"] = Arm("binary-terminal", DENSE | {"value_scale": 0.0}, stop_gold=0)

# ---- SLAS: DanceGRPO's dynamics, a rare signal under noise ----

DANCE: dict[str, Any] = {
    "learning_rate": 3e-4,
    "epsilon": 1e-4,
    "sde_type": "dance",
    "noise_level": 0.3,
    "share_initial_noise": True,
    "timestep_fraction": 0.6,
    "timestep_fraction_per_sample": True,
}
NOISES = ("0", "0.3", "0.1")
# With a power of 0 the two of the batch differ by a factor, which AdamW takes away
SHAPES: dict[str, dict[str, Any]] = {
    "group": {"scale_rewards": "group"},
    "batch": {"scale_rewards": "batch"},
    "batch, power 0.5": {"scale_rewards": "batch", "advantage_power": 0.5},
    "batch, power 1": {"scale_rewards": "batch", "advantage_power": 1.0},
    "centered, power 0.5": {"scale_rewards": "batch_centered", "advantage_power": 0.5},
    "centered, power 1": {"scale_rewards": "batch_centered", "advantage_power": 1.0},
    "group, power 0.5": {"scale_rewards": "group", "advantage_power": 0.5},
    "group, power 1": {"scale_rewards": "group", "advantage_power": 1.0},
}
ARMS |= {
    f"strict + {noise}: {name}": Arm(f"strict-{noise}", DANCE | shape, updates=64, prompts=24, stop_gold=0)
    for noise in NOISES
    for name, shape in SHAPES.items()
}

# ---- Two and three methods at once, with the learned scorer ----

_SLAS: dict[str, Any] = {"scale_rewards": "batch_centered", "advantage_power": 0.5}
_COMBINED: dict[str, dict[str, Any]] = {
    "guard + SLAS": GUARD | _SLAS,
    "guard + VGPO": GUARD | DENSE | {name: GUARD[name] for name in FLOW_GRPO} | {"value_scale": 0.05},
}
_COMBINED["guard + SLAS + VGPO"] = _COMBINED["guard + VGPO"] | {"advantage_power": 0.5}
ARMS |= {f"learned: {name}": Arm("learned", fields, **_longer(fields)) for name, fields in _COMBINED.items()}

# ---- Without training ----

ARMS["clipping by lag"] = Measurement(
    "lag",
    full={"prompts": 16, "num_generations": 12, "lags": [1, 2, 4, 8, 16]},
    quick={"prompts": 4, "num_generations": 6, "lags": [1, 2]},
)
ARMS["absolute term"] = Measurement(
    "absolute_term",
    full={"groups": 1000, "chunk": 20, "num_generations": 4},
    quick={"groups": 16, "chunk": 4, "num_generations": 4},
)


def _of(proxy: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{proxy}: {name}" for name in names)


def _guard_claim(proxy: str, what: str, *names: str, title: str, short: str, subject: str, says: str = "") -> Claim:
    says = says or "At equal proxy Guard keeps a higher gold score than its baseline (GRPO-Guard, Table 1)."
    return Claim(f"{title}: {what}", says, f"{short} ({what})", _of(proxy, *names), f"{proxy}: {subject}")


_LEARNED, _RECALL = ("learned", "a learned scorer"), ("recall", "a rule with a cheap way out")
_ORDER = "Mean-revised < RatioNorm < Guard in gold; temp-reweight is the fastest and the most hacked (Table 2)."
_KL = "With a KL to the base model, too, Guard keeps more gold (supplement, Section 5)."


def _slas_claim(noise: str, *names: str, title: str = "SLAS", subject: str = "centered, power 0.5") -> Claim:
    says = "Shaped advantages scaled by the batch learn a genuine signal faster than the group's (SLAS, Tables 1, 2)."
    return Claim(
        f"{title}: strict score, noise {noise}",
        f"{says} Noise of a standard deviation of {noise} on all rewards; the held-out score has none.",
        f"SLAS (power 0.5) learns the strict score faster than DanceGRPO under noise {noise}",
        _of(f"strict + {noise}", *names),
        f"strict + {noise}: {subject}",
        score="strict",
        at="updates",
    )


_SIX = tuple(SHAPES)[:6]
_ABSOLUTE = "The absolute term learns on where groups are constant"
CLAIMS: dict[str, Claim] = {
    "guard-learned": _guard_claim(
        *_LEARNED, "baseline", "guard",
        title="GRPO-Guard", short="Guard keeps more gold at equal proxy", subject="guard",
    ),
    "guard-recall": _guard_claim(
        *_RECALL, "baseline", "guard",
        title="GRPO-Guard", short="Guard keeps more gold at equal proxy", subject="guard",
    ),
    "credit": Claim(
        "VGPO: credit assignment or a time weighting?",
        "Rewards of the steps' projections (TCRM) learn faster than the same weights on the last reward (VGPO, 3.2).",
        "TCRM learns faster than its time weighting alone",
        _of("binary", "fixed weights", "flow-grpo", "tcrm"),
        "binary: tcrm",
        score="proxy",
        at="updates",
    ),
    "slas-0": _slas_claim("0", *_SIX),
    "slas-0.3": _slas_claim("0.3", *_SIX),
    "scale": Claim(
        "VGPO: the absolute term",
        "The absolute value keeps learning going when all images of a group are equal (ADAE, Section 3.3).",
        f"{_ABSOLUTE} (k = 0.3)",
        _of("binary", "tcrm", "k = 0.05", "k = 0.3"),
        "binary: k = 0.3",
        score="proxy",
        at="updates",
    ),
    "diversity": Claim(
        "VGPO: diversity",
        "VGPO keeps more diversity at equal reward (Figure 1).",
        "VGPO keeps more diversity at equal reward",
        _of("binary", "flow-grpo", "fixed weights", "tcrm", "k = 0.05", "k = 0.3"),
        "binary: k = 0.05",
        score="diversity",
    ),
    "one-rate": _guard_claim(
        *_LEARNED, "baseline", "ratio-norm, one rate", "guard, one rate",
        title="GRPO-Guard, all at one rate", short="Guard keeps more gold at one rate", subject="guard, one rate",
        says="As above; the second reading: Guard at the baseline's learning rate, its clip range multiplied alike.",
    ),
    "ablation-learned": _guard_claim(
        *_LEARNED, *tuple(ABLATION)[:6],
        title="GRPO-Guard's ablation", short="temp-reweight loses gold", subject="temp-reweight", says=_ORDER,
    ),
    "kl": _guard_claim(
        *_LEARNED, "baseline + KL", "guard + KL",
        title="GRPO-Guard with KL", short="Guard keeps more gold with KL", subject="guard + KL", says=_KL,
    ),
    "combined": _guard_claim(
        *_LEARNED, "guard", "guard + SLAS", "guard + VGPO", "guard + SLAS + VGPO",
        title="Combinations", short="all three keep more gold than Guard", subject="guard + SLAS + VGPO",
        says="None: no paper has tried them.",
    ),
    "noised": _guard_claim(
        *_LEARNED, "baseline", "DiffusionNFT", "AWM", "guard",
        title="DiffusionNFT and AWM", short="DiffusionNFT keeps more gold than Flow-GRPO", subject="DiffusionNFT",
        says="None about over-optimization.",
    ),
    "precision": _guard_claim(
        *_LEARNED, "guard", "guard, bfloat16", "guard, bfloat16 and probe", "guard, float16",
        title="Precision", short="bfloat16 costs Guard gold", subject="guard, bfloat16",
        says="None of a paper: in bfloat16 the clipping acts on rounding.",
    ),
    "guidance": _guard_claim(
        *_LEARNED, "baseline, guidance 2", "guard, guidance 2",
        title="GRPO-Guard with guidance", short="Guard keeps more gold with guidance", subject="guard, guidance 2",
    ),
    "slas-0.1": _slas_claim("0.1", *_SIX),
    "one-rate-recall": _guard_claim(
        *_RECALL, "baseline", "guard, one rate",
        title="GRPO-Guard, all at one rate", short="Guard keeps more gold at one rate", subject="guard, one rate",
    ),
    "ablation-recall": _guard_claim(
        *_RECALL, *tuple(ABLATION)[:6],
        title="GRPO-Guard's ablation", short="temp-reweight loses gold", subject="temp-reweight", says=_ORDER,
    ),
    "slas-group": _slas_claim(
        "0.3", "group", "group, power 0.5", "group, power 1", title="The power on the group's scale",
        subject="group, power 0.5",
    ),
}  # fmt: skip
# "The most hacked": it is said to have less
for _name in ("ablation-learned", "ablation-recall", "precision"):
    CLAIMS[_name] = Claim(**{**CLAIMS[_name].__dict__, "sign": -1})

MEASUREMENTS = tuple(name for name, arm in ARMS.items() if isinstance(arm, Measurement))
