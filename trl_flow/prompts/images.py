"""The column of images to be edited, beside the prompts."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset


def with_image_column(dataset: "Dataset", image_column: str | None, folder: Path | None) -> "Dataset":
    """`dataset` with the images or paths of `image_column` as `datasets.Image` in the column `image`; as it is with
    None. Paths are relative to `folder`. Raises `ValueError` if there is no such column, or none of images."""
    if image_column is None:
        return dataset
    from datasets import Image, Value

    names = dataset.column_names
    if image_column not in names:
        raise ValueError(f"it has no column {image_column!r}, which image_column names; its columns are {names}")
    if image_column != "image":
        if "image" in names:
            raise ValueError(f"image_column is {image_column!r}, but there is a column 'image' too: rename that one")
        dataset = dataset.rename_column(image_column, "image")
    feature = dataset.features["image"]
    if isinstance(feature, Image):
        return dataset
    if feature in (Value("string"), Value("large_string")):
        if folder is None:
            instead = "Download it, and give the folder"
            raise ValueError(f"its column {image_column!r} holds text, and there is no file that it is of. {instead}")
        paths = [_path(folder, value) for value in dataset["image"][:]]
        dataset = dataset.remove_columns("image").add_column("image", paths, feature=Value("string"))
    try:
        return dataset.cast_column("image", Image())
    except (TypeError, ValueError, NotImplementedError) as error:
        wanted = "paths, or images as datasets has them"
        raise ValueError(f"its column {image_column!r} holds {feature}, but must hold {wanted}") from error


def _path(folder: Path, value: Any) -> str | None:
    if value is None or "://" in value:
        return value
    return os.fspath(folder / Path(value).expanduser())  # an absolute one stays what it is
