"""The bundled pipeline: what is shipped, that stock diffusers draws with it, and that it is the measured one."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trl_flow.shapes import PlacedShape, check, load_pipeline, load_prompts, pipeline_path, render
from trl_flow.shapes.bundled import T5_TOKENS
from trl_flow.shapes.prompts import all_targets, make_caption


# Tokenizers belong to the weights: with another order of tokens the same weights read other words.
TOKENIZER_HASHES = {
    "tokenizer": "8c66be92bec11828e62b6d7fc229b1bc709b77ba2a4c7be2f6ff8f0fc15721e9",
    "tokenizer_2": "8c66be92bec11828e62b6d7fc229b1bc709b77ba2a4c7be2f6ff8f0fc15721e9",
    "tokenizer_3": "dd78c7e6f0187bc0fa26e0b39f5bdded87177ef5caafd33de6c412f6fc5eb96a",
}

WEIGHT_HASHES = {
    "text_encoder": "3bef91493526b56ebfd610357fef0caef6cfccc846ce596dbe0a667fb48545d0",
    "text_encoder_2": "22a0ea3bae0e73374c12609ca48a2018e0fa78fb8ee5a31e4b5117c358447c55",
    "text_encoder_3": "75c837158ddc66eeb42ed6706b8a216c7474d8b9326c4adba3b0212f0abcce9e",
    "tiny_decoder": "7e8a241ada71e8336b5ec7cb401a153e8697f47de7a4ba86483403ab49334346",
    "transformer": "27b3e0f526ed374a5de9c13865473f7e633e569c6ad74d30a26209e869ef9afa",
    "vae": "79a4f3a82f2e71e39724caa9e2f80fc0b3b52ca674ed059d823bfcf93f5d238c",
}


@pytest.fixture(scope="module")
def pipeline():
    loaded = load_pipeline()
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_folder_is_small_and_holds_only_weights_and_text():
    files = [path for path in Path(pipeline_path()).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt"}
    assert sum(path.stat().st_size for path in files) <= 16e6


def test_every_file_is_package_data():
    # setup.cfg ships pipeline/**/*.json, *.safetensors and *.txt; a scores.json goes with them.
    scores = json.loads((Path(pipeline_path()) / "scores.json").read_text(encoding="utf-8"))
    assert scores["psnr_db"]["autoencoder"] > 30


@pytest.mark.parametrize("name", WEIGHT_HASHES)
def test_weights_are_those_that_the_scores_belong_to(name):
    (file,) = (Path(pipeline_path()) / name).glob("*.safetensors")
    assert hashlib.sha256(file.read_bytes()).hexdigest() == WEIGHT_HASHES[name]


@pytest.mark.parametrize("name", TOKENIZER_HASHES)
def test_tokenizers_are_those_of_the_weights(name):
    # Line endings may be changed by git on the way
    text = (Path(pipeline_path()) / name / "tokenizer.json").read_bytes().replace(b"\r\n", b"\n")
    assert hashlib.sha256(text).hexdigest() == TOKENIZER_HASHES[name]


def test_every_word_is_one_token(pipeline):
    for caption in (make_caption(*target) for target in all_targets()):
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
            tokens = tokenizer(caption).input_ids
            assert len(tokens) == len(caption.split()) + 2 <= tokenizer.model_max_length
            assert tokenizer.decode(tokens, skip_special_tokens=True) == caption


def test_all_weights_load_in_single_precision(pipeline):
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            assert {parameter.dtype for parameter in component.parameters()} == {torch.float32}, name
            assert not component.training, name


def test_autoencoder_keeps_pictures(pipeline):
    scene = [PlacedShape("red", "circle", 18, 18, 18), PlacedShape("cyan", "triangle", 44, 42, 20)]
    image = render(scene, ground=0.95)
    with torch.no_grad():
        pixels = pipeline.image_processor.preprocess(image)
        decoded = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample
    result = pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
    error = np.asarray(result, dtype=np.float64) - np.asarray(image, dtype=np.float64)
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 28
    wanted = [{"count": 1, "color": placed.color, "shape": placed.shape} for placed in scene]
    assert check(result, wanted).strict == 1


def test_scores_at_a_fixed_seed(pipeline):
    rows = load_prompts("test").to_list()
    images = pipeline(
        [row["prompt"] for row in rows],
        guidance_scale=1.0,
        num_inference_steps=10,
        max_sequence_length=T5_TOKENS,
        generator=torch.Generator().manual_seed(0),
    ).images
    results = [check(image, row["objects"], row["relation"]) for image, row in zip(images, rows, strict=True)]
    assert np.mean([result.soft for result in results]) == pytest.approx(0.647, abs=0.01)
    assert np.mean([result.strict for result in results]) == pytest.approx(0.25, abs=0.02)
    assert np.mean([result.fidelity for result in results]) == pytest.approx(0.705, abs=0.01)


STOCK_USE = """
import sys
import torch
from diffusers import StableDiffusion3Pipeline
pipe = StableDiffusion3Pipeline.from_pretrained(sys.argv[1])
generator = torch.Generator().manual_seed(0)
image = pipe("two red circles", num_inference_steps=10, generator=generator).images[0]
assert not [name for name in sys.modules if name.startswith("trl_flow")]
image.save(sys.argv[2])
"""


def test_stock_diffusers_draws_without_this_package(tmp_path):
    picture = tmp_path / "picture.png"
    command = [sys.executable, "-c", STOCK_USE, pipeline_path(), str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "truncated" not in done.stderr
    with Image.open(picture) as image:
        assert image.size == (64, 64)
        red, green, blue = np.asarray(image, dtype=np.float64).transpose(2, 0, 1)
    # The pipeline's default guidance of 7 leaves the ground mottled, but the shapes have their color and their size.
    colored = np.maximum.reduce([red, green, blue]) - np.minimum.reduce([red, green, blue]) > 107
    is_red = colored & (red > green + 80) & (red > blue + 80)
    assert 160 <= is_red.sum() <= 2000
    assert is_red.sum() > 0.8 * colored.sum()


def test_importing_the_world_loads_no_model_library():
    code = (
        "import sys, trl_flow.shapes; "
        "print([name for name in ('torch', 'diffusers', 'transformers', 'datasets') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]", done.stderr
