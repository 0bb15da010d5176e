"""How much work a run is, to say beforehand how long all of them take."""

import math
import statistics
import time
from typing import Any

import torch
from analysis import Rows

from trl_flow.shapes import load_pipeline


# In forwards of the transformer for one image: a forward with its backward, decoding and scoring an image, and a run's
# start
BACKWARD, IMAGE, START = 3.0, 4.0, 3000.0
ROUNDING = 1.6  # how much slower a forward is with emulated rounding


def units(settings: dict[str, Any]) -> float:
    """Forwards of the transformer for one image, and what takes as long."""
    if settings["kind"] == "lag":
        given = settings["arguments"]
        forwards = 6 + BACKWARD * 5 * (max(given["lags"]) + 6) + 5 * (2 * len(given["lags"]) + 1)
        return START + given["prompts"] * given["num_generations"] * (forwards + IMAGE)
    if settings["kind"] == "absolute_term":
        given = settings["arguments"]
        return START + given["groups"] * given["num_generations"] * (6 + 5 * (1 + 2 * (BACKWARD - 1)) + IMAGE)
    fields, number = settings["fields"], settings["prompts"] * settings["num_generations"]
    steps = fields["num_inference_steps"]
    guidance = 2 if fields["guidance_scale"] > 1 else 1
    iterations = fields.get("num_iterations", 1)
    trained = fields.get("timesteps_per_sample") or math.floor((steps - 1) * fields.get("timestep_fraction", 1.0))
    each = BACKWARD + (1 if fields.get("beta") or fields.get("ratio_probe") else 0)
    images = steps if fields.get("dense_rewards") else 1
    phase = number * (steps * guidance + IMAGE * images + trained * each * guidance * iterations)
    phases = settings["updates"] / (fields["steps_per_generation"] * iterations)
    evaluations = 2 + settings["updates"] / settings["eval_updates"]
    drawn = settings["eval_prompts"] * settings["eval_images"]
    slower = ROUNDING if settings["rounding"] else 1.0
    return START + slower * (phases * phase + evaluations * drawn * (steps * guidance + 2 * IMAGE))


def done(settings: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Settings with the updates that a run has made, which may have stopped early."""
    return settings | ({"updates": result["evaluations"]["update"][-1]} if "evaluations" in result else {})


def seconds_of_unit(rows: Rows) -> float:
    """From the runs that are done, or from a few forwards."""
    known = [row["seconds"] / row["units"] for row in rows.values()]
    return statistics.median(known) if known else measured()


@torch.no_grad()
def measured(images: int = 96, repeats: int = 5) -> float:
    torch.set_num_threads(1)
    transformer = load_pipeline().transformer
    size, config = transformer.config.sample_size, transformer.config
    latents = torch.randn(images, config.in_channels, size, size)
    given = {
        "encoder_hidden_states": torch.randn(images, 13, config.joint_attention_dim),
        "pooled_projections": torch.randn(images, config.pooled_projection_dim),
        "timestep": torch.full((images,), 500.0),
    }
    found = []
    for _ in range(repeats):
        start = time.process_time()
        transformer(latents, **given)
        found.append(time.process_time() - start)
    return min(found) / images
