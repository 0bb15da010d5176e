"""Which prompts a run draws: one for all images of a group, and how many of the data set."""

import math
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from transformers.utils import logging

from trl_flow.prompts.rows import check_prompt, has_transform
from trl_flow.trainer.flow_rl_config import FlowRLConfig


logger = logging.get_logger(__name__)


def of_one_reading(rows: list[dict[str, Any]], dataset: Dataset, args: FlowRLConfig) -> list[dict[str, Any]]:
    """The local rows of a sampling phase, of which each process has read its own: those of a group that is split over
    processes become the first one's, if a transform may have made others. Raises `ValueError` for what are no
    prompts."""
    if not has_transform(dataset):
        return rows
    size, offset = args.num_generations, args.process_index * len(rows)
    if args.world_size > 1 and len(rows) % size != 0:
        ends = [(offset // size, rows[0]), ((offset + len(rows) - 1) // size, rows[-1])]
        first: dict[int, dict[str, Any]] = {}
        for group, row in gather_object(ends):
            first.setdefault(group, row)
        rows = [first.get((offset + i) // size, row) for i, row in enumerate(rows)]
    for index, row in enumerate(rows):
        try:
            check_prompt(row.get("prompt"), offset + index)
        except ValueError as error:
            raise ValueError(f"A sampling phase {error}") from error
    return rows


def warn_of_prompts_left_out(num_prompts: int, max_steps: int, args: FlowRLConfig) -> None:
    """One warning if a run of `max_steps` updates cannot draw each prompt of the data set."""
    each = args.generation_batch_size // args.num_generations
    phases = math.ceil(max_steps / args.updates_per_generation)
    whole = max(1, num_prompts // each) * each  # a smaller set is repeated
    drawn = phases * each if args.shuffle_dataset else min(phases * each, whole)
    if drawn >= num_prompts:
        return
    message = f"{num_prompts - drawn} of the {num_prompts} prompts are never drawn: "
    if phases * each <= whole:
        ends = f"the run ends after update {max_steps}, and each sampling phase takes {each} of them"
        message += f"{ends}. Raise max_steps, or num_train_epochs, to draw all."
    else:
        message += (
            f"a sampling phase takes {each} (generation_batch_size / num_generations), and without shuffling the rest "
            "is the same in each epoch. Set shuffle_dataset=True, or a generation_batch_size that fits."
        )
    logger.warning(message)
