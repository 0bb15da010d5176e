"""Weights are found on the Hub, in folders and as files; what is wrong with them is told by name."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_geneval import save_tiny_clip, save_tiny_mask2former
from tiny_reward_models import NAMES, clip_model, clip_tokenizer, make_reward, picture, save_clip, save_reward_models
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.utils import logging

from trl_flow.rewards import CLIPScoreReward, GenEvalReward, HPSv2Reward, ImageReward, PickScoreReward
from trl_flow.rewards.base import CheckpointError
from trl_flow.rewards.checkpoints import fill, find_file, load_pretrained, read_tensors


WHERE = {"revision": None, "token": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_reward_models(tmp_path_factory.mktemp("rewards"))


def upload(server, repo_id, folder):
    server.repos[repo_id] = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    server.private[repo_id] = True


class Malicious:
    """What a file on the Hub can hold: something that is run by the one who unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


# ---- The Hub ----


@pytest.mark.parametrize("name", NAMES)
def test_rewards_load_from_private_repositories_at_a_revision(name, folder, hub_server):
    kind = {"pickscore": "clip", "clipscore": "clip", "imagereward": "image_reward"}.get(name, name)
    kind = "hps" if name.startswith("hpsv2") else kind
    for part in {kind, "clip"}:
        upload(hub_server, f"tester/{part}", folder / part)
        hub_server.tag(f"tester/{part}", "v1")
    # `make_reward` puts ids together as it does paths
    reward = make_reward(name, Path("tester"), revision="v1", token=hub_server.token)
    expected = make_reward(name, folder)(["a cat"], [picture(0)])
    assert reward(["a cat"], [picture(0)]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    downloads = [path for _, path in hub_server.requests if "/resolve/" in path and f"/{kind}/" in path]
    assert any(path.endswith((".pt", ".pth", ".safetensors")) for path in downloads)
    # A revision is asked for by its name, or first looked up
    lookup = ("HEAD", f"/api/models/tester/{kind}/revision/v1"), ("GET", f"/api/models/tester/{kind}/revision/v1")
    assert any("/resolve/v1/" in path for path in downloads) or set(lookup) & set(hub_server.requests)
    # The second time nothing is downloaded
    before = sum(method == "GET" and "/resolve/" in path for method, path in hub_server.requests)
    reward.close()
    assert reward(["a cat"], [picture(0)]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert sum(method == "GET" and "/resolve/" in path for method, path in hub_server.requests) == before


def test_geneval_loads_its_two_models_from_private_repositories_at_their_revisions(tmp_path, hub_server):
    for name, save in (("detector", save_tiny_mask2former), ("colors", save_tiny_clip)):
        save(tmp_path / name)
        upload(hub_server, f"tester/{name}", tmp_path / name)
    hub_server.tag("tester/detector", "v1")
    hub_server.tag("tester/colors", "v2")
    columns = {"tag": ["single_object"], "include": [[{"class": "dog", "count": 1}]]}
    models = {"model": "tester/detector", "clip_model": "tester/colors"}
    with GenEvalReward(**models, revision="v1", clip_revision="v2", token=hub_server.token) as reward:
        score = reward(["a photo of a dog"], [picture(0)], **columns)
    local = {"model": str(tmp_path / "detector"), "clip_model": str(tmp_path / "colors")}
    assert score == pytest.approx(GenEvalReward(**local)(["a photo of a dog"], [picture(0)], **columns))
    paths = [path for _, path in hub_server.requests]
    assert any("/tester/detector/" in path and "v1" in path for path in paths)
    assert any("/tester/colors/" in path and "v2" in path for path in paths)
    assert not any("/tester/detector/" in path and "v2" in path for path in paths)
    with pytest.raises(CheckpointError, match="geneval: tester/detector .*token="):
        GenEvalReward(**models, token=False)(["a photo of a dog"], [picture(0)], **columns)


@pytest.mark.parametrize("name", ["pickscore", "hpsv2"])
def test_without_the_right_to_read_the_error_asks_for_a_token(name, folder, hub_server):
    upload(hub_server, "tester/clip", folder / "clip")
    upload(hub_server, "tester/hps", folder / "hps")
    reward = make_reward(name, Path("tester"), token=False)
    with pytest.raises(CheckpointError, match=f"{name}: tester/(clip|hps) .*token="):
        reward(["a cat"], [picture(0)])


def test_repository_that_does_not_exist_is_named(hub_server):
    with pytest.raises(CheckpointError, match="imagereward: tester/nothing cannot .* Check the name"):
        ImageReward("tester/nothing", token=hub_server.token)(["a cat"], [picture(0)])
    with pytest.raises(CheckpointError, match="pickscore: tester/nothing cannot .* Check the name"):
        PickScoreReward("tester/nothing", token=hub_server.token)(["a cat"], [picture(0)])


def test_repository_without_the_file_is_named(folder, hub_server):
    upload(hub_server, "tester/hps", folder / "aesthetic")
    with pytest.raises(CheckpointError, match="hpsv2: tester/hps cannot .*file HPS_v2_compressed.pt.*EntryNotFound"):
        HPSv2Reward(model="tester/hps", token=hub_server.token)(["a cat"], [picture(0)])


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "imagereward"])
def test_without_a_network_the_error_says_what_to_download_where(name):
    cls = {"pickscore": PickScoreReward, "hpsv2": HPSv2Reward, "imagereward": ImageReward}[name]
    reward = cls("tester/weights") if name != "hpsv2" else cls(model="tester/weights")
    message = f"{name}: tester/weights .*Without a network .*hf download tester/weights"
    with pytest.raises(CheckpointError, match=message):
        reward(["a cat"], [picture(0)])


# ---- Folders and files ----


@pytest.mark.parametrize("source", ["/no/such/path", "./weights", "~/weights", "a/b/c/weights.pt"])
def test_path_that_does_not_exist_is_no_repository(source):
    message = "neither an existing file or folder nor the id of a repository"
    with pytest.raises(CheckpointError, match=message):
        find_file(source, "weights.pt", **WHERE)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(CLIPModel, source, **WHERE)


def test_file_may_have_any_name_and_folder_must_have_the_published(tmp_path):
    (tmp_path / "mine.pt").touch()
    assert find_file(str(tmp_path / "mine.pt"), "published.pt", **WHERE) == tmp_path / "mine.pt"
    with pytest.raises(CheckpointError, match=r"has no file published\.pt \(it has mine\.pt\)"):
        find_file(str(tmp_path), "published.pt", **WHERE)
    (tmp_path / "published.pt").touch()
    assert find_file(str(tmp_path), "published.pt", **WHERE) == tmp_path / "published.pt"


@pytest.mark.parametrize("cls", [CLIPModel, CLIPImageProcessorPil])
def test_empty_folder_is_refused(cls, tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path} "):
        load_pretrained(cls, str(tmp_path), **WHERE)


@pytest.mark.parametrize("gone", ["preprocessor_config.json", "model.safetensors"])
@pytest.mark.parametrize("damaged", [False, True])
def test_folder_with_a_missing_or_damaged_file_is_not_said_to_be_missing(gone, damaged, tmp_path):
    path = save_clip(tmp_path, clip_model())
    (tmp_path / gone).write_bytes((tmp_path / gone).read_bytes()[:20]) if damaged else (tmp_path / gone).unlink()
    for model in (path, tmp_path):
        with pytest.raises(CheckpointError, match=f"clipscore: {tmp_path} lacks a file .* or has a damaged one"):
            CLIPScoreReward(model, device="cpu").load()


def test_folder_without_a_tokenizer_is_refused(folder, tmp_path):
    # transformers makes an empty one up
    clip = str(folder / "clip")
    CLIPImageProcessorPil.from_pretrained(clip).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"tokenizer of {tmp_path} has . tokens .* but the model has 514"):
        PickScoreReward(clip, str(tmp_path), device="cpu")(["a cat"], [picture(0)])
    with pytest.raises(CheckpointError, match=f"tokenizer of {tmp_path} has . tokens with BLIP's two, the model 59"):
        ImageReward(str(folder / "image_reward"), str(tmp_path), device="cpu")(["a cat"], [picture(0)])


def test_weights_that_are_not_there_are_never_random(tmp_path):
    path = save_clip(tmp_path, clip_model())
    tensors = load_file(tmp_path / "model.safetensors")
    gone = [name for name in tensors if name.startswith("text_model.encoder.layers.1.mlp")]
    for name in gone:
        del tensors[name]
    tensors["visual_projection.weight"] = torch.ones(3, 3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = (
        r"misses text_model\.encoder\.layers\.1\.mlp\.fc1\.bias.*another shape for visual_projection\.weight \(3, 3\)"
    )
    with pytest.raises(CheckpointError, match=message):
        CLIPScoreReward(path, device="cpu")(["a cat"], [picture(0)])


def test_tokenizer_of_another_model_is_refused(tmp_path):
    path = save_clip(tmp_path, clip_model())
    tokens = sorted(clip_tokenizer().get_vocab())
    other = CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    other.save_pretrained(tmp_path / "other")
    CLIPImageProcessorPil().save_pretrained(tmp_path / "other")
    with pytest.raises(
        CheckpointError,
        match="has 514 tokens and ends .* looks for number 513",
    ):
        CLIPScoreReward(path, str(tmp_path / "other"), device="cpu")(["a cat"], [picture(0)])


def test_old_configurations_with_the_wrong_end_of_text_are_read_right(tmp_path):
    # transformers takes the highest token for them, which is the end
    model = clip_model()
    expected = CLIPScoreReward(save_clip(tmp_path / "new", model), device="cpu")(["a cat"], [picture(0)])
    model.config.text_config.eos_token_id = 2
    old = CLIPScoreReward(save_clip(tmp_path / "old", model), device="cpu")
    assert old(["a cat"], [picture(0)]) == pytest.approx(expected, rel=1e-4)


def test_transformers_reports_nothing_and_keeps_its_verbosity(folder, caplog):
    logging.set_verbosity_info()
    try:
        # Only half of this checkpoint is needed
        make_reward("aesthetic", folder).load()
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity_warning()
    assert "UNEXPECTED" not in caplog.text


# ---- What is in a file ----


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_state_dicts_are_taken_out_of_what_they_are_wrapped_in(tmp_path, wrapper):
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.float16)}
    content = tensors if wrapper is None else {"epoch": 3, wrapper: tensors}
    torch.save(content, tmp_path / "weights.pt")
    read = read_tensors(tmp_path / "weights.pt")
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_safetensors_are_read_too(tmp_path):
    save_file({"a": torch.arange(3.0)}, tmp_path / "weights.safetensors")
    assert read_tensors(tmp_path / "weights.safetensors")["a"].tolist() == [0, 1, 2]


def test_nothing_in_a_file_is_run(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "trap": Malicious(tmp_path / "run")}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="holds other objects, which are not loaded because they could run any"):
        read_tensors(tmp_path / "weights.pt")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"version https://git-lfs.github.com/spec/v1\n"])
def test_damaged_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{tmp_path / name} cannot be read.*download it again"):
        read_tensors(tmp_path / name)


def test_half_a_file_is_damaged(tmp_path):
    torch.save({"a": torch.ones(10_000)}, tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:20_000])
    with pytest.raises(CheckpointError, match="only partly downloaded"):
        read_tensors(tmp_path / "half.pt")


@pytest.mark.parametrize(
    "content", [torch.ones(2), {}, {"epoch": 3, "loss": 0.5}, [torch.ones(2)], {"state_dict": {}}]
)
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="instead of a state dict"):
        read_tensors(tmp_path / "weights.pt")


def test_filling_is_all_or_nothing():
    layer = nn.Linear(2, 1)
    fill(
        layer, {"weight": torch.tensor([[1.0, 2.0]], dtype=torch.float16), "bias": torch.zeros(1)}, source="weights.pt"
    )
    assert layer.weight.tolist() == [[1.0, 2.0]] and layer.weight.dtype == torch.float32
    with pytest.raises(CheckpointError, match="weights.pt .*misses bias; .*has the unknown scale"):
        fill(layer, {"weight": torch.ones(1, 2), "scale": torch.ones(1)}, source="weights.pt")
    assert layer.weight.tolist() == [[1.0, 2.0]]
