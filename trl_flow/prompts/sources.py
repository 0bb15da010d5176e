"""One function for all sources of prompts: a published set by name, a file, a folder, a data set on the Hub."""

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from trl_flow.prompts.files import SUFFIXES, read_prompts, with_prompt_column
from trl_flow.prompts.images import with_image_column
from trl_flow.prompts.sets import PROMPT_SETS, UnknownSplitError
from trl_flow.prompts.splits import read_split


if TYPE_CHECKING:
    from datasets import Dataset


def load_prompts(
    name_or_path: str | os.PathLike, split: str = "train", *, config: str | None = None, revision: str | None = None,
    prompt_column: str = "prompt", image_column: str | None = None, unique: bool = False, seed: int | None = None,
    limit: int | None = None,
) -> "Dataset":  # fmt: skip
    """
    Loads prompts.

    Args:
        name_or_path (`str` or `PathLike`): in this order,

            * the name of a set in `PROMPT_SETS`, or `"name:path"` to read a copy of it at `path` instead of
              downloading it. A file or folder of a set's name is `"./name"`;
            * a file as [`read_prompts`] reads them, which is the split `"train"`;
            * a folder with a file for each split, such as `train.txt` or `test_metadata.jsonl`, or any folder that
              `datasets.load_dataset` reads;
            * the id of a data set on the Hub.
        split (`str`, defaults to `"train"`): which part, in the words of `datasets`: `"test"`, `"train[:100]"`,
            `"train[10%:20%]"` or `"train+test"`.
        config, revision (`str`, *optional*): a configuration on the Hub; commit, branch or tag to download.
        prompt_column (`str`, defaults to `"prompt"`): the column with the prompts, `prompt` in the result.
        image_column (`str`, *optional*): the column with the images to be edited, or their paths, which are relative
            to the file or folder: `datasets.Image` in the result, called `image`.
        unique (`bool`, defaults to `False`): leave out rows whose prompt stands in an earlier row.
        seed (`int`, *optional*): shuffle by this seed; default: the source's order.
        limit (`int`, *optional*): keep as many rows at most, the first after shuffling.

    Returns:
        `datasets.Dataset`: the column `prompt` (`str`), and those that rewards need.

    Raises:
        UnknownSplitError: if there is no such split; it names those that there are.
        ValueError: if the prompts cannot be had, saying why and what to do, or an argument does not fit.

    Example:

    ```pycon
    >>> from trl_flow.prompts import load_prompts
    >>> prompts = load_prompts("generated_geneval", split="test", seed=0, limit=100)
    >>> prompts.column_names
    ['tag', 'include', 'prompt', 'exclude']
    ```
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit is {limit!r}, but must be a whole number of at least 1.")
    options = {"prompt_column": prompt_column, "image_column": image_column, "config": config, "revision": revision}
    dataset = read_split(split, lambda name: _load(name_or_path, name, **options))
    name, _, _ = os.fspath(name_or_path).partition(":")  # of a copy the set's name
    dataset.info.dataset_name = name if name in PROMPT_SETS else os.fspath(name_or_path)  # for the model card
    if unique:
        first = {prompt: row for row, prompt in reversed(list(enumerate(dataset["prompt"][:])))}
        dataset = dataset.select(sorted(first.values()))
    if seed is not None:
        dataset = dataset.shuffle(seed=seed)
    return dataset if limit is None else dataset.take(min(limit, len(dataset)))


def _load(
    name_or_path: str | os.PathLike, split: str, *, prompt_column: str, image_column: str | None, **options: str | None
) -> "Dataset":
    name = os.fspath(name_or_path)
    if not name.strip():
        raise ValueError("the name of the prompts is empty. Give that of a set, a file, a folder or a data set.")
    head, _, copy = name.partition(":")
    columns = {"prompt_column": prompt_column, "image_column": image_column}
    if isinstance(name_or_path, str) and head in PROMPT_SETS:
        _refuse(f"the data set {head!r}", config=options["config"], **columns)
        if copy:
            _refuse(f"a copy of the data set {head!r}", revision=options["revision"])
        return PROMPT_SETS[head].load(split, path=copy or None, revision=options["revision"])
    path = Path(name)
    # A name with such an end is a file even where it is missing; without, it may be a data set on the Hub
    is_file = path.suffix.lower() in SUFFIXES or path.is_file()
    if file := path if is_file else _split_file(path, split):
        _refuse(f"the file {os.fspath(file)!r}", **options)
        dataset = read_prompts(file, **columns)
        if is_file and split != "train":
            raise UnknownSplitError(name, split, ("train",))
        return dataset
    return _from_datasets(name, split, **columns, **options)


def _refuse(what: str, **options: str | None) -> None:
    """An option that would do nothing is a mistake."""
    for name, value in options.items():
        if value is not None and (name, value) != ("prompt_column", "prompt"):
            raise ValueError(f"{what} has no {name}, but {name} is {value!r}. Remove it.")


def _split_file(folder: Path, split: str) -> Path | None:
    files = [folder / f"{stem}{suffix}" for stem in (split, f"{split}_metadata") for suffix in SUFFIXES]
    found = [file for file in files if file.is_file()]
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise ValueError(f"the data set {os.fspath(folder)!r} has {names}: give the file instead of the folder.")
    return found[0] if found else None


def _from_datasets(
    name: str, split: str, *, prompt_column: str, image_column: str | None, config: str | None, revision: str | None
) -> "Dataset":
    from datasets import load_dataset

    try:
        splits = load_dataset(name, name=config, revision=revision)
    # Readers raise errors of many kinds, and most of them say what is the matter
    except Exception as error:
        cause = str(error).rstrip(".") or "it holds nothing"
        cause += f" ({error.__cause__})" if error.__cause__ else ""
        hint = "".join(f" Did you mean {near}?" for near in difflib.get_close_matches(name, PROMPT_SETS, n=1))
        raise ValueError(f"the data set {name!r} cannot be read: {cause}.{hint}") from error
    if split not in splits:
        raise UnknownSplitError(name, split, tuple(splits))
    try:
        folder = Path(name).absolute() if os.path.isdir(name) else None
        return with_image_column(with_prompt_column(splits[split], prompt_column), image_column, folder)
    except ValueError as error:
        raise ValueError(f"the data set {name!r} cannot be used: {error}.") from error
