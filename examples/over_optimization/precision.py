"""What rounding makes of the importance ratio: the same samples and weights in several precisions.

    python examples/over_optimization/precision.py --output outputs/precision     # 18 runs, an hour on one core
    python examples/over_optimization/precision.py --output outputs/precision --figure docs/images/ratio_precision.png

A run is trained in float32. After the first of the two updates of some of its sampling phases the log-ratios of some
samples are computed in every precision, each from two forwards of its own: at the weights that sampled, and at the
present ones. One half of the samples is what the update has been made of, the other what the next one will be made of.
What is compared is what the clipping sees: the log-ratio itself, and whether it takes the gradient away.
"""

import argparse
import contextlib
import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch.overrides import TorchFunctionMode

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer, GuardConfig
from trl_flow.algorithms import MicroBatch
from trl_flow.functional import log_ratio
from trl_flow.rewards import ShapesReward
from trl_flow.shapes import load_pipeline, load_prompts
from trl_flow.shapes.bundled import DRAWING_SETTINGS


# Each paper's learning rate and clip range; that of Guard is 2e-6 at 65,536 dimensions and 1.6e-5 at the model's 1,024
METHODS: dict[str, tuple[type[FlowGRPOConfig], dict[str, Any]]] = {
    "guard": (GuardConfig, {}),
    "flow-grpo": (FlowGRPOConfig, {}),
    "dance-grpo": (FlowGRPOConfig, {"sde_type": "dance", "noise_level": 0.3, "share_initial_noise": True}),
}
SCALES = {"float32": (8, 32, 128), "float16": (32,), "bfloat16": (8, 32, 128)}
SAMPLES = 16  # of each half


class Tf32(TorchFunctionMode):
    """Rounds what matrix products read to the ten bits of mantissa that tensor cores read in TF32."""

    PRODUCTS = (F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.PRODUCTS:
            args = [self.rounded(a) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return ((tensor.detach().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@contextlib.contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    torch.clear_autocast_cache()
    with torch.autocast("cpu", dtype, cache_enabled=False):
        yield


@contextlib.contextmanager
def float32_residuals(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Autocast with the sum over the blocks, and the output layer, in float32."""
    widen = [model.pos_embed, model.context_embedder]
    hooks = [module.register_forward_hook(lambda module, args, output: output.float()) for module in widen]
    linear, output_layer = F.linear, model.proj_out

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return linear(hidden.float(), output_layer.weight.float(), output_layer.bias.float())

    output_layer.forward = forward
    try:
        with autocast(dtype):
            yield
    finally:
        del output_layer.forward
        for hook in hooks:
            hook.remove()


def precisions(model: torch.nn.Module) -> dict[str, Callable[[], contextlib.AbstractContextManager]]:
    return {
        "float32": contextlib.nullcontext,
        "TF32": Tf32,
        "float16": lambda: autocast(torch.float16),
        "float16, float32 residuals": lambda: float32_residuals(model, torch.float16),
        "bfloat16": lambda: autocast(torch.bfloat16),
        "bfloat16, float32 residuals": lambda: float32_residuals(model, torch.bfloat16),
    }


def first_samples(batch: MicroBatch) -> MicroBatch:
    tensors = {name: tensor[:SAMPLES] for name, tensor in batch.tensors.items()}
    return MicroBatch(batch.prompts[:SAMPLES], batch.steps, tensors, batch.advantages[:SAMPLES])


class Measuring(FlowGRPOTrainer):
    """Compares the precisions in the second update of every `every`-th sampling phase."""

    every = 10

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.measured: list[dict[str, Any]] = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        generation, update = self.run_state.generation, self.run_state.update
        if update == 0:
            self.run_state_weights = self.policy.copy_weights()
        elif generation % self.every == 0:
            self.policy.sampling_weights = self.run_state_weights
            for trained, batch in zip((True, False), self.run_state.micro_batches, strict=True):
                rows = self.compare(first_samples(batch), generation)
                self.measured += [row | {"trained": trained} for row in rows]
        return super().training_step(model, inputs, num_items_in_batch)

    @torch.no_grad()
    def compare(self, batch: MicroBatch, generation: int) -> list[dict[str, Any]]:
        transformer = self.backbone.model
        condition, rows = self.policy.condition(batch.prompts), []
        for index, step in enumerate(batch.steps):
            exact: dict[str, torch.Tensor] = {}
            for name, context in precisions(transformer).items():
                found = self.log_ratios(batch, index, step, condition, context, SCALES.get(name, ()))
                exact = exact or found
                for scale, values in found.items():
                    label = name if scale == "1" else f"{name}, k = {scale}"
                    rows.append(self.row(label, values, exact["1"], batch.advantages[:, index]))
                    rows[-1] |= {"generation": generation, "step": step}
        return rows

    def log_ratios(
        self, batch: MicroBatch, index: int, step: int, condition, context, scales
    ) -> dict[str, torch.Tensor]:
        """By the scale of the probe, 1 being none."""
        dynamics, tensors = self.algorithm.dynamics, batch.tensors
        latents, sample = tensors["latents"][:, index], tensors["next_latents"][:, index]

        def mean(scale: float):
            with self.policy.at("probe", scale), context():
                prediction = self.policy.predict(latents, dynamics.schedule.timesteps[step], condition)
            return dynamics.transition(prediction, latents, step)

        old, std = mean(0.0)
        options = {"kind": self.args.importance_ratio}
        ways = {"1": mean(1.0).mean, **{str(k): old + (mean(float(k)).mean - old) / k for k in scales}}
        # The sample lies where the noise has taken it from this precision's own mean
        noise = sample - tensors["means"][:, index]
        return {k: log_ratio(old + noise, new, old, std, **options) for k, new in ways.items()}

    def row(self, name: str, values: torch.Tensor, exact: torch.Tensor, advantages: torch.Tensor) -> dict[str, Any]:
        low, high = self.algorithm.epsilon_low, self.algorithm.epsilon_high

        def sides(log_ratios: torch.Tensor) -> torch.Tensor:
            excess = torch.expm1(log_ratios)
            return (excess > high).int() - (excess < -low).int()

        side, clipped = sides(values), sides(values) * advantages.sign() > 0
        outside = side != 0
        return {
            "precision": name,
            "correlation": torch.corrcoef(torch.stack([values, exact]))[0, 1].item(),
            "spread": values.std().item(),
            "error": (values - exact).square().mean().sqrt().item(),
            "outside": outside.float().mean().item(),
            "right_side": clipped.sum().item() / max(outside.sum().item(), 1),
            "same_decision": (clipped == (sides(exact) * advantages.sign() > 0)).float().mean().item(),
            "clip_range": low,
        }


def run(method: str, guidance: float, seed: int, updates: int) -> list[dict[str, Any]]:
    cls, fields = METHODS[method]
    with tempfile.TemporaryDirectory() as folder:
        args = cls(
            output_dir=folder,
            **{name: DRAWING_SETTINGS[name] for name in ("height", "width", "max_sequence_length")},
            num_inference_steps=6,
            guidance_scale=guidance,
            num_generations=8,
            per_device_train_batch_size=64,
            max_steps=updates,
            seed=seed,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1000,
            log_images=False,
            gradient_checkpointing=False,
            ratio_probe=0,
            **fields,
        )
        trainer = Measuring(
            model=load_pipeline(),
            reward_funcs=ShapesReward("soft"),
            args=args,
            train_dataset=load_prompts("train"),
            peft_config=LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian"),
        )
        trainer.train()
    about = {"method": method, "guidance": guidance, "seed": seed}
    return [about | row for row in trainer.measured]


def table(rows: list[dict[str, Any]]) -> str:
    """Means over steps and phases, then over seeds; the standard error is that over seeds."""
    groups: dict[tuple, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["method"], row["guidance"], row["precision"]][row["seed"]].append(row)
    names = {
        "correlation": "correlation with float32",
        "outside": "outside the range",
        "right_side": "of these, where the advantage pushes",
        "right_side_trained": "the same of the samples that were trained on",
        "same_decision": "same decision as float32",
    }
    lines = [
        "| method | guidance | precision | " + " | ".join(names.values()) + " |",
        "| --- " * (3 + len(names)) + "|",
    ]
    for (method, guidance, precision), seeds in groups.items():
        cells = []
        for name in names:
            key, trained = name.removesuffix("_trained"), name.endswith("_trained")
            means = []
            for own in seeds.values():
                chosen = [row for row in own if row["trained"] == trained and not math.isnan(row[key])]
                # A share of few is worth little
                weights = [row["outside"] if key == "right_side" else 1.0 for row in chosen]
                total = sum(weight * row[key] for weight, row in zip(weights, chosen, strict=True))
                means.append(total / sum(weights) if sum(weights) else math.nan)
            means = [mean for mean in means if not math.isnan(mean)]
            error = f" ± {statistics.stdev(means) / len(means) ** 0.5:.2f}" if len(means) > 1 else ""
            cells.append(f"{statistics.fmean(means):.2f}{error}" if means else "none outside")
        lines.append(f"| {method} | {guidance:g} | {precision} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Error of the log-ratio in units of the clip range, and the share of equal decisions, by precision."""
    names = ["float16", "bfloat16", *(f"bfloat16, k = {k}" for k in SCALES["bfloat16"])]
    settings = sorted({(row["method"], row["guidance"]) for row in rows})
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for method, guidance in settings:
        chosen = [row for row in rows if (row["method"], row["guidance"], row["trained"]) == (method, guidance, False)]
        for axis, value in (
            (axes[0], lambda row: row["error"] / row["clip_range"]),
            (axes[1], lambda row: row["same_decision"]),
        ):
            means = [statistics.fmean(value(row) for row in chosen if row["precision"] == name) for name in names]
            style = {
                "linestyle": "-" if guidance == 1 else "--",
                "color": f"C{list(METHODS).index(method)}",
                "marker": "o",
            }
            axis.plot(range(len(names)), means, label=f"{method}, guidance {guidance:g}", **style)
    axes[0].axhline(1, color="gray", linewidth=0.8)
    axes[0].set(yscale="log", ylabel="error of the log-ratio / clip range", title="Rounding")
    axes[1].set(ylabel="share of the samples and steps", ylim=(None, 1), title="Same clip decision as float32")
    for axis in axes:
        axis.set_xticks(range(len(names)), names, rotation=25, ha="right")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder; runs that are there are not run again")
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--figure", type=Path, help="where to draw a figure of all runs in the folder")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        for method in options.methods:
            for guidance in (1.0, 4.5):
                path = options.output / f"{method}-{guidance:g}-{seed}.json"
                if not path.exists():
                    start = time.perf_counter()
                    path.write_text(json.dumps(run(method, guidance, seed, options.updates)))
                    print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)
    rows = [row for path in sorted(options.output.glob("*.json")) for row in json.loads(path.read_text())]
    print(table(rows))
    if options.figure:
        figure(rows, options.figure)


if __name__ == "__main__":
    main()
