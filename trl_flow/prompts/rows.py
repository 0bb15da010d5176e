"""Rows as a data set gives them: a transform or a format may make, change or hide what its table has."""

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trl_flow.prompts.files import OF_A_CONVERSATION, is_conversation


if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]

_MEASURED = 64  # rows that a transform makes to look at their prompts


def has_transform(dataset: "Dataset") -> bool:
    """Whether rows are made as they are read, by `set_transform` or `with_transform`, and may differ each time."""
    return dataset.format["type"] == "custom"


def columns_of_rows(dataset: "Dataset") -> list[str]:
    """The columns that a row has, which is not empty. Raises `ValueError` if there are none to be had."""
    if not has_transform(dataset):
        if dataset.format["type"] in ("pandas", "polars", "arrow"):
            what = f"has the format {dataset.format['type']!r}, in which a row is a table"
            raise ValueError(f"{what}. Take it off: dataset.with_format(None).")
        return list(dataset.format["columns"])
    try:
        row = first_row(dataset)
    except Exception as error:
        what = f"has a transform that raises {type(error).__name__} for its first row: {error}"
        raise ValueError(f"{what}. The table's columns are {dataset.column_names}.") from error
    if not isinstance(row, dict):
        wanted = "a dictionary of lists, one for each column"
        raise ValueError(f"has a transform that makes a {type(row).__name__} of a row, but must make {wanted}.")
    return list(row)


def check_prompts(dataset: "Dataset") -> None:
    """Raises `ValueError`, which begins with a verb, unless each row has a prompt, of those that a transform makes the
    first."""
    names = columns_of_rows(dataset)
    if "prompt" not in names:
        if "prompt" in dataset.column_names:
            what = (
                f"has a column 'prompt', but its {'transform' if has_transform(dataset) else 'format'} leaves it out"
            )
            raise ValueError(f"{what}: rows have {names}. Return it too, or take it off: dataset.with_format(None).")
        raise ValueError(f"has no column 'prompt' in {names}. Use dataset.rename_column(old, 'prompt').")
    prompts = [first_row(dataset)["prompt"]] if has_transform(dataset) else dataset["prompt"]
    for index, prompt in enumerate(prompts):
        check_prompt(prompt, index)


def check_prompt(prompt: Any, index: int) -> None:
    """Raises `ValueError`, which begins with a verb, unless the prompt of a row is text."""
    if not isinstance(prompt, str) or not prompt.strip():
        remedy = f"{OF_A_CONVERSATION}." if is_conversation(prompt) else "Filter such rows out, or convert them."
        raise ValueError(f"has prompt {prompt!r} in row {index}, but prompts must be non-empty strings. {remedy}")


def prompts_of(dataset: "Dataset") -> Sequence[str]:
    """All prompts."""
    if not has_transform(dataset):
        return dataset["prompt"]
    with unchanged_random_state():
        return [row["prompt"] for row in dataset]


def prompts_to_measure(dataset: "Dataset") -> Sequence[str]:
    """All prompts; of those that a transform makes the first ones, as to make all may take long."""
    if not has_transform(dataset):
        return dataset["prompt"]
    with unchanged_random_state():
        return [dataset[index]["prompt"] for index in range(min(len(dataset), _MEASURED))]


def first_row(dataset: "Dataset") -> Row:
    with unchanged_random_state():
        return dataset[0]


def read_rows(dataset: "Dataset", indices: Sequence[int], seed: int) -> list[Row]:
    """A row for each of `indices`, each read once. What a transform draws at random depends on `seed` and the row: it
    is the same in each reading and on each process."""
    rows: dict[int, Row] = {}
    with unchanged_random_state():
        for index in dict.fromkeys(indices):
            if has_transform(dataset):
                random.seed(seed + index)
                np.random.seed((seed + index) % 2**32)
                torch.manual_seed(seed + index)
            rows[index] = dataset[index]
    return [rows[index] for index in indices]


@contextlib.contextmanager
def unchanged_random_state() -> Iterator[None]:
    """Reward functions and transforms may draw random numbers; training after an evaluation must not notice."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=None if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class ReadOnce:
    """A data set of which each row in a batch is read once, however often it stands there: the images of a group are
    of one prompt, which a transform may make at random, and whose image need not be decoded for each."""

    def __init__(self, dataset: "Dataset"):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        distinct = list(dict.fromkeys(indices))
        rows = dict(zip(distinct, self.dataset.__getitems__(distinct), strict=True))
        return [rows[index] for index in indices]
