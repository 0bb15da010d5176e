"""Embeddings kept on disk: training is the same, and the text encoders are off the device."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_models import tiny_sd3_pipeline
from tiny_training import PROMPTS, assert_equal, prompts, tiny_config, tiny_trainer, train, warnings_of

from trl_flow.backbones import StableDiffusion3Backbone
from trl_flow.trainer.prompt_cache import PromptCache, PromptEmbedStore, default_folder, encoding_fingerprint


def backbone(pipeline=None, **settings) -> StableDiffusion3Backbone:
    settings = {"height": 16, "width": 16, "max_sequence_length": 16} | settings
    return StableDiffusion3Backbone(tiny_sd3_pipeline() if pipeline is None else pipeline, **settings)


def files_in(folder) -> list[Path]:
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """Every prompt that is encoded, in order."""
    calls = []
    encode = StableDiffusion3Backbone.encode_prompt

    def counted(self, prompt):
        calls.append(prompt)
        return encode(self, prompt)

    monkeypatch.setattr(StableDiffusion3Backbone, "encode_prompt", counted)
    return calls


# ---- Training ----


def test_training_is_the_same(tmp_path, encoded):
    expected = train(tmp_path / "a")
    fields = {"precompute_prompt_embeds": True, "prompt_embeds_dir": str(tmp_path / "embeds")}
    encoded.clear()
    assert_equal(train(tmp_path / "b", **fields), expected)
    assert sorted(encoded) == sorted(["", *PROMPTS])  # each once, the negative one too
    encoded.clear()
    assert_equal(train(tmp_path / "c", **fields), expected)
    assert encoded == []  # the second run finds them all


def test_evaluation_of_other_prompts_brings_the_encoders_back(tmp_path, encoded):
    fields = {"precompute_prompt_embeds": True, "prompt_embeds_dir": str(tmp_path / "embeds")}
    other = Dataset.from_dict({"prompt": ["a green cow", "a red door"]})
    expected = tiny_trainer(tmp_path / "a", eval_dataset=prompts(2)).evaluate(other)["eval_reward"]
    trainer = tiny_trainer(tmp_path / "b", eval_dataset=prompts(2), **fields)
    encoded.clear()
    assert trainer.evaluate()["eval_reward"] is not None and encoded == []
    assert trainer.evaluate(other)["eval_reward"] == pytest.approx(expected, abs=2e-5)
    assert encoded == ["a green cow", "a red door"]


def test_a_negative_prompt_and_evaluation_sets_are_encoded_ahead(tmp_path, encoded):
    sets = {"one": Dataset.from_dict({"prompt": ["x"]}), "two": Dataset.from_dict({"prompt": ["y", "x"]})}
    fields = {"precompute_prompt_embeds": True, "prompt_embeds_dir": str(tmp_path / "embeds")}
    tiny_trainer(tmp_path / "run", eval_dataset=sets, negative_prompt="blur", **fields)
    assert sorted(encoded) == sorted(["blur", "x", "y", *PROMPTS])
    assert len(files_in(tmp_path / "embeds")) == len(encoded)


def test_without_guidance_no_negative_prompt_is_encoded(tmp_path, encoded):
    fields = {"precompute_prompt_embeds": True, "prompt_embeds_dir": str(tmp_path / "embeds")}
    tiny_trainer(tmp_path / "a", guidance_scale=1.0, **fields)
    assert "" not in encoded
    tiny_trainer(tmp_path / "b", guidance_scale=1.0, eval_guidance_scale=3.0, **fields)
    assert "" in encoded


def test_the_default_folder_is_beside_the_hubs_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    tiny_trainer(tmp_path / "run", precompute_prompt_embeds=True)
    assert default_folder() == tmp_path / "home" / "trl_flow" / "prompt_embeds"
    assert len(files_in(default_folder())) == len(PROMPTS) + 1


def test_a_folder_without_a_use_is_refused(tmp_path):
    with pytest.raises(ValueError, match="prompt_embeds_dir is 'x', but precompute_prompt_embeds is False"):
        tiny_config(tmp_path, prompt_embeds_dir="x")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    fields = {"precompute_prompt_embeds": True, "prompt_embeds_dir": str(tmp_path / "file")}
    with pytest.raises(ValueError, match="prompt_embeds_dir '.*file' cannot be written to"):
        tiny_trainer(tmp_path / "run", **fields)


def test_a_disk_on_which_they_do_not_fit(tmp_path, monkeypatch):
    size = sum(value.nbytes for value in backbone().encode_prompt("x").values())
    usage = shutil.disk_usage(tmp_path)._replace(free=(len(PROMPTS) + 1) * size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    fields = {"precompute_prompt_embeds": True, "prompt_embeds_dir": str(tmp_path / "embeds")}
    with pytest.raises(OSError, match=f"embeddings of {len(PROMPTS) + 1} prompts take about"):
        tiny_trainer(tmp_path / "run", **fields)


# ---- The cache ----


def test_encoders_are_on_the_device_only_while_they_are_needed(tmp_path, monkeypatch):
    places = []
    monkeypatch.setattr(PromptCache, "_move_encoders", lambda self, device: places.append(device.type))
    cache = PromptCache(backbone(), store=PromptEmbedStore(tmp_path, "a"))
    # The "device" is the CPU here: what is seen is that they are called for once, and sent away again
    assert places == ["cpu"]
    cache.write(lambda: [("x", None), ("y", None), ("x", None)])
    assert places == ["cpu"] * 3
    cache(["x", "y"])
    assert places == ["cpu"] * 3
    cache(["z"])
    assert places == ["cpu"] * 5


def test_they_are_moved_there_and_back():
    pipeline = tiny_sd3_pipeline()
    cache = PromptCache(backbone(pipeline))
    cache._move_encoders(torch.device("meta"))
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    assert {getattr(pipeline, name).device.type for name in names} == {"meta"}
    assert pipeline.vae.device.type == pipeline.transformer.device.type == "cpu"


def test_quantized_encoders_stay_where_they_are():
    pipeline = tiny_sd3_pipeline()
    pipeline.text_encoder_3.is_quantized = True  # as loading does
    PromptCache(backbone(pipeline))._move_encoders(torch.device("meta"))
    assert (pipeline.text_encoder.device.type, pipeline.text_encoder_3.device.type) == ("meta", "cpu")


def test_each_process_writes_its_share(tmp_path, encoded):
    pairs = [(text, None) for text in "abcade"]
    caches = [PromptCache(backbone(), store=PromptEmbedStore(tmp_path, "a")) for _ in range(2)]
    caches[0].write(lambda: pairs, rank=0, num_processes=2)
    assert encoded == ["a", "c", "e"]
    caches[1].write(lambda: pairs, rank=1, num_processes=2)
    assert encoded == ["a", "c", "e", "b", "d"]


def test_conditions_come_back_as_they_were(tmp_path):
    store = PromptEmbedStore(tmp_path, "a")
    condition = {
        "a": torch.randn(1, 3, 5, dtype=torch.bfloat16),
        "mask": torch.tensor([[True, False]]),
        "transposed": torch.randn(4, 3).T,
    }
    store.save("a “prompt”\n", None, condition)
    loaded = store.load("a “prompt”\n", None)
    assert loaded.keys() == condition.keys()
    assert all(torch.equal(loaded[name], condition[name]) for name in condition)
    assert all(loaded[name].dtype == condition[name].dtype for name in condition)
    assert store.load("another", None) is None
    assert store.load("a “prompt”\n", "of an image") is None


def test_images_are_part_of_the_key(tmp_path):
    class Editing(StableDiffusion3Backbone):
        takes_image = True

        def encode_prompt(self, prompt, image=None):
            brightness = torch.tensor([[float(image.getpixel((0, 0))[0])]])
            return super().encode_prompt(prompt) | {"brightness": brightness}

    cache = PromptCache(
        Editing(tiny_sd3_pipeline(), height=16, width=16, max_sequence_length=16),
        store=PromptEmbedStore(tmp_path, "a"),
    )
    images = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (7, 9, 7)]
    cache.write(lambda: [("same", image) for image in images])
    assert len(files_in(tmp_path)) == 2
    assert cache(["same"] * 3, images)["brightness"].flatten().tolist() == [7.0, 9.0, 7.0]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_damaged_files_are_encoded_anew(tmp_path, encoded, damage):
    store = PromptEmbedStore(tmp_path, "a")
    expected = PromptCache(backbone(), store=store)(["x"])
    (path,) = files_in(tmp_path)
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[:-3],
            "flipped": content[:-1] + bytes([content[-1] ^ 1]),
            "empty": b"",
            "text": b"not what it should be",
        }[damage]
    )
    encoded.clear()
    with warnings_of("trl_flow") as messages:
        found = PromptCache(backbone(), store=store)(["x"])
    assert encoded == ["x"] and "is damaged" in messages[0]
    torch.testing.assert_close(found, expected)
    assert store.load("x", None) is not None  # written again


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    store = PromptEmbedStore(tmp_path, "a")

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="could not be written to .*No space left on device.*prompt_embeds_dir"):
        store.save("x", None, {"a": torch.zeros(1)})
    assert files_in(tmp_path) == []


WRITER = """
import sys, torch
from trl_flow.trainer.prompt_cache import PromptEmbedStore
store = PromptEmbedStore(sys.argv[1], "a")
for turn in range(60):
    for i in range(4):
        store.save(str(i), None, {"a": torch.full((2000,), float(i))})
"""


def test_readers_see_whole_files_while_others_write_them(tmp_path):
    """Two processes write the same files again and again; every read in between finds a whole one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], env=environment) for _ in range(2)]
    store = PromptEmbedStore(tmp_path, "a")
    reads = 0
    with warnings_of("trl_flow") as messages:
        while any(writer.poll() is None for writer in writers):
            for i in range(4):
                if (condition := store.load(str(i), None)) is not None:
                    reads += 1
                    assert condition["a"].eq(i).all()
    assert [writer.returncode for writer in writers] == [0, 0]
    assert reads > 0 and messages == []
    assert len(files_in(tmp_path)) == 4


# ---- What a condition depends on ----


def test_the_fingerprint_is_that_of_what_encodes():
    own = encoding_fingerprint(backbone())
    assert encoding_fingerprint(backbone()) == own
    # The trained part has no share in it
    pipeline = tiny_sd3_pipeline()
    pipeline.transformer.proj_out.weight.data += 1
    assert encoding_fingerprint(backbone(pipeline)) == own


def changed_weight(pipeline):
    pipeline.text_encoder_3.shared.weight.data[5, 0] += 1


def changed_dtype(pipeline):
    pipeline.text_encoder_2.to(torch.bfloat16)


def changed_tokenizer(pipeline):
    pipeline.tokenizer.add_tokens("cat")


def changed_vae(pipeline):
    pipeline.vae.decoder.conv_out.bias.data += 1


@pytest.mark.parametrize("change", [changed_weight, changed_dtype, changed_tokenizer, changed_vae])
def test_the_fingerprint_changes_with_the_pipeline(change):
    pipeline = tiny_sd3_pipeline()
    before = encoding_fingerprint(backbone(pipeline))
    change(pipeline)
    assert encoding_fingerprint(backbone(pipeline)) != before


def test_the_fingerprint_changes_with_settings_and_class():
    pipeline = tiny_sd3_pipeline()

    class Other(StableDiffusion3Backbone):
        pass

    settings = {"height": 16, "width": 16, "max_sequence_length": 16}
    found = [
        encoding_fingerprint(backbone(pipeline)),
        encoding_fingerprint(backbone(pipeline, max_sequence_length=8)),
        encoding_fingerprint(backbone(pipeline, height=32)),
        encoding_fingerprint(Other(pipeline, **settings)),
    ]
    assert len(set(found)) == len(found)
