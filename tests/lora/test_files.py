import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_loras import FAMILIES, PATTERNS, assert_same_deltas, component_of, deltas, saved_adapter

from trl_flow.lora import find_lora, load_lora


def loaded(family, path):
    """What the pipeline's layers get from a file."""
    pipeline = FAMILIES[family]()
    load_lora(pipeline, path, component_of(pipeline))
    return deltas(getattr(pipeline, component_of(pipeline)))


@pytest.mark.parametrize("family", ["sd", "sd3", "flux", "klein", "z"])
def test_pefts_form_is_what_peft_makes_of_it(family, tmp_path):
    saved_adapter(family, tmp_path, use_rslora=True, **PATTERNS)
    (tmp_path / "pytorch_lora_weights.safetensors").unlink()
    pipeline = FAMILIES[family]()
    expected = deltas(PeftModel.from_pretrained(getattr(pipeline, component_of(pipeline)), str(tmp_path)))
    assert_same_deltas(loaded(family, tmp_path), expected)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="adapter_config.json, which has its alpha, is not beside it"):
        loaded(family, tmp_path)


def kohya_file(path, family="sd", *, alphas=(1.0, 3.0)):
    """A file as kohya's scripts write it, with alphas in turn, and what each layer gets from it."""
    torch.manual_seed(0)
    tensors, expected = {}, {}
    model = FAMILIES[family]().unet
    layers = [(name, module) for name, module in model.named_modules() if name.endswith(("to_q", "ff.net.2"))]
    for i, (name, module) in enumerate(layers):
        down, up = torch.randn(2 + i % 2, module.in_features), torch.randn(module.out_features, 2 + i % 2)
        key = f"lora_unet_{name.replace('.', '_')}"
        alpha = alphas[i % len(alphas)]
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        expected[name] = alpha / len(down) * up @ down
    save_file(tensors, path)
    return expected


@pytest.mark.parametrize("alphas", [(1.0,), (1.0, 3.0)])
def test_alphas_of_a_u_net_are_honored_also_where_they_differ(alphas, tmp_path):
    expected = kohya_file(tmp_path / "lora.safetensors", alphas=alphas)
    assert_same_deltas(loaded("sd", tmp_path), expected)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_layers_without_an_alpha_are_not_given_that_of_others(alpha, tmp_path):
    file = tmp_path / "lora.safetensors"
    expected = kohya_file(file, alphas=(alpha,))
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("to_q.alpha")]:
        del tensors[name]
    save_file(tensors, file)
    for name in (name for name in expected if name.endswith("to_q")):
        down = tensors[f"lora_unet_{name.replace('.', '_')}.lora_down.weight"]
        expected[name] = expected[name] * len(down) / alpha
    assert_same_deltas(loaded("sd", tmp_path), expected)


def added(tensors, name, tensor):
    return tensors | {name: tensor}


LOST = {
    "dora_scale": ("sd3", "transformer.transformer_blocks.0.attn.to_q.dora_scale", r"\.dora_scale.*form of DoRA"),
    "bias difference": ("sd3", "transformer.transformer_blocks.0.attn.to_q.diff_b", r"diff_b"),
    "other module": (
        "sd3",
        "transformer.transformer_blocks.9.attn.to_q.lora_A.weight",
        "12 of the 13 .*not .*blocks.9",
    ),
    "other prefix": ("flux", "unet.mid_block.lora_A.weight", "of the"),
    "an alpha alone": ("qwen", "transformer.img_in.alpha", "img_in.alpha"),
    "text encoder 3": ("sd3", "text_encoder_3.encoder.lora_A.weight", "only 12 of the 13"),
}


@pytest.mark.parametrize("case", LOST)
def test_a_file_of_which_a_tensor_would_be_lost_is_refused(case, tmp_path):
    family, name, words = LOST[case]
    saved_adapter(family, tmp_path / "a", target_modules=["to_q", "to_k", "to_v"])
    tensors = load_file(tmp_path / "a" / "pytorch_lora_weights.safetensors")
    save_file(tensors | {name: torch.ones(2, 8)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=words):
        loaded(family, tmp_path / "more.safetensors")


def test_a_control_lora_is_refused(tmp_path):
    width = FAMILIES["flux"]().transformer.x_embedder
    down, up = torch.ones(2, 2 * width.in_features), torch.ones(width.out_features, 2)
    name = "transformer.x_embedder.lora_{}.weight"
    save_file({name.format("A"): down, name.format("B"): up}, tmp_path / "control.safetensors")
    with pytest.raises(ValueError, match="a control LoRA"):
        loaded("flux", tmp_path / "control.safetensors")


def test_kohyas_dora_is_refused_in_the_form_that_diffusers_strips_of_it(tmp_path):
    kohya_file(tmp_path / "lora.safetensors")
    tensors = load_file(tmp_path / "lora.safetensors")
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    scale = name.replace("lora_up.weight", "dora_scale")
    save_file(tensors | {scale: torch.ones(len(tensors[name]), 1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="no place for 1 of .*dora_scale"):
        loaded("sd", tmp_path / "lora.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", [{"use_dora": True}, {"use_rslora": True, "lora_alpha": 7}], ids=["dora", "rslora"])
def test_no_tensor_is_lost_between_the_trainers_files_and_the_stock_pipeline(family, config, tmp_path):
    saved_adapter(family, tmp_path, **config)
    ours, stock = FAMILIES[family](), FAMILIES[family]()
    component = component_of(ours)
    load_lora(ours, tmp_path, component)
    stock.load_lora_weights(str(tmp_path))
    mine, theirs = getattr(ours, component).state_dict(), getattr(stock, component).state_dict()
    assert {name.replace(".default_0", ".default") for name in theirs} == set(mine)
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name.replace(".default_0", ".default")], tensor)


def test_which_file_of_a_folder(tmp_path):
    for name in ("other.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        (tmp_path / name).touch()
        assert find_lora(tmp_path) == tmp_path / name
    shutil.copy(tmp_path / "other.safetensors", tmp_path / "second.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(ValueError, match="several: .*other.*second"):
        find_lora(tmp_path)
    (tmp_path / "pickled.bin").touch()
    with pytest.raises(ValueError, match="not a .safetensors file"):
        find_lora(tmp_path / "pickled.bin")
    with pytest.raises(ValueError, match="none, but"):
        find_lora(tmp_path.parent)
