"""open_clip checkpoints become a CLIPModel that computes the same."""

import pytest
import torch
from tiny_reward_models import OpenCLIP, clip_tokenizer, open_clip_tokens
from transformers import CLIPModel

from trl_flow.rewards.base import CheckpointError
from trl_flow.rewards.hps import clip_from_open_clip, open_clip_config, open_clip_to_transformers


# Names and shapes in HPSv2's checkpoints, a ViT-H-14: one of every kind
VIT_H_14 = {
    "logit_scale": (),
    "positional_embedding": (77, 1024),
    "text_projection": (1024, 1024),
    "token_embedding.weight": (49408, 1024),
    "ln_final.weight": (1024,),
    "ln_final.bias": (1024,),
    "visual.class_embedding": (1280,),
    "visual.positional_embedding": (257, 1280),
    "visual.proj": (1280, 1024),
    "visual.conv1.weight": (1280, 3, 14, 14),
    "visual.ln_pre.weight": (1280,),
    "visual.ln_pre.bias": (1280,),
    "visual.ln_post.weight": (1280,),
    "visual.ln_post.bias": (1280,),
}


def block_shapes(width):
    return {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
    }


def full_size_tensors():
    """The whole state dict of ViT-H-14, without values."""
    shapes = dict(VIT_H_14)
    for prefix, layers, width in (("transformer", 24, 1024), ("visual.transformer", 32, 1280)):
        for layer in range(layers):
            shapes |= {f"{prefix}.resblocks.{layer}.{name}": shape for name, shape in block_shapes(width).items()}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def to_open_clip(tensors):
    """The way back, written from transformers' side."""
    converted = {}
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        for name in [name for name in tensors if name.startswith(f"{tower}.encoder.layers.")]:
            layer, rest = name.removeprefix(f"{tower}.encoder.layers.").split(".", 1)
            block = f"{prefix}transformer.resblocks.{layer}"
            if rest.startswith("self_attn.q_proj"):
                kind = rest.rpartition(".")[2]
                parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                converted[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
            elif not rest.startswith(("self_attn.k_proj", "self_attn.v_proj")):
                rest = rest.replace("self_attn", "attn").replace("layer_norm", "ln_")
                converted[f"{block}.{rest.replace('fc1', 'c_fc').replace('fc2', 'c_proj')}"] = tensors[name]
        converted[f"{prefix}positional_embedding"] = tensors[f"{tower}.embeddings.position_embedding.weight"]
    for kind in ("weight", "bias"):
        converted[f"ln_final.{kind}"] = tensors[f"text_model.final_layer_norm.{kind}"]
        converted[f"visual.ln_pre.{kind}"] = tensors[f"vision_model.pre_layrnorm.{kind}"]
        converted[f"visual.ln_post.{kind}"] = tensors[f"vision_model.post_layernorm.{kind}"]
    converted["visual.class_embedding"] = tensors["vision_model.embeddings.class_embedding"]
    converted["visual.conv1.weight"] = tensors["vision_model.embeddings.patch_embedding.weight"]
    converted["visual.proj"] = tensors["visual_projection.weight"].T
    converted["text_projection"] = tensors["text_projection.weight"].T
    converted["token_embedding.weight"] = tensors["text_model.embeddings.token_embedding.weight"]
    converted["logit_scale"] = tensors["logit_scale"]
    return converted


def convert(tensors):
    return clip_from_open_clip(tensors, vision_head_width=80, source="weights.pt")


def test_full_size_checkpoint_has_every_parameter_of_the_model_and_no_more():
    tensors = full_size_tensors()
    # The published file has 1.97 GB in half precision
    assert sum(tensor.numel() for tensor in tensors.values()) == 986_109_441
    config = open_clip_config(tensors, vision_head_width=80)
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (16, 16)
    assert (config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers) == (32, 24)
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (224, 14)
    assert (config.text_config.bos_token_id, config.text_config.eos_token_id) == (49406, 49407)
    with torch.device("meta"):
        expected = CLIPModel(config).state_dict()
    converted = open_clip_to_transformers(tensors)
    assert {name: tensor.shape for name, tensor in converted.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }


def test_reference_has_the_published_names():
    def kinds(names):
        return {name.replace(".1.", ".0.").replace(".2.", ".0.") for name in names if not name[-1].isdigit()}

    one_layer = {name for name in full_size_tensors() if "resblocks" not in name or ".resblocks.0." in name}
    assert kinds(OpenCLIP().state_dict()) == one_layer


def test_state_dict_goes_there_and_back():
    tensors = OpenCLIP().state_dict()
    back = to_open_clip(convert(tensors).state_dict())
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("seed", [0, 1])
def test_converted_model_computes_what_the_original_does(seed):
    original = OpenCLIP(seed)
    model = convert(original.state_dict())
    prompts = ["a cat", "", "more than fits into the context", "ünï"]
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
    tokens = clip_tokenizer()(prompts, padding=True, truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        images = model.get_image_features(pixel_values=pixels).pooler_output
        texts = model.get_text_features(**tokens).pooler_output
        torch.testing.assert_close(images, original.visual(pixels), rtol=1e-4, atol=1e-5)
        # open_clip pads with 0 to the whole context, transformers with the end token to the longest of the batch
        torch.testing.assert_close(texts, original.encode_text(open_clip_tokens(prompts)), rtol=1e-4, atol=1e-5)
    assert model.logit_scale.exp().item() == pytest.approx(100, rel=1e-5)
    assert not model.training


def test_half_precision_weights_are_computed_with_in_float32():
    tensors = {name: tensor.half() for name, tensor in OpenCLIP().state_dict().items()}
    model = convert(tensors)
    assert model.dtype == torch.float32
    assert torch.equal(model.visual_projection.weight, tensors["visual.proj"].T.float())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("ln_final.bias"), r"misses text_model\.final_layer_norm\.bias"),
        (
            lambda t: t.pop("transformer.resblocks.1.attn.in_proj_weight"),
            r"misses .*layers\.1\.self_attn\.k_proj\.weight, .*q_proj\.weight, .*v_proj\.weight",
        ),
        (lambda t: t.update(score_predictor=torch.ones(2)), "has the unknown score_predictor"),
        (
            lambda t: t.update({"text_projection": torch.ones(5, 8)}),
            r"another shape for text_projection\.weight \(8, 5\) instead of \(8, 128\)",
        ),
        (lambda t: t.pop("visual.conv1.weight"), "not an open_clip checkpoint.*'visual.conv1.weight'.*It begins with"),
    ],
)
def test_checkpoint_of_another_layout_is_refused_by_name(change, message):
    tensors = OpenCLIP().state_dict()
    change(tensors)
    with pytest.raises(CheckpointError, match=f"weights.pt .*{message}"):
        convert(tensors)


def test_transformers_own_layout_is_not_taken_for_open_clips():
    with pytest.raises(CheckpointError, match="not an open_clip checkpoint"):
        convert(convert(OpenCLIP().state_dict()).state_dict())
