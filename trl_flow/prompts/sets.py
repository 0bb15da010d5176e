"""
Published prompt sets, each with the columns that its rewards need, from where their authors put them.

All functions that load one return a `datasets.Dataset` and have the arguments `split` (`str`), `path` (`str` or
`PathLike`, *optional*: a copy to read instead of downloading, which is a clone of the repository, a folder with its
files, or the file of the split) and `revision` (`str`, *optional*: commit, branch or tag to download). They raise
[`UnknownSplitError`] for another split, and `ValueError` if a file cannot be fetched, saying how to get it otherwise,
or is no set of this kind.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants, get_session, hf_hub_download

from trl_flow.prompt_words import dimension_of, quoted_text
from trl_flow.prompts.files import dataset_of, read_prompts, with_prompt_column
from trl_flow.prompts.geneval import generate_geneval_prompts, geneval_benchmark


if TYPE_CHECKING:
    from datasets import Dataset

# Some publish their prompts on GitHub only. A commit rather than the branch: the same prompts in each run.
FLOW_GRPO = "yifan123/flow_grpo"
FLOW_GRPO_REVISION = "879042cf5707f8b90daa98d147d7deac2317c5da"
VBENCH = "Vchitect/VBench"
VBENCH_REVISION = "fed99821796c304bb99a176cecaf1fafeac7c64b"
GITHUB = "https://raw.githubusercontent.com"
HPDV2_STYLES = ("anime", "concept-art", "paintings", "photo")
# The dimensions that VBench has prompts of their own for: the names of its text files
VBENCH_DIMENSIONS = (
    *("appearance_style", "color", "human_action", "multiple_objects", "object_class", "overall_consistency", "scene"),
    *("spatial_relationship", "subject_consistency", "temporal_flickering", "temporal_style"),
)

GENERATED = 50_000  # as many as Flow-GRPO trains on
Source = str | os.PathLike | None  # a copy to read instead of downloading

# The keys of UniGenBench's descriptions: theme, theme within it, test points, what each of these is in the prompt
_UNIGENBENCH_KEYS = {
    "en": ("Primary Categories", "Secondary Categories", "Testpoints", "Testpoint Description"),
    "zh": ("一级垂类", "二级垂类", "考点", "考点对应描述"),
}


class UnknownSplitError(ValueError):
    """A prompt set has no such split, only `splits` (`tuple[str, ...]`).

    Example:

    ```pycon
    >>> from trl_flow.prompts import UnknownSplitError, load_drawbench
    >>> try:
    ...     load_drawbench("train")
    ... except UnknownSplitError as error:
    ...     print(error)
    ...
    the data set 'drawbench' has no split 'train', only test.
    ```
    """

    def __init__(self, name: str, split: str, splits: tuple[str, ...]):
        super().__init__(f"the data set {name!r} has no split {split!r}, only {', '.join(splits)}.")
        self.splits = splits


@dataclass(frozen=True)
class PromptSet:
    """What to know of a prompt set: where it comes from, its license as its publishers state it, where it was
    published, how many prompts each of its splits has, its columns, which rewards it is for, and what loads it:
    `load(split, path=None, revision=None)`.

    Example:

    ```pycon
    >>> from trl_flow.prompts import PROMPT_SETS, PromptSet
    >>> known: PromptSet = PROMPT_SETS["pickscore"]
    >>> dict(known.splits), known.license
    ({'train': 'about 25,000', 'test': 'about 2,000'}, "MIT (Flow-GRPO's repository and Pick-a-Pic)")
    ```
    """

    source: str
    license: str
    paper: str
    splits: Mapping[str, str]
    columns: Sequence[str]
    rewards: str
    load: Callable[..., "Dataset"]


def load_geneval(split: str = "train", *, path: Source = None, revision: str | None = None) -> "Dataset":
    """
    Flow-GRPO's GenEval prompts: 50,000 to train on (33,199 different ones) and 2,212 to test on (the 553 of GenEval,
    four times each). The rules that score them are GenEval's (https://arxiv.org/abs/2310.11513).

    Splits: `"train"` and `"test"`. Columns: `prompt`, `tag` (`str`: `single_object`, `two_object`, `counting`,
    `colors`, `position` or `color_attr`), `include` and `exclude` (lists of objects with `class`, `count`, and `color`
    or `position` where they matter; `None` where the file has none).

    Example:

    ```pycon
    >>> from pathlib import Path
    >>> from trl_flow.prompts import load_geneval
    >>> row = '{"prompt": "a photo of a cat", "tag": "single_object", "include": [{"class": "cat", "count": 1}]}'
    >>> _ = Path("train_metadata.jsonl").write_text(row)
    >>> load_geneval(path="train_metadata.jsonl")[0]["tag"]  # without a path it is downloaded
    'single_object'
    ```
    """
    dataset = _flow_grpo_prompts("geneval", split, path, revision)
    _check_column("geneval", dataset, "include")
    missing = dict.fromkeys(("prompt", "tag", "include", "exclude"), [None] * len(dataset))
    return dataset_of(missing | dataset[:])


def load_ocr(split: str = "train", *, path: Source = None, revision: str | None = None) -> "Dataset":
    """
    Flow-GRPO's prompts for text rendering (https://arxiv.org/abs/2505.05470), about 20,000 to train on and 1,000 to
    test on. Each quotes the text that the image must show.

    Splits: `"train"` and `"test"`. Columns: `prompt` and `text`, the quoted text (both `str`).

    Example:

    ```pycon
    >>> from pathlib import Path
    >>> from trl_flow.prompts import load_ocr
    >>> _ = Path("train.txt").write_text('A sign that says "OPEN"')
    >>> load_ocr(path="train.txt")[0]["text"]  # without a path it is downloaded
    'OPEN'
    ```
    """
    prompts = _flow_grpo_prompts("ocr", split, path, revision)["prompt"][:]
    texts = []
    for row, prompt in enumerate(prompts):
        try:
            texts.append(quoted_text(prompt))
        except ValueError as error:
            raise ValueError(f"the data set 'ocr' cannot be used, because of row {row}. {error}") from error
    return _prompts(prompts, text=texts)


def load_pickscore(
    split: str = "train", *, sfw: bool = False, path: Source = None, revision: str | None = None
) -> "Dataset":
    """
    Flow-GRPO's prompts for preference scores: what users of Pick-a-Pic typed (https://arxiv.org/abs/2305.01569), about
    25,000 to train on and 2,000 to test on. Some are not safe for work; `sfw=True` gives the set `pickscore_sfw`
    without them, which Flow-GRPO's authors recommend.

    Splits: `"train"` and `"test"`. Column: `prompt` (`str`).

    Example:

    ```pycon
    >>> from pathlib import Path
    >>> from trl_flow.prompts import load_pickscore
    >>> _ = Path("train.txt").write_text('a castle in the clouds')
    >>> load_pickscore(path="train.txt")[0]["prompt"]  # without a path it is downloaded
    'a castle in the clouds'
    ```
    """
    return _prompts(_flow_grpo_prompts("pickscore_sfw" if sfw else "pickscore", split, path, revision)["prompt"][:])


def load_hpdv2(split: str = "train", *, path: Source = None, revision: str | None = None) -> "Dataset":
    """
    The prompts of HPDv2 (https://arxiv.org/abs/2306.09341), without its images.

    Splits: `"train"` (the different prompts of the training pairs, some 100,000), `"test"` (the 400 of the test pairs)
    and `"benchmark"` (3,200, 800 in each of the styles). Columns: `prompt` (`str`), and for `"benchmark"` `style`
    (`str`: `anime`, `concept-art`, `paintings` or `photo`).

    Example:

    ```pycon
    >>> from pathlib import Path
    >>> from trl_flow.prompts import load_hpdv2
    >>> _ = Path("test.json").write_text('[{"prompt": "a lighthouse at dusk"}]')
    >>> load_hpdv2("test", path="test.json")[0]  # without a path it is downloaded
    {'prompt': 'a lighthouse at dusk'}
    ```
    """
    _check_split("hpdv2", split)
    if split != "benchmark":
        prompts = read_prompts(_hub_file("hpdv2", f"{split}.json", path, revision))["prompt"][:]
        return dataset_of({"prompt": list(dict.fromkeys(prompts))})  # the file has one for each comparison of images
    if path is not None and Path(path).is_file():
        files = {Path(path).stem: Path(path)}
    else:
        files = {style: _hub_file("hpdv2", f"benchmark/{style}.json", path, revision) for style in HPDV2_STYLES}
    by_style = {style: read_prompts(file)["prompt"][:] for style, file in files.items()}
    styles = [style for style, prompts in by_style.items() for _ in prompts]
    return dataset_of({"prompt": sum(by_style.values(), []), "style": styles})


def load_drawbench(split: str = "test", *, path: Source = None, revision: str | None = None) -> "Dataset":
    """
    DrawBench, the 200 prompts of Imagen's paper (https://arxiv.org/abs/2205.11487).

    Split: `"test"`. Columns: `prompt` and `category` (`str`, one of 11 such as `Colors`; `None` in copies without).

    Example:

    ```pycon
    >>> from pathlib import Path
    >>> from trl_flow.prompts import load_drawbench
    >>> _ = Path("test.txt").write_text("A red colored car.")
    >>> load_drawbench(path="test.txt")[0]["prompt"]  # without a path it is downloaded
    'A red colored car.'
    ```
    """
    from datasets import load_dataset

    _check_split("drawbench", split)
    if path is not None:
        dataset = read_prompts(_local_file("drawbench", "dataset/drawbench/test.txt", path), prompt_column="Prompts")
    else:  # called `train` there, though nobody trains on it
        repository = PROMPT_SETS["drawbench"].source.removeprefix("huggingface.co/datasets/")
        get = partial(load_dataset, repository, revision=revision, split="train")
        dataset = with_prompt_column(_fetched("drawbench", "its file of prompts", get), "Prompts")
    known = "Category" in dataset.column_names  # plain lines, as DiffusionNFT ships them, have none
    categories = dataset["Category"][:] if known else [None] * len(dataset)
    return dataset_of({"prompt": dataset["prompt"][:], "category": categories})


def load_unigenbench(
    split: str = "train", *, language: str = "en", long: bool = False, path: Source = None, revision: str | None = None
) -> "Dataset":
    """
    UniGenBench++ (https://arxiv.org/abs/2510.18701): 600 prompts in English and Chinese, each short and long, and what
    an image is tested for, and the English prompts that its authors trained on. `language` is `"en"` or `"zh"`; `long`
    gives the long prompts, which have more test points.

    Splits: `"test"`, and `"train"` of the short English prompts. Columns: `prompt` (`str`), and for `"test"` also
    `theme` and `subtheme` (`str`), `dimensions`, `testpoints` and `testpoint_descriptions` (`list[str]`): a test point
    such as "Attribute - Color" belongs to the dimension "Attribute"; each has one description, what it is here.

    Example:

    ```pycon
    >>> from pathlib import Path
    >>> from trl_flow.prompts import load_unigenbench
    >>> _ = Path("train_prompt.txt").write_text("a glass fox in the snow")
    >>> load_unigenbench(path="train_prompt.txt")[0]  # without a path it is downloaded
    {'prompt': 'a glass fox in the snow'}
    ```
    """
    if language not in _UNIGENBENCH_KEYS:
        raise ValueError(f"language is {language!r}, but must be one of {', '.join(_UNIGENBENCH_KEYS)}.")
    variant = "_long" if long else ""
    _check_split("unigenbench" + ("_zh" if language == "zh" else "") + variant, split)
    if split == "train":
        return _prompts(read_prompts(_hub_file("unigenbench", "train/train_prompt.txt", path, revision))["prompt"][:])
    file = _hub_file("unigenbench", f"eval/test_{language}{variant}.csv", path, revision)
    dataset = read_prompts(file, prompt_column=f"prompt_{language}")
    column, keys = f"sub_dims_{language}", _UNIGENBENCH_KEYS[language]
    _check_column("unigenbench", dataset, column)
    rows = []
    for row, text in enumerate(dataset[column][:]):
        try:
            theme, subtheme, testpoints, descriptions = (json.loads(text)[key] for key in keys)
            if len(testpoints) != len(descriptions):
                raise ValueError(f"{len(testpoints)} test points and {len(descriptions)} descriptions")
        except (ValueError, TypeError, KeyError) as error:
            words = f"the description in row {row} is not understood ({error!r})"
            wanted = f"It must be a JSON object with the keys {', '.join(keys)}: {text!r}"
            raise ValueError(f"the data set 'unigenbench' cannot be read: {words}. {wanted}.") from error
        dimensions = list(dict.fromkeys(dimension_of(point) for point in testpoints))
        rows.append((theme, subtheme, dimensions, testpoints, descriptions))
    names = ("theme", "subtheme", "dimensions", "testpoints", "testpoint_descriptions")
    columns = zip(names, map(list, zip(*rows, strict=True)), strict=True)
    return dataset_of({"prompt": dataset["prompt"][:], **dict(columns)})


def load_vbench(split: str = "test", *, path: Source = None, revision: str | None = None) -> "Dataset":
    """
    VBench's prompts for videos (https://arxiv.org/abs/2311.17982), 946 in 16 dimensions. `path` may also be one of its
    text files, such as `prompts/prompts_per_dimension/color.txt`, or one with the same prompts in longer words.

    Split: `"test"`. Columns: `prompt` (`str`), `dimension` (`list[str]`, such as `["color"]`, by which VBench scores
    the prompt's videos; `None` in text files that are of several), and `auxiliary_info` (objects by dimension, what
    VBench looks for there; `None` where it needs nothing).

    Example:

    ```pycon
    >>> from pathlib import Path
    >>> from trl_flow.prompts import load_vbench
    >>> _ = Path("color.txt").write_text("a red bicycle")
    >>> load_vbench(path="color.txt")[0]["dimension"]  # without a path it is downloaded
    ['color']
    ```
    """
    _check_split("vbench", split)
    if path is not None:
        file = _local_file("vbench", "vbench/VBench_full_info.json", path)
    else:
        revision = revision or VBENCH_REVISION
        # It has been moved since that commit
        name = ("" if revision == VBENCH_REVISION else "vbench/") + "VBench_full_info.json"
        file = _github_file("vbench", VBENCH, revision, name)
    dataset = read_prompts(file)
    if file.suffix == ".txt":
        own = next((name for name in VBENCH_DIMENSIONS if file.stem in (name, f"{name}_longer")), None)
        dimensions = [own and [own]] * len(dataset)
        return _prompts(dataset["prompt"][:], dimension=dimensions, auxiliary_info=[None] * len(dataset))
    _check_column("vbench", dataset, "dimension")
    known = "auxiliary_info" in dataset.column_names
    columns = {"prompt": dataset["prompt"][:], "dimension": dataset["dimension"][:]}
    return dataset_of(columns | {"auxiliary_info": dataset["auxiliary_info"][:] if known else [None] * len(dataset)})


def _load_generated_geneval(split: str = "train", *, path: Source = None, revision: str | None = None) -> "Dataset":
    _check_split("generated_geneval", split)
    if path is not None or revision is not None:
        raise ValueError("the data set 'generated_geneval' is made here: it has neither a path nor a revision.")
    return geneval_benchmark() if split == "test" else generate_geneval_prompts(GENERATED)


def _prompts(prompts: list[str], **columns: list) -> "Dataset":
    return dataset_of({"prompt": [prompt.strip() for prompt in prompts], **columns})


# ---- Where the files come from ----


def _check_split(name: str, split: str) -> None:
    if split not in PROMPT_SETS[name].splits:
        raise UnknownSplitError(name, split, tuple(PROMPT_SETS[name].splits))


def _check_column(name: str, dataset: "Dataset", column: str) -> None:
    if column not in dataset.column_names:
        raise ValueError(f"the data set {name!r} has no column {column!r}, only {dataset.column_names}: give another.")


def _flow_grpo_prompts(name: str, split: str, path: Source, revision: str | None) -> "Dataset":
    _check_split(name, split)
    file = f"dataset/{name}/{split}" + ("_metadata.jsonl" if name == "geneval" else ".txt")
    if path is not None:
        return read_prompts(_local_file(name, file, path))
    return read_prompts(_github_file(name, FLOW_GRPO, revision or FLOW_GRPO_REVISION, file))


def _github_file(name: str, repository: str, revision: str, file: str) -> Path:
    kept = Path(constants.HF_HOME, "trl_flow", "prompts", repository, revision, file.removeprefix("dataset/"))
    # What a commit holds never changes, so that nobody need be asked about a file that is there
    if not (re.fullmatch(r"[0-9a-f]{40}", revision) and kept.is_file()):
        _fetched(name, file, partial(_download, f"{GITHUB}/{repository}/{revision}/{file}", kept))
    return kept


def _download(url: str, path: Path) -> None:
    """Saves what is at `url`, by the Hub's client: it knows of proxies, certificates and offline mode."""
    response = get_session().get(url, follow_redirects=True, timeout=60)
    response.raise_for_status()
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that no other process has, until it is complete
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    temporary.write_bytes(response.content)
    os.replace(temporary, path)


def _hub_file(name: str, file: str, path: Source, revision: str | None) -> Path:
    if path is not None:
        return _local_file(name, file, path)
    repository = PROMPT_SETS[name].source.removeprefix("huggingface.co/datasets/")
    get = partial(hf_hub_download, repository, file, repo_type="dataset", revision=revision)
    return Path(_fetched(name, file, get))


def _local_file(name: str, file: str, path: str | os.PathLike) -> Path:
    """`path` itself, or what lies in it as in the repository or next to each other."""
    for candidate in (Path(path), Path(path, file), Path(path, Path(file).name)):
        if candidate.is_file():
            return candidate
    words = f"is neither a file nor a folder with {file} or {Path(file).name}"
    raise ValueError(f"the data set {name!r} cannot be read: {os.fspath(path)!r} {words}.")


def _fetched(name: str, file: str, get: Callable[[], Any]) -> Any:
    try:
        return get()
    # The libraries raise errors of many kinds; all of them mean that it is not here
    except Exception as error:
        cause = str(error).rstrip(".") or type(error).__name__
        raise ValueError(
            f"the data set {name!r} cannot be fetched from {PROMPT_SETS[name].source.split(',')[0]}: {cause}. Without "
            f"network get {file} from there by other means, and give the file or its folder: path=... in Python, "
            f"{name}:PATH on the command line."
        ) from error


_LOADERS = {
    "geneval": load_geneval, "generated_geneval": _load_generated_geneval, "ocr": load_ocr,
    "pickscore": load_pickscore, "pickscore_sfw": partial(load_pickscore, sfw=True),
    "hpdv2": load_hpdv2, "drawbench": load_drawbench, "vbench": load_vbench,
    "unigenbench": load_unigenbench, "unigenbench_long": partial(load_unigenbench, long=True),
    "unigenbench_zh": partial(load_unigenbench, language="zh"),
    "unigenbench_zh_long": partial(load_unigenbench, language="zh", long=True),
}  # fmt: skip
PROMPT_SETS: dict[str, PromptSet] = {
    name: PromptSet(**about, load=_LOADERS[name])
    for name, about in json.loads(Path(__file__).with_name("sets.json").read_text(encoding="utf-8")).items()
}
"""What is known of each prompt set, by the name that `load_prompts` and the command line take."""
