"""Parts of splits, in the words of `datasets`: `train[:100]`, `train[10%:20%]+test`."""

from collections.abc import Callable
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset


def read_split(split: str, load: Callable[[str], "Dataset"]) -> "Dataset":
    """What `split` says of the splits that `load` gives by name. Raises `ValueError` if it is not understood."""
    if "[" not in split and "+" not in split:
        return load(split)
    from datasets import ReadInstruction, concatenate_datasets

    try:
        instruction = ReadInstruction.from_spec(split.strip())
    except (ValueError, AssertionError) as error:
        example = "Write it as datasets does: train[:100], train[10%:20%] or train+test"
        raise ValueError(f"the split {split!r} is not understood ({error}). {example}.") from error
    names = dict.fromkeys(part.partition("[")[0].partition("(")[0].strip() for part in split.split("+"))
    splits = {name: load(name) for name in names}
    try:
        ranges = instruction.to_absolute({name: len(dataset) for name, dataset in splits.items()})
    except ValueError as error:
        raise ValueError(f"the split {split!r} cannot be taken: {error}") from error
    parts = [splits[part.splitname].select(range(part.from_, part.to)) for part in ranges if part.from_ < part.to]
    if not parts:
        sizes = ", ".join(f"{name} has {len(dataset)} rows" for name, dataset in splits.items())
        raise ValueError(f"the split {split!r} holds nothing: {sizes}.")
    return concatenate_datasets(parts)
