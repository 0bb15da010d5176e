"""ImageReward checkpoints, in BLIP's layout, become a model that computes the same."""

import pytest
import torch
from tiny_reward_models import ImageRewardReference, bert_tokenizer
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from trl_flow.rewards.aesthetic import ScoreHead
from trl_flow.rewards.base import CheckpointError
from trl_flow.rewards.image_reward import blip_vision_to_transformers, image_reward_model


# Names and shapes in ImageReward.pt (ViT-L/16, BERT base with cross-attention, head): one of every kind
VISION = {
    "cls_token": (1, 1, 1024),
    "pos_embed": (1, 197, 1024),
    "patch_embed.proj.weight": (1024, 3, 16, 16),
    "patch_embed.proj.bias": (1024,),
    "norm.weight": (1024,),
    "norm.bias": (1024,),
}
VISION_BLOCK = {
    "norm1.weight": (1024,),
    "norm1.bias": (1024,),
    "attn.qkv.weight": (3072, 1024),
    "attn.qkv.bias": (3072,),
    "attn.proj.weight": (1024, 1024),
    "attn.proj.bias": (1024,),
    "norm2.weight": (1024,),
    "norm2.bias": (1024,),
    "mlp.fc1.weight": (4096, 1024),
    "mlp.fc1.bias": (4096,),
    "mlp.fc2.weight": (1024, 4096),
    "mlp.fc2.bias": (1024,),
}
TEXT = {
    "embeddings.word_embeddings.weight": (30524, 768),
    "embeddings.position_embeddings.weight": (512, 768),
    "embeddings.LayerNorm.weight": (768,),
    "embeddings.LayerNorm.bias": (768,),
}
TEXT_LAYER = {
    **{
        f"{attention}.{name}.{kind}": ((768, width) if kind == "weight" else (768,))
        for attention, context in (("attention", 768), ("crossattention", 1024))
        for name, width in (
            ("self.query", 768),
            ("self.key", context),
            ("self.value", context),
            ("output.dense", 768),
        )
        for kind in ("weight", "bias")
    },
    "attention.output.LayerNorm.weight": (768,),
    "attention.output.LayerNorm.bias": (768,),
    "crossattention.output.LayerNorm.weight": (768,),
    "crossattention.output.LayerNorm.bias": (768,),
    "intermediate.dense.weight": (3072, 768),
    "intermediate.dense.bias": (3072,),
    "output.dense.weight": (768, 3072),
    "output.dense.bias": (768,),
    "output.LayerNorm.weight": (768,),
    "output.LayerNorm.bias": (768,),
}
HEAD = {
    "layers.0.weight": (1024, 768),
    "layers.0.bias": (1024,),
    "layers.2.weight": (128, 1024),
    "layers.2.bias": (128,),
    "layers.4.weight": (64, 128),
    "layers.4.bias": (64,),
    "layers.6.weight": (16, 64),
    "layers.6.bias": (16,),
    "layers.7.weight": (1, 16),
    "layers.7.bias": (1,),
}
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


def full_size(single, repeated, block, layers):
    return single | {f"{block}.{layer}.{name}": shape for layer in range(layers) for name, shape in repeated.items()}


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def convert(tensors):
    return image_reward_model(tensors, source="weights.pt")


def from_transformers(model):
    """The way back, written from transformers' side."""
    renames = [
        ("embeddings.class_embedding", "cls_token"),
        ("embeddings.position_embedding", "pos_embed"),
        ("embeddings.patch_embedding", "patch_embed.proj"),
        ("post_layernorm", "norm"),
        ("encoder.layers", "blocks"),
        ("layer_norm", "norm"),
        ("self_attn.projection", "attn.proj"),
        ("self_attn", "attn"),
    ]
    tensors = {f"mlp.{name}": tensor for name, tensor in model.head.state_dict().items()}
    tensors |= {f"blip.text_encoder.{name}": tensor for name, tensor in model.text.state_dict().items()}
    for name, tensor in model.vision.state_dict().items():
        for ours, theirs in renames:
            name = name.replace(ours, theirs)
        tensors[f"blip.visual_encoder.{name}"] = tensor
    return tensors


def test_full_size_checkpoint_has_every_parameter_of_the_model_and_no_more():
    vision = full_size(VISION, VISION_BLOCK, "blocks", 24)
    text = full_size(TEXT, TEXT_LAYER, "encoder.layer", 12)
    with torch.device("meta"):
        vision_model = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=224,
                patch_size=16,
            )
        )
        text_model = BlipTextModel(
            BlipTextConfig(encoder_hidden_size=1024, num_attention_heads=12), add_pooling_layer=False
        )
        head = ScoreHead(768)
    renamed = blip_vision_to_transformers({name: torch.empty(shape, device="meta") for name, shape in vision.items()})
    assert {name: tuple(tensor.shape) for name, tensor in renamed.items()} == shapes(vision_model)
    assert text == shapes(text_model)
    assert HEAD == shapes(head)


def test_reference_has_the_published_names():
    tensors = ImageRewardReference().state_dict()
    expected = {f"blip.visual_encoder.{name}" for name in full_size(VISION, VISION_BLOCK, "blocks", 2)}
    expected |= {f"blip.text_encoder.{name}" for name in full_size(TEXT, TEXT_LAYER, "encoder.layer", 3)}
    expected |= {f"mlp.{name}" for name in HEAD}
    assert {name for name in tensors if not name.startswith(UNUSED)} == expected


def test_state_dict_goes_there_and_back():
    tensors = {
        name: tensor for name, tensor in ImageRewardReference().state_dict().items() if not name.startswith(UNUSED)
    }
    back = from_transformers(convert(tensors))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("seed", [0, 1])
def test_converted_model_computes_what_the_original_does(seed):
    original = ImageRewardReference(seed)
    model = convert(original.state_dict())
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
    tokens = bert_tokenizer()(["a b c", "", "z y x w v"], padding=True, return_tensors="pt")
    padded = bert_tokenizer()(["a b c", "", "z y x w v"], padding="max_length", max_length=35, return_tensors="pt")
    with torch.no_grad():
        patches = model.vision(pixel_values=pixels).last_hidden_state
        torch.testing.assert_close(patches, original.blip.visual_encoder(pixels), rtol=1e-4, atol=1e-5)
        expected = original(pixels, padded.input_ids, padded.attention_mask)
        for batch in (tokens, padded):
            scores = model(pixels, batch.input_ids, batch.attention_mask)
            torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    assert not model.training


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("mlp.layers.7.bias"), r"misses layers\.7\.bias"),
        (
            lambda t: t.pop("blip.visual_encoder.blocks.1.attn.qkv.weight"),
            r"misses encoder\.layers\.1\.self_attn\.qkv\.weight",
        ),
        (
            lambda t: t.pop("blip.text_encoder.encoder.layer.2.crossattention.self.key.bias"),
            r"misses encoder\.layer\.2\.crossattention\.self\.key\.bias",
        ),
        (
            lambda t: t.update({"blip.text_encoder.pooler.dense.bias": torch.ones(2)}),
            r"has the unknown pooler\.dense\.bias",
        ),
        (
            lambda t: t.update({"mlp.layers.0.weight": torch.ones(1024, 7)}),
            r"another shape for layers\.0\.weight \(1024, 7\) instead of \(1024, 128\)",
        ),
        (lambda t: t.pop("blip.visual_encoder.pos_embed"), "not an ImageReward checkpoint: 'pos_embed' is missing"),
    ],
)
def test_checkpoint_of_another_layout_is_refused_by_name(change, message):
    tensors = ImageRewardReference().state_dict()
    change(tensors)
    with pytest.raises(CheckpointError, match=f"weights.pt .*{message}"):
        convert(tensors)
