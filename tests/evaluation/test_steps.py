"""One-step predictions at every step: what the rollout itself predicts, of each family, and the grid of them."""

from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import QwenImageEditPipeline
from PIL import Image
from tiny_comparisons import assert_same_images, random_lora
from tiny_flux import tiny_flux_pipeline
from tiny_models import tiny_sd3_pipeline
from tiny_painter import tiny_painter_backbone
from tiny_qwen import smaller_input_images, tiny_qwen_edit_pipeline
from tiny_unets import tiny_sd_pipeline

from trl_flow.backbones import get_backbone
from trl_flow.cli import main
from trl_flow.dynamics import make_dynamics
from trl_flow.evaluation import DrawingOptions, predict_steps, steps_grid
from trl_flow.evaluation.drawing import draw
from trl_flow.rollout import RandomStream, StepPlan, decode, draw_noise, rollout, sample_generator


SD3 = {"height": 16, "width": 16, "max_sequence_length": 16}
SETTINGS = {"num_inference_steps": 4, "guidance_scale": 2.0}
EDIT = SD3 | {"height": 64, "width": 64}

FAMILIES = {
    "sd3": (tiny_sd3_pipeline, SD3),
    "flux": (tiny_flux_pipeline, SD3),
    "sd": (tiny_sd_pipeline, EDIT | {"height": 32, "width": 32}),
    "sd-v": (partial(tiny_sd_pipeline, prediction_type="v_prediction"), EDIT | {"height": 32, "width": 32}),
    "edit": (partial(tiny_qwen_edit_pipeline, QwenImageEditPipeline), EDIT),
}


@torch.no_grad()
def by_rollout(backbone, prompt: str, image, index: int) -> tuple[list[Image.Image], list[Image.Image]]:
    """Images of the rollout's own predictions after each step, and of the one from pure noise, by hand."""
    edited = [] if image is None else [image]
    condition, negative = backbone.encode_prompt(prompt, *edited), None
    if backbone.uses_guidance(2.0):
        negative = backbone.encode_prompt("", *edited)
    schedule = backbone.schedule(4)
    dynamics = make_dynamics(schedule, sde_type="flow", noise_level=0.7)

    def predict(latents, timestep):
        return backbone.guided_prediction(backbone.model, latents, timestep, condition, negative, 2.0)

    generators = [sample_generator(3, RandomStream.EVALUATION, index)]
    noise = draw_noise(backbone.latent_shape(), generators, backbone.device)
    after = rollout(predict, dynamics, noise, StepPlan(project=True)).pred_original_samples[0]
    prediction = predict(noise, schedule.timesteps[0])
    if hasattr(schedule, "sigmas"):
        first = noise - schedule.sigmas[0] * prediction
    else:
        signal = schedule.alphas_cumprod[0]
        part = (signal.sqrt() * noise, prediction * (1 - signal).sqrt())
        is_noise = schedule.prediction_type == "epsilon"
        first = (noise - part[1]) / signal.sqrt() if is_noise else part[0] - part[1]
    return decode(backbone, after), decode(backbone, first)


@pytest.mark.parametrize("name", FAMILIES)
def test_predictions_are_the_rollouts_own(name, monkeypatch):
    smaller_input_images(monkeypatch)
    make, sizes = FAMILIES[name]
    backbone = get_backbone(make(), **sizes)
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    image = Image.fromarray(pixels) if backbone.takes_image else None
    steps = []
    found = predict_steps(
        backbone, "a red circle", seed=3, index=5, image=image, on_step=steps.append, negative_prompt=None, **SETTINGS
    )
    after, first = by_rollout(backbone, "a red circle", image, 5)
    assert steps == [0, 1, 2, 3] and len(found) == 4
    # What is predicted before a step is what is predicted after the one before
    assert_same_images(found[1:], after[:3])
    assert_same_images(found[:1], first)
    (drawn,) = draw(
        backbone, ["a red circle"], seed=3, first_index=5, images=None if image is None else [image], **SETTINGS
    )
    if "sd-" not in name and name != "sd":  # DDIM's last step need not end at the prediction
        assert_same_images(found[3:], [drawn])


@pytest.fixture(scope="module")
def lora(tiny_sd3_path, tmp_path_factory):
    return random_lora(tiny_sd3_path, tmp_path_factory.mktemp("adapters") / "ours", seed=1)


PROMPTS = Dataset.from_dict({"prompt": [f"a red circle {i}" for i in range(5)]})


def test_one_block_for_each_prompt_one_row_for_each_model_one_column_for_each_step(
    tiny_sd3, lora, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr("trl_flow.evaluation.steps.shows_bars", lambda: True)
    options = DrawingOptions(seed=3, num_images_per_prompt=2, height=16, width=16, max_sequence_length=16, **SETTINGS)
    grid = steps_grid(tiny_sd3, {"ours": lora}, prompts=PROMPTS, options=options, path=tmp_path / "a" / "steps.png")
    assert "steps" in capfd.readouterr().err
    cell, beside = 128, 6 + 27 + 6  # four letters, and a margin on both sides
    assert grid.width == beside + 4 * (cell + 6)
    with Image.open(tmp_path / "a" / "steps.png") as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(grid))

    # Rows 0, 1, 2 and 3 of 5: evenly spread. Two lines of headings, one line of prompt above each block
    backbone = get_backbone(tiny_sd3, **SD3)
    top = 12 + 2 * 15
    for row in range(4):
        for model in ("base", "ours"):
            top += 15 if model == "base" else 0
            if model == "ours":
                tiny_sd3.load_lora_weights(lora)
            prompt = PROMPTS[row]["prompt"]
            expected = predict_steps(backbone, prompt, seed=3, index=2 * row, **SETTINGS)
            tiny_sd3.unload_lora_weights()
            shown = [grid.crop((x := beside + s * (cell + 6), top, x + cell, top + cell)) for s in range(4)]
            assert_same_images([image.resize((16, 16), Image.Resampling.NEAREST) for image in shown], expected)
            top += cell + 12
    assert top == grid.height + 6


def test_a_family_of_ones_own_and_several_sets():
    backbone = tiny_painter_backbone()
    sets = {"first": PROMPTS.select([0]), "second": PROMPTS.select([1, 2])}
    options = DrawingOptions(num_inference_steps=30)
    grid = steps_grid(backbone.pipeline, prompts=sets, options=options, backbone=backbone, num_prompts=1)
    # 2048 / 30 = 68, but no image is smaller than 96
    assert grid.size == (39 + 30 * (96 + 6), 6 + 2 * 15 + 2 * (15 + 96 + 12))


def test_what_does_not_fit_is_refused(tiny_sd3, tmp_path):
    for options, message in (
        ({"prompts": PROMPTS, "num_prompts": 0}, "num_prompts is 0"),
        ({"prompts": {}}, "no prompts"),
        ({"prompts": PROMPTS, "adapters": ["no/where/at/all"]}, "neither a file"),
    ):
        with pytest.raises(ValueError, match=message):
            steps_grid(tiny_sd3, path=tmp_path / "steps.png", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_grid_beside_the_comparison(tiny_sd3_path, lora, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue squares\n")
    command = ["evaluate", "--model", tiny_sd3_path, "--adapters", f"ours={lora}", "--device", "cpu"]
    command += ["--prompts", str(tmp_path / "prompts.txt"), "--num_inference_steps", "3", "--height", "16"]
    command += ["--width", "16", "--max_sequence_length", "16", "--output_dir", str(tmp_path / "out")]
    assert main(command) == 0
    assert not (tmp_path / "out" / "steps.png").exists()
    images = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").rglob("*.png")}
    capsys.readouterr()
    assert main([*command, "--steps"]) == 0
    assert "steps.png" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "steps.png") as grid:
        assert grid.size == (39 + 3 * 134, 6 + 2 * 15 + 2 * (15 + 2 * 140))
    # Nothing else is drawn again
    assert {path: path.stat().st_mtime_ns for path in images} == images
