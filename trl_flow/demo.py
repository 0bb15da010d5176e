"""`trl-flow demo`: the bundled model before and after a few minutes of reinforcement learning.

Everything that is written about the result comes from prompts that were never trained on, drawn from the same seeds by
the bundled pipeline as it is shipped and by a fresh copy of it with the adapter loaded from disk.
"""

import json
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from PIL import Image

from trl_flow import DiffusionNFTConfig, DiffusionNFTTrainer, FlowGRPOConfig, FlowGRPOTrainer, GuardConfig
from trl_flow.backbones.base import JOINT_ATTENTION
from trl_flow.evaluation.diversity import diversity
from trl_flow.evaluation.drawing import draw
from trl_flow.evaluation.grids import before_after_grid, evenly, image_grid
from trl_flow.evaluation.outputs import LOCK, versions, write_json
from trl_flow.evaluation.scoring import paired_difference, score_images
from trl_flow.evaluation.tables import score_table
from trl_flow.rewards import ShapesReward
from trl_flow.shapes import load_prompts, pipeline_path
from trl_flow.shapes.bundled import BUNDLED, T5_TOKENS, is_bundled
from trl_flow.trainer.run_folder import is_aside, move_aside


RESULTS = "results.json"
LORA_TARGETS = [*JOINT_ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
EVAL_SEED = 1234  # of the images that are compared, whatever the seed of the training
_METHODS = {
    "nft": (DiffusionNFTConfig, DiffusionNFTTrainer),
    "guard": (GuardConfig, FlowGRPOTrainer),
    "flow_grpo": (FlowGRPOConfig, FlowGRPOTrainer),
}


@dataclass(frozen=True)
class DemoSettings:
    """
    What a demo does.

    Attributes:
        method (`str`): of the training, as in commands: `"nft"`, `"guard"` or `"flow_grpo"`.
        rollouts (`int`): sampling phases.
        prompts_per_rollout, num_generations (`int`): prompts in each, and images for each prompt.
        updates_per_rollout (`int`): updates on each sampling phase, on as many equal parts of it.
        num_inference_steps (`int`): sampling steps, in training and in the comparison.
        guidance_scale, learning_rate, lr_scheduler_type: as in the config.
        options (`dict`): what else the method's config is given.
        lora_rank (`int`): rank; alpha is twice that.
        rewards (`dict[str, float]`): scores of the shapes checker whose sum is optimized, with their weights. The soft
            score alone can be raised by smeared shapes, which the strict score and fidelity are against.
        eval_prompts, eval_images_per_prompt (`int`): held-out prompts of the comparison, and images for each.
        grid_prompts (`int`): prompts in the image of before and after.
    """

    method: str = "nft"
    rollouts: int = 60
    prompts_per_rollout: int = 12
    num_generations: int = 12
    updates_per_rollout: int = 1
    num_inference_steps: int = 6
    guidance_scale: float = 1.0
    learning_rate: float = 6e-4
    lr_scheduler_type: str = "constant"
    # Half of each group is trained on, the images whose rewards differ most
    options: dict[str, Any] = field(default_factory=lambda: {"num_generations_trained": 6, "timesteps_per_sample": 4})
    lora_rank: int = 32
    rewards: dict[str, float] = field(default_factory=lambda: {"soft": 1.0, "strict": 0.5, "fidelity": 0.25})
    eval_prompts: int = 108
    eval_images_per_prompt: int = 4
    grid_prompts: int = 16


def _policy_gradient(method: str, epsilon: float) -> DemoSettings:
    # The early steps decide what is drawn where
    options = {"sde_window_size": 4, "sde_window_range": [0, 4], "epsilon": epsilon, "scale_epsilon": False}
    sizes = {"rollouts": 60, "num_generations": 24, "updates_per_rollout": 2}
    return DemoSettings(method, **sizes, learning_rate=1e-3, options=options)


QUICK = {
    "nft": DemoSettings(),
    "guard": _policy_gradient("guard", epsilon=1e-4),
    "flow_grpo": _policy_gradient("flow_grpo", epsilon=5e-4),
}
# DiffusionNFT at 1e-3, on twice the images, was better until update 54 and then spoiled the model
FULL = {
    method: replace(
        quick, rollouts=5 * quick.rollouts // 2, learning_rate=0.8 * quick.learning_rate, lr_scheduler_type="cosine"
    )
    for method, quick in QUICK.items()
}


class DemoError(ValueError):
    """The demo cannot be run as asked; nothing has been computed."""


def run_demo(
    settings: DemoSettings,
    *,
    output_dir: str | os.PathLike = "trl-flow-demo",
    seed: int = 0,
    model: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """
    Draws held-out prompts, trains the bundled model, draws the same again, and writes what came out of it.

    `output_dir` then holds `results.json`, `before.png`, `after.png`, `before_after.png`, `rewards.png`, the adapter
    in diffusers' format, its model card, and what the trainer writes. An earlier demo's files are moved aside.

    Args:
        settings ([`DemoSettings`]): how long and on what.
        output_dir (`str` or `os.PathLike`): a new or empty folder, or an earlier demo's.
        seed (`int`): of the training. Equal seeds give equal results on equal machines.
        model (`str` or `os.PathLike`, *optional*): folder of another Stable Diffusion 3 pipeline than the bundled one.

    Returns:
        `dict[str, Any]`: what `results.json` holds.

    Raises:
        DemoError: if `output_dir` cannot be written to or holds something else.
    """
    folder = _claim(output_dir)
    start = time.perf_counter()
    print(f"Loading the model; results go to {folder} ...", flush=True)
    model = pipeline_path() if model is None else model
    prompts = load_prompts("test")
    prompts = prompts.select(evenly(len(prompts), settings.eval_prompts))  # every kind of prompt is among them
    pipeline = StableDiffusion3Pipeline.from_pretrained(model).to(torch.float32)
    before = _draw(pipeline, prompts, settings, "Held-out prompts before training")
    scores_before = _score(before, prompts, settings)
    drawn = time.perf_counter()

    _, trainer_class = _METHODS[settings.method]
    trainer = trainer_class(
        model=pipeline,
        reward_funcs=[ShapesReward(score) for score in settings.rewards],
        args=_config(settings, folder, seed, _image(pipeline)),
        train_dataset=load_prompts("train"),
        peft_config=LoraConfig(
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            target_modules=LORA_TARGETS,
            init_lora_weights="gaussian",
        ),
    )
    try:
        trainer.train()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"The demo keeps no checkpoints: {folder} has no adapter of this run.") from None
    trainer.save_model()
    trainer.save_state()
    trained = time.perf_counter()

    # The adapter as anyone would load it, not the model in memory: what is shown is what was saved
    pipeline = StableDiffusion3Pipeline.from_pretrained(model).to(torch.float32)
    pipeline.load_lora_weights(str(folder))
    after = _draw(pipeline, prompts, settings, "Held-out prompts after training")
    scores_after = _score(after, prompts, settings)
    differences = {
        name: paired_difference(of_name.ravel(), scores_after[name].ravel(), num_images_per_prompt=of_name.shape[1])
        for name, of_name in scores_before.items()
    }
    # The first image of every prompt that is shown: chosen by index, never by score
    shown = evenly(len(prompts), settings.grid_prompts)
    captions = prompts.select(shown)["prompt"]
    before, after = ([images[i * settings.eval_images_per_prompt] for i in shown] for images in (before, after))
    soft = [[scores["shapes_soft"][i, 0] for i in shown] for scores in (scores_before, scores_after)]
    image_grid(before, captions, path=folder / "before.png")
    image_grid(after, captions, path=folder / "after.png")
    scores = list(zip(*soft, strict=True))
    before_after_grid(before, after, captions, scores, path=folder / "before_after.png", columns=4)
    trainer.create_model_card(model_name="trl_flow demo")

    end = time.perf_counter()
    seconds = {"total": end - start, "before": drawn - start, "training": trained - drawn, "after": end - trained}
    results = {
        "method": settings.method,
        "reward": _formula(settings),
        "seed": seed,
        "model": BUNDLED if is_bundled(model) else os.fspath(model),
        "scores": {name: difference.to_dict() for name, difference in differences.items()},
        "standard_error_of": "the mean over prompts of the paired difference, each prompt's images averaged first",
        "eval_seed": EVAL_SEED,
        "settings": asdict(settings),
        "versions": versions(),
        "cpu_threads": torch.get_num_threads(),
        "device": str(trainer.accelerator.device),
        "seconds": {phase: round(value, 1) for phase, value in seconds.items()},
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    write_json(folder / RESULTS, results)
    print(
        f"\n{settings.eval_prompts} prompts never trained on, {settings.eval_images_per_prompt} images each, before "
        f"and after {settings.rollouts * settings.updates_per_rollout} updates on {_formula(settings)} by "
        f"{settings.method}:\n\n{score_table(differences)}\n\n{_closing(folder, settings, end - start)}"
    )
    return results


def _claim(output_dir: str | os.PathLike) -> Path:
    """The folder, made, writable, and empty or an earlier demo's."""
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise DemoError(f"{folder} is a file, and the demo writes a folder. Choose another with --output-dir.")
    if folder.is_dir() and any(folder.iterdir()):
        try:
            results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
            is_demo = results == {} or "eval_seed" in results  # empty as long as the first demo in it is not over
        except (OSError, ValueError, TypeError):
            is_demo = False
        if not is_demo:
            raise DemoError(
                f"{folder} is not empty and holds no {RESULTS} of an earlier demo, so its files are left alone. "
                "Choose another folder with --output-dir, or empty this one."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if earlier := [
            path.name for path in folder.iterdir() if path.name not in (LOCK, RESULTS) and not is_aside(path)
        ]:
            to = move_aside(folder, [*earlier, RESULTS])
            print(f"{folder} held an earlier demo, which is moved to {to}.", flush=True)
        # From now on the folder is a demo's, even if this one is interrupted
        (folder / RESULTS).write_text("{}\n")
    except OSError as error:
        why = f"{folder} cannot be written to ({error.strerror or error})"
        raise DemoError(f"{why}. Choose another folder with --output-dir.") from error
    return folder


def _image(pipeline: StableDiffusion3Pipeline) -> dict[str, int]:
    side = pipeline.default_sample_size * pipeline.vae_scale_factor
    return {"height": side, "width": side, "max_sequence_length": T5_TOKENS}


def _draw(
    pipeline: StableDiffusion3Pipeline, prompts: Dataset, settings: DemoSettings, progress: str
) -> list[Image.Image]:
    sampling = {name: getattr(settings, name) for name in ("num_inference_steps", "guidance_scale")}
    sampling |= {"seed": EVAL_SEED, "num_images_per_prompt": settings.eval_images_per_prompt}
    return draw(pipeline, prompts["prompt"], **sampling, **_image(pipeline), batch_size=64, progress=progress)


def _score(images: list[Image.Image], prompts: Dataset, settings: DemoSettings) -> dict[str, np.ndarray]:
    """The optimized reward, the checker's scores one by one, and each prompt's diversity: of shape `(prompts, images)`
    and `(prompts, 1)`."""
    number = settings.eval_images_per_prompt
    scores = score_images(images, prompts, [ShapesReward(score) for score in ("soft", "strict", "fidelity")])
    scores = {name: values.reshape(-1, number) for name, values in scores.items()}
    reward = sum(weight * scores[f"shapes_{score}"] for score, weight in settings.rewards.items())
    each = [[diversity(images[i : i + number], number)] for i in range(0, len(images), number)]
    return {"reward": reward, **scores, "diversity": np.array(each)}


def _formula(settings: DemoSettings) -> str:
    """The optimized reward in words: `"shapes_soft + 0.5 shapes_fidelity"`."""
    return " + ".join(f"{'' if w == 1 else f'{w:g} '}shapes_{score}" for score, w in settings.rewards.items())


def _config(
    settings: DemoSettings, folder: Path, seed: int, image: dict[str, int]
) -> FlowGRPOConfig | DiffusionNFTConfig:
    same = ("num_generations", "num_inference_steps", "guidance_scale", "learning_rate", "lr_scheduler_type")
    updates, (config, _) = settings.updates_per_rollout, _METHODS[settings.method]
    return config(
        output_dir=str(folder),
        per_device_train_batch_size=settings.prompts_per_rollout * settings.num_generations // updates,
        steps_per_generation=updates,
        max_steps=settings.rollouts * updates,
        reward_weights=list(settings.rewards.values()),
        **{name: getattr(settings, name) for name in same},
        **settings.options,
        **image,
        # A model this small is trained in memory and in float32 everywhere, so that it does the same everywhere
        **{"gradient_checkpointing": False, "bf16": False, "use_cpu": True, "seed": seed},
        **{"logging_steps": updates, "save_strategy": "no", "report_to": "none", "disable_tqdm": False},
    )


def _closing(folder: Path, settings: DemoSettings, seconds: float) -> str:
    sampling = f"num_inference_steps={settings.num_inference_steps}, guidance_scale={settings.guidance_scale:g}"
    return (
        f"{seconds / 60:.1f} minutes. In {folder}: before_after.png, rewards.png, {RESULTS}, and the adapter, which "
        "stock diffusers loads:\n\n"
        "    from diffusers import StableDiffusion3Pipeline\n"
        "    from trl_flow.shapes import pipeline_path\n"
        "    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline_path())\n"
        f"    pipe.load_lora_weights({str(folder)!r})\n"
        f'    pipe("two red circles", {sampling}, max_sequence_length={T5_TOKENS}).images[0].save("circles.png")'
    )
