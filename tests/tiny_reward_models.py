"""
Tiny reward models with random weights, saved as their authors save the real ones.

The two that are not published in transformers' layout, open_clip's CLIP and ImageReward, are written here in plain
torch under their authors' names of parameters: what a converted model computes is held against them.
"""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from trl_flow.rewards import AestheticReward, CLIPScoreReward, HPSv2Reward, ImageReward, PickScoreReward
from trl_flow.rewards.base import ModelReward


CONTEXT = 12  # most tokens of a prompt that the CLIP models read, with the two at its ends
IMAGE_SIZE = 28  # two by two patches
PATCH_SIZE = 14
FEATURES = 8  # width of the space that images and texts share

# What CLIP's pixels are normalized by
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def picture(seed: int, width: int = 40, height: int = 40) -> Image.Image:
    """Noise in RGB."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def cropped_pixels(image: Image.Image, size: int = IMAGE_SIZE) -> torch.Tensor:
    """What CLIP's authors do to an image: shorter side to `size`, middle, normalization. `(3, size, size)`."""
    scale = size / min(image.size)
    width, height = (int(side * scale + 1e-9) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    return (torch.tensor(np.array(image)).permute(2, 0, 1) / 255 - MEAN) / STD


# ---- CLIP ----


def clip_tokenizer() -> CLIPTokenizer:
    """One token a character; the end of a text is the last of the vocabulary, as in the real one."""
    bytes_ = sorted(ByteLevel.alphabet())
    tokens = [*bytes_, *(f"{byte}</w>" for byte in bytes_), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])


def clip_model(seed: int = 0, hidden_act: str = "quick_gelu") -> CLIPModel:
    vocab_size = len(clip_tokenizer())
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": hidden_act, "projection_dim": FEATURES}
    model = CLIPModel(
        CLIPConfig(
            text_config={
                **sizes,
                "hidden_size": 32,
                "intermediate_size": 64,
                "vocab_size": vocab_size,
                "max_position_embeddings": CONTEXT,
                "bos_token_id": vocab_size - 2,
                "eos_token_id": vocab_size - 1,
                "pad_token_id": vocab_size - 1,
            },
            vision_config={
                **sizes,
                "hidden_size": 40,
                "intermediate_size": 80,
                "image_size": IMAGE_SIZE,
                "patch_size": PATCH_SIZE,
            },
            projection_dim=FEATURES,
        )
    )
    randomize(model, seed)
    nn.init.constant_(model.logit_scale, np.log(100))
    # A part that all features share: cosines are positive then, as in real models
    for norm, projection in (
        (model.vision_model.post_layernorm, model.visual_projection),
        (model.text_model.final_layer_norm, model.text_projection),
    ):
        norm.bias.data += 4
        projection.weight.data -= projection.weight.data.mean(dim=1, keepdim=True)
        projection.weight.data[0] = 1 / projection.in_features
    return model.eval()


def randomize(model: nn.Module, seed: int) -> None:
    """Draws every parameter: with the usual start biases are zero and norms one, and many mistakes do not show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = parameter.ndim == 1 and name.endswith("weight")
        # Bounded by the fan-in, so that neither activations nor attention saturate
        parameter.data = (
            1 + 0.2 * noise if is_norm else noise * (0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
        )


def save_clip(folder: Path, model: CLIPModel) -> str:
    """`model` with its tokenizer and image processor, as on the Hub."""
    model.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ).save_pretrained(folder)
    return str(folder)


def with_features(model: CLIPModel, image: list[float], text: list[float]) -> CLIPModel:
    """Makes every image and every text have these features, whatever it shows: the last norms give a constant."""
    for norm, projection, features in (
        (model.vision_model.post_layernorm, model.visual_projection, image),
        (model.text_model.final_layer_norm, model.text_projection, text),
    ):
        nn.init.zeros_(norm.weight)
        nn.init.zeros_(norm.bias)
        nn.init.eye_(projection.weight)
        norm.bias.data[: len(features)] = torch.tensor(features)
    return model


# ---- open_clip's CLIP ----


class OpenCLIPBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=nn.GELU(), c_proj=nn.Linear(4 * width, width))
        )

    def forward(self, x, mask=None):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class OpenCLIPTransformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.resblocks = nn.ModuleList(OpenCLIPBlock(width, heads) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenCLIPVision(nn.Module):
    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, PATCH_SIZE, PATCH_SIZE, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((IMAGE_SIZE // PATCH_SIZE) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = OpenCLIPTransformer(width, heads, layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, FEATURES))

    def forward(self, pixels):
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class OpenCLIP(nn.Module):
    """CLIP as open_clip has it. Attention heads are as wide as in ViT-H-14: 80 for images, 64 for texts."""

    def __init__(self, seed: int = 0):
        super().__init__()
        text_width = 128
        self.visual = OpenCLIPVision(width=160, heads=2, layers=2)
        self.transformer = OpenCLIPTransformer(text_width, heads=2, layers=3)
        self.token_embedding = nn.Embedding(len(clip_tokenizer()), text_width)
        self.positional_embedding = nn.Parameter(torch.empty(CONTEXT, text_width))
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.empty(text_width, FEATURES))
        self.logit_scale = nn.Parameter(torch.empty([]))
        randomize(self, seed)
        nn.init.constant_(self.logit_scale, np.log(100))
        self.eval()

    def encode_text(self, tokens):
        """`tokens` `(N, CONTEXT)`, padded with 0. The feature is taken at the highest token."""
        mask = torch.full((CONTEXT, CONTEXT), -torch.inf).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(tokens) + self.positional_embedding, mask))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection


def open_clip_tokens(prompts: list[str]) -> torch.Tensor:
    """As open_clip's own tokenizer has them: cut to the context with the end kept, then zeros."""
    tokens = torch.zeros(len(prompts), CONTEXT, dtype=torch.long)
    tokenizer = clip_tokenizer()
    for row, prompt in zip(tokens, prompts, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids = ids[:CONTEXT]
        ids[-1] = tokenizer.eos_token_id
        row[: len(ids)] = torch.tensor(ids)
    return tokens


# ---- ImageReward ----


class BertAttention(nn.Module):
    """Self- or, given `context`, cross-attention, with the residual and norm after it. Heads are 64 wide."""

    def __init__(self, width: int, context_width: int):
        super().__init__()
        self.self = nn.ModuleDict(
            {
                "query": nn.Linear(width, width),
                "key": nn.Linear(context_width, width),
                "value": nn.Linear(context_width, width),
            }
        )
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

    def forward(self, x, context=None, keep=None):
        context = x if context is None else context
        query, key, value = (
            self.self[name](states).unflatten(-1, (-1, 64)).transpose(1, 2)
            for name, states in (("query", x), ("key", context), ("value", context))
        )
        scores = query @ key.transpose(-1, -2) / 8
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None].bool(), -10000.0)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return self.output["LayerNorm"](x + self.output["dense"](mixed))


class BertLayer(nn.Module):
    def __init__(self, width: int, context_width: int):
        super().__init__()
        self.attention = BertAttention(width, width)
        self.crossattention = BertAttention(width, context_width)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        self.output = nn.ModuleDict(
            {"dense": nn.Linear(4 * width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)}
        )

    def forward(self, x, keep, patches):
        x = self.crossattention(self.attention(x, keep=keep), patches)
        return self.output["LayerNorm"](x + self.output["dense"](F.gelu(self.intermediate["dense"](x))))


class BertEncoder(nn.Module):
    def __init__(self, width: int, context_width: int, layers: int):
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(len(bert_tokenizer()) + 2, width),
                "position_embeddings": nn.Embedding(40, width),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )
        self.embeddings.register_buffer("position_ids", torch.arange(40)[None])
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(BertLayer(width, context_width) for _ in range(layers))})

    def forward(self, ids, keep, patches):
        places = self.embeddings.position_ids[:, : ids.shape[1]]
        x = self.embeddings["word_embeddings"](ids) + self.embeddings["position_embeddings"](places)
        x = self.embeddings["LayerNorm"](x)
        for layer in self.encoder["layer"]:
            x = layer(x, keep, patches)
        return x


class ViTBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x):
        # `(N, L, 3 * heads * 64)`, with query, key and value outermost
        query, key, value = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        mixed = (query @ key.transpose(-1, -2) / 8).softmax(-1) @ value
        x = x + self.attn["proj"](mixed.transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class ViT(nn.Module):
    def __init__(self, width: int, layers: int):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH_SIZE, PATCH_SIZE)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, (IMAGE_SIZE // PATCH_SIZE) ** 2 + 1, width))
        self.blocks = nn.ModuleList(ViTBlock(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels):
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class BlipReference(nn.Module):
    def __init__(self, vision_width: int, text_width: int):
        super().__init__()
        self.visual_encoder = ViT(vision_width, layers=2)
        self.text_encoder = BertEncoder(text_width, vision_width, layers=3)
        # In the file, and not used for scores
        self.vision_proj = nn.Linear(vision_width, 16)
        self.text_proj = nn.Linear(text_width, 16)


class ImageRewardReference(nn.Module):
    """ImageReward as its authors have it, without the standardisation."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.blip = BlipReference(vision_width=192, text_width=128)
        self.mlp = nn.ModuleDict({"layers": linear_layers(128)})
        randomize(self, seed)
        self.eval()

    def forward(self, pixels, ids, keep):
        states = self.blip.text_encoder(ids, keep, self.blip.visual_encoder(pixels))
        return self.mlp["layers"](states[:, 0]).squeeze(-1)


def linear_layers(width: int) -> nn.Sequential:
    """The head of ImageReward and of the aesthetic predictor, dropout included, which takes up numbers."""
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


def bert_tokenizer() -> BertTokenizer:
    """Words of one letter, and their parts."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}, do_lower_case=True)


# ---- All of them ----

NAMES = ("pickscore", "clipscore", "hpsv2", "hpsv2.1", "imagereward", "aesthetic")


def save_reward_models(folder: Path, seed: int = 0) -> Path:
    """The files of every reward, in one folder for each."""
    save_clip(folder / "clip", clip_model(seed))
    (folder / "hps").mkdir()
    torch.save({"state_dict": OpenCLIP(seed).state_dict()}, folder / "hps" / "HPS_v2_compressed.pt")
    torch.save({"state_dict": OpenCLIP(seed + 1).half().state_dict()}, folder / "hps" / "HPS_v2.1_compressed.pt")
    bert_tokenizer().save_pretrained(folder / "image_reward")
    torch.save(ImageRewardReference(seed).state_dict(), folder / "image_reward" / "ImageReward.pt")
    (folder / "aesthetic").mkdir()
    torch.save(aesthetic_layers(seed).state_dict(), folder / "aesthetic" / "aesthetic-model.pth")
    return folder


def aesthetic_layers(seed: int = 0) -> nn.Module:
    """The aesthetic predictor's head under its author's names."""
    layers = nn.ModuleDict({"layers": linear_layers(FEATURES)})
    randomize(layers, seed)
    return layers.eval()


def make_reward(name: str, folder: Path, **options) -> ModelReward:
    """A reward with the files that `save_reward_models` wrote, on the CPU."""
    options = {"device": "cpu", **options}
    clip = str(folder / "clip")
    if name == "pickscore":
        return PickScoreReward(clip, clip, **options)
    if name == "clipscore":
        return CLIPScoreReward(clip, **options)
    if name.startswith("hpsv2"):
        version = "v2.1" if name == "hpsv2.1" else "v2.0"
        return HPSv2Reward(version, str(folder / "hps"), clip, **options)
    if name == "imagereward":
        return ImageReward(str(folder / "image_reward"), str(folder / "image_reward"), **options)
    return AestheticReward(str(folder / "aesthetic"), clip, **options)
