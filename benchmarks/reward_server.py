"""
Throughput and latency of one reward server, printed as one JSON line.

    python benchmarks/reward_server.py
    python benchmarks/reward_server.py --sizes 1024 --images-per-request 16 --rewards pickscore

Starts `trl-flow serve-rewards` on this machine and scores pictures of each size through [`RemoteReward`], with two
requests under way at a time. A request's latency is what the caller waits: encoding as PNG, both ways, decoding and
scoring. `local_images_per_s` is the reward function without a server, in one thread. The `cpu_ms` are processor time
for each picture, which other programs on the machine disturb less.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time

import numpy as np
import psutil
from PIL import Image, ImageFilter
from tqdm import tqdm

from trl_flow.rewards import RemoteReward
from trl_flow.rewards.named import named_reward
from trl_flow.rewards.scorer import RewardScorer


DISTINCT = 32  # pictures that are drawn, and then used in turn
CONCURRENCY = 2


def draw(number: int, size: int) -> list[Image.Image]:
    """Smooth shapes with a little noise, which compress about as well as photographs."""
    generator = np.random.default_rng(0)
    images = []
    for _ in range(number):
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = coarse.resize((size, size), Image.Resampling.BICUBIC).filter(ImageFilter.UnsharpMask())
        noisy = np.asarray(smooth, dtype=np.int16) + generator.integers(-4, 5, (size, size, 3))
        images.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    return images


async def measure(reward: RemoteReward, requests: list[list[Image.Image]], label: str) -> tuple[float, list[float]]:
    """Seconds for all requests, and those of each."""
    slots, latencies = asyncio.Semaphore(CONCURRENCY), []
    bar = tqdm(total=len(requests), desc=label, unit="request")

    async def ask(images: list[Image.Image]) -> None:
        async with slots:
            started = time.perf_counter()
            await reward(prompts=["a picture"] * len(images), images=images)
            latencies.append(time.perf_counter() - started)
            bar.update()

    await ask(requests[0])  # opens the connection
    latencies.clear()
    started = time.perf_counter()
    await asyncio.gather(*map(ask, requests))
    seconds = time.perf_counter() - started
    bar.close()
    return seconds, latencies


def computing(process: psutil.Process) -> float:
    """Seconds of processor time that it has used."""
    times = process.cpu_times()
    return times.user + times.system


def measure_size(
    reward: RemoteReward, local, server: psutil.Process, size: int, options: argparse.Namespace
) -> dict[str, float]:
    images = draw(min(DISTINCT, options.images), size)
    all_images = [images[i % len(images)] for i in range(options.images)]
    step = options.images_per_request
    requests = [all_images[first : first + step] for first in range(0, len(all_images), step)]
    client = psutil.Process()
    before = computing(client), computing(server)
    seconds, latencies = asyncio.run(measure(reward, requests, f"{size} x {size}"))
    client_seconds, server_seconds = computing(client) - before[0], computing(server) - before[1]

    started = time.perf_counter()
    RewardScorer([local]).score(["a picture"] * len(images), images, {})
    local_seconds = time.perf_counter() - started
    return {
        "size": size,
        "images_per_s": round(options.images / seconds, 1),
        "local_images_per_s": round(len(images) / local_seconds, 1),
        "client_cpu_ms": round(1000 * client_seconds / options.images, 2),
        "server_cpu_ms": round(1000 * server_seconds / options.images, 2),
        "p50_ms": round(1000 * float(np.quantile(latencies, 0.5)), 1),
        "p99_ms": round(1000 * float(np.quantile(latencies, 0.99)), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", default="jpeg_incompressibility", help="the name of one reward function")
    parser.add_argument("--images", type=int, default=1000, help="pictures of each size")
    parser.add_argument("--images-per-request", type=int, default=4)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 512], help="heights and widths in pixels")
    options = parser.parse_args()

    command = [sys.executable, "-m", "trl_flow", "serve-rewards", "--rewards", options.rewards, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().split()[2]
        reward, local = RemoteReward(url), named_reward(options.rewards)
        results = [measure_size(reward, local, psutil.Process(server.pid), size, options) for size in options.sizes]
    finally:
        server.terminate()
        server.wait()
    result = {
        "reward": options.rewards,
        "images": options.images,
        "images_per_request": options.images_per_request,
        "requests_at_a_time": CONCURRENCY,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "results": results,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
