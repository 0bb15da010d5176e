"""One run: an arm, a seed, a folder. What came out of it is `result.json` there, written last."""

import hashlib
import json
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import proxies
import torch
from experiments import VERSION, Arm, Scale
from peft import LoraConfig

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer
from trl_flow.evaluation.outputs import write_json
from trl_flow.rewards import ShapesReward
from trl_flow.shapes import load_pipeline, load_prompts
from trl_flow.trainer.progress import FlowProgressCallback


RESULT = "result.json"
ERROR = "error.txt"

# Made from the folder in which they may keep files
PROXIES: dict[str, Callable[[Path], Callable[..., list[float]]]] = {
    "colors": lambda folder: proxies.ColorsOnlyReward(),
    "colors-terminal": lambda folder: proxies.ColorsOnlyReward(dense=False),
    "learned": lambda folder: proxies.LearnedReward(folder / "scorer.safetensors"),
    "jpeg": lambda folder: proxies.jpeg_reward(),
    "small-spread": lambda folder: proxies.SmallSpreadReward(),
}


def settings_of(arm: Arm, seed: int, scale: Scale) -> dict[str, Any]:
    """All that a run's result depends on, as JSON values."""
    return {
        "version": VERSION,
        "proxy": arm.proxy,
        "config": arm.full_config,
        "seed": seed,
        "scale": asdict(scale),
    }


def fingerprint(settings: dict[str, Any]) -> str:
    """Equal for equal settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether `folder` has the result of a run with these very settings."""
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return result.get("fingerprint") == fingerprint(settings)


def run(folder: Path, settings: dict[str, Any], shared: Path) -> str | None:
    """
    Trains, evaluates on held-out prompts along the way, and writes `result.json`.

    What an unfinished or different run has left in `folder` is removed first. A failure is written to `error.txt` and
    returned, not raised: it must not take the other runs with it.

    Args:
        folder (`Path`): of this run alone.
        settings (`dict`): from `settings_of`.
        shared (`Path`): where proxies keep their files.

    Returns:
        `str` or `None`: the last line of what went wrong, if something did.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.perf_counter()
    try:
        history = train(folder, settings, shared)
        write_json(
            folder / RESULT,
            {
                "fingerprint": fingerprint(settings),
                "settings": settings,
                "seconds": round(time.perf_counter() - start, 1),
                "log_history": history,
            },
        )
    except Exception as error:
        (folder / ERROR).write_text(traceback.format_exc(), encoding="utf-8")
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def train(folder: Path, settings: dict[str, Any], shared: Path) -> list[dict[str, Any]]:
    """Trains; returns the log of every update and every evaluation."""
    # The result must not depend on how many threads a machine has: sums are rounded in the order of the threads
    torch.set_num_threads(1)
    scale = settings["scale"]
    batch = scale["prompts"] * scale["num_generations"]
    test = load_prompts("test")
    trainer = FlowGRPOTrainer(
        model=load_pipeline(),
        reward_funcs=PROXIES[settings["proxy"]](shared),
        # Never optimized: the gold scores
        eval_reward_funcs=[ShapesReward(score) for score in ("strict", "fidelity", "soft")],
        args=FlowGRPOConfig(
            **{"bf16": False} | settings["config"],
            output_dir=str(folder),
            seed=settings["seed"],
            num_generations=scale["num_generations"],
            per_device_train_batch_size=batch // settings["config"]["steps_per_generation"],
            max_steps=scale["updates"],
            eval_strategy="steps",
            eval_steps=scale["eval_steps"],
            eval_on_start=True,
            logging_steps=1,
            gradient_checkpointing=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            log_images=False,
            disable_tqdm=True,
        ),
        train_dataset=load_prompts("train"),
        eval_dataset=test.select([i * len(test) // scale["eval_prompts"] for i in range(scale["eval_prompts"])]),
        peft_config=LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian"),
    )
    trainer.remove_callback(FlowProgressCallback)
    trainer.train()
    return trainer.state.log_history
