"""
What a reward server can take, and how long its clients wait. Prints one line of JSON.

    python benchmarks/reward_server.py
    python benchmarks/reward_server.py --rewards ocr --sizes 512 --workers 1 2 --images 400 10000

Starts `trl-flow serve-rewards` on this machine, for each number of `--workers` and each size, and has `--clients` of
them score pictures with a word on each, through [`RemoteReward`], one call after another. A call's latency is what its
caller waits: encoding as PNG, both ways, waiting for the other clients, decoding and scoring. `local_images_per_s` is
the reward function without a server, in one thread. The `cpu_ms` are processor time for each picture, which other
programs on the machine disturb less. Memory is what is resident in the server with its workers, its slope is fitted
to the second half of a run. Clients and server share the cores.
"""

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
import time

import numpy as np
import psutil
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from trl_flow.rewards import RemoteReward
from trl_flow.rewards.named import named_reward
from trl_flow.rewards.scorer import RewardScorer


DISTINCT = 32  # pictures that are drawn, and then used in turn
WORDS = ("OPEN", "COFFEE", "EXIT", "MARKET")


def draw(number: int, size: int) -> tuple[list[str], list[Image.Image]]:
    """Prompts and pictures: smooth shapes with a little noise, which compress about as well as photographs."""
    generator = np.random.default_rng(0)
    prompts, images = [], []
    for word in itertools.islice(itertools.cycle(WORDS), number):
        coarse = Image.fromarray(generator.integers(0, 160, (8, 8, 3), dtype=np.uint8))
        smooth = coarse.resize((size, size), Image.Resampling.BICUBIC).filter(ImageFilter.UnsharpMask())
        ImageDraw.Draw(smooth).text((size / 2, size / 2), word, "white", font_size=size / 7, anchor="mm")
        noisy = np.asarray(smooth, dtype=np.int16) + generator.integers(-4, 5, (size, size, 3))
        images.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
        prompts.append(f'a sign that says "{word}"')
    return prompts, images


class Server:
    """A running server with its workers."""

    def __init__(self, rewards: str, workers: int):
        command = [sys.executable, "-m", "trl_flow", "serve-rewards", "--rewards", rewards, "--port", "0"]
        command += ["--workers", str(workers)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = self._process.stdout.readline().split()[2]
        first = psutil.Process(self._process.pid)
        self.processes = [first, *first.children()]

    def computing(self) -> float:
        return sum(map(computing, self.processes))

    def memory(self) -> float:
        """MB that are resident, of all processes."""
        return sum(process.memory_info().rss for process in self.processes) / 1e6

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def computing(process: psutil.Process) -> float:
    """Seconds of processor time that it has used."""
    times = process.cpu_times()
    return times.user + times.system


class Load:
    """Clients that ask for the scores of `number` pictures, a call after the other, and what is noted meanwhile."""

    def __init__(self, server: Server, pictures: tuple[list[str], list[Image.Image]], number: int, each: int):
        self.server, self.pictures, self.each = server, pictures, each
        self.calls = iter(range(0, number, each))
        self.latencies: list[float] = []
        self.memory: list[tuple[int, float]] = []
        self.rewards: list[float] = []
        self.bar = tqdm(total=number, unit="image")

    async def call(self, client: RemoteReward, first: int) -> list[float]:
        chosen = [i % len(self.pictures[0]) for i in range(first, first + self.each)]
        prompts, images = ([kind[i] for i in chosen] for kind in self.pictures)
        return await client(prompts=prompts, images=images)

    async def client(self, reward: RemoteReward) -> None:
        for first in self.calls:
            started = time.perf_counter()
            self.rewards += await self.call(reward, first)
            self.latencies.append(time.perf_counter() - started)
            self.bar.update(self.each)
            self.memory.append((len(self.rewards), self.server.memory()))

    async def run(self, clients: list[RemoteReward]) -> float:
        """Seconds for all."""
        for index, client in enumerate(clients):  # opens what is opened at first
            await self.call(client, index)
        started = time.perf_counter()
        await asyncio.gather(*map(self.client, clients))
        self.bar.close()
        return time.perf_counter() - started


def measure(workers: int, number: int, size: int, options: argparse.Namespace) -> dict[str, float]:
    server, local = Server(options.rewards, workers), named_reward(options.rewards)
    try:
        prompts, images = draw(min(DISTINCT, number), size)
        clients = [RemoteReward(server.url) for _ in range(options.clients)]
        load = Load(server, (prompts, images), number, options.images_per_call)
        before = computing(psutil.Process()), server.computing()
        seconds = asyncio.run(load.run(clients))
        client_seconds, server_seconds = computing(psutil.Process()) - before[0], server.computing() - before[1]
        done, memory = np.array(load.memory[len(load.memory) // 2 :]).T
    finally:
        server.close()
    RewardScorer([local]).score(prompts[:1], images[:1], {})  # loads it
    started = time.perf_counter()
    RewardScorer([local]).score(prompts, images, {})
    local_seconds = time.perf_counter() - started
    return {
        "size": size,
        "workers": workers,
        "images": number,
        "images_per_s": round(number / seconds, 2),
        "local_images_per_s": round(len(images) / local_seconds, 2),
        "client_cpu_ms": round(1000 * client_seconds / number, 2),
        "server_cpu_ms": round(1000 * server_seconds / number, 2),
        "p50_ms": round(1000 * float(np.quantile(load.latencies, 0.5)), 1),
        "p99_ms": round(1000 * float(np.quantile(load.latencies, 0.99)), 1),
        "memory_mb": [round(memory[0], 1), round(memory[-1], 1)],
        "memory_slope_mb_per_1000_images": round(1000 * float(np.polyfit(done, memory, 1)[0]), 3),
        "mean_reward": round(float(np.mean(load.rewards)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", default="jpeg_incompressibility", help="the name of one reward function")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1], help="of the server, one number after the other"
    )
    number = "pictures of each size, one number or one for each of --workers"
    parser.add_argument("--images", type=int, nargs="+", default=[1000], help=number)
    parser.add_argument("--images-per-call", type=int, default=4)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 512], help="heights and widths in pixels")
    options = parser.parse_args()

    numbers = options.images if len(options.images) > 1 else options.images * len(options.workers)
    runs = [(*run, size) for size in options.sizes for run in zip(options.workers, numbers, strict=True)]
    result = {
        "reward": options.rewards,
        "images_per_call": options.images_per_call,
        "clients": options.clients,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "results": [measure(*run, options) for run in runs],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
