import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file
from tiny_loras import FAMILIES, PATTERNS, assert_same_deltas, component_of, deltas, random_adapter, saved_adapter
from tiny_unets import tiny_sdxl_pipeline, tiny_unet

from trl_flow.lora import export_lora, load_lora
from trl_flow.sharing import save_lora


def exported(family, adapter, file, format):
    pipeline = FAMILIES[family]()
    component = component_of(pipeline)
    getattr(pipeline, component).to("meta")  # names and shapes are enough
    export_lora(pipeline, component, adapter, format, file)
    return load_file(file)


def as_read(tensors: dict[str, torch.Tensor], ends: tuple[str, str] = (".lora_down.weight", ".lora_up.weight")):
    """What each module's LoRA adds, as these tools compute it: alpha over rank times up times down."""
    down, up = ends
    read = {}
    for name in [name.removesuffix(down) for name in tensors if name.endswith(down)]:
        first, second, alpha = tensors.pop(name + down), tensors.pop(name + up), tensors.pop(f"{name}.alpha").item()
        product = (second.flatten(1) @ first.flatten(1)).reshape(len(second), *first.shape[1:])
        read[name] = alpha / len(first) * product
    assert not tensors
    return read


@pytest.mark.parametrize("family", ["sd3", "flux", "klein", "qwen", "z"])
def test_comfyui_reads_diffusers_names_of_transformers_with_alphas(family, tmp_path):
    expected = saved_adapter(family, tmp_path, **PATTERNS)
    tensors = exported(family, tmp_path, tmp_path / "comfyui.safetensors", "comfyui")
    read = as_read(tensors, (".lora_A.weight", ".lora_B.weight"))
    assert_same_deltas(read, {f"transformer.{name}": delta for name, delta in expected.items()})


@pytest.mark.parametrize(("family", "format"), [("sd", "comfyui"), ("sdxl", "comfyui"), ("sd", "kohya")])
def test_names_of_u_nets_are_diffusers_with_underscores(family, format, tmp_path):
    expected = saved_adapter(family, tmp_path, target_modules=["to_q", "ff.net.0.proj", "conv1"], **PATTERNS)
    read = as_read(exported(family, tmp_path, tmp_path / "out.safetensors", format))
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q" in read
    assert_same_deltas(read, {f"lora_unet_{name.replace('.', '_')}": delta for name, delta in expected.items()})


# diffusers reads kohya's files of these families by converters of its own
@pytest.mark.parametrize("family", ["sd", "sdxl", "klein", "qwen", "z"])
def test_kohyas_files_are_what_the_stock_pipeline_takes_for_the_adapter(family, tmp_path):
    expected = saved_adapter(family, tmp_path)
    file = tmp_path / "kohya.safetensors"
    exported(family, tmp_path, file, "kohya")
    stock = FAMILIES[family]()
    stock.load_lora_weights(str(file))
    assert_same_deltas(deltas(getattr(stock, component_of(stock))), expected)


@pytest.mark.parametrize("format", ["comfyui", "kohya"])
def test_wans_modules_have_their_original_names(format, tmp_path):
    # diffusers' converter of musubi-tuner's files asks for the feed-forward layers, too
    targets = ["to_k", "to_out.0", "to_q", "to_v", "ffn.net.0.proj", "ffn.net.2"]
    expected = saved_adapter("wan", tmp_path, target_modules=targets, **PATTERNS)
    file = tmp_path / "out.safetensors"
    tensors = exported("wan", tmp_path, file, format)
    assert "lora_unet_blocks_1_cross_attn_o.lora_up.weight" in tensors
    stock = FAMILIES["wan"]()
    stock.load_lora_weights(str(file))
    assert_same_deltas(deltas(stock.transformer), expected)


def test_modules_of_an_xl_u_nets_blocks_have_their_original_names(tmp_path):
    # Blocks as in Stable Diffusion XL: two layers each, attention in all but the first and the last
    blocks = {"block_out_channels": (8, 8, 8), "layers_per_block": 2, "transformer_layers_per_block": 1}
    down = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    up = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    pipeline = tiny_sdxl_pipeline()
    xl = {name: pipeline.unet.config[name] for name in ("addition_embed_type", "addition_time_embed_dim")}
    xl["projection_class_embeddings_input_dim"] = pipeline.unet.config.projection_class_embeddings_input_dim
    pipeline.unet = tiny_unet(**blocks, **xl, down_block_types=down, up_block_types=up)
    targets = ["conv1", "conv2", "time_emb_proj", "conv_shortcut", "to_out.0", "ff.net.2", "samplers.0.conv"]
    regex = rf".*({'|'.join(targets)})".replace(".0", r"\.0")
    model = random_adapter(pipeline.unet, target_modules=regex)
    expected = deltas(model)
    save_lora(type(pipeline), model, tmp_path, component="unet")
    pipeline.unet = tiny_unet(**blocks, **xl, down_block_types=down, up_block_types=up)
    file = tmp_path / "kohya.safetensors"
    export_lora(pipeline, "unet", tmp_path, "kohya", file)
    names = {name.split(".")[0].removeprefix("lora_unet_") for name in load_file(file)}
    assert {
        *("input_blocks_1_0_in_layers_2", "input_blocks_3_0_op", "input_blocks_5_0_emb_layers_1"),
        *("input_blocks_4_1_transformer_blocks_0_attn2_to_out_0", "middle_block_2_out_layers_3"),
        *("middle_block_1_transformer_blocks_0_ff_net_2", "output_blocks_0_0_skip_connection"),
        *("output_blocks_2_2_conv", "output_blocks_5_1_transformer_blocks_0_attn1_to_out_0", "output_blocks_5_2_conv"),
        "output_blocks_8_0_in_layers_2",
    } <= names
    pipeline.load_lora_weights(str(file))
    assert_same_deltas(deltas(pipeline.unet), expected)


def rows(read: dict[str, torch.Tensor], name: str, *parts: torch.Tensor) -> None:
    """A module of several of diffusers' has their weights one under another."""
    torch.testing.assert_close(read.pop(f"lora_unet_{name}"), torch.cat(parts), rtol=1e-4, atol=1e-5)


def test_sd3_in_kohyas_names(tmp_path):
    attention = ["to_q", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "attn.to_out.0", "to_add_out"]
    others = ["ff.net.0.proj", "ff_context.net.2", "norm1.linear", "norm1_context.linear"]
    others += ["norm_out.linear", "proj_out"]
    own = saved_adapter("sd3", tmp_path, target_modules=attention + others, **PATTERNS)
    read = as_read(exported("sd3", tmp_path, tmp_path / "out.safetensors", "kohya"))
    for i in (0, 1):
        block, target = f"transformer_blocks.{i}", f"joint_blocks_{i}"
        q, v = own[f"{block}.attn.to_q"], own[f"{block}.attn.to_v"]
        rows(read, f"{target}_x_block_attn_qkv", q, torch.zeros_like(q), v)
        rows(read, f"{target}_context_block_attn_qkv", *(own[f"{block}.attn.add_{x}_proj"] for x in "qkv"))
        rows(read, f"{target}_x_block_attn_proj", own[f"{block}.attn.to_out.0"])
        rows(read, f"{target}_x_block_mlp_fc1", own[f"{block}.ff.net.0.proj"])
        rows(read, f"{target}_x_block_adaLN_modulation_1", own[f"{block}.norm1.linear"])
    rows(read, "joint_blocks_0_context_block_attn_proj", own["transformer_blocks.0.attn.to_add_out"])
    rows(read, "joint_blocks_0_context_block_mlp_fc2", own["transformer_blocks.0.ff_context.net.2"])
    rows(read, "joint_blocks_0_context_block_adaLN_modulation_1", own["transformer_blocks.0.norm1_context.linear"])
    # diffusers has scale before shift where the text stream ends, and at the end of all
    scale, shift = own["transformer_blocks.1.norm1_context.linear"].chunk(2)
    rows(read, "joint_blocks_1_context_block_adaLN_modulation_1", shift, scale)
    scale, shift = own["norm_out.linear"].chunk(2)
    rows(read, "final_layer_adaLN_modulation_1", shift, scale)
    rows(read, "final_layer_linear", own["proj_out"])
    assert not read


def test_flux_in_kohyas_names_as_diffusers_converts_them_back(tmp_path):
    # The converter knows the width of the released model only; what is as wide has no data here
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    targets = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "proj_mlp", "ff.net.2", "norm.linear"]
    with torch.device("cpu"):
        adapter = random_adapter(model, target_modules=targets, r=1, lora_alpha=3)
    state = {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in adapter.state_dict().items():
        if "lora_" in name:
            state[name] = torch.randn(tensor.shape, generator=generator)
    save_lora(FluxPipeline, adapter, tmp_path, state_dict=state)
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    pipeline = FluxPipeline(None, None, None, None, None, None, model)
    file = tmp_path / "kohya.safetensors"
    export_lora(pipeline, "transformer", tmp_path, "kohya", file)
    names = {name.split(".")[0].removeprefix("lora_unet_") for name in load_file(file)}
    assert {"double_blocks_0_img_attn_qkv", "double_blocks_0_txt_attn_qkv", "single_blocks_0_linear1"} < names
    back = FluxPipeline.lora_state_dict(str(file))
    assert len(back) == len(state)
    for name, down in state.items():
        if "lora_A" in name:
            key = name.replace("base_model.model.", "transformer.").replace(".default", "")
            up = state[name.replace("lora_A", "lora_B")]
            probe = torch.randn(down.shape[1], generator=generator)
            actual = back[key.replace("lora_A", "lora_B")] @ (back[key] @ probe)
            torch.testing.assert_close(actual, 3 * (up @ (down @ probe)), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("family", "format", "config", "words"),
    [
        ("sd", "kohya", {"target_modules": ["time_embedding.linear_1"]}, "no names for 1 of the 1 .* time_embedding"),
        ("sdxl", "kohya", {"target_modules": ["conv_in", "to_q"]}, "no names for 1 .* conv_in"),
        ("flux", "kohya", {"target_modules": ["norm_out.linear"]}, "no names .* norm_out.linear"),
        ("klein", "comfyui", {"target_modules": ["single_stream_modulation.linear"]}, "no names"),
        ("klein", "kohya", {"target_modules": ["x_embedder"]}, "no names"),
        ("qwen", "kohya", {"target_modules": ["img_in"]}, "no names"),
        ("z", "kohya", {"target_modules": ["cap_embedder.1"]}, "no names"),
        ("sd3", "comfyui", {"target_modules": ["to_q"], "use_dora": True}, "not a plain LoRA"),
        ("sd3", "comfyui", {"target_modules": ["to_q"], "lora_bias": True}, "not a plain LoRA"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*invalid shape")
def test_what_a_format_has_no_names_for_is_refused(family, format, config, words, tmp_path):
    saved_adapter(family, tmp_path, **config)
    with pytest.raises(ValueError, match=words):
        exported(family, tmp_path, tmp_path / "out.safetensors", format)
    assert not (tmp_path / "out.safetensors").exists()


def test_an_adapter_is_not_written_over(tmp_path):
    expected = saved_adapter("sd3", tmp_path)
    with pytest.raises(ValueError, match="the adapter itself, which would be lost"):
        exported("sd3", tmp_path, tmp_path / "pytorch_lora_weights.safetensors", "comfyui")
    pipeline = FAMILIES["sd3"]()
    load_lora(pipeline, tmp_path, "transformer")
    assert_same_deltas(deltas(pipeline.transformer), expected)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    saved_adapter("sd", tmp_path)
    with pytest.raises(ValueError, match="is not a LoRA for this StableDiffusion3Pipeline"):
        exported("sd3", tmp_path, tmp_path / "out.safetensors", "comfyui")


def test_what_was_exported_can_be_loaded_again(tmp_path):
    # diffusers refuses this file: of Stable Diffusion 3 it reads no alphas
    expected = saved_adapter("sd3", tmp_path, **PATTERNS)
    exported("sd3", tmp_path, tmp_path / "comfyui.safetensors", "comfyui")
    pipeline = FAMILIES["sd3"]()
    load_lora(pipeline, tmp_path / "comfyui.safetensors", "transformer")
    assert_same_deltas(deltas(pipeline.transformer), expected)
