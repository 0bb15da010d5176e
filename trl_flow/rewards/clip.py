"""Rewards that compare an image with a text in CLIP: CLIPScore, PickScore, and what they share with HPSv2."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, PreTrainedTokenizerBase

from trl_flow.rewards.base import CheckpointError, Columns, HubReward, Images, RewardInfo
from trl_flow.rewards.checkpoints import load_pretrained
from trl_flow.rewards.pixels import without_ends
from trl_flow.rewards.text_length import warn_of_cut_prompts


Preprocess = Callable[[Images], torch.Tensor]

# transformers finds the end of a text by its highest token for models whose configuration says 2, as older ones do
_OLD_EOS = 2

DFN5B = "apple/DFN5B-CLIP-ViT-H-14-378"


@dataclass(frozen=True)
class CLIPScorer:
    """
    A CLIP model with what it needs to read prompts and images. `preprocess` makes `N` RGB images into pixels,
    `(N, 3, H, W)` in float32. `logit_scale` is the factor by which the model was trained to multiply cosines; kept
    aside because the rounding of its logarithm to bfloat16 would be an error of 1 %.
    """

    model: CLIPModel
    tokenizer: PreTrainedTokenizerBase
    preprocess: Preprocess
    logit_scale: float

    def cosines(self, prompts: list[str], images: Images, *, reward: str) -> torch.Tensor:
        """The cosine of each image and its prompt, cut to the model's context, in `[-1, 1]`: `(N,)` in float32, for
        `reward`."""
        pixels = self.preprocess(images).to(self.model.device, self.model.dtype)
        image_features = self.model.get_image_features(pixel_values=pixels).pooler_output
        # The images of a group share their prompt
        different = list(dict.fromkeys(prompts))
        context = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(different, padding=True, truncation=True, max_length=context, return_tensors="pt")
        warn_of_cut_prompts(reward, self.tokenizer, different, tokens, context)
        ids, mask = tokens.input_ids.to(self.model.device), tokens.attention_mask.to(self.model.device)
        text_features = self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
        text_features = text_features[[different.index(prompt) for prompt in prompts]]
        return F.cosine_similarity(image_features.float(), text_features.float(), dim=-1)


@dataclass(eq=False)
class CLIPReward(HubReward):
    """
    A reward from the cosine in a CLIP model in transformers' layout. A subclass says in `_score` what it makes of it,
    its `__name__`, and the default `model` and `processor`: where its image processor and tokenizer are, if elsewhere.
    """

    model: str
    processor: str | None = None
    _: KW_ONLY
    processor_revision: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.processor is None:
            self.processor, self.processor_revision = self.model, self.revision

    def _load(self, device: torch.device) -> CLIPScorer:
        model = load_pretrained(CLIPModel, self.model, revision=self.revision, token=self.token)
        source = {"revision": self.processor_revision, "token": self.token}
        tokenizer = load_clip_tokenizer(self.processor, model, **source)
        preprocess = load_clip_preprocess(self.processor, **source)
        return clip_scorer(model, tokenizer, preprocess, device=device, dtype=self.dtype)


@dataclass(eq=False)
class CLIPScoreReward(CLIPReward):
    """
    CLIPScore (Hessel et al., 2021, https://huggingface.co/papers/2104.08718) as text-to-image papers report it and
    torchmetrics computes it: `max(100 cos(E(prompt), E(image)), 0)`.

    The paper itself (equation 1) has a factor of 2.5, puts "A photo depicts" before each text and uses CLIP ViT-B/32;
    others leave the cosine as it is. DanceGRPO and SLAS train on that of Apple's DFN5B ViT-H/14 at 378 pixels, which
    recipes name `clipscore_dfn5b`; its weights are for research only.

    Args:
        model (`str`, defaults to `"openai/clip-vit-large-patch14"`): Hub id or folder of a `CLIPModel`.
        processor (`str`, *optional*): Hub id or folder of the image processor and tokenizer; by default `model`.
        processor_revision (`str`, *optional*): Branch, tag or commit of `processor`, if there is one.
        revision, token, device, dtype, batch_size: As in [`HubReward`].

    Example:

    ```pycon
    >>> from trl_flow.rewards import CLIPScoreReward
    >>> reward = CLIPScoreReward(batch_size=32)  # loads its model at the first call
    >>> reward.info.range
    (0.0, 100.0)
    ```
    """

    info = RewardInfo.of("CLIPScoreReward")
    __name__ = "clipscore"

    model: str = "openai/clip-vit-large-patch14"

    def __post_init__(self):
        super().__post_init__()
        if self.model == DFN5B:
            self.__name__ = "clipscore_dfn5b"  # beside OpenAI's in one run's metrics

    def _score(self, loaded: CLIPScorer, prompts: list[str], images: Images, columns: Columns) -> torch.Tensor:
        return 100 * loaded.cosines(prompts, images, reward=self.__name__).clamp(min=0)


@dataclass(eq=False)
class PickScoreReward(CLIPReward):
    """
    PickScore (Kirstain et al., 2023, https://huggingface.co/papers/2305.01569, section 4): `exp(t) cos(E(prompt),
    E(image))` in a CLIP ViT-H/14 tuned on the choices of Pick-a-Pic. Its learned factor `exp(t)` is 100. Values are
    the published ones; some programs divide them by 26 or 100.

    Args:
        model (`str`, defaults to `"yuvalkirstain/PickScore_v1"`): Hub id or folder of a `CLIPModel`.
        processor (`str`, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`), processor_revision (`str`,
            *optional*): Hub id or folder of its image processor and tokenizer, and their branch, tag or commit.
        revision, token, device, dtype, batch_size: As in [`HubReward`].

    Example:

    ```pycon
    >>> from trl_flow.rewards import PickScoreReward
    >>> reward = PickScoreReward(device="cpu")  # loads its model at the first call
    >>> reward.info.license
    'weights: not stated; the CLIP that they were tuned from: MIT'
    ```
    """

    info = RewardInfo.of("PickScoreReward")
    __name__ = "pickscore"

    model: str = "yuvalkirstain/PickScore_v1"
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def _score(self, loaded: CLIPScorer, prompts: list[str], images: Images, columns: Columns) -> torch.Tensor:
        return loaded.logit_scale * loaded.cosines(prompts, images, reward=self.__name__)


def clip_scorer(
    model: CLIPModel, tokenizer: PreTrainedTokenizerBase, preprocess: Preprocess, *, device: torch.device,
    dtype: torch.dtype,
) -> CLIPScorer:  # fmt: skip
    """Puts a CLIP model in float32 on `device` and in `dtype`, together with what it needs."""
    logit_scale = model.logit_scale.exp().item()
    return CLIPScorer(model.to(device, dtype), tokenizer, preprocess, logit_scale)


def load_clip_preprocess(source: str, *, revision: str | None, token: str | bool | None) -> Preprocess:
    """What `source` says is to be done to images, by Pillow: the pixels differ with torchvision."""
    processor = load_pretrained(CLIPImageProcessorPil, source, revision=revision, token=token)

    def preprocess(images: Images) -> torch.Tensor:
        images = [without_ends(image) for image in images]
        return processor(images=images, input_data_format="channels_last", return_tensors="pt")["pixel_values"]

    return preprocess


def load_clip_tokenizer(
    source: str, model: CLIPModel, *, revision: str | None, token: str | bool | None
) -> PreTrainedTokenizerBase:
    """The tokenizer for `model`. A `CheckpointError` if it is another's: every score would be wrong without a sign."""
    tokenizer = load_pretrained(CLIPTokenizer, source, revision=revision, token=token)
    config = model.config.text_config
    end = config.vocab_size - 1 if config.eos_token_id == _OLD_EOS else config.eos_token_id
    if tokenizer.eos_token_id != end or len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens and ends texts with number "
            f"{tokenizer.eos_token_id}, but the model has {config.vocab_size} and looks for number {end}. Give the "
            "tokenizer that the model was trained with."
        )
    return tokenizer
