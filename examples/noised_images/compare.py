"""Time to a held-out score on the bundled world: Flow-GRPO, GRPO-Guard, DiffusionNFT and AWM.

    python examples/noised_images/compare.py             # all runs, hours of one core; continues where it stopped
    python examples/noised_images/compare.py --quick     # each arm for a few updates, minutes

Every arm trains on the same reward with as many images a sampling phase. Processor time is that of one thread, of
sampling, scoring and updating; evaluations are not counted. The report is `report.py`'s.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from peft import LoraConfig
from transformers import TrainerCallback

import trl_flow
from trl_flow import AWMConfig, DiffusionNFTConfig, FlowGRPOConfig, GuardConfig
from trl_flow.rewards import ShapesReward
from trl_flow.shapes import load_pipeline, load_prompts
from trl_flow.trainer.progress import FlowProgressCallback


HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "over_optimization"))
from proxies import SCORER, LearnedReward  # noqa: E402


PROMPTS, GENERATIONS = 12, 12  # in each sampling phase
SEEDS = range(5)
COMMON = {
    "height": 64, "width": 64, "max_sequence_length": 1, "num_generations": GENERATIONS,
    "per_device_eval_batch_size": 216, "eval_num_inference_steps": 6, "num_generations_eval": 2, "bf16": False,
    "gradient_checkpointing": False, "use_cpu": True, "save_strategy": "no", "report_to": "none",
    "log_images": False, "disable_tqdm": True, "logging_steps": 1, "eval_strategy": "steps",
}  # fmt: skip
NOISED = {"num_inference_steps": 6, "timesteps_per_sample": 4, "beta": 0.0}
WINDOW = {"num_inference_steps": 6, "guidance_scale": 1.0, "sde_window_size": 4, "sde_window_range": [0, 4]}


@dataclass(frozen=True)
class Arm:
    """
    One way to train.

    Attributes:
        config (`type`): class of the config.
        fields (`dict[str, Any]`): its fields besides `COMMON`.
        rates (`tuple[float, ...]`): learning rates of which the best is taken.
        updates (`int`): updates of each sampling phase.
    """

    config: type
    rates: tuple[float, ...]
    fields: dict[str, Any] = field(default_factory=dict)
    updates: int = 2


ARMS = {
    # Guidance, ten steps of which all but the last are trained, two updates, and the clip range for smaller latents
    "Flow-GRPO, published": Arm(
        FlowGRPOConfig, (3e-4, 1e-3, 2e-3), {"num_inference_steps": 10, "guidance_scale": 4.5}
    ),
    "Flow-GRPO, window": Arm(FlowGRPOConfig, (1e-3, 2e-3, 4e-3), WINDOW),
    "GRPO-Guard": Arm(GuardConfig, (1e-3, 2e-3, 4e-3), WINDOW | {"epsilon": 2e-4, "scale_epsilon": False}),
    "DiffusionNFT": Arm(DiffusionNFTConfig, (1e-3, 2e-3, 4e-3), NOISED, updates=1),
    "AWM": Arm(AWMConfig, (1e-3, 2e-3, 4e-3), NOISED, updates=1),
}


class Watch(TrainerCallback):
    """Measures processor time and wall time of updates, with their sampling, and keeps the scores of evaluations."""

    def __init__(self, seconds: float, target: float):
        self.limit, self.target, self.rows = seconds, target, []
        self.seconds, self.wall, self._start = 0.0, 0.0, (0.0, 0.0)

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.process_time(), time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.process_time() - self._start[0]
        self.wall += time.perf_counter() - self._start[1]

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        scores = {name.removeprefix("eval_"): value for name, value in metrics.items() if "/" in name or "rew" in name}
        times = {"seconds": round(self.seconds, 2), "wall": round(self.wall, 2)}
        self.rows.append({"update": state.global_step, **times, **scores})
        reached = sum(row["reward"] for row in self.rows[-2:]) >= 2 * self.target
        control.should_training_stop |= self.seconds > self.limit or reached


def run(
    arm: Arm, rate: float, seed: int, reward: str, seconds: float, every: int, target: float
) -> list[dict[str, Any]]:
    """Trains until so much processor time is used, or two evaluations in a row are at `target` in their mean; returns
    the evaluations, `every` sampling phases one."""
    torch.set_num_threads(1)
    if reward == "learned":
        rewards, weights = [LearnedReward(Path(tempfile.gettempdir(), SCORER))], [1.0]
    elif reward == "strict":
        rewards, weights = [ShapesReward("strict")], [1.0]
    else:
        rewards, weights = [ShapesReward("soft"), ShapesReward("fidelity")], [1.0, 0.5]
    watch, test = Watch(seconds, target), load_prompts("test")
    with tempfile.TemporaryDirectory() as folder:
        fields = {
            "seed": seed, "learning_rate": rate, "reward_weights": weights, "max_steps": 100_000,
            "per_device_train_batch_size": PROMPTS * GENERATIONS // arm.updates, "steps_per_generation": arm.updates,
            "eval_steps": every * arm.updates, "eval_on_start": True,
        }  # fmt: skip
        args = arm.config(output_dir=folder, **fields | COMMON | arm.fields)
        trainer = getattr(trl_flow, TRAINERS[arm.config])(
            load_pipeline(), rewards, args, load_prompts("train"), test, callbacks=[watch],
            peft_config=LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian"),
            eval_reward_funcs=[ShapesReward(score) for score in ("strict", "fidelity", "soft")],
        )  # fmt: skip
        trainer.remove_callback(FlowProgressCallback)
        trainer.train()
    return watch.rows


TRAINERS = {FlowGRPOConfig: "FlowGRPOTrainer", GuardConfig: "FlowGRPOTrainer"}
TRAINERS |= {DiffusionNFTConfig: "DiffusionNFTTrainer", AWMConfig: "AWMTrainer"}


def run_missing(arms: dict[str, Arm], runs: Iterable[tuple[str, float, int]], path: Path, given: Any) -> None:
    """Those of the runs (arm, learning rate, seed) that `path` does not have, one after another, a line each."""
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["arm"], row["rate"], row["seed"], row["reward"]) for row in done}
    for name, rate, seed in runs:
        if (name, rate, seed, given.reward) in done:
            continue
        rows = run(arms[name], rate, seed, given.reward, given.seconds, given.every, given.target)
        result = {"arm": name, "rate": rate, "seed": seed, "reward": given.reward, "evaluations": rows}
        with path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(name, rate, seed, rows[-1], file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", default="noised_images.jsonl", help="Results, a line a run; an existing file is continued."
    )
    parser.add_argument("--reward", choices=("score", "learned"), default="score")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--rates", nargs="+", type=float, help="Instead of each arm's own.")
    parser.add_argument("--seconds", type=float, default=300, help="Processor time of a run.")
    parser.add_argument("--target", type=float, default=1.06, help="Held-out score at which a run ends.")
    parser.add_argument("--every", type=int, default=4, help="Sampling phases between evaluations.")
    parser.add_argument("--quick", action="store_true", help="Ten seconds of each arm, one seed, one rate.")
    given = parser.parse_args()
    if given.quick:
        given.seconds, given.seeds = 10.0, [0]
    rates = {name: given.rates or (ARMS[name].rates[1:2] if given.quick else ARMS[name].rates) for name in given.arms}
    runs = [(name, rate, seed) for seed in given.seeds for name in given.arms for rate in rates[name]]
    run_missing(ARMS, runs, Path(given.output), given)


if __name__ == "__main__":
    main()
