"""`trl-flow demo`: the bundled model before and after a few minutes of reinforcement learning.

Everything that is written about the result comes from prompts that were never trained on, drawn from the same seeds by
the bundled pipeline as it is shipped and by a fresh copy of it with the adapter loaded from disk.
"""

import json
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import numpy as np
    from diffusers import StableDiffusion3Pipeline
    from PIL import Image

    from trl_flow.evaluation.scoring import PairedDifference
    from trl_flow.trainer import FlowGRPOConfig, FlowGRPOTrainer

RESULTS = "results.json"

# The pictures that are compared come from this seed, whatever the seed of the training
EVAL_SEED = 1234


@dataclass(frozen=True)
class DemoSettings:
    """
    What a demo does.

    Attributes:
        rollouts (`int`): sampling phases.
        prompts_per_rollout, num_generations (`int`): prompts in each, and pictures for each prompt.
        updates_per_rollout (`int`): updates on each sampling phase, on as many equal parts of it.
        num_inference_steps (`int`): sampling steps, in training and in the comparison.
        guidance_scale, noise_level (`float`): as in the config.
        learning_rate, epsilon (`dict[str, float]`): by method; the clip ranges of the papers are for larger latents.
        lora_rank (`int`): rank; alpha is twice that.
        sde_window (`tuple[int, int]`): first and end of the steps that are stochastic and trained. The early ones
            decide what is drawn where.
        lr_scheduler_type (`str`): as in the config.
        rewards (`dict[str, float]`): scores of the shapes checker whose sum is optimised, with their weights. The soft
            score alone can be raised by smeared shapes; fidelity is what that costs.
        eval_prompts, eval_images_per_prompt (`int`): held-out prompts of the comparison, and pictures for each.
        grid_prompts (`int`): prompts in the picture of before and after.
    """

    rollouts: int
    prompts_per_rollout: int
    num_generations: int
    updates_per_rollout: int
    num_inference_steps: int
    sde_window: tuple[int, int]
    guidance_scale: float
    noise_level: float
    learning_rate: dict[str, float]
    epsilon: dict[str, float]
    lora_rank: int
    rewards: dict[str, float]
    eval_prompts: int
    eval_images_per_prompt: int
    grid_prompts: int = 16
    lr_scheduler_type: str = "constant"


QUICK = DemoSettings(
    rollouts=60,
    prompts_per_rollout=12,
    num_generations=24,
    updates_per_rollout=2,
    num_inference_steps=6,
    sde_window=(0, 4),
    guidance_scale=1.0,
    noise_level=0.7,
    learning_rate={"guard": 2e-3, "flow_grpo": 2e-3},
    epsilon={"guard": 2e-4, "flow_grpo": 1e-3},
    lora_rank=32,
    rewards={"soft": 1.0, "fidelity": 0.5},
    eval_prompts=108,
    eval_images_per_prompt=4,
)

# Longer still raises the scores further, but the pictures become alike: one layout for all prompts (150 rollouts are a
# compromise; `images/` in the output folder shows it happen)
FULL = replace(QUICK, rollouts=150, lr_scheduler_type="cosine")


class DemoError(ValueError):
    """The demo can not be run as asked; nothing has been computed."""


def run_demo(
    settings: DemoSettings = QUICK,
    *,
    method: str = "guard",
    output_dir: str | os.PathLike = "trl-flow-demo",
    seed: int = 0,
    model: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """
    Draws held-out prompts, trains the bundled model, draws the same again, and writes what came out of it.

    `output_dir` then holds `results.json`, `before.png`, `after.png`, `before_after.png`, `rewards.png`, the adapter
    in diffusers' format, its model card, and what the trainer writes. An earlier demo's files are replaced.

    Args:
        settings ([`DemoSettings`]): how long and on what.
        method (`str`): `"guard"` or `"flow_grpo"`.
        output_dir (`str` or `os.PathLike`): a new or empty folder, or an earlier demo's.
        seed (`int`): of the training. Equal seeds give equal results on equal machines.
        model (`str` or `os.PathLike`, *optional*): folder of another Stable Diffusion 3 pipeline than the bundled one.

    Returns:
        `dict[str, Any]`: what `results.json` holds.

    Raises:
        DemoError: if `output_dir` can not be written to or holds something else, or `method` is unknown.
    """
    if method not in settings.learning_rate:
        raise DemoError(f"method is {method!r}, but must be one of {', '.join(settings.learning_rate)}.")
    folder = _claim(output_dir)
    start = time.perf_counter()
    print(f"Loading the model; results go to {folder} ...", flush=True)
    import torch

    from trl_flow.evaluation.grids import evenly
    from trl_flow.evaluation.outputs import versions, write_json
    from trl_flow.evaluation.tables import score_table
    from trl_flow.shapes import load_prompts, pipeline_path

    model = pipeline_path() if model is None else model
    prompts = load_prompts("test")
    # So that every kind of prompt is among them
    prompts = prompts.select(evenly(len(prompts), settings.eval_prompts))
    pipeline = _load(model)
    before = _draw(pipeline, prompts, settings, "Held-out prompts before training")
    scores_before = _score(before, prompts, settings)
    drawn = time.perf_counter()

    trainer = _trainer(pipeline, settings, method, folder, seed)
    try:
        trainer.train()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"The demo keeps no checkpoints: {folder} has no adapter of this run.") from None
    trainer.save_model()
    trainer.save_state()
    trained = time.perf_counter()

    # The adapter as anyone would load it, not the model in memory: what is shown is what was saved
    pipeline = _load(model)
    pipeline.load_lora_weights(str(folder))
    after = _draw(pipeline, prompts, settings, "Held-out prompts after training")
    scores_after = _score(after, prompts, settings)
    differences = _differences(scores_before, scores_after, settings)
    _write_pictures(folder, prompts["prompt"], before, after, scores_before, scores_after, settings)
    trainer.create_model_card(model_name="trl_flow demo")

    end = time.perf_counter()
    results = {
        "method": method,
        "reward": _formula(settings),
        "seed": seed,
        "model": os.fspath(model),
        "scores": {name: difference.to_dict() for name, difference in differences.items()},
        "standard_error_of": "the mean over prompts of the paired difference, each prompt's pictures averaged first",
        "eval_seed": EVAL_SEED,
        "settings": asdict(settings) | {"sde_window": list(settings.sde_window)},
        "versions": versions(),
        "cpu_threads": torch.get_num_threads(),
        "device": str(trainer.accelerator.device),
        "seconds": {
            "total": round(end - start, 1),
            "before": round(drawn - start, 1),
            "training": round(trained - drawn, 1),
            "after": round(end - trained, 1),
        },
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    write_json(folder / RESULTS, results)
    print(
        f"\n{settings.eval_prompts} prompts never trained on, {settings.eval_images_per_prompt} pictures each, before "
        f"and after {settings.rollouts * settings.updates_per_rollout} updates on {_formula(settings)} by "
        f"{method}:\n\n{score_table(differences)}\n\n{_closing(folder, settings, end - start)}"
    )
    return results


def _claim(output_dir: str | os.PathLike) -> Path:
    """The folder, made, writable, and empty or an earlier demo's."""
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise DemoError(f"{folder} is a file, and the demo writes a folder. Choose another with --output-dir.")
    if folder.is_dir() and any(folder.iterdir()) and not _is_demo(folder):
        raise DemoError(
            f"{folder} is not empty and holds no {RESULTS} of an earlier demo, so its files are left alone. Choose "
            "another folder with --output-dir, or empty this one."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # From now on the folder is a demo's, even if this one is interrupted
        probe = folder / f".{RESULTS}.probe"
        probe.write_text("")
        probe.unlink()
        if not (folder / RESULTS).is_file():
            (folder / RESULTS).write_text("{}\n")
        for grid in folder.glob("images/step-*.png"):
            grid.unlink()
    except OSError as error:
        raise DemoError(
            f"{folder} can not be written to ({error.strerror or error}). Choose another folder with --output-dir."
        ) from error
    return folder


def _is_demo(folder: Path) -> bool:
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # Empty as long as the first demo in this folder is not over
    return isinstance(results, dict) and (not results or "eval_seed" in results)


def _load(model: str | os.PathLike) -> "StableDiffusion3Pipeline":
    import torch
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(model).to(torch.float32)


def _draw(pipeline: Any, prompts: Any, settings: DemoSettings, progress: str) -> list["Image.Image"]:
    from trl_flow.evaluation.drawing import draw
    from trl_flow.shapes import PICTURE_SIZE
    from trl_flow.shapes.model import T5_TOKENS

    return draw(
        pipeline,
        prompts["prompt"],
        seed=EVAL_SEED,
        num_images_per_prompt=settings.eval_images_per_prompt,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        height=PICTURE_SIZE,
        width=PICTURE_SIZE,
        max_sequence_length=T5_TOKENS,
        batch_size=64,
        progress=progress,
    )


def _score(images: list["Image.Image"], prompts: Any, settings: DemoSettings) -> dict[str, "np.ndarray"]:
    """The optimised reward, and the checker's scores one by one."""
    from trl_flow.evaluation.scoring import score_images
    from trl_flow.rewards import ShapesReward

    scores = score_images(images, prompts, [ShapesReward(score) for score in ("soft", "strict", "fidelity")])
    return {"reward": sum(w * scores[f"shapes_{score}"] for score, w in settings.rewards.items()), **scores}


def _formula(settings: DemoSettings) -> str:
    """The optimised reward in words: `"shapes_soft + 0.5 shapes_fidelity"`."""
    return " + ".join(f"{'' if w == 1 else f'{w:g} '}shapes_{score}" for score, w in settings.rewards.items())


def _differences(
    before: dict[str, "np.ndarray"], after: dict[str, "np.ndarray"], settings: DemoSettings
) -> dict[str, "PairedDifference"]:
    from trl_flow.evaluation.scoring import paired_difference

    return {
        name: paired_difference(before[name], after[name], num_images_per_prompt=settings.eval_images_per_prompt)
        for name in before
    }


def _trainer(
    pipeline: "StableDiffusion3Pipeline", settings: DemoSettings, method: str, folder: Path, seed: int
) -> "FlowGRPOTrainer":
    from peft import LoraConfig

    from trl_flow import FlowGRPOTrainer
    from trl_flow.rewards import ShapesReward
    from trl_flow.shapes import load_prompts

    return FlowGRPOTrainer(
        model=pipeline,
        reward_funcs=[ShapesReward(score) for score in settings.rewards],
        args=_config(settings, method, folder, seed),
        train_dataset=load_prompts("train"),
        peft_config=LoraConfig(r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, init_lora_weights="gaussian"),
    )


def _config(settings: DemoSettings, method: str, folder: Path, seed: int) -> "FlowGRPOConfig":
    from trl_flow import FlowGRPOConfig, GuardConfig
    from trl_flow.shapes import PICTURE_SIZE
    from trl_flow.shapes.model import T5_TOKENS

    return {"guard": GuardConfig, "flow_grpo": FlowGRPOConfig}[method](
        output_dir=str(folder),
        num_generations=settings.num_generations,
        per_device_train_batch_size=(
            settings.prompts_per_rollout * settings.num_generations // settings.updates_per_rollout
        ),
        steps_per_generation=settings.updates_per_rollout,
        max_steps=settings.rollouts * settings.updates_per_rollout,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        noise_level=settings.noise_level,
        sde_window_size=settings.sde_window[1] - settings.sde_window[0],
        sde_window_range=list(settings.sde_window),
        reward_weights=list(settings.rewards.values()),
        lr_scheduler_type=settings.lr_scheduler_type,
        height=PICTURE_SIZE,
        width=PICTURE_SIZE,
        max_sequence_length=T5_TOKENS,
        learning_rate=settings.learning_rate[method],
        epsilon=settings.epsilon[method],
        # A model this small is trained in memory and in float32 everywhere, so that it does the same everywhere
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        seed=seed,
        logging_steps=settings.updates_per_rollout,
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
    )


def _write_pictures(
    folder: Path,
    captions: list[str],
    before: list["Image.Image"],
    after: list["Image.Image"],
    scores_before: dict[str, "np.ndarray"],
    scores_after: dict[str, "np.ndarray"],
    settings: DemoSettings,
) -> None:
    from trl_flow.evaluation.grids import before_after_grid, evenly, image_grid

    # The first picture of every prompt that is shown: chosen by place, never by score
    shown = evenly(len(captions), settings.grid_prompts)
    places = [i * settings.eval_images_per_prompt for i in shown]
    captions = [captions[i] for i in shown]
    score = "shapes_soft"
    image_grid([before[i] for i in places], captions, path=folder / "before.png")
    image_grid([after[i] for i in places], captions, path=folder / "after.png")
    before_after_grid(
        [before[i] for i in places],
        [after[i] for i in places],
        captions,
        [(scores_before[score][i], scores_after[score][i]) for i in places],
        path=folder / "before_after.png",
        columns=4,
    )


def _closing(folder: Path, settings: DemoSettings, seconds: float) -> str:
    from trl_flow.shapes.model import T5_TOKENS

    sampling = (
        f"num_inference_steps={settings.num_inference_steps}, guidance_scale={settings.guidance_scale:g}, "
        f"max_sequence_length={T5_TOKENS}"
    )
    return (
        f"{seconds / 60:.1f} minutes. In {folder}: before_after.png, rewards.png, {RESULTS}, and the adapter, which "
        "stock diffusers loads:\n\n"
        "    from diffusers import StableDiffusion3Pipeline\n"
        "    from trl_flow.shapes import pipeline_path\n"
        "    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline_path())\n"
        f"    pipe.load_lora_weights({str(folder)!r})\n"
        f'    pipe("two red circles", {sampling}).images[0].save("circles.png")'
    )
