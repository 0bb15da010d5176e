"""What leaves a training run is loaded by stock diffusers and the Hub's own client, and equals what was trained."""

import ast
import filecmp
import functools
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import yaml
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from family_checks import assert_same_images
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from peft import LoKrConfig, LoraConfig, get_peft_model, set_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import tiny_sd3_pipeline
from tiny_painter import tiny_painter_backbone

from trl_flow.backbones import get_backbone
from trl_flow.sharing import (
    PushError,
    check_lora_config,
    create_model_card,
    hub_model_id,
    load_full,
    papers_behind,
    save_adapter,
    save_full,
    save_lora,
    training_settings,
    upload,
    uploaded_files,
    weight_files,
)


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LORA_FILES = {"pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"}


def draw(pipeline) -> np.ndarray:
    """Two images, as floats: `(2, 16, 16, 3)`."""
    generator = torch.Generator().manual_seed(3)
    return pipeline(
        ["a red circle", "two squares"],
        num_inference_steps=3,
        guidance_scale=2.0,
        max_sequence_length=32,
        generator=generator,
        output_type="np",
    ).images


def assert_same(images: np.ndarray, expected: np.ndarray) -> None:
    """
    The same images to rounding: the same weights in other memory may go through other kernels.

    What is trained here moves pixels by more than 0.01 of their range.
    """
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-4)


def add_random_lora(pipeline, **config) -> None:
    """Wraps the pipeline's transformer by PEFT in place and moves every trainable weight off its initial value."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **config}
    model = get_peft_model(pipeline.transformer, LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    pipeline.transformer = model


def drawn_by_stock_pipeline(base: str, lora: str | os.PathLike) -> np.ndarray:
    pipeline = StableDiffusion3Pipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(lora)
    return draw(pipeline)


# ---- LoRA ----


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"lora_alpha": 7, "use_rslora": True},
        {"rank_pattern": {"to_q": 2, "^transformer_blocks.1.attn.to_k": 3}, "alpha_pattern": {"to_v": 5}},
        {"target_modules": "all-linear", "lora_dropout": 0.5},
        {"target_modules": r".*attn\.(to_q|add_k_proj)"},
        {"target_modules": ["proj_out", "pos_embed.proj"], "rank_pattern": {"^proj_out": 2}},
        {"exclude_modules": ["transformer_blocks.0.attn.to_q"]},
        {"layers_to_transform": [1], "layers_pattern": "transformer_blocks"},
        {"use_dora": True},
        {"lora_bias": True},
        {"init_lora_weights": "gaussian"},
    ],
    ids=lambda config: " ".join(config) or "plain",
)
@pytest.mark.filterwarnings("ignore:.*invalid shape")  # PEFT takes the biases of `lora_bias` for shards
def test_stock_pipeline_draws_the_same_images(tiny_sd3, tiny_sd3_path, tmp_path, config):
    untrained = draw(tiny_sd3)
    add_random_lora(tiny_sd3, **config)
    trained = draw(tiny_sd3)
    assert np.abs(trained - untrained).max() > 0.01

    path = save_lora(StableDiffusion3Pipeline, tiny_sd3.transformer, tmp_path)

    assert path == tmp_path / "pytorch_lora_weights.safetensors"
    # PEFT's files lie in the same folder, and no card of PEFT's, nor anything left over
    assert set(os.listdir(tmp_path)) == LORA_FILES
    assert_same(drawn_by_stock_pipeline(tiny_sd3_path, tmp_path), trained)


def test_alpha_is_kept_and_the_metadata_holds_only_what_every_peft_knows(tiny_sd3, tiny_sd3_path, tmp_path):
    add_random_lora(tiny_sd3, r=4, lora_alpha=10)
    path = save_lora(StableDiffusion3Pipeline, tiny_sd3.transformer, tmp_path)
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        names = list(file.keys())
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (4, 10)
    modules = metadata["transformer.target_modules"]
    assert modules == sorted(modules) and len(modules) == 2 * len(ATTENTION)
    known_to_every_peft = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"}
    assert {key.removeprefix("transformer.") for key in metadata} == known_to_every_peft
    assert all(name.startswith("transformer.transformer_blocks.") for name in names)

    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3_path)
    pipeline.load_lora_weights(tmp_path, adapter_name="tuned")
    layer = pipeline.transformer.transformer_blocks[0].attn.to_q
    assert layer.scaling["tuned"] == 10 / 4


@pytest.mark.filterwarnings("ignore:.*base_model_name_or_path")  # the transformer in hand has no name
def test_peft_files_restore_the_weights(tiny_sd3, tiny_sd3_path, tmp_path):
    add_random_lora(tiny_sd3)
    save_lora(StableDiffusion3Pipeline, tiny_sd3.transformer, tmp_path, base_model="owner/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/base"

    other = StableDiffusion3Pipeline.from_pretrained(tiny_sd3_path)
    model = get_peft_model(other.transformer, LoraConfig.from_pretrained(tmp_path))
    set_peft_model_state_dict(model, load_file(tmp_path / "adapter_model.safetensors"))
    expected = tiny_sd3.transformer.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_local_base_model_is_not_noted_as_a_hub_id(tiny_sd3, tiny_sd3_path, tmp_path):
    add_random_lora(tiny_sd3)
    save_adapter(tiny_sd3.transformer, tmp_path, base_model=tiny_sd3_path)
    assert set(os.listdir(tmp_path)) == {"adapter_model.safetensors", "adapter_config.json"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] is None


def test_a_card_that_is_there_is_left_alone(tiny_sd3, tmp_path):
    (tmp_path / "README.md").write_text("ours")
    add_random_lora(tiny_sd3)
    save_lora(StableDiffusion3Pipeline, tiny_sd3.transformer, tmp_path)
    assert (tmp_path / "README.md").read_text() == "ours"


def test_gathered_state_dict_is_what_is_saved(tiny_sd3, tmp_path):
    add_random_lora(tiny_sd3)
    doubled = {name: 2 * tensor for name, tensor in tiny_sd3.transformer.state_dict().items()}
    plain = load_file(save_lora(StableDiffusion3Pipeline, tiny_sd3.transformer, tmp_path / "plain"))
    gathered = load_file(
        save_lora(StableDiffusion3Pipeline, tiny_sd3.transformer, tmp_path / "gathered", state_dict=doubled)
    )
    assert plain.keys() == gathered.keys()
    assert all(torch.equal(gathered[name], 2 * plain[name]) for name in plain)
    resumed = load_file(tmp_path / "gathered" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[f"base_model.model.{n.removeprefix('transformer.')}"], gathered[n]) for n in plain)


@pytest.mark.filterwarnings("ignore:.*invalid shape")  # PEFT's own warning about the same
def test_empty_shards_are_refused(tiny_sd3, tmp_path):
    add_random_lora(tiny_sd3)
    shards = {name: tensor.new_empty(0) for name, tensor in tiny_sd3.transformer.state_dict().items()}
    with pytest.raises(RuntimeError, match="accelerator.get_state_dict"):
        save_lora(StableDiffusion3Pipeline, tiny_sd3.transformer, tmp_path, state_dict=shards)
    with pytest.raises(RuntimeError, match="no weights"):
        save_lora(StableDiffusion3Pipeline, tiny_sd3.transformer, tmp_path, state_dict={})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["proj_out"]}, r"modules_to_save=\['proj_out'\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"target_parameters": ["weight"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_name(config, named):
    with pytest.raises(ValueError, match=named):
        check_lora_config(LoraConfig(**config))


def test_other_adapters_than_lora_are_refused():
    with pytest.raises(ValueError, match="LoKrConfig"):
        check_lora_config(LoKrConfig())


# ---- Full fine-tuning ----


def test_full_weights_load_in_stock_diffusers(tiny_sd3, tiny_sd3_path, tmp_path):
    with torch.no_grad():
        for parameter in tiny_sd3.transformer.parameters():
            parameter.mul_(1.1)
    trained = draw(tiny_sd3)
    save_full(tiny_sd3.transformer, tmp_path)
    assert set(os.listdir(tmp_path)) == {"config.json", "diffusion_pytorch_model.safetensors"}

    transformer = SD3Transformer2DModel.from_pretrained(tmp_path)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3_path, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    assert_same(draw(pipeline), trained)

    again = SD3Transformer2DModel.from_pretrained(tiny_sd3_path, subfolder="transformer")
    load_full(again, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), transformer.parameters(), strict=True))


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_the_weights_of_a_checkpoint_are_told_from_its_other_files(tiny_sd3, tmp_path, is_lora):
    if is_lora:
        add_random_lora(tiny_sd3)
        save_lora(StableDiffusion3Pipeline, tiny_sd3.transformer, tmp_path)
    else:
        save_full(tiny_sd3.transformer, tmp_path)
    written = set(tmp_path.iterdir())
    for name in ("optimizer.pt", "rollouts-0.safetensors", "run_state.safetensors", "trainer_state.json"):
        (tmp_path / name).write_text("")
    assert set(weight_files(tmp_path)) == written


def test_full_weights_in_shards(tiny_sd3, tmp_path, monkeypatch):
    import trl_flow.sharing.weights as weights

    whole = weights.save_torch_state_dict
    monkeypatch.setattr(
        weights, "save_torch_state_dict", lambda *a, **kw: whole(*a, **{**kw, "max_shard_size": "20KB"})
    )
    save_full(tiny_sd3.transformer, tmp_path)
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    expected = tiny_sd3.transformer.state_dict()
    other = SD3Transformer2DModel.from_config(tiny_sd3.transformer.config)
    load_full(other, tmp_path)
    for loaded in (other, SD3Transformer2DModel.from_pretrained(tmp_path)):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_weights_of_another_model_are_refused(tiny_sd3, tmp_path):
    transformer = tiny_sd3.transformer
    with pytest.raises(FileNotFoundError, match="diffusion_pytorch_model"):
        load_full(transformer, tmp_path)
    partial = dict(list(transformer.state_dict().items())[1:])
    missing = next(iter(transformer.state_dict()))
    with pytest.raises(RuntimeError, match=missing):
        save_full(transformer, tmp_path, state_dict=partial)
    assert os.listdir(tmp_path) == []


# ---- A disk that will not take it ----


@contextmanager
def full_disk():
    """
    Writing more than 2,000 bytes to a file fails, as on a full disk; files under the limit still go through.

    To be left before the test ends: pytest's own output may be a file.
    """
    resource = pytest.importorskip("resource", reason="needs POSIX limits")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_full_disk_leaves_the_earlier_files(tiny_sd3, tmp_path, kind):
    if kind == "lora":
        add_random_lora(tiny_sd3)

    def save() -> None:
        if kind == "lora":
            save_lora(StableDiffusion3Pipeline, tiny_sd3.transformer, tmp_path)
        else:
            save_full(tiny_sd3.transformer, tmp_path)

    save()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        for parameter in tiny_sd3.transformer.parameters():
            parameter.add_(1.0)
    with full_disk(), pytest.raises(OSError, match="before is unchanged"):
        save()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_where_the_folder_should_be(tiny_sd3, tmp_path):
    add_random_lora(tiny_sd3)
    (tmp_path / "out").write_text("")
    with pytest.raises(OSError, match="could not be written to"):
        save_lora(StableDiffusion3Pipeline, tiny_sd3.transformer, tmp_path / "out")


# ---- Model card ----


NASTY = 'a "red" circle | `left` of\n---\n<b>a\'s</b>: [#1] *square* \\ {x}'


def card_of(path) -> ModelCard:
    return ModelCard.load(path)


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "my run"
    (folder / "images").mkdir(parents=True)
    for name in ("rewards.png", "images/step 10.png", "images/grid.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


@functools.cache
def sd3_backbone():
    return get_backbone(tiny_sd3_pipeline(), height=16, width=16, max_sequence_length=16)


def write_card(folder, **kwargs):
    kwargs = {
        "backbone": sd3_backbone(),
        "is_lora": True,
        "base_model": "stabilityai/stable-diffusion-3.5-medium",
        "settings": {"num_inference_steps": 10, "guidance_scale": 4.5, "importance_ratio": "ratio_norm"},
        **kwargs,
    }
    return create_model_card(folder, **kwargs)


def test_front_matter_of_a_hub_model(run_folder):
    card = card_of(write_card(run_folder, repo_id="me/tuned", dataset_name="me/prompts"))
    data = card.data.to_dict()
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "text-to-image"
    assert data["base_model"] == "stabilityai/stable-diffusion-3.5-medium"
    assert data["base_model_relation"] == "adapter"
    assert data["datasets"] == ["me/prompts"]
    assert {"trl_flow", "lora", "diffusers-training", "text-to-image", "flow-grpo", "grpo-guard"} == set(data["tags"])
    assert "# tuned" in card.text


def test_local_base_is_told_in_words_without_its_path(run_folder, tiny_sd3_path):
    card = card_of(write_card(run_folder, base_model=tiny_sd3_path))
    assert "base_model" not in card.data.to_dict()
    assert "a local pipeline, `tiny-sd3`" in card.text
    assert os.path.dirname(tiny_sd3_path) not in card.text


def python_block(card: ModelCard) -> str:
    return card.text.split("```python\n")[1].split("\n```")[0]


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_the_loading_code_runs_and_draws_the_trained_images(tiny_sd3, tiny_sd3_path, run_folder, is_lora):
    if is_lora:
        add_random_lora(tiny_sd3)
        save_lora(StableDiffusion3Pipeline, tiny_sd3.transformer, run_folder)
    else:
        with torch.no_grad():
            tiny_sd3.transformer.proj_out.weight.mul_(-1)
        save_full(tiny_sd3.transformer, run_folder)
    sampling = {"num_inference_steps": 2, "guidance_scale": 1.5, "negative_prompt": 'a "b"', "max_sequence_length": 20}
    settings = {"height": 16, "width": None, **sampling, "noise_level": 0.7}
    card = card_of(write_card(run_folder, base_model=tiny_sd3_path, is_lora=is_lora, settings=settings))
    code = python_block(card)
    assert len([line for line in code.splitlines() if line and "import" not in line]) == 3
    code = code.replace("path/to/tiny-sd3", tiny_sd3_path).replace("path/to/my run", str(run_folder))
    torch.manual_seed(5)
    scope = {}
    exec(code, scope)
    torch.manual_seed(5)
    assert_same_images([scope["image"]], tiny_sd3("a prompt", height=16, **sampling).images, (16, 16))


def test_the_loading_code_of_a_hub_model_is_python(run_folder):
    for is_lora, loader in ((True, "load_lora_weights"), (False, "SD3Transformer2DModel")):
        code = python_block(card_of(write_card(run_folder, repo_id="me/tuned", is_lora=is_lora)))
        ast.parse(code)
        assert '"me/tuned"' in code and '"stabilityai/stable-diffusion-3.5-medium"' in code and loader in code
        assert code.count(", dtype=torch.bfloat16)") == (1 if is_lora else 2)
        assert "num_inference_steps=10, guidance_scale=4.5" in code


def test_the_card_of_a_family_of_ones_own(run_folder):
    path = write_card(
        run_folder,
        backbone=tiny_painter_backbone(),
        base_model=None,
        is_lora=False,
        settings={"num_inference_steps": 3, "guidance_scale": 1.5, "height": 8},
    )
    card = card_of(path)
    assert "A fine-tuned painter for a pipeline that was not loaded from the Hub" in card.text
    assert python_block(card).splitlines() == [
        "from tiny_painter import PainterPipeline",
        "from tiny_painter import Painter",
        "from painting import Brush",
        "",
        'painter = Painter.from_pretrained("path/to/my run")',
        'pipeline = PainterPipeline.from_pretrained("path/to/base_model", painter=painter)',
        "pipeline.scheduler = Brush()",
        'image = pipeline(prompt="a prompt", num_inference_steps=3, strength=1.5).images[0]',
    ]


def test_prompts_with_quotes_newlines_pipes_and_html(run_folder):
    path = write_card(
        run_folder,
        model_name=NASTY,
        reward_names=[NASTY],
        settings={"negative_prompt": NASTY, "noise_level": 0.7},
        samples=[("images/step 10.png", NASTY), ("images/grid.png", None), ("images/missing.png", "x")],
        curves="rewards.png",
    )
    card = card_of(path)
    raw = path.read_text()
    front = yaml.safe_load(raw.split("\n---\n")[0].removeprefix("---\n"))
    assert front["widget"] == [{"text": " ".join(NASTY.split()), "output": {"url": "images/step%2010.png"}}]
    # In code Markdown leaves everything as it is
    prose = re.sub(r"```.*?\n```|`[^`\n]*`", "", card.text, flags=re.DOTALL)
    assert "<b>" not in prose and "\n---\n" not in card.text
    nodes = ast.walk(ast.parse(python_block(card_of(write_card(run_folder, prompt=NASTY)))))
    # Another prompt would draw another image
    assert NASTY in [node.value.value for node in nodes if isinstance(node, ast.keyword) and node.arg == "prompt"]
    row = next(line for line in card.text.splitlines() if line.startswith("| negative"))
    cells = [cell for cell in row.replace("\\|", "").split("|") if cell.strip()]
    assert len(cells) == 2
    assert "| noise\\_level | 0.7 |" in card.text
    assert "![Rewards while training](rewards.png)" in card.text
    assert "(images/grid.png)" in card.text and "missing" not in card.text
    assert "<Gallery />" in card.text


def test_images_outside_the_folder_are_refused(run_folder, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere.png")
    with pytest.raises(ValueError, match="lies outside"):
        write_card(run_folder, curves=tmp_path / "elsewhere.png")


@pytest.mark.parametrize(
    ("settings", "tags"),
    [
        ({}, []),  # an algorithm of the user's own
        ({"sde_type": "flow", "timestep_weighting": "none", "advantage_power": 0.0}, ["flow-grpo"]),
        ({"importance_ratio": "ratio_norm", "timestep_weighting": "inverse_dt"}, ["flow-grpo", "grpo-guard"]),
        ({"sde_type": "dance", "advantage_power": 0.5}, ["flow-grpo", "dance-grpo", "slas"]),
        ({"sde_type": "cps", "sde_window_size": 2}, ["flow-grpo", "flow-cps"]),  # Flow-GRPO-Fast's is a random window
        (
            {"sde_type": "flow", "sde_window_size": 2, "sde_window_schedule": "progressive"},
            ["flow-grpo", "mix-grpo"],
        ),
        (
            {"sde_type": "flow", "timestep_weighting": "temp", "dense_rewards": True},
            ["flow-grpo", "tempflow-grpo", "vgpo"],
        ),
        ({"nft_beta": 1.0, "timestep_sampling": "schedule", "advantage_power": 0.5}, ["slas", "diffusion-nft"]),
        ({"huber_power": 0.25, "timestep_weighting": "t"}, ["awm"]),
    ],
)
def test_the_papers_follow_from_the_settings(run_folder, settings, tags):
    assert [paper.tag for paper in papers_behind(settings)] == tags
    text = card_of(write_card(run_folder, settings=settings)).text
    for paper in papers_behind(settings):
        assert paper.bibtex in text and f"https://arxiv.org/abs/{paper.arxiv}" in text
    assert text.count("@article") == len(tags)


def test_training_settings_reads_what_the_config_has():
    class Args:
        noise_level, seed, hub_token = 0.7, 42, "hf_secret"

    assert training_settings(Args()) == {"noise_level": 0.7, "seed": 42}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", "owner/name"),
        ("/home/me/model", None),
        ("./model", None),
        ("name", None),
        ("a/b/c", None),
        (None, None),
        ("owner/na me", None),
    ],
)
def test_hub_ids_are_told_from_paths(name, expected):
    assert hub_model_id(name) == expected


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_model_id("owner/name") is None


# ---- Push ----


@pytest.fixture
def finished_run(tiny_sd3, run_folder):
    """A run's folder as it is at the end: what is to be shared, and what is not."""
    add_random_lora(tiny_sd3)
    save_lora(StableDiffusion3Pipeline, tiny_sd3.transformer, run_folder)
    write_card(run_folder, samples=[("images/step 10.png", NASTY)])
    (run_folder / "results.json").write_text("{}")
    for name in (
        *("training_args.bin", "notes.txt", ".env", "token", "rollouts-0.safetensors"),
        *(
            "_saving-x/adapter_model.safetensors",
            "checkpoint-5/optimizer.pt",
            "checkpoint-5/adapter_model.safetensors",
        ),
    ):
        (run_folder / name).parent.mkdir(exist_ok=True)
        (run_folder / name).write_text("private")
    return run_folder


# The card shows one of the two samples, and no curve
SHARED = LORA_FILES | {"README.md", "images/step 10.png"}


def test_push_and_load_back_with_the_real_client(hub_server, finished_run, tiny_sd3, tiny_sd3_path, tmp_path):
    commit = upload(finished_run, "tuned", private=True, commit_message="First")
    assert commit.oid == hub_server.revision("tester/tuned")
    assert hub_server.private["tester/tuned"]
    assert hub_server.commits == [("tester/tuned", "First")]
    files = hub_server.repos["tester/tuned"]
    assert files.keys() - {".gitattributes"} == SHARED
    for name in SHARED:
        assert files[name] == (finished_run / name).read_bytes(), name
    # The large files went the way of large files
    assert ("POST", "/tester/tuned.git/info/lfs/objects/batch") in hub_server.requests

    downloaded = snapshot_download("tester/tuned", cache_dir=tmp_path / "cache")
    for name in SHARED:
        assert filecmp.cmp(os.path.join(downloaded, name), finished_run / name, shallow=False), name
    # By its id, as the card tells: the pipeline picks its own file among the three
    assert_same(drawn_by_stock_pipeline(tiny_sd3_path, "tester/tuned"), draw(tiny_sd3))


def test_pushing_again_commits_only_what_changed(hub_server, finished_run):
    upload(finished_run, "tester/tuned")
    sent = len([request for request in hub_server.requests if request[0] == "PUT"])
    card = finished_run / "README.md"
    card.write_text(card.read_text() + "More.\n")
    upload(finished_run, "tester/tuned", commit_message="Second")
    assert hub_server.repos["tester/tuned"]["README.md"].endswith(b"More.\n")
    assert [title for _, title in hub_server.commits] == ["End of training", "Second"]
    assert len([request for request in hub_server.requests if request[0] == "PUT"]) == sent


def test_a_checkpoint_is_pushed_whole_into_a_subfolder(hub_server, finished_run):
    upload(finished_run / "checkpoint-5", "tester/tuned", checkpoint_as="last-checkpoint")
    files = hub_server.repos["tester/tuned"]
    names = {"last-checkpoint/optimizer.pt", "last-checkpoint/adapter_model.safetensors"}
    assert files.keys() - {".gitattributes"} == names
    # what the next one has not is taken away
    (finished_run / "checkpoint-5" / "optimizer.pt").rename(finished_run / "checkpoint-5" / "optimizer.bin")
    upload(finished_run / "checkpoint-5", "tester/tuned", checkpoint_as="last-checkpoint")
    files = hub_server.repos["tester/tuned"].keys() - {".gitattributes"}
    assert files == {"last-checkpoint/optimizer.bin", "last-checkpoint/adapter_model.safetensors"}


def test_what_is_asked_for_is_shared_too_and_samples_of_an_earlier_card_are_taken_away(hub_server, finished_run):
    upload(finished_run, "tester/tuned", include=["images/*.png", "results.json"])
    files = hub_server.repos["tester/tuned"].keys() - {".gitattributes"}
    assert files == SHARED | {"images/grid.png", "results.json"}
    listed = uploaded_files(finished_run, include=["images/*.png", "results.json"])
    assert {str(name) for name in listed} == files and all(path.is_file() for path in listed.values())
    write_card(finished_run, samples=[("images/grid.png", None)], curves="rewards.png")
    upload(finished_run, "tester/tuned")
    files = hub_server.repos["tester/tuned"].keys() - {".gitattributes"}
    assert files == LORA_FILES | {"README.md", "results.json", "images/grid.png", "rewards.png"}


def test_a_card_that_links_elsewhere_takes_nothing_along(hub_server, finished_run, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    (finished_run / "linked.png").symlink_to(tmp_path / "private.png")
    links = "../private.png", "linked.png", str(tmp_path / "private.png"), "notes.txt", "https://host/x.png"
    (finished_run / "mine.png").write_bytes((tmp_path / "private.png").read_bytes())
    in_code = '```python\npipeline(prompt="a ![x](mine.png)")\n```\n'
    (finished_run / "README.md").write_text("".join(f"![x]({link})\n" for link in links) + in_code)
    upload(finished_run, "tester/tuned")
    assert hub_server.repos["tester/tuned"].keys() - {".gitattributes"} == LORA_FILES | {"README.md"}


def test_a_branch_is_made(hub_server, finished_run):
    for _ in range(2):
        upload(finished_run, "tester/tuned", revision="exp1")
    assert hub_server.repos["tester/tuned"].keys() == {".gitattributes"}
    assert hub_server.repos["tester/tuned@exp1"].keys() >= SHARED


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/repos/create", 401),
        ("/api/repos/create", 403),
        ("/api/repos/create", 500),
        ("/preupload/", 403),
        ("/lfs/", 403),
        ("/commit/", 500),
    ],
)
def test_a_refused_push_says_so_and_loses_nothing(hub_server, finished_run, path, status):
    before = {p: p.read_bytes() for p in finished_run.rglob("*") if p.is_file()}
    hub_server.fail(path, status, "refused on purpose")
    with pytest.raises(PushError) as caught:
        upload(finished_run, "tester/tuned")
    message = str(caught.value)
    assert "tester/tuned" in message and str(finished_run) in message and "Nothing is lost" in message
    if path != "/lfs/":  # of a failed upload the client tells only the file's name
        assert "refused on purpose" in message or str(status) in message
    assert {p: p.read_bytes() for p in finished_run.rglob("*") if p.is_file()} == before
    assert hub_server.commits == []

    hub_server.heal()
    upload(finished_run, "tester/tuned")
    assert hub_server.repos["tester/tuned"].keys() >= SHARED


def test_a_wrong_token_and_a_foreign_namespace(hub_server, finished_run, monkeypatch):
    with pytest.raises(PushError, match="401"):
        upload(finished_run, "tester/tuned", token="hf_wrong")
    with pytest.raises(PushError, match="403"):
        upload(finished_run, "somebody/tuned")
    assert hub_server.repos == {}


def test_no_server_at_all(finished_run):
    with pytest.raises(PushError, match="Nothing is lost"):
        upload(finished_run, "tester/tuned")


def test_the_environment_leads_a_subprocess_to_the_server(hub_server):
    code = "from huggingface_hub import HfApi; print(HfApi().whoami()['name'])"
    environment = {**os.environ, **hub_server.environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "tester"


def test_the_loopback_server_checks_contents(hub_server):
    """The server would notice a broken upload: it is no yes-man."""
    request = urllib.request.Request(f"{hub_server.url}/lfs/{'0' * 64}", data=b"abc", method="PUT")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 400
    with pytest.raises(Exception, match="Invalid user token"):
        HfApi(token="hf_wrong").whoami()
    with pytest.raises(Exception, match="404"):
        hf_hub_download("tester/none", "README.md")
