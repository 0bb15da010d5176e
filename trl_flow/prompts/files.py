"""Prompts from files: JSON lines, JSON, CSV, TSV, plain text and Parquet.

JSON and CSV are read by Python's own modules, since the readers of `datasets` change what stands in the file: "null"
and "NA" become missing values in a CSV file, a date in a JSON file a time stamp, and errors seldom say where they are.
"""

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_flow.prompts.images import with_image_column


if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")

Row = tuple[str, dict[str, Any]]  # where in the file it stands, in words, and what it holds


def read_prompts(
    path: str | os.PathLike, *, prompt_column: str = "prompt", image_column: str | None = None,
    suffix: str | None = None,
) -> "Dataset":  # fmt: skip
    """
    Reads a file of prompts.

    | suffix | content |
    | --- | --- |
    | `.jsonl` | one object a line |
    | `.json` | a list of objects or of prompts, or an object of objects; one object a line will do too |
    | `.csv`, `.tsv` | a header and rows, separated by commas or tabs; columns of nothing but numbers become numbers |
    | `.txt` | one prompt a line |
    | `.parquet` | a table |

    Text is UTF-8, with or without byte order mark; lines end with LF or CRLF; empty lines are skipped. The order of
    the rows is kept, and so are prompts that occur several times. A key that some rows lack is `None` there. Objects
    within a row come out as they stand in the file, without the keys that only other objects have.

    Args:
        path (`str` or `PathLike`): the file.
        prompt_column (`str`, defaults to `"prompt"`): the column with the prompts, called `prompt` in the result. A
            file that has none but `prompt_en`, as VBench's and UniGenBench's, is read by that one.
        image_column (`str`, *optional*): the column with the images to be edited, or their paths, relative to the
            file's folder: in the result they are `datasets.Image`, called `image`.
        suffix (`str`, *optional*): which of these it is, for a file whose name does not tell.

    Returns:
        `datasets.Dataset`: the column `prompt` (`str`), and all others of the file.

    Raises:
        ValueError: if the file is missing, empty, of another kind, malformed (with the line), without the column (with
            those that it has), or holds a prompt that is empty or no text (with its line, or its row counted from 0).

    Example:

    ```pycon
    >>> from pathlib import Path
    >>> from trl_flow.prompts import read_prompts
    >>> _ = Path("animals.jsonl").write_text('{"prompt": "a bird", "legs": 2}')
    >>> read_prompts("animals.jsonl")[0]
    {'prompt': 'a bird', 'legs': 2}
    ```
    """
    path = Path(path)
    try:
        dataset = _read(path, prompt_column, (suffix or path.suffix).lower())
        return with_image_column(dataset, image_column, path.parent.absolute())
    # Arrow raises what is no ValueError for numbers that are too large
    except (ValueError, OSError, OverflowError, TypeError, RecursionError) as error:
        cause = getattr(error, "strerror", None) or str(error)  # without the operating system's number and path
        raise ValueError(f"the data set {os.fspath(path)!r} cannot be read: {cause.rstrip('.')}.") from error


def _read(path: Path, prompt_column: str, suffix: str) -> "Dataset":
    if not path.is_file():
        raise ValueError("it is a folder" if path.is_dir() else "there is no such file")
    if suffix not in SUFFIXES:
        raise ValueError(f"files end with {', '.join(SUFFIXES)}, this one with {suffix!r}")
    if suffix == ".parquet":
        return _from_parquet(path, prompt_column)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8") from error
    if suffix == ".txt":
        rows = [(where, {prompt_column: line.removesuffix("\r")}) for where, line in _lines(text)]
    elif suffix in (".csv", ".tsv"):
        rows = _csv(text, prompt_column, "," if suffix == ".csv" else "\t")
    else:
        rows = (_json if suffix == ".json" else _json_lines)(text, prompt_column)
    return _from_rows(rows, prompt_column)


def _lines(text: str) -> list[tuple[str, str]]:
    # Not `splitlines`: a string in JSON may hold other line separators than LF
    return [(f"line {n}", line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _json_lines(text: str, prompt_column: str) -> list[Row]:
    rows = []
    for where, line in _lines(text):
        try:
            rows.append(_row(json.loads(line), where, prompt_column))
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not valid JSON ({error.msg}, column {error.colno})") from error
    return rows


def _json(text: str, prompt_column: str) -> list[Row]:
    try:
        content = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a second value: one a line
            return _json_lines(text, prompt_column)
        raise ValueError(f"line {error.lineno} is not valid JSON ({error.msg}, column {error.colno})") from error
    values = content
    if isinstance(content, dict):
        inner = list(content.values())
        # By a name for each, as MJHQ-30K and ImgEdit have them, or all under one
        by_name = len(inner) > 0 and all(isinstance(value, dict) for value in inner)
        under_one = len(inner) == 1 and isinstance(inner[0], list)
        values = inner if by_name else inner[0] if under_one else [content]
    if not isinstance(values, list):
        raise ValueError(f"it holds {_described(values)}, but must hold a list of objects or of prompts")
    return [_row(value, f"row {index}", prompt_column) for index, value in enumerate(values)]


def _row(value: Any, where: str, prompt_column: str) -> Row:
    if not isinstance(value, str | dict):
        raise ValueError(f"{where} is {_described(value)}, neither an object nor a prompt")
    return where, {prompt_column: value} if isinstance(value, str) else value


def _csv(text: str, prompt_column: str, delimiter: str) -> list[Row]:
    try:
        names, lines = _csv_lines(text, delimiter=delimiter)
    except ValueError:
        if delimiter == ",":
            raise
        # Published tables separated by tabs, such as PartiPrompts, have quotation marks that are part of the text
        names, lines = _csv_lines(text, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    if len(set(names)) < len(names) or "" in names:
        raise ValueError(f"the first line must name each column, and each name once, but is {names}")
    for where, row in lines:
        if None in row:  # where DictReader puts what has no column
            counts = f"{len(names) + len(row[None])} values for the {len(names)} columns"
            raise ValueError(f"{where} has {counts} {names}; values that hold the separator need quotes around them")
    for name in set(names) - {prompt_column}:
        for (_, row), value in zip(lines, _typed([row[name] for _, row in lines]), strict=True):
            row[name] = value
    return lines


def _csv_lines(text: str, **how: Any) -> tuple[list[str], list[Row]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, restval="", **how)
    try:
        return list(reader.fieldnames or []), [(f"line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"line {reader.reader.line_num} is not valid CSV ({error})") from error


def _typed(values: list[str]) -> list[Any]:
    """A column as JSON reads it if that gives numbers or truth values only, else as text; what is empty is `None`."""
    try:
        parsed = [json.loads(value.lower()) if value else None for value in values]
    except ValueError:
        return [value or None for value in values]
    kinds = {type(number) for number, value in zip(parsed, values, strict=True) if value}
    fits = not any(isinstance(number, int) and abs(number) >= 2**63 for number in parsed)  # into 64 bits
    return parsed if fits and kinds in ({int}, {float}, {int, float}, {bool}) else [v or None for v in values]


def _from_rows(rows: list[Row], prompt_column: str) -> "Dataset":
    if not rows:
        raise ValueError("it holds nothing")
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    prompt_column = _known_column(names, prompt_column)
    _check_column(names, prompt_column)
    for where, row in rows:
        if prompt_column not in row:
            raise ValueError(f"{where} has no {prompt_column!r}, only {list(row)}")
    columns = {name: [row.get(name) for _, row in rows] for name in names}
    _check_prompts(columns[prompt_column], [where for where, _ in rows], prompt_column)
    return dataset_of({"prompt": columns.pop(prompt_column), **columns})


def dataset_of(columns: dict[str, list[Any]]) -> "Dataset":
    """A data set of columns in which objects keep their keys: these have the type `datasets.Json`, or are lists of it.
    As a type of its own the object of one row would gain the keys of all others."""
    from datasets import Dataset, Features, Json, List, concatenate_datasets

    parts = []
    for name, values in columns.items():
        of_objects = Json() if any(isinstance(value, dict) for value in values) else None
        items = [item for value in values if isinstance(value, list) for item in value]
        if of_objects is None and any(isinstance(item, dict | list) for item in items):
            of_objects = List(Json())
        types = Features({name: of_objects}) if of_objects else None
        parts.append(Dataset.from_dict({name: values}, features=types, on_mixed_types=None if types else "use_json"))
    return concatenate_datasets(parts, axis=1)


def _from_parquet(path: Path, prompt_column: str) -> "Dataset":
    from datasets import load_dataset

    try:
        dataset = load_dataset("parquet", data_files=str(path), split="train")
    # Its own message says no more than that it failed; what is wrong stands in the cause
    except Exception as error:
        raise ValueError(f"{error} ({error.__cause__})" if error.__cause__ else str(error)) from error
    if len(dataset) == 0:
        raise ValueError("it holds nothing")
    dataset = with_prompt_column(dataset, prompt_column)
    prompts = dataset["prompt"][:]
    _check_prompts(prompts, [f"row {index}" for index in range(len(prompts))], prompt_column)
    return dataset


def with_prompt_column(dataset: "Dataset", prompt_column: str) -> "Dataset":
    """`dataset` with the column `prompt_column` called `prompt`; `ValueError` if it is not there, or both are."""
    prompt_column = _known_column(dataset.column_names, prompt_column)
    _check_column(dataset.column_names, prompt_column)
    return dataset if prompt_column == "prompt" else dataset.rename_column(prompt_column, "prompt")


def _known_column(names: Sequence[str], prompt_column: str) -> str:
    return "prompt_en" if prompt_column == "prompt" not in names and "prompt_en" in names else prompt_column


def _check_column(names: Sequence[str], prompt_column: str) -> None:
    if prompt_column not in names:
        shown = list(names) if len(names) <= 30 else [*names[:30], "..."]
        columns = f"its columns are {shown}. Give the name of the one that holds the prompts as prompt_column"
        raise ValueError(f"it has no column {prompt_column!r}; {columns}")
    if prompt_column != "prompt" and "prompt" in names:
        raise ValueError(f"prompt_column is {prompt_column!r}, but there is a column 'prompt' too: rename that one")


def _check_prompts(prompts: Sequence[Any], places: Sequence[str], prompt_column: str) -> None:
    for prompt, where in zip(prompts, places, strict=True):
        if not isinstance(prompt, str):
            remedy = f". {OF_A_CONVERSATION}" if is_conversation(prompt) else ""
            raise ValueError(f"{where}: {prompt_column} is {_described(prompt)}, but must be text{remedy}")
        if not prompt.strip():
            raise ValueError(f"{where}: {prompt_column} is {prompt!r}; a prompt must not be empty")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # JSON can write one half of a surrogate pair
            raise ValueError(f"{where}: {prompt_column} is not valid Unicode ({error})") from error


OF_A_CONVERSATION = (
    "Prompts of language models are conversations; load them with datasets, and take what the user says: "
    "dataset.map(lambda row: {'prompt': row['prompt'][-1]['content']})"
)


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, as TRL's are."""
    return isinstance(prompt, list) and len(prompt) > 0 and all(isinstance(m, dict) and "role" in m for m in prompt)


def _described(value: Any) -> str:
    kinds = {type(None): "null", dict: "an object", list: "a list"}
    return kinds.get(type(value), f"{value!r}"[:80])
