"""Without options a comparison draws as the adapters' runs evaluated, and says where they did otherwise."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from datasets import Dataset
from tiny_comparisons import random_lora
from tiny_flux import tiny_flux_pipeline, tiny_klein_pipeline
from tiny_training import warnings_of
from tiny_unets import tiny_sd_pipeline

from trl_flow.cli import main
from trl_flow.evaluation import DrawingOptions, evaluate_models
from trl_flow.evaluation.adapters import Adapter
from trl_flow.evaluation.drawing import draw
from trl_flow.evaluation.inputs import loaded_backbone
from trl_flow.evaluation.run_settings import run_settings
from trl_flow.shapes import load_pipeline


SIZE = {"height": 16, "width": 16, "max_sequence_length": 16}
RUN = SIZE | {"num_inference_steps": 10, "eval_num_inference_steps": 2, "guidance_scale": 3.0}
PROMPTS = Dataset.from_dict({"prompt": ["a red circle"]})


@pytest.fixture(scope="module")
def lora(tiny_sd3_path, tmp_path_factory) -> Path:
    return Path(random_lora(tiny_sd3_path, tmp_path_factory.mktemp("adapters") / "ours", seed=1))


def run_folder(lora: Path, folder: Path, **settings) -> str:
    """A run's folder with this adapter, whose evaluations had `settings`."""
    shutil.copytree(lora, folder)
    (folder / "training_args.json").write_text(json.dumps(RUN | settings))
    return str(folder)


def decided(pipeline, *runs: str, **options):
    adapters = [Adapter(Path(run).name, run) for run in runs]
    return loaded_backbone(pipeline, DrawingOptions(**options), None, adapters, {})[1:]


def test_settings_are_those_of_the_evaluations_beside_the_weights(lora, tmp_path):
    run = run_folder(lora, tmp_path / "run", eval_guidance_scale=5.0, negative_prompt="a moth")
    expected = SIZE | {"num_inference_steps": 2, "guidance_scale": 5.0, "negative_prompt": "a moth"}
    assert run_settings(Adapter("x", run)) == expected
    assert run_settings(Adapter("x", f"{run}/pytorch_lora_weights.safetensors")) == expected
    assert run_settings(Adapter("x", str(lora))) == run_settings(Adapter("x", "owner/on-the-hub")) == {}
    plain = run_folder(lora, tmp_path / "plain", eval_num_inference_steps=None, negative_prompt=None)
    assert run_settings(Adapter("x", plain)) == SIZE | {"guidance_scale": 3.0}


def test_what_is_asked_for_comes_before_the_run_and_the_run_before_the_pipeline(tiny_sd3, lora, tmp_path):
    run = run_folder(lora, tmp_path / "run", negative_prompt="a moth")
    options, notes = decided(tiny_sd3, run)
    assert (options.num_inference_steps, options.guidance_scale, options.negative_prompt) == (2, 3.0, "a moth")
    assert notes == []
    options, notes = decided(tiny_sd3, run, guidance_scale=1.0, height=24)
    # Without guidance the run's negative prompt has no effect
    assert (options.height, options.width, options.guidance_scale, options.negative_prompt) == (24, 16, 1.0, None)
    assert notes == ["The run of run evaluated with guidance_scale 3.0, negative_prompt 'a moth', height 16."]
    options, notes = decided(tiny_sd3, str(lora))
    assert (options.num_inference_steps, options.guidance_scale, options.max_sequence_length) == (28, 7.0, 256)
    assert notes == ["How the run of ours evaluated is not known: it has no training_args.json beside it."]
    options, notes = decided(tiny_sd3, str(lora), num_inference_steps=3, guidance_scale=None)
    assert (options.num_inference_steps, options.guidance_scale) == (3, 7.0)


def test_the_bundled_model_has_settings_of_its_own():
    options, _ = decided(load_pipeline())
    assert (options.num_inference_steps, options.guidance_scale, options.height) == (10, 2.0, 64)


def test_settings_of_a_run_that_have_no_effect_are_left_out(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "training_args.json").write_text(json.dumps(RUN | {"height": 32, "width": 32, "max_sequence_length": 128}))
    options, notes = decided(tiny_sd_pipeline(), str(run))
    assert (options.max_sequence_length, options.guidance_scale, notes) == (16, 3.0, [])
    options, notes = decided(tiny_flux_pipeline(guidance_embeds=False), str(run))
    assert (options.guidance_scale, notes) == (1.0, [])


def test_runs_that_differ_are_drawn_alike_and_said(tiny_sd3_path, lora, tmp_path):
    one = run_folder(lora, tmp_path / "one")
    two = run_folder(lora, tmp_path / "two", guidance_scale=1.0, height=24)
    found = evaluate_models(tiny_sd3_path, [one, two], prompts=PROMPTS, output_dir=tmp_path / "out", progress=False)
    assert found.results["settings"]["guidance_scale"] == 3.0 and found.results["settings"]["height"] == 16
    assert found.results["notes"] == ["The run of two evaluated with guidance_scale 1.0, height 24."]
    assert "The run of two evaluated with guidance_scale 1.0, height 24." in found.markdown


@pytest.mark.parametrize(
    ("make", "option", "message"),
    [
        (tiny_klein_pipeline, {"negative_prompt": "x"}, "negative_prompt is 'x', but Flux2KleinPipeline takes none"),
        (tiny_flux_pipeline, {"negative_prompt": "x"}, "negative_prompt is 'x', but FluxPipeline takes none"),
        (partial(tiny_flux_pipeline, guidance_embeds=False), {"guidance_scale": 3.5}, "FluxPipeline is distilled"),
        (tiny_sd_pipeline, {"max_sequence_length": 128}, "max_sequence_length is 128, but StableDiffusionPipeline"),
        (tiny_sd_pipeline, {"negative_prompt": "x", "guidance_scale": 1.0}, "has no effect: with guidance_scale 1"),
    ],
)
def test_an_option_without_effect_is_refused_before_the_folder_is_claimed(make, option, message, tmp_path, capsys):
    pipeline, size = make(), {"height": 32, "width": 32}
    with pytest.raises(ValueError, match=message):
        draw(pipeline, ["a cat"], seed=0, **size, **option)
    pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    flags = [text for name, value in (size | option).items() for text in (f"--{name}", str(value))]
    paths = ["--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.txt")]
    assert main(["evaluate", *paths, "--device", "cpu", "--output_dir", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_prompts_that_are_cut_are_counted_once(tiny_sd3, tmp_path):
    prompts = Dataset.from_dict({"prompt": ["a cat", "two dogs " * 9, "a bird"]})
    options = DrawingOptions(num_inference_steps=1, batch_size=1, **SIZE)
    with warnings_of("trl_flow") as said:
        evaluate_models(tiny_sd3, prompts=prompts, output_dir=tmp_path, options=options, progress=False)
    assert [message for message in said if "1 of 3 different prompts of the prompts" in message] == said
    with warnings_of("trl_flow") as said:
        draw(tiny_sd3, prompts["prompt"], seed=0, num_inference_steps=1, batch_size=1, **SIZE)
    assert len(said) == 1
