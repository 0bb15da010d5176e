"""Prompts that are longer than a text encoder reads: counted, and cut where the text around them stays whole."""

from collections.abc import Callable, Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from trl_flow.backbones.base import Backbone


logger = logging.get_logger(__name__)


def warn_of_long_prompts(backbone: Backbone, prompts: Iterable[str], where: str) -> None:
    """One warning if some of `prompts`, those of `where`, are longer than the pipeline reads: how many, and what the
    longest needs."""
    prompts = [prompt for prompt in dict.fromkeys(prompts) if prompt]
    around, most = backbone.prompt_tokens([""]), backbone.token_limit
    if around is None:
        return
    # No more tokens than bytes, and one for the beginning: of tens of thousands few need to be counted
    candidates = [prompt for prompt in prompts if len(prompt.encode(errors="replace")) >= most - around[0]]
    too_long = [number for number in backbone.prompt_tokens(candidates) if number > most] if candidates else []
    if not too_long:
        return
    kind, longest = type(backbone.pipeline).__name__, max(too_long)
    limit = backbone.sequence_length_limit or longest
    if backbone.fixed_sequence_length is not None or most >= limit:
        remedy = "Shorten them: it reads no more."
    elif longest > limit:
        remedy = f"Set max_sequence_length={limit}, the most that it takes, and shorten those that need more."
    else:
        remedy = f"Set max_sequence_length={longest}, or shorten them."
    logger.warning(
        f"{len(too_long):,} of {len(prompts):,} different prompts of {where} are longer than the {most} tokens that "
        f"{kind} reads here: the longest needs {longest}, and what is beyond is cut off. {remedy}"
    )


def shortened(
    backbone: Backbone, tokenizer: PreTrainedTokenizerBase, prompt: str, needed: Callable[[str], int]
) -> str:
    """The longest beginning of a prompt for which the pipeline reads all that it puts around it: `needed(text)` tokens
    are at most those of the backbone. Raises `ValueError` if not even the empty prompt fits."""
    while (excess := needed(prompt) - backbone.token_limit) > 0:
        if not prompt:
            raise ValueError(
                f"max_sequence_length is {backbone.max_sequence_length}, but {type(backbone.pipeline).__name__} puts "
                f"{needed('')} tokens around every prompt. Raise it."
            )
        ends = [end for _, end in tokenizer(prompt, return_offsets_mapping=True).offset_mapping]
        # One character at least: a letter may have several tokens
        prompt = prompt[: min(([0] + ends)[max(len(ends) - excess, 0)], len(prompt) - 1)]
    return prompt


def chat_length(tokenizer: PreTrainedTokenizerBase, prompt: str, **options: Any) -> int:
    """Tokens of a prompt as a user's message in the tokenizer's chat template."""
    message, options = [{"role": "user", "content": prompt}], {"add_generation_prompt": True, **options}
    return len(tokenizer(tokenizer.apply_chat_template(message, tokenize=False, **options), verbose=False).input_ids)
