"""
What a sampling phase gains when rewards are computed while the rest of it is sampled, printed as one JSON line.

    python benchmarks/overlap.py
    python benchmarks/overlap.py --parts 16 --share 0.5

Two kinds of rewards: `remote` waits, as for a server's answer, and `cpu` computes in this process. Each is set to take
`--share` times as long as an update without rewards, which is measured first. For each kind two trainers, one with
`overlap_rewards=True` and one without, take turns in one process, update by update, so that whatever else runs on the
machine slows both; the gain is the median over the measured updates of the serial one's time divided by that of the
overlapped one beside it. It is below 2 at a share of 1: the rewards of the last part have nothing to hide behind, nor
has the update itself. A `cpu` reward needs a core that sampling leaves idle.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.utils import logging

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer
from trl_flow.shapes import load_pipeline, load_prompts
from trl_flow.trainer.progress import FlowProgressCallback


WARM_UP = 2  # updates that are not counted: nothing overlaps in the first phase


class Remote:
    """Waits for `seconds` an image, and draws the reward."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __call__(self, prompts, images, **kwargs):
        time.sleep(self.seconds * len(images))
        return np.random.default_rng(len(prompts)).random(len(images)).tolist()


class Computed:
    """Multiplies matrices for `seconds` of this thread's processor time an image, and draws the reward."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.matrix = np.random.default_rng(0).random((128, 128))

    def __call__(self, prompts, images, **kwargs):
        end = time.thread_time() + self.seconds * len(images)
        while time.thread_time() < end:
            self.matrix @ self.matrix
        return np.random.default_rng(len(prompts)).random(len(images)).tolist()


KINDS = {"remote": Remote, "cpu": Computed}


class TakeTurns(TrainerCallback):
    """Lets one trainer make one update at a time, and times it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.may_go = threading.Semaphore(0)
        self.has_stepped = threading.Semaphore(0)
        self.times: list[float] = []

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.may_go.acquire()
        self.start = self._clock()

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(self._clock() - self.start)
        self.has_stepped.release()

    def step(self) -> None:
        self.may_go.release()
        self.has_stepped.acquire()


def make_trainer(reward, overlap: bool, folder: Path, updates: int, options: argparse.Namespace) -> FlowGRPOTrainer:
    pipeline = load_pipeline()
    size = pipeline.default_sample_size * pipeline.vae_scale_factor
    images = options.parts * options.batch_size
    args = FlowGRPOConfig(
        output_dir=str(folder),
        max_steps=updates,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.parts,
        steps_per_generation=options.parts,
        num_generations=options.num_generations,
        num_inference_steps=options.num_steps,
        # Sampling is what rewards hide behind: train one step of it
        sde_window_size=1,
        height=size,
        width=size,
        max_sequence_length=1,
        overlap_rewards=overlap,
        gradient_checkpointing=False,
        log_images=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    dataset = load_prompts("train").select(range(images // options.num_generations))
    lora = LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian")
    trainer = FlowGRPOTrainer(pipeline, reward, args, dataset, peft_config=lora)
    trainer.remove_callback(FlowProgressCallback)  # stdout is for the result alone
    return trainer


def take_turns(trainers: list[FlowGRPOTrainer], updates: int) -> list[TakeTurns]:
    turns = []
    for trainer in trainers:
        turns.append(TakeTurns(trainer.accelerator.device))
        trainer.add_callback(turns[-1])
        threading.Thread(target=trainer.train, daemon=True).start()
    for _ in range(updates):
        for turn in turns:
            turn.step()
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=8, help="forwards' sizes in a sampling phase")
    parser.add_argument("--batch-size", type=int, default=8, help="images in one forward")
    parser.add_argument("--num-generations", type=int, default=8, help="images of each prompt")
    parser.add_argument("--num-steps", type=int, default=10, help="sampling steps, one of them trained")
    parser.add_argument("--share", type=float, default=1.0, help="time of the rewards as a share of the update's")
    parser.add_argument("--repeats", type=int, default=6, help="updates that are measured")
    options = parser.parse_args()
    logging.set_verbosity_error()
    diffusers_logging.set_verbosity_error()

    updates = WARM_UP + options.repeats
    images = options.parts * options.batch_size
    with tempfile.TemporaryDirectory() as folder:
        alone = make_trainer(Remote(0.0), False, Path(folder, "alone"), WARM_UP + 2, options)
        (turn,) = take_turns([alone], WARM_UP + 2)
        seconds = statistics.median(turn.times[WARM_UP:])
        result = {"update_without_rewards_s": round(seconds, 4)}
        for kind, reward in KINDS.items():
            pair = [
                make_trainer(reward(options.share * seconds / images), overlap, Path(folder, kind), updates, options)
                for overlap in (False, True)
            ]
            serial, overlapped = take_turns(pair, updates)
            ratios = [s / o for s, o in zip(serial.times[WARM_UP:], overlapped.times[WARM_UP:], strict=True)]
            result[f"{kind}_gain"] = round(statistics.median(ratios), 3)
            result[f"{kind}_serial_s"] = round(statistics.median(serial.times[WARM_UP:]), 4)
            result[f"{kind}_overlapped_s"] = round(statistics.median(overlapped.times[WARM_UP:]), 4)
    result |= {
        "parts": options.parts,
        "batch_size": options.batch_size,
        "num_steps": options.num_steps,
        "share": options.share,
        "repeats": options.repeats,
        "device": str(alone.accelerator.device),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
