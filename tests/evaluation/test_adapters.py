import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_comparisons import assert_same_images, random_full, random_lora

from trl_flow.backbones import get_backbone
from trl_flow.evaluation.adapters import (
    Adapter,
    base_fingerprint,
    check_adapter,
    loaded_adapter,
    parse_adapters,
)
from trl_flow.evaluation.drawing import draw


OPTIONS = {"seed": 0, "num_inference_steps": 2, "height": 16, "width": 16, "max_sequence_length": 16}


def images(pipeline) -> np.ndarray:
    return np.stack(
        [np.asarray(image, dtype=int) for image in draw(pipeline, ["a red circle", "two squares"], **OPTIONS)]
    )


@pytest.fixture(scope="module")
def folders(tiny_sd3_path, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {
        "one": random_lora(tiny_sd3_path, root / "one", seed=1),
        "two": random_lora(tiny_sd3_path, root / "two", seed=2),
        "full": random_full(tiny_sd3_path, root / "full", seed=3),
    }


@pytest.fixture
def backbone(tiny_sd3):
    return get_backbone(tiny_sd3)


# ---- names ----


def test_names_and_paths(folders, tmp_path):
    run = tmp_path / "guard"
    for step in ("checkpoint-20", "checkpoint-100", "best_gold"):
        (run / step).mkdir(parents=True)
        (run / step / "pytorch_lora_weights.safetensors").touch()
    (run / "pytorch_lora_weights.safetensors").touch()
    other = tmp_path / "old" / "guard"
    other.mkdir(parents=True)
    (other / "pytorch_lora_weights.safetensors").touch()
    (tmp_path / "a=b.safetensors").touch()
    parsed = parse_adapters(
        [
            folders["one"],
            f"my name={folders['two']}",
            "owner/lora",
            f"hub={'owner/other'}",
            run / "checkpoint-100",
            run / "best_gold",
            str(tmp_path / "a=b.safetensors"),
        ]
    )
    assert [(adapter.name, adapter.path) for adapter in parsed] == [
        ("one", folders["one"]),
        ("my name", folders["two"]),
        ("lora", "owner/lora"),
        ("hub", "owner/other"),
        ("guard/checkpoint-100", str(run / "checkpoint-100")),
        ("guard/best_gold", str(run / "best_gold")),
        ("a=b", str(tmp_path / "a=b.safetensors")),
    ]
    # Two of one name are told apart by the folders that they are in
    both = parse_adapters([run, other])
    assert [adapter.name for adapter in both] == [f"{tmp_path.name}/guard", "old/guard"]


@pytest.mark.parametrize(
    "paths, message",
    [
        (["base={one}"], "kept for the model without"),
        (["BASE={one}"], "kept for the model without"),
        (["={one}"], "kept for the model without"),
        (["a={one}", "a={two}"], "two adapters are called 'a'"),
        (["no/such/folder"], "neither a file"),
        (["./nowhere"], "neither a file"),
        (["nowhere"], "neither a file"),
        (["{tmp}"], "checkpoint-9"),
        (["{tmp}/pickled.bin"], "not a .safetensors"),
        (["{base}"], "a whole pipeline"),
    ],
)
def test_wrong_paths_are_refused(paths, message, folders, tiny_sd3_path, tmp_path):
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "pickled.bin").touch()
    filled = [path.format(**folders, tmp=tmp_path, base=tiny_sd3_path) for path in paths]
    with pytest.raises(ValueError, match=message):
        parse_adapters(filled)


# ---- loading ----


@pytest.mark.parametrize("name", ["one", "full"])
def test_draws_as_anyone_would_with_it_and_leaves_the_base_as_it_was(name, folders, tiny_sd3, backbone, tiny_sd3_path):
    before = images(tiny_sd3)
    with loaded_adapter(backbone, Adapter(name, folders[name])):
        inside = images(tiny_sd3)
    stock = type(tiny_sd3).from_pretrained(tiny_sd3_path)
    if name == "one":
        stock.load_lora_weights(folders[name])
    else:
        stock.transformer = type(stock.transformer).from_pretrained(folders[name])
    assert_same_images(inside, images(stock))
    assert np.abs(inside - before).mean() > 1
    assert_same_images(images(tiny_sd3), before)
    with loaded_adapter(backbone, None):
        assert_same_images(images(tiny_sd3), before)


def test_fingerprints_tell_weights_and_scaling_apart(folders, tiny_sd3, backbone, tiny_sd3_path, tmp_path):
    prints = {name: check_adapter(backbone, Adapter(name, path)) for name, path in folders.items()}
    assert len(set(prints.values())) == 3
    again = random_lora(tiny_sd3_path, tmp_path / "again", seed=1)
    assert check_adapter(backbone, Adapter("another name", again)) == prints["one"]
    # The same weights, another alpha
    file = tmp_path / "again" / "pytorch_lora_weights.safetensors"
    save_file(load_file(file), file)  # without the metadata alpha is the rank
    assert check_adapter(backbone, Adapter("one", again)) != prints["one"]


def test_a_base_model_is_known_by_its_weights(folders, tiny_sd3, backbone, tiny_sd3_path):
    stock = type(tiny_sd3)
    before = base_fingerprint(tiny_sd3)
    assert base_fingerprint(stock.from_pretrained(tiny_sd3_path)) == before
    with loaded_adapter(backbone, Adapter("full", folders["full"])):
        assert base_fingerprint(tiny_sd3) != before
    with loaded_adapter(backbone, Adapter("one", folders["one"])):
        assert base_fingerprint(tiny_sd3) != before
    assert base_fingerprint(tiny_sd3) == before


def test_a_folder_that_is_not_there_is_told_with_what_is(tiny_sd3, backbone, tmp_path, monkeypatch):
    # It looks like a Hub id, and is asked for there
    (tmp_path / "runs" / "guard").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (adapter,) = parse_adapters(["runs/gaurd"])

    def unreachable(path, **options):
        raise RuntimeError("the Hub cannot be reached.")

    monkeypatch.setattr("trl_flow.lora.files.model_info", unreachable)
    with pytest.raises(
        ValueError, match=r"no file or folder 'runs/gaurd'.*reached\. The folder runs holds \['guard'\]"
    ):
        check_adapter(backbone, adapter)


def test_adapters_of_other_models_are_refused_and_leave_nothing_behind(folders, tiny_sd3, backbone, tmp_path):
    before = images(tiny_sd3)
    weights = load_file(folders["one"] + "/pytorch_lora_weights.safetensors")
    wider = {name: torch.nn.functional.pad(tensor, (0, 3, 0, 3)) for name, tensor in weights.items()}
    deeper = weights | {name.replace("blocks.0.", "blocks.7."): tensor.clone() for name, tensor in weights.items()}
    elsewhere = {name.replace("transformer.", "unet."): tensor for name, tensor in weights.items()}
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nonsense")
    for name, content in {"wider": wider, "deeper": deeper, "elsewhere": elsewhere, "broken": None}.items():
        path = tmp_path / f"{name}.safetensors"
        if content is not None:
            save_file(content, path)
        with pytest.raises(
            ValueError, match=f"the adapter '{name}' .* could not be loaded into this StableDiffusion3"
        ):
            check_adapter(backbone, Adapter(name, str(path)))
        assert_same_images(images(tiny_sd3), before)


def test_an_adapter_that_the_pipeline_has_already_is_not_taken_away_in_silence(folders, tiny_sd3, backbone):
    tiny_sd3.load_lora_weights(folders["one"])
    drawn = images(tiny_sd3)
    for name in ("two", "full"):
        with pytest.raises(ValueError, match="has adapters already.*unload_lora_weights.*fuse_lora"):
            check_adapter(backbone, Adapter(name, str(folders[name])))
    assert_same_images(images(tiny_sd3), drawn)
    tiny_sd3.fuse_lora()
    tiny_sd3.unload_lora_weights()
    check_adapter(backbone, Adapter("two", str(folders["two"])))
    assert_same_images(images(tiny_sd3), drawn)
