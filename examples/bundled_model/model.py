"""The parts of the bundled Stable Diffusion 3 pipeline, untrained."""

from collections import Counter
from itertools import pairwise

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from trl_flow.shapes.prompts import all_targets, make_caption
from trl_flow.shapes.world import IMAGE_SIZE


LATENT_SIZE, CHANNELS = IMAGE_SIZE // 4, 4
CLIP_TOKENS = 10  # a relation's eight words and the two marks
_WIDTH = 64  # of each CLIP text encoder
_JOINT = 2 * _WIDTH  # of the transformer's text input, and of T5

WORDS = sorted({word for target in all_targets() for word in make_caption(*target).split()})


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte pair merges that make one token of each word. The trainer of `tokenizers` breaks ties at random."""
    parts = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while counts := Counter(pair for part in parts for pair in pairwise(part)):
        left, right = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append((left, right))
        for part in parts:
            for index in range(len(part) - 2, -1, -1):
                if part[index : index + 2] == [left, right]:
                    part[index : index + 2] = [left + right]
    return merges


def _clip_tokenizer() -> CLIPTokenizer:
    """A byte-level tokenizer with one token for each word of the world."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(WORDS)
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocab = {token: index for index, token in enumerate(tokens)}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_TOKENS)


def _t5_tokenizer() -> PreTrainedTokenizerFast:
    """
    A tokenizer that reads every prompt as one unknown token.

    The stock pipeline cannot be loaded without its third text encoder, whose tokens are expensive for a transformer
    this small; the CLIP encoders tell it all there is to know.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>")),
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=512,
    )


def _clip(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_WIDTH,
            intermediate_size=4 * _WIDTH,
            projection_dim=_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CLIP_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_autoencoder() -> AutoencoderKL:
    """The autoencoder with untrained weights from torch's global random state."""
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    # Little noise of its own from the start: a deviation of 1 would hide what the encoder has to say
    torch.nn.init.constant_(vae.encoder.conv_out.bias[CHANNELS:], -6.0)
    return vae


def new_pipeline(vae: AutoencoderKL, patch_size: int = 2, layers: int = 3, heads: int = 3) -> StableDiffusion3Pipeline:
    """The pipeline around an autoencoder, with untrained weights from torch's global random state."""
    tokenizer, tokenizer_3 = _clip_tokenizer(), _t5_tokenizer()
    text_encoder_3 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer_3),
            d_model=_JOINT,
            d_kv=32,
            d_ff=_JOINT,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
        )
    )
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=LATENT_SIZE,
            patch_size=patch_size,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=layers,
            attention_head_dim=32,
            num_attention_heads=heads,
            joint_attention_dim=_JOINT,
            caption_projection_dim=32 * heads,
            pooled_projection_dim=2 * _WIDTH,
            pos_embed_max_size=2 * LATENT_SIZE // patch_size,
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_clip(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def new_tiny_decoder() -> AutoencoderTiny:
    """A decoder of scaled latents, five times as fast as the autoencoder's own. Its encoder is not trained."""
    return AutoencoderTiny(
        latent_channels=CHANNELS,
        encoder_block_out_channels=(8,) * 3,
        num_encoder_blocks=(0,) * 3,
        decoder_block_out_channels=(8,) * 3,
        num_decoder_blocks=(3, 1, 0),
    )
