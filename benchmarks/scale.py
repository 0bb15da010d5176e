"""
What one sampling phase costs on many GPUs, simulated from counted operations and bytes: no GPU is needed.

    python benchmarks/scale.py --model sd35-medium
    python benchmarks/scale.py --model flux-dev --tokens 512 --images-at-once 4 --trained-steps 2

The transformer, made from its published configuration without data, is run to count its matrix products; weights and
adapters are counted in bytes. Speeds of GPU, network and disk are assumptions, and options. A phase ends with the
slowest process, so that images which do not divide cost waiting. The last line is JSON.
"""

import argparse
import json
import math

import torch
from diffusers import AutoencoderKL
from full_size_update import MODELS, make_inputs, make_policy
from torch.utils.flop_counter import FlopCounterMode


# The VAE of both, as published
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
LATENCY = 1e-5  # seconds from one GPU to the next


def counted(name: str, size: int, tokens: int) -> dict[str, int]:
    """Operations of a forward, a forward and backward, and decoding, each for one image, and bytes."""
    policy = make_policy(name, "meta", checkpointing=False)
    adapter = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    weights = sum(p.nbytes for p in policy.parameters()) - adapter
    policy.get_base_model().enable_gradient_checkpointing()
    policy.float()  # without autocast, of which there is none without a device
    inputs = {
        key: value.float() if value.is_floating_point() else value
        for key, value in make_inputs(name, 1, size, tokens, "meta").items()
    }
    vae = AutoencoderKL(**VAE).to("meta")
    operations = {}
    for part in ("forward", "update", "decoding"):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(part == "update"):
            if part == "decoding":
                vae.decode(torch.empty(1, 16, size // 8, size // 8, device="meta"))
            else:
                output = policy(**inputs, return_dict=False)[0]
            if part == "update":
                output.float().square().mean().backward()
        operations[part] = counter.get_total_flops()
    return operations | {"weights": weights, "adapter": adapter}


def phase(counts: dict[str, int], gpus: int, given: argparse.Namespace) -> dict[str, float]:
    """Seconds of the parts of a phase, and the share of the GPUs' time in which they compute."""
    flops, own = given.tflops * 1e12, math.ceil(given.images / gpus)
    trained = math.ceil(own * given.share_trained)
    passes = math.ceil(own / given.images_at_once) * given.steps, math.ceil(trained / given.images_at_once)
    # With gradients of all weights the backward has twice a forward's products, of a LoRA once
    update = counts["update"] + counts["forward"] * (given.sharded + given.kl)
    seconds = {
        "sampling": own * (given.steps * counts["forward"] + counts["decoding"]) / flops,
        "rewards": own * given.reward_seconds,
        "update": trained * given.trained_steps * update / flops,
    }
    bandwidth = (given.node_gb if gpus <= given.gpus_per_node else given.network_gb) * 1e9
    # Around the ring once to add up and once to tell, in each update
    synchronized = 2 * counts["weights" if given.sharded else "adapter"] * (gpus - 1) / gpus / bandwidth
    seconds["communication"] = given.updates * (synchronized + 2 * (gpus - 1) * LATENCY)
    if given.sharded:
        # Weights are gathered for each pass through the model, twice where there is a backward
        gathered = counts["weights"] * (gpus - 1) / gpus / bandwidth
        each = passes[0] + 2 * passes[1] * given.trained_steps
        # What the computation does not cover: blocks are gathered ahead of it
        per_pass = (seconds["sampling"] + seconds["update"]) / each
        seconds["communication"] += each * max(0.0, gathered - per_pass)
    # Weights and the optimizer's two moments in float32
    saved = 3 * (2 * counts["weights"] if given.sharded else counts["adapter"])
    seconds["checkpoint"] = saved / (given.disk_gb * 1e9) * given.updates / given.save_steps
    total = sum(seconds.values())
    work = sum(seconds[part] for part in ("sampling", "rewards", "update")) * given.images / gpus / own
    return seconds | {"total": total, "busy": work / total}


def main(argv: list[str] | None = None) -> None:
    """Prints a table of the parts of a phase for each number of GPUs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, default="sd35-medium")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels")
    parser.add_argument("--tokens", type=int, default=128, help="max_sequence_length")
    parser.add_argument("--images", type=int, default=1152, help="in a sampling phase")
    parser.add_argument("--images-at-once", type=int, default=8, help="per_device_train_batch_size")
    parser.add_argument("--steps", type=int, default=10, help="num_inference_steps")
    parser.add_argument("--trained-steps", type=int, default=9, help="of each image")
    parser.add_argument("--kl", action="store_true", help="beta is above 0: one forward more of the initial model")
    parser.add_argument("--share-trained", type=float, default=1.0, help="num_generations_trained / num_generations")
    parser.add_argument("--updates", type=int, default=2, help="of a phase")
    parser.add_argument("--reward-seconds", type=float, default=0.03, help="of one image, in process, one at a time")
    parser.add_argument("--sharded", action="store_true", help="full fine-tuning under FSDP in place of a LoRA")
    parser.add_argument("--tflops", type=float, default=400, help="of a GPU in use; default: 40 %% of an H100's")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--node-gb", type=float, default=400, help="GB/s of a GPU within a node")
    parser.add_argument("--network-gb", type=float, default=50, help="GB/s of a GPU between nodes")
    parser.add_argument("--disk-gb", type=float, default=2, help="GB/s of the file system, by all together")
    parser.add_argument("--save-steps", type=int, default=50)
    given = parser.parse_args(argv)
    counts = counted(given.model, given.size, given.tokens)
    rows = {gpus: phase(counts, gpus, given) for gpus in given.gpus}
    names = list(next(iter(rows.values())))
    print("| GPUs | " + " | ".join(names) + " |\n|" + " --- |" * (len(names) + 1))
    for gpus, row in rows.items():
        cells = [f"{row[name]:.0%}" if name == "busy" else f"{row[name]:.3g}" for name in names]
        print(f"| {gpus} | " + " | ".join(cells) + " |")
    print(json.dumps({"model": given.model, "counted": counts, "phases": rows}))


if __name__ == "__main__":
    main()
