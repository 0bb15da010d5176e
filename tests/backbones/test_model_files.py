"""Models that are no folder of a pipeline with plain weights: the message says what to do with them."""

import pytest
from tiny_models import tiny_sd3_pipeline
from tiny_training import tiny_trainer

from trl_flow.evaluation.inputs import DrawingOptions, loaded_backbone
from trl_flow.memory.estimate import fetch_configs


VARIANT = ["variant='fp16'", "model_init_kwargs={'variant': 'fp16'}", "--variant fp16"]
SINGLE = ["is a single file", ".from_single_file(", ".save_pretrained('folder')"]


@pytest.fixture(scope="module", params=[None, "20KB"], ids=["whole", "shards"])
def only_fp16(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp16")
    shards = {} if request.param is None else {"max_shard_size": request.param}
    tiny_sd3_pipeline().save_pretrained(folder, variant="fp16", **shards)
    return str(folder)


def messages(model, tmp_path) -> list[str]:
    """What the trainer and the evaluation say of a model."""
    with pytest.raises(ValueError) as training:
        tiny_trainer(tmp_path / "out", pipeline=model)
    with pytest.raises(ValueError) as evaluation:
        loaded_backbone(model, DrawingOptions(), None, [], {})
    return [str(training.value), str(evaluation.value)]


def test_weights_of_a_variant_only(only_fp16, tmp_path):
    for message in messages(only_fp16, tmp_path):
        assert all(part in message for part in ["of a variant only", *VARIANT]), message
    tiny_trainer(tmp_path / "out", pipeline=only_fp16, model_init_kwargs={"variant": "fp16"})


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "x.gguf"])
@pytest.mark.parametrize("where", ["file", "folder", "nowhere"])
def test_a_single_file(name, where, tmp_path):
    path = tmp_path / "models" / name
    path.parent.mkdir()
    if where != "nowhere":
        path.touch()
    parts = ["holds the weights of a transformer alone", "GGUFQuantizationConfig"] if "gguf" in name else SINGLE
    for message in messages(str(path.parent if where == "folder" else path), tmp_path):
        assert all(part in message for part in [str(path), "from_single_file(", *parts]), message


def test_the_memory_estimate_says_it_too(tmp_path):
    (tmp_path / "x.safetensors").touch()
    for model in (tmp_path / "x.safetensors", tmp_path):
        with pytest.raises(ValueError, match="from_single_file"):
            fetch_configs(model)


def test_a_model_that_is_nowhere_gets_no_such_hint(tmp_path):
    for message in messages("no/such-model", tmp_path):
        assert "variant" not in message and "single" not in message
