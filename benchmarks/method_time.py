"""
What GRPO-Guard, its probe, SLAS and VGPO add to a phase of plain Flow-GRPO with two updates, as one JSON line.

    python benchmarks/method_time.py
    python benchmarks/method_time.py --num-steps 6 --batch-size 144

One trainer for each method, all with the same model, prompts, dynamics and trained steps, so that only the method's
own arithmetic differs: the ratio and the weight (Guard), one more forward of the second update (its probe), the shape
of the advantages (SLAS), the reward of every step and the values made of them (VGPO; here with the bundled world's
checker, of images that the VAE has drawn or the tiny decoder). They take turns in one process, phase by phase, so that
whatever else runs on the machine slows all; each figure is the median over the measured phases of the method's time
divided by that of the plain trainer's beside it.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.utils import logging

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer
from trl_flow.rewards import ShapesReward
from trl_flow.shapes import load_pipeline, load_prompts, pipeline_path
from trl_flow.shapes.bundled import TINY_DECODER
from trl_flow.trainer.progress import FlowProgressCallback


WARM_UP = 2  # phases that are not counted: the first ones encode the prompts and allocate

GUARD = {"importance_ratio": "ratio_norm", "timestep_weighting": "inverse_dt", "scale_rewards": "group"}
VGPO = {"dense_rewards": True, "value_discount": 0.9, "value_scale": 0.1}
UPDATES = 2  # in a phase
METHODS = {
    "plain": {},
    "guard": GUARD,
    "guard_probe": GUARD | {"ratio_probe": 32},
    "slas": {"advantage_power": 0.5},
    "vgpo": VGPO,
    "vgpo_projection": VGPO | {"projection_vae": str(Path(pipeline_path(), TINY_DECODER))},
}


class TakeTurns(TrainerCallback):
    """Lets one trainer go through one phase at a time, and times it as `(wall, computing)` seconds."""

    def __init__(self, device: torch.device):
        self.device = device
        self.may_go = threading.Semaphore(0)
        self.has_stepped = threading.Semaphore(0)
        self.times: list[tuple[float, float]] = []

    def _clocks(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % UPDATES == 0:
            self.may_go.acquire()
            self.start = self._clocks()

    def on_step_end(self, args, state, control, **kwargs):
        # Logging follows this event, and is the same for all
        if state.global_step % UPDATES == 0:
            end = self._clocks()
            self.times.append((end[0] - self.start[0], end[1] - self.start[1]))
            self.has_stepped.release()

    def step(self) -> None:
        self.may_go.release()
        self.has_stepped.acquire()


def make_trainer(fields: dict, folder: Path, options: argparse.Namespace) -> FlowGRPOTrainer:
    pipeline = load_pipeline()
    size = pipeline.default_sample_size * pipeline.vae_scale_factor
    args = FlowGRPOConfig(
        output_dir=str(folder),
        max_steps=UPDATES * (WARM_UP + options.repeats),
        per_device_train_batch_size=options.batch_size // UPDATES,
        steps_per_generation=UPDATES,
        num_generations=options.num_generations,
        num_inference_steps=options.num_steps,
        guidance_scale=options.guidance,
        height=size,
        width=size,
        max_sequence_length=1,
        gradient_checkpointing=False,
        logging_steps=1,
        log_images=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **{"ratio_probe": 0} | fields,
    )
    dataset = load_prompts("train").select(range(options.batch_size // options.num_generations))
    lora = LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian")
    trainer = FlowGRPOTrainer(pipeline, ShapesReward(), args, dataset, peft_config=lora)
    trainer.remove_callback(FlowProgressCallback)  # stdout is for the result alone
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64, help="samples in a phase")
    parser.add_argument("--num-generations", type=int, default=8, help="samples of each prompt")
    parser.add_argument("--num-steps", type=int, default=10, help="sampling steps, all but the last trained")
    parser.add_argument("--guidance", type=float, default=4.5, help="classifier-free guidance; 1 is none")
    parser.add_argument("--repeats", type=int, default=10, help="phases that are measured")
    options = parser.parse_args()
    logging.set_verbosity_error()
    diffusers_logging.set_verbosity_error()

    with tempfile.TemporaryDirectory() as folder:
        turns, threads = {}, []
        for name, fields in METHODS.items():
            trainer = make_trainer(fields, Path(folder, name), options)
            turns[name] = TakeTurns(trainer.accelerator.device)
            trainer.add_callback(turns[name])
            threads.append(threading.Thread(target=trainer.train, daemon=True))
            threads[-1].start()
        for _ in range(WARM_UP + options.repeats):
            for turn in turns.values():
                turn.step()
        for thread in threads:
            thread.join()  # they write into the folder

    result = {"plain_s": round(statistics.median(wall for wall, _ in turns["plain"].times[WARM_UP:]), 4)}
    for clock, label in enumerate(("ratio", "cpu_ratio")):
        for name in METHODS:
            if name != "plain":
                pairs = zip(turns[name].times[WARM_UP:], turns["plain"].times[WARM_UP:], strict=True)
                ratios = [method[clock] / plain[clock] for method, plain in pairs]
                result[f"{name}_{label}"] = round(statistics.median(ratios), 4)
    result |= {
        "batch_size": options.batch_size,
        "num_steps": options.num_steps,
        "guidance": options.guidance,
        "repeats": options.repeats,
        "device": str(turns["plain"].device),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
