"""One run: an arm and a seed. What came out of it is a line of the results, see `run`."""

import contextlib
import functools
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mechanism
import numpy as np
import proxies
import torch
from experiments import NOISES
from peft import LoraConfig
from rounding import rounded
from transformers import TrainerCallback

import trl_flow
from trl_flow.rewards import ShapesReward
from trl_flow.shapes import load_pipeline, load_prompts, pipeline_path
from trl_flow.shapes.bundled import DRAWING_SETTINGS
from trl_flow.trainer.progress import FlowProgressCallback


# Made from the folder in which they may keep files
PROXIES: dict[str, Callable[[Path], Callable[..., list[float]]]] = {
    "learned": lambda folder: proxies.LearnedReward(folder / proxies.SCORER),
    "recall": lambda folder: proxies.RecallReward(),
    "binary": lambda folder: proxies.RecallReward(binary=True),
    "binary-terminal": lambda folder: proxies.RecallReward(binary=True, dense=False),
}
for _noise in NOISES:
    PROXIES[f"strict-{_noise}"] = lambda folder, noise=float(_noise): proxies.NoisyStrictReward(noise)

# Evaluations: what the log calls the scores. Only the first is optimized.
SCORES = {
    "proxy": "eval_reward",
    "strict": "eval_gold/shapes_strict",
    "fidelity": "eval_gold/shapes_fidelity",
    "soft": "eval_gold/shapes_soft",
    "diversity": "eval_diversity",
}
# The mean of these, each divided by the base model's value, is "gold": the strict score is too coarse
GOLD = ("soft", "fidelity")
# Of training, means between two evaluations
TRAINING = {
    "reward": "reward",
    "reward_std": "reward_std",
    "equal": "frac_reward_zero_std",
    "effective": "advantage/effective_share",
}


@functools.cache
def world() -> str:
    """The bundled model's fingerprint: with another model all is run again."""
    weights = sorted(Path(pipeline_path(), "transformer").glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()[:12]


def fingerprint(settings: dict[str, Any]) -> str:
    """Equal for equal settings of the same bundled model."""
    return hashlib.sha256(json.dumps(settings | {"world": world()}, sort_keys=True).encode()).hexdigest()[:16]


def run(settings: dict[str, Any], shared: Path) -> dict[str, Any]:
    """
    What one run gives, JSON values.

    Args:
        settings (`dict`): from `Arm.settings` or `Measurement.settings`.
        shared (`Path`): where proxies keep their files.

    Returns:
        `dict`: `"fingerprint"`; `"seconds"` of processor time; and of a training `"evaluations"`, columns of equal
        length (`SCORES` and `TRAINING` at `"update"`), and `"below"` and `"above"`, the shares of ratios outside of
        the clip range by step. Else what the function of mechanism.py gives.
    """
    # The result must not depend on how many threads a machine has: sums are rounded in the order of the threads
    torch.set_num_threads(1)
    start = time.process_time()
    if settings["kind"] == "training":
        result = train(settings, shared)
    else:
        result = getattr(mechanism, settings["kind"])(seed=settings["seed"], **settings["arguments"])
    return {"fingerprint": fingerprint(settings), "seconds": round(time.process_time() - start, 1)} | result


def train(settings: dict[str, Any], shared: Path) -> dict[str, Any]:
    """Trains, with evaluations on held-out prompts along the way."""
    method, batch = settings["method"], settings["prompts"] * settings["num_generations"]
    test, number = load_prompts("test"), settings["eval_prompts"]
    with tempfile.TemporaryDirectory() as folder:
        args = getattr(trl_flow, f"{method}Config")(
            output_dir=folder,
            seed=settings["seed"],
            num_generations=settings["num_generations"],
            per_device_train_batch_size=batch // settings["fields"]["steps_per_generation"],
            max_steps=settings["updates"],
            eval_strategy="steps",
            eval_steps=settings["eval_updates"],
            eval_on_start=True,
            eval_num_inference_steps=settings["fields"]["num_inference_steps"],
            num_generations_eval=settings["eval_images"],
            per_device_eval_batch_size=min(216, number * settings["eval_images"]),
            logging_steps=1,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            log_images=False,
            disable_tqdm=True,
            **{name: DRAWING_SETTINGS[name] for name in ("height", "width", "max_sequence_length")},
            **settings["fields"] if method == "FlowGRPO" else without_noise(settings["fields"]),
        )
        pipeline = load_pipeline()
        trainer = getattr(trl_flow, f"{method}Trainer")(
            model=pipeline,
            reward_funcs=PROXIES[settings["proxy"]](shared),
            # Never optimized: the gold scores
            eval_reward_funcs=[ShapesReward(score) for score in ("strict", "fidelity", "soft")],
            args=args,
            train_dataset=load_prompts("train"),
            eval_dataset=test.select([i * len(test) // number for i in range(number)]),
            peft_config=LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian"),
            callbacks=[StopWhenHacked(settings["stop_gold"])],
        )
        trainer.remove_callback(FlowProgressCallback)
        with in_precision(pipeline.transformer, settings["rounding"]):
            trainer.train()
        return columns(trainer.state.log_history, settings["fields"]["num_inference_steps"])


def without_noise(fields: dict[str, Any]) -> dict[str, Any]:
    """For methods that sample along the ODE."""
    return {name: value for name, value in fields.items() if name != "noise_level"}


@contextlib.contextmanager
def in_precision(transformer: torch.nn.Module, name: str | None) -> Iterator[None]:
    """The transformer's arithmetic with the rounding of a precision."""
    forward = transformer.forward
    if name is not None:
        transformer.forward = rounded(forward, getattr(torch, name))
    try:
        yield
    finally:
        transformer.forward = forward


class StopWhenHacked(TrainerCallback):
    """Ends a run when two evaluations in a row have a gold below `least` in their mean."""

    def __init__(self, least: float):
        self.least, self.rows = least, []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.rows.append({name: metrics[key] for name, key in SCORES.items()})
        golds = gold({name: np.array([row[name] for row in self.rows]) for name in GOLD})
        control.should_training_stop |= bool(len(golds) > 1 and golds[-2:].mean() < self.least)


def gold(scores: dict[str, np.ndarray]) -> np.ndarray:
    """Of the evaluations of a run, the first of which is the base model's: `(E,)`, 1 for the base model."""
    return np.mean([scores[name] / scores[name][0] for name in GOLD], axis=0)


def columns(log: list[dict[str, Any]], num_steps: int) -> dict[str, Any]:
    """What is kept of a run's log, see `run`."""
    evaluations = [entry for entry in log if SCORES["proxy"] in entry]
    found: dict[str, list] = {"update": [entry["step"] for entry in evaluations]}
    for name, key in SCORES.items():
        found[name] = [round(entry[key], 5) for entry in evaluations]
    for name, key in TRAINING.items():
        found[name] = [None] + [
            mean_of(entry.get(key) for entry in log if first["step"] < entry["step"] <= last["step"])
            for first, last in zip(evaluations, evaluations[1:], strict=False)
        ]
    # Without the updates whose ratio is always 1
    moved = [entry for entry in log if entry.get("ratio/std", 0) > 0]
    sides = {"below": "low", "above": "high"}
    return {"evaluations": found} | {
        name: [mean_of(entry.get(f"clip_ratio/{side}_step_{i}") for entry in moved) for i in range(num_steps)]
        for name, side in sides.items()
    }


def mean_of(values: Iterator[float | None]) -> float | None:
    """Mean of those that are there."""
    numbers = [value for value in values if value is not None]
    return round(float(np.mean(numbers)), 5) if numbers else None
