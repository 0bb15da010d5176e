"""
What the trainer adds to the transformer's own work, printed as one JSON line.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --num-steps 10 --guidance 4.5

A training step of [`FlowGRPOTrainer`] (sampling, decoding, rewards, advantages, update, logs) is timed against a copy
of the same transformer with the same LoRA, which only does the same forward and backward passes. The two take turns in
one process, so that whatever else runs on the machine slows both; each figure is the median over the measured steps.

`ratio` compares wall time, `cpu_ratio` the time that this process spent computing, which other programs disturb less.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.utils import logging

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer
from trl_flow.rewards import JPEGCompressibilityReward, ShapesReward
from trl_flow.shapes import load_pipeline, load_prompts
from trl_flow.trainer.progress import FlowProgressCallback


WARM_UP = 2  # steps that are not counted: the first ones encode the prompts and allocate


def clocks(device: torch.device) -> tuple[float, float]:
    """Seconds on the wall and of this process's computing, read once the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


class BareTransformer:
    """
    The forward and backward passes of one training step, and nothing else.

    Args:
        trainer ([`FlowGRPOTrainer`]): whose model is copied, before it is trained.
        prompts (`list[str]`): one for each sample of the batch.
    """

    def __init__(self, trainer: FlowGRPOTrainer, prompts: list[str]):
        self.trainer = trainer
        self.model = copy.deepcopy(trainer.model).train()
        backbone, args = trainer.backbone, trainer.args
        self.timesteps = backbone.schedule(args.num_inference_steps).timesteps
        if backbone.uses_guidance(args.guidance_scale):
            prompts = [""] * len(prompts) + prompts  # both in one batch, as the trainer and the pipeline run them
        self.condition = trainer.policy.conditions(prompts)
        self.latents = torch.randn(
            len(prompts), *backbone.latent_shape(), device=backbone.device, dtype=backbone.dtype
        )

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        with self.trainer.accelerator.autocast():
            return self.model(
                hidden_states=self.latents,
                timestep=timestep.expand(len(self.latents)),
                return_dict=False,
                **self.condition,
            )[0]

    def step(self) -> None:
        with torch.no_grad():
            for timestep in self.timesteps:
                self.forward(timestep)
        for timestep in self.timesteps[:-1]:
            self.forward(timestep).float().square().mean().backward()
        self.model.zero_grad()


class TakeTurns(TrainerCallback):
    """After each of the trainer's steps, one of the bare transformer; both timed as `(wall, computing)` seconds."""

    def __init__(self, device: torch.device):
        self.device = device
        self.bare: BareTransformer | None = None
        self.trainer_times: list[tuple[float, float]] = []
        self.bare_times: list[tuple[float, float]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = clocks(self.device)

    def on_step_end(self, args, state, control, **kwargs):
        # Logging and saving follow this event: they are counted in the step after
        middle = clocks(self.device)
        self.bare.step()
        end = clocks(self.device)
        self.trainer_times.append((middle[0] - self.start[0], middle[1] - self.start[1]))
        self.bare_times.append((end[0] - middle[0], end[1] - middle[1]))
        self.start = clocks(self.device)


def medians(times: list[tuple[float, float]]) -> tuple[float, float]:
    wall, computing = zip(*times[WARM_UP:], strict=True)
    return statistics.median(wall), statistics.median(computing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of a pipeline; default: the bundled one")
    parser.add_argument("--batch-size", type=int, default=64, help="samples in a training step")
    parser.add_argument("--num-generations", type=int, default=8, help="samples of each prompt")
    parser.add_argument("--num-steps", type=int, default=10, help="sampling steps, all but the last trained")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance; 1 is none")
    parser.add_argument("--size", type=int, help="height and width in pixels; default: the model's own")
    parser.add_argument("--max-sequence-length", type=int, default=1, help="T5 tokens; the bundled model has no T5")
    parser.add_argument("--repeats", type=int, default=10, help="training steps that are measured")
    options = parser.parse_args()
    logging.set_verbosity_error()
    diffusers_logging.set_verbosity_error()

    if options.model is None:
        pipeline, dataset, reward = load_pipeline(), load_prompts("train"), ShapesReward()
    else:
        pipeline = DiffusionPipeline.from_pretrained(options.model)
        dataset = Dataset.from_dict({"prompt": [f"a photo of {number} cats" for number in range(2, 34)]})
        reward = JPEGCompressibilityReward()
    # As many prompts as one step takes: all are encoded while warming up, as they are after a first epoch of training
    dataset = dataset.select(range(options.batch_size // options.num_generations))
    size = options.size or pipeline.default_sample_size * pipeline.vae_scale_factor

    with tempfile.TemporaryDirectory() as folder:
        args = FlowGRPOConfig(
            output_dir=folder,
            max_steps=WARM_UP + options.repeats,
            per_device_train_batch_size=options.batch_size,
            steps_per_generation=1,  # each step samples
            num_generations=options.num_generations,
            num_inference_steps=options.num_steps,
            guidance_scale=options.guidance,
            height=size,
            width=size,
            max_sequence_length=options.max_sequence_length,
            gradient_checkpointing=False,
            logging_steps=1,  # the dearest: every step pays for its metrics and its grid of images
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = FlowGRPOTrainer(
            pipeline, reward, args, dataset, peft_config=LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian")
        )
        turns = TakeTurns(trainer.accelerator.device)
        turns.bare = BareTransformer(trainer, dataset["prompt"][:] * options.num_generations)
        trainer.add_callback(turns)
        trainer.remove_callback(FlowProgressCallback)  # stdout is for the result alone
        trainer.train()

    (wall, computing), (bare_wall, bare_computing) = medians(turns.trainer_times), medians(turns.bare_times)
    result = {
        "trainer_s": round(wall, 4),
        "bare_s": round(bare_wall, 4),
        "ratio": round(wall / bare_wall, 4),
        "cpu_ratio": round(computing / bare_computing, 4),
        "model": options.model or "bundled",
        "batch_size": options.batch_size,
        "num_steps": options.num_steps,
        "guidance": options.guidance,
        "size": size,
        "repeats": options.repeats,
        "device": str(turns.device),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
