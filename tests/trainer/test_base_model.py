"""What the base was loaded with goes with the adapter: into its config, the card, and back into evaluation."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_models import tiny_sd3_pipeline
from tiny_training import prompts, tiny_trainer

from trl_flow.evaluation import DrawingOptions, evaluate_models


OPTIONS = DrawingOptions(num_inference_steps=1, height=16, width=16, max_sequence_length=16, device="cpu")


def folder_of(path, **options) -> Path:
    tiny_sd3_pipeline().save_pretrained(path, **options)
    return path


def asked(server, word: str) -> int:
    return sum(f"/{word}" in path for _, path in server.requests)


def test_the_revision_of_the_base(hub_server, tmp_path):
    base = folder_of(tmp_path / "base")
    files = {str(file.relative_to(base)): file.read_bytes() for file in base.rglob("*") if file.is_file()}
    hub_server.repos["tester/base"], hub_server.private["tester/base"] = files, False
    hub_server.tag("tester/base", "v1")
    trainer = tiny_trainer(tmp_path / "run", pipeline="tester/base", model_init_kwargs={"revision": "v1"})
    trainer.save_model()
    trainer.create_model_card()
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("tester/base", "v1")
    card = (tmp_path / "run" / "README.md").read_text()
    assert 'from_pretrained("tester/base", revision="v1", dtype=torch.bfloat16)' in card

    hub_server.requests.clear()
    given = {"prompts": prompts(1), "options": OPTIONS, "progress": False}
    evaluate_models("tester/base", [tmp_path / "run"], output_dir=tmp_path / "out", **given)
    assert asked(hub_server, "v1") > 0 and asked(hub_server, "main") == 0
    # Said by the user, it is what is loaded
    hub_server.requests.clear()
    evaluate_models("tester/base", [tmp_path / "run"], output_dir=tmp_path / "out", revision="main", **given)
    assert asked(hub_server, "main") > 0 and asked(hub_server, "v1") == 0
    # Adapters of two revisions have no common base
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    (tmp_path / "other" / "training_args.json").unlink()
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config | {"revision": None}))
    with pytest.raises(ValueError, match=r"different revisions of tester/base \(run: v1, other: main\)"):
        evaluate_models("tester/base", [tmp_path / "run", tmp_path / "other"], output_dir=tmp_path / "two", **given)


def test_the_variant_of_its_files(tmp_path):
    base = str(folder_of(tmp_path / "base", variant="fp16"))
    trainer = tiny_trainer(tmp_path / "run", pipeline=base, model_init_kwargs={"variant": "fp16"})
    trainer.save_model()
    trainer.create_model_card()
    assert 'from_pretrained("path/to/base", variant="fp16")' in (tmp_path / "run" / "README.md").read_text()
    given = {"prompts": prompts(1), "options": OPTIONS, "progress": False}
    with pytest.raises(ValueError, match="could not be loaded as a diffusers pipeline.*of a variant only"):
        evaluate_models(base, output_dir=tmp_path / "out", **given)
    evaluate_models(base, [tmp_path / "run"], output_dir=tmp_path / "out", **given)
    evaluate_models(base, variant="fp16", output_dir=tmp_path / "other", **given)
    # Another copy of the model has not the files that were trained with
    copy = str(folder_of(tmp_path / "copy"))
    evaluate_models(copy, [tmp_path / "run"], output_dir=tmp_path / "of_copy", **given)
    with pytest.raises(ValueError, match="variant cannot be given for a loaded pipeline"):
        evaluate_models(tiny_sd3_pipeline(), variant="fp16", output_dir=tmp_path / "third", **given)


def test_a_subfolder_is_refused_rather_than_ignored(tmp_path, tiny_sd3_path):
    with pytest.raises(ValueError, match="subfolder='fp16', which diffusers does not read for a pipeline"):
        tiny_trainer(tmp_path, pipeline=tiny_sd3_path, model_init_kwargs={"subfolder": "fp16"})
