"""What pre-training sees: nothing that is held out."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from trl_flow.shapes import check, parse_caption
from trl_flow.shapes.prompts import is_held_out, load_prompts


FOLDER = Path(__file__).parents[2] / "examples" / "bundled_model"
sys.path.insert(0, str(FOLDER))

from data import noisy_caption, random_scene, render_images  # noqa: E402


def test_no_scene_and_no_caption_is_held_out():
    rng = np.random.default_rng(0)
    contents = [random_scene(rng)[1] for _ in range(600)]
    assert not any(is_held_out(objects) for objects, _ in contents)
    noise = random.Random(0)
    for target in contents:
        for _ in range(3):
            assert not is_held_out(parse_caption(noisy_caption(target, contents, 1.0, noise))[0])


def test_captions_tell_the_truth_without_noise_and_seldom_with_full_noise():
    rng, noise = np.random.default_rng(1), random.Random(1)
    scenes = [random_scene(rng) for _ in range(300)]
    contents = [target for _, target in scenes]
    assert all(parse_caption(noisy_caption(target, contents, 0.0, noise)) == target for target in contents)
    wrong = [parse_caption(noisy_caption(target, contents, 1.0, noise)) != target for target in contents]
    assert np.mean(wrong) > 0.95


def test_pictures_show_what_their_targets_say_and_a_seed_repeats_them():
    pixels, targets = render_images(200, seed=3)
    again, same_targets = render_images(200, seed=3)
    assert (pixels == again).all() and targets == same_targets
    for picture, target in zip(pixels, targets, strict=True):
        assert check(Image.fromarray(picture.permute(1, 2, 0).numpy()), *target).strict == 1


def test_every_held_out_part_is_met_in_training():
    rng = np.random.default_rng(2)
    targets = [random_scene(rng)[1] for _ in range(1200)]
    met = {(item["count"], item["color"], item["shape"], len(objects)) for objects, _ in targets for item in objects}
    for row in load_prompts("test"):
        if len(row["objects"]) == 2:
            assert {(1, item["color"], item["shape"], 2) for item in row["objects"]} <= met
        else:
            item = row["objects"][0]
            assert {count for count, color, shape, _ in met if (color, shape) == (item["color"], item["shape"])}
    assert {relation for _, relation in targets} == {None, "left of", "right of", "above", "below"}


@pytest.mark.slow
def test_the_training_script_writes_a_pipeline_and_its_scores(tmp_path):
    # Long enough for a few steps of everything, not for an image
    options = "--images 1100 --autoencoder-steps 3 --decoder-steps 3 --steps 2".split()
    command = [sys.executable, str(FOLDER / "train.py"), "--output-dir", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert scores["seed"] == 0 and scores["steps"] == 2
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    assert pipeline("a red circle", num_inference_steps=2).images[0].size == (64, 64)
