import json
import math
from dataclasses import replace

import numpy as np
import pytest
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file

from trl_flow.demo import EVAL_SEED, FULL, QUICK, DemoError, run_demo


SMALL = {"rollouts": 2, "prompts_per_rollout": 2, "num_generations": 4, "num_inference_steps": 2}
SMALL |= {"eval_prompts": 6, "eval_images_per_prompt": 2, "grid_prompts": 4}
SMALL |= {"learning_rate": 7e-2}  # moves the scores by more than rounding does
TINY = replace(QUICK["nft"], **SMALL, options={"num_generations_trained": 2})
TINY_FLOW = replace(QUICK["flow_grpo"], **SMALL, options={"sde_window_size": 1, "sde_window_range": [0, 1]})
ROUNDING = 5e-6  # of a score: other kernels change a few pixels by one level
FILES = {
    *("before.png", "after.png", "before_after.png", "rewards.png", "results.json"),
    *("pytorch_lora_weights.safetensors", "README.md"),
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory, tiny_sd3_path):
    """The results and the folder of one demo."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return run_demo(TINY, output_dir=folder, model=tiny_sd3_path), folder


def test_everything_is_written(demo):
    _, folder = demo
    assert {path.name for path in folder.iterdir()} >= FILES
    assert not list(folder.glob("checkpoint-*"))
    for name in ("before.png", "after.png", "before_after.png", "rewards.png"):
        with Image.open(folder / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 1, f"{name} is blank"


def test_results_have_what_a_reader_needs(demo, tiny_sd3_path):
    results, folder = demo
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["scores"].keys() == {"reward", "shapes_soft", "shapes_strict", "shapes_fidelity", "diversity"}
    for score in results["scores"].values():
        assert score["num_pairs"] == 6
        assert math.isclose(score["difference"], score["mean_after"] - score["mean_before"], abs_tol=1e-12)
        assert score["standard_error"] >= 0
    assert results["method"] == "nft" and results["seed"] == 0
    assert results["reward"] == "shapes_soft + 0.5 shapes_strict + 0.25 shapes_fidelity"
    means = {name: score["mean_after"] for name, score in results["scores"].items()}
    assert math.isclose(
        means["reward"],
        means["shapes_soft"] + 0.5 * means["shapes_strict"] + 0.25 * means["shapes_fidelity"],
        abs_tol=1e-6,
    )
    assert results["settings"]["rollouts"] == 2 and results["eval_seed"] == EVAL_SEED
    assert {"python", "torch", "diffusers", "trl_flow"} <= results["versions"].keys()
    assert results["seconds"]["total"] >= results["seconds"]["training"] > 0
    assert results["command"] and results["model"] == tiny_sd3_path


def test_the_saved_adapter_draws_the_images_that_were_scored(demo, tiny_sd3_path):
    from trl_flow.evaluation.drawing import draw
    from trl_flow.evaluation.scoring import score_images
    from trl_flow.rewards import ShapesReward
    from trl_flow.shapes import load_prompts

    results, folder = demo
    prompts = load_prompts("test")
    prompts = prompts.select([i * len(prompts) // 6 for i in range(6)])
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3_path)

    def fidelity() -> float:
        images = draw(
            pipeline,
            prompts["prompt"],
            seed=EVAL_SEED,
            num_images_per_prompt=2,
            num_inference_steps=2,
            guidance_scale=TINY.guidance_scale,
            max_sequence_length=1,
            batch_size=64,
        )
        return score_images(images, prompts, ShapesReward("fidelity"))["shapes_fidelity"].mean()

    score = results["scores"]["shapes_fidelity"]
    before = fidelity()
    pipeline.load_lora_weights(folder)
    assert before == pytest.approx(score["mean_before"], abs=ROUNDING)
    assert fidelity() == pytest.approx(score["mean_after"], abs=ROUNDING)
    assert abs(score["mean_before"] - score["mean_after"]) > 2 * ROUNDING


def test_again_in_the_same_folder_gives_the_same(demo, tiny_sd3_path, tmp_path, capsys):
    results, folder = demo
    (folder / "images" / "step-999999.png").write_bytes(b"of a longer demo")
    before = {path.name for path in folder.iterdir()} - {".lock"}
    again = run_demo(TINY, output_dir=folder, model=tiny_sd3_path)
    for name, score in results["scores"].items():
        assert again["scores"][name]["mean_after"] == pytest.approx(score["mean_after"], abs=ROUNDING)
    assert not (folder / "images" / "step-999999.png").exists()
    assert {path.name for path in (folder / "previous-1").iterdir()} == before
    shown = capsys.readouterr().out
    assert "shapes_strict" in shown and "load_lora_weights" in shown and str(folder) in shown
    assert f"{folder} held an earlier demo, which is moved to {folder / 'previous-1'}" in shown


def test_seed_and_method_matter(demo, tiny_sd3_path, tmp_path):
    results, folder = demo
    other_seed = run_demo(TINY, output_dir=tmp_path / "seed", model=tiny_sd3_path, seed=1)
    other_method = run_demo(TINY_FLOW, output_dir=tmp_path / "method", model=tiny_sd3_path)
    trained = load_file(folder / "pytorch_lora_weights.safetensors")
    for name, other in (("seed", other_seed), ("method", other_method)):
        fidelity, first = other["scores"]["shapes_fidelity"], results["scores"]["shapes_fidelity"]
        assert fidelity["mean_before"] == pytest.approx(first["mean_before"], abs=ROUNDING)
        weights = load_file(tmp_path / name / "pytorch_lora_weights.safetensors")
        assert max((weights[key] - trained[key]).abs().max() for key in trained) > 1e-3
    config = json.loads((tmp_path / "method" / "training_args.json").read_text())
    assert config["importance_ratio"] == "standard"


def test_the_shipped_settings_fit_together(tmp_path):
    from trl_flow.demo import _config

    for settings in (*QUICK.values(), *FULL.values()):
        config = _config(settings, tmp_path, seed=0, image={"height": 64, "width": 64})
        assert config.generation_batch_size == settings.prompts_per_rollout * settings.num_generations
        assert config.max_steps == settings.rollouts * settings.updates_per_rollout
        assert all(getattr(config, name) == value for name, value in settings.options.items())


def test_what_cannot_be_done_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text('{"of": "another program"}')
    for arguments, words in (
        ({"output_dir": tmp_path / "file"}, "is a file"),
        ({"output_dir": tmp_path / "file" / "below"}, "cannot be written to"),
        ({"output_dir": tmp_path / "other"}, "is not empty"),
    ):
        with pytest.raises(DemoError, match=words):
            run_demo(TINY, model="never looked at", **arguments)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "other", "results.json"]


def test_ctrl_c_leaves_a_folder_that_the_next_demo_takes(tiny_sd3_path, tmp_path, monkeypatch):
    from trl_flow import DiffusionNFTTrainer

    def interrupted(self, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionNFTTrainer, "train", interrupted)
        with pytest.raises(KeyboardInterrupt, match="no adapter"):
            run_demo(TINY, output_dir=tmp_path / "demo", model=tiny_sd3_path)
    assert run_demo(TINY, output_dir=tmp_path / "demo", model=tiny_sd3_path)["scores"]
