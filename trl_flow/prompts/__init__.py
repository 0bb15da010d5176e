"""Prompt sets: files, published sets, data sets on the Hub, and generated prompts, each a `datasets.Dataset`."""

from trl_flow.prompts.files import read_prompts
from trl_flow.prompts.geneval import generate_geneval_prompts, geneval_benchmark
from trl_flow.prompts.sets import (
    PROMPT_SETS,
    PromptSet,
    UnknownSplitError,
    load_drawbench,
    load_geneval,
    load_hpdv2,
    load_ocr,
    load_pickscore,
    load_unigenbench,
    load_vbench,
)
from trl_flow.prompts.sources import load_prompts


__all__ = [
    "PROMPT_SETS", "PromptSet", "UnknownSplitError", "generate_geneval_prompts", "geneval_benchmark",
    "load_drawbench", "load_geneval", "load_hpdv2", "load_ocr", "load_pickscore", "load_prompts",
    "load_unigenbench", "load_vbench", "read_prompts",
]  # fmt: skip
