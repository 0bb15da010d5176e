"""
What `torch_compile=True` brings on the bundled model, printed as one JSON line.

    python benchmarks/compilation.py
    python benchmarks/compilation.py --forwards
    python benchmarks/compilation.py --learning

The first trains one model whose updates are compiled and uncompiled in turns, so that whatever else runs on a machine
slows both. The second lets three copies of the transformer take turns, uncompiled, compiled block by block and as a
whole, in forwards as sampling runs them and in forwards and backwards. Seconds are those that the process spent
computing, but for `compile_s`, and figures medians. The third trains three seeds compiled and not, and compares the
curves of the reward.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
import types

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.utils import logging

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer
from trl_flow.evaluation.intervals import mean_interval
from trl_flow.rewards import ShapesReward
from trl_flow.shapes import load_pipeline, load_prompts
from trl_flow.trainer import progress


WARM_UP = 4  # updates that are not counted: two of each kind
PARTS = ("sampling", "updating")


def make_trainer(given: argparse.Namespace, folder: str, steps: int, *, compiled: bool, seed: int = 42):
    args = FlowGRPOConfig(
        output_dir=folder,
        max_steps=steps,
        seed=seed,
        per_device_train_batch_size=given.batch_size,
        gradient_accumulation_steps=given.accumulation,
        steps_per_generation=given.accumulation,  # each update samples
        num_generations=8,
        num_inference_steps=given.num_steps,
        guidance_scale=given.guidance,
        height=32,
        width=32,
        max_sequence_length=1,  # T5 tokens; the bundled model has no T5
        learning_rate=given.learning_rate,
        gradient_checkpointing=False,
        torch_compile=compiled,
        torch_compile_backend=given.backend if compiled else None,
        use_regional_compilation=not given.whole,
        logging_steps=1,
        log_images=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    lora = LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian")
    trainer = FlowGRPOTrainer(load_pipeline(), ShapesReward(), args, load_prompts("train"), peft_config=lora)
    trainer.remove_callback(progress.FlowProgressCallback)
    trainer.accelerator.print = lambda *args: None  # stdout is for the result alone
    return trainer


class TakeTurns(TrainerCallback):
    """Every second update runs uncompiled, and then samples without gradients, as a run without compilation does."""

    trainer: FlowGRPOTrainer

    def on_step_begin(self, args, state, control, **kwargs):
        compiled = state.global_step % 2 == 0
        torch.compiler.set_stance("default" if compiled else "force_eager")
        self.trainer.policy._one_graph = compiled


def measure_time(given: argparse.Namespace) -> dict:
    progress.time = types.SimpleNamespace(perf_counter=time.process_time, monotonic=time.monotonic)
    with tempfile.TemporaryDirectory() as folder:
        trainer, turns = make_trainer(given, folder, WARM_UP + 2 * given.repeats, compiled=True), TakeTurns()
        turns.trainer = trainer
        trainer.add_callback(turns)
        trainer.train()
    logs = [log for log in trainer.state.log_history if "step_time" in log]
    result = {"compile_s": sum(log.get("time/compiling", 0.0) for log in logs)}
    result["first_update_deviation"] = logs[0]["ratio/first_update_deviation"]
    result["clip_range"] = trainer.algorithm.epsilon_low
    sums = {}
    for compiled in (True, False):
        own = [log for log in logs[WARM_UP:] if (log["step"] % 2 == 1) == compiled]
        found = {part: [log[f"time/{part}"] for log in own] for part in PARTS}
        found["both"] = [sum(values) for values in zip(*found.values(), strict=True)]
        sums[compiled] = {part: statistics.median(values) for part, values in found.items()}
    for part, seconds in sums[True].items():
        result |= {f"{part}_s": seconds, f"{part}_eager_s": sums[False][part]}
        result[f"{part}_ratio"] = sums[False][part] / seconds
    return result | {"repeats": given.repeats}


def measure_forwards(given: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(given, folder, 1, compiled=False)
    backbone, condition = trainer.backbone, trainer.policy.condition(["a red circle"] * given.batch_size)
    latents = torch.randn(given.batch_size, *backbone.latent_shape(), device=backbone.device)
    timestep, scale = backbone.schedule(given.num_steps).timesteps[given.num_steps // 2], given.guidance
    models = {name: copy.deepcopy(trainer.model).train() for name in ("eager", "blocks", "whole")}
    for part in backbone.compiled_parts(models["blocks"].get_base_model()):
        part.compile(backend=given.backend)
    models["whole"].get_base_model().compile(backend=given.backend)

    def run(name: str, kind: str) -> None:
        # Compiled, sampling runs the forward with gradients, too
        with torch.set_grad_enabled(kind == "updating" or name != "eager"):
            told = condition.positive, condition.negative, scale
            prediction = backbone.guided_prediction(models[name], latents, timestep, *told)
            if kind == "updating":
                prediction.square().mean().backward()

    result, times = {}, {(name, kind): [] for name in models for kind in PARTS}
    for name in models:
        start = time.perf_counter()
        run(name, "updating")
        result[f"{name}_compile_s"] = time.perf_counter() - start
    for _ in range(given.repeats):
        for key, found in times.items():
            start = time.process_time()
            run(*key)
            found.append(time.process_time() - start)
    medians = {key: statistics.median(found) for key, found in times.items()}
    # A phase of one update has all forwards of sampling, and trains all steps but the last
    numbers = {"sampling": given.num_steps, "updating": given.num_steps - 1}
    phases = {name: sum(number * medians[name, kind] for kind, number in numbers.items()) for name in models}
    result |= {f"{name}_{kind}_s": seconds for (name, kind), seconds in medians.items()}
    for name in ("blocks", "whole"):
        result |= {f"{name}_{kind}_ratio": medians["eager", kind] / medians[name, kind] for kind in PARTS}
        result[f"{name}_ratio"] = phases["eager"] / phases[name]
    return result


def measure_learning(given: argparse.Namespace) -> dict:
    curves = {False: [], True: []}
    for seed in range(given.seeds):
        for compiled, found in curves.items():
            with tempfile.TemporaryDirectory() as folder:
                trainer = make_trainer(given, folder, given.updates, compiled=compiled, seed=seed)
                trainer.train()
            found.append([log["reward"] for log in trainer.state.log_history if "reward" in log])
    eager, with_it = (np.array(curves[compiled]) for compiled in (False, True))
    later = slice(given.updates // 2, None)
    differences = (with_it - eager)[:, later].mean(axis=1)  # of the same seeds, over the second half
    interval = mean_interval(differences)
    return {
        "first_reward": eager[:, 0].mean(),
        "last_reward_eager": eager[:, later].mean(),
        "last_reward_compiled": with_it[:, later].mean(),
        "difference": interval.mean,
        "interval_95": [interval.low, interval.high],
        "largest_difference_of_an_update": np.abs(with_it - eager).max(),
        "spread_of_seeds": eager[:, later].mean(axis=1).std(ddof=1),
        "seeds": given.seeds,
        "updates": given.updates,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--forwards", action="store_true", help="time the transformer alone")
    kinds.add_argument("--learning", action="store_true", help="compare what is learned")
    parser.add_argument("--backend", default="inductor", help="torch_compile_backend")
    parser.add_argument("--whole", action="store_true", help="use_regional_compilation=False")
    parser.add_argument("--batch-size", type=int, default=16, help="images in a micro-batch")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches in an update")
    parser.add_argument("--num-steps", type=int, default=10, help="sampling steps, all but the last trained")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance; 1 is none")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--repeats", type=int, default=8, help="measured updates of each kind")
    parser.add_argument("--updates", type=int, default=16, help="with --learning, of each run")
    parser.add_argument("--seeds", type=int, default=3, choices=range(2, 6), help="with --learning")
    given = parser.parse_args()
    logging.set_verbosity_error()
    diffusers_logging.set_verbosity_error()
    measure = measure_learning if given.learning else measure_forwards if given.forwards else measure_time
    result = measure(given)
    result = {name: round(float(value), 10) if np.isscalar(value) else value for name, value in result.items()}
    about = {"batch_size": given.batch_size, "num_steps": given.num_steps, "guidance": given.guidance}
    about |= {"whole": given.whole, "accumulation": given.accumulation, "learning_rate": given.learning_rate}
    print(json.dumps(result | about | {"threads": torch.get_num_threads(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
