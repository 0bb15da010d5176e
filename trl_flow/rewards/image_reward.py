"""ImageReward: how much people would prefer an image for a prompt, learned from experts' rankings."""

from dataclasses import KW_ONLY, dataclass

import torch
from transformers import BertTokenizer, PreTrainedTokenizerBase

from trl_flow.rewards.base import CheckpointError, Columns, HubReward, Images, RewardInfo
from trl_flow.rewards.blip import ImageRewardModel, image_reward_model
from trl_flow.rewards.checkpoints import find_file, load_pretrained, read_tensors
from trl_flow.rewards.pixels import fill_and_crop


# Of the scores on the authors' training set, which they are standardized by
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
_MAX_TOKENS = 35

_Loaded = tuple[ImageRewardModel, PreTrainedTokenizerBase]


@dataclass(eq=False)
class ImageReward(HubReward):
    """
    ImageReward (Xu et al., 2023, https://huggingface.co/papers/2304.05977): a BLIP (ViT-L/16 and a BERT with
    cross-attention) tuned on experts' rankings, standardized to mean 0 and variance 1 on its training set. Prompts are
    cut to 35 tokens.

    Args:
        model (`str`, defaults to `"zai-org/ImageReward"`):
            Hub id or folder with `ImageReward.pt`, or the file: a state dict in BLIP's layout.
        tokenizer (`str`, defaults to `"google-bert/bert-base-uncased"`): Hub id or folder of the tokenizer.
        tokenizer_revision (`str`, *optional*): Branch, tag or commit of the tokenizer on the Hub.
        revision, token, device, dtype, batch_size: As in [`HubReward`].
    """

    info = RewardInfo.of("ImageReward")
    __name__ = "imagereward"

    model: str = "zai-org/ImageReward"
    tokenizer: str = "google-bert/bert-base-uncased"
    _: KW_ONLY
    tokenizer_revision: str | None = None

    def _load(self, device: torch.device) -> _Loaded:
        path = find_file(self.model, "ImageReward.pt", revision=self.revision, token=self.token)
        model = image_reward_model(read_tensors(path), source=str(path))
        tokenizer = load_pretrained(BertTokenizer, self.tokenizer, revision=self.tokenizer_revision, token=self.token)
        # The two that BLIP adds to BERT's; scoring needs them only for the rare prompt that has them in its text
        tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        vocab_size = model.text.config.vocab_size
        if len(tokenizer) != vocab_size:
            raise CheckpointError(
                f"the tokenizer of {self.tokenizer} has {len(tokenizer)} tokens with BLIP's two, the model "
                f"{vocab_size}. Give the tokenizer that the model was trained with, bert-base-uncased."
            )
        model.vision.to(device, self.dtype)
        model.text.to(device, self.dtype)
        # In bfloat16 its steps would be of a few hundredths
        model.head.to(device, torch.float32)
        return model, tokenizer

    def _score(self, loaded: _Loaded, prompts: list[str], images: Images, columns: Columns) -> torch.Tensor:
        model, tokenizer = loaded
        device, size = model.vision.device, model.vision.config.image_size
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt")
        pixels = torch.stack([fill_and_crop(image, size) for image in images]).to(device, self.dtype)
        raw = model(pixels, tokens.input_ids.to(device), tokens.attention_mask.to(device))
        return (raw - _MEAN) / _STD
