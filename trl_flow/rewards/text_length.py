"""Prompts that are longer than a reward's text encoder reads."""

from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils import logging


logger = logging.get_logger(__name__)

_said: set[str] = set()  # rewards of which it was said


def warn_of_cut_prompts(
    reward: str, tokenizer: PreTrainedTokenizerBase, prompts: list[str], tokens: BatchEncoding, most: int
) -> None:
    """Says once for each reward that `prompts`, whose `tokens` were cut to `most`, have lost something."""
    full = (tokens.attention_mask.sum(dim=1) >= most).tolist()
    if reward in _said or not any(full):
        return
    candidates = [prompt for prompt, is_full in zip(prompts, full, strict=True) if is_full]
    lengths = [len(ids) for ids in tokenizer(candidates, verbose=False).input_ids]
    too_long = [length for length in lengths if length > most]
    if too_long:
        _said.add(reward)
        logger.warning(
            f"{reward} reads {most} tokens of a prompt: {len(too_long)} of {len(prompts)} that it was given are "
            f"longer (up to {max(too_long)}), and their ends do not count. This is said once."
        )
