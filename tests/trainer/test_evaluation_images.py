"""In every family the trainer's evaluation, `trl-flow evaluate` and the model card's code draw the same images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from families import FAMILIES
from family_checks import Family, assert_same_images, family_trainer, image_distance, images_to_edit
from PIL import Image
from tiny_flux import tiny_kontext_sizes
from tiny_qwen import smaller_input_images
from tiny_training import PROMPTS, brightness, prompts

from trl_flow.backbones import Backbone
from trl_flow.cli import main
from trl_flow.evaluation.videos import read_frames
from trl_flow.images import frame_of
from trl_flow.rollout import RandomStream, draw_noise, sample_generator


SEED, EVALUATED = 5, 2


@pytest.fixture(autouse=True)
def small_inputs(monkeypatch):
    smaller_input_images(monkeypatch)
    with tiny_kontext_sizes():
        yield


def as_bytes(video: np.ndarray) -> np.ndarray:
    return (video * 255).round().astype(np.uint8)


def by_the_command(family: Family, run: Path, folder: Path, dataset) -> list[Image.Image]:
    """What `trl-flow evaluate` draws with the run's adapter when it is told the seed and nothing else."""
    file, out = folder / "prompts.parquet", folder / "comparison"
    dataset.to_parquet(file)
    command = ["evaluate", "--model", str(folder / "base"), "--adapters", f"tuned={run}", "--prompts", str(file)]
    assert main([*command, "--seed", str(SEED), "--batch_size", "2", "--device", "cpu", "--output_dir", str(out)]) == 0
    drawn = [Image.open(path) for path in sorted((out / "images" / "prompts" / "tuned").glob("*.png"))]
    return [frame_of(read_frames(image)) for image in drawn]


def by_the_card(family: Family, backbone: Backbone, run: Path, folder: Path, edited) -> list[Image.Image]:
    """What the model card's code draws, with the noise of the evaluation."""
    code = (run / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("path/to/image.png", str(folder / "image.png")).replace("path/to/run", str(run))
    images = []
    for index, prompt in enumerate(PROMPTS[:EVALUATED]):
        if edited is not None:
            edited[index].save(folder / "image.png")
        generators = [sample_generator(SEED, RandomStream.EVALUATION, index)]
        noise = draw_noise(backbone.latent_shape(), generators, torch.device("cpu"))
        scope = {"latents": family.latents(backbone, noise)}
        exec(code.replace(f'prompt="{PROMPTS[0]}"', f'prompt="{prompt}", latents=latents'), scope)
        video = scope.get("video")
        images.append(scope["image"] if video is None else frame_of([Image.fromarray(f) for f in as_bytes(video)]))
    return images


@pytest.mark.parametrize("name", FAMILIES)
def test_trainer_command_and_card_draw_the_same_images(name, tmp_path, monkeypatch):
    family, shown = FAMILIES[name], []
    monkeypatch.chdir(tmp_path)  # where the card's code writes a video
    pipeline_class = type(family.make_pipeline())
    for cls in (DiffusionPipeline, pipeline_class):
        monkeypatch.setattr(cls, "from_pretrained", lambda path, **kwargs: family.make_pipeline())
    backbone = family.backbone()

    def reward(prompts, images, **kwargs):
        shown[:] = images
        return brightness(prompts, images)

    edited = images_to_edit(EVALUATED, family.size) if backbone.takes_image else None
    dataset = prompts(EVALUATED, **({} if edited is None else {"image": edited}))
    takes_negative = backbone.takes_negative_prompt
    trainer = family_trainer(
        family,
        tmp_path / "run",
        reward_funcs=reward,
        eval_dataset=dataset,
        per_device_eval_batch_size=2,
        seed=SEED,
        max_steps=1,
        learning_rate=0.3,
        guidance_scale=1.5 if backbone.takes_guidance else 1.0,
        eval_guidance_scale=8.0 if backbone.takes_guidance else None,
        negative_prompt="a moth" if takes_negative else None,
    )
    trainer.evaluate()
    untrained = list(shown)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    trainer.evaluate()
    assert min(map(image_distance, shown, untrained)) > 0.1  # the adapter does something
    assert_same_images(by_the_command(family, tmp_path / "run", tmp_path, dataset), shown, family.size)
    assert_same_images(by_the_card(family, backbone, tmp_path / "run", tmp_path, edited), shown, family.size)
