"""
Published prompt sets, each with the columns that its rewards need, from where their authors put them.

All functions that load one have the arguments `split`, `path` (a copy to read instead of downloading: a clone of the
repository, a folder with its files, or the file of the split) and `revision` (commit, branch or tag to download), and
raise [`UnknownSplitError`] for another split, and `ValueError` if a file cannot be fetched, saying how to get it
otherwise, or is no set of this kind.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants, get_session, hf_hub_download

from trl_flow.prompt_words import quoted_text
from trl_flow.prompts.files import dataset_of, read_prompts, with_prompt_column
from trl_flow.prompts.geneval import generate_geneval_prompts, geneval_benchmark


if TYPE_CHECKING:
    from datasets import Dataset

# Flow-GRPO publishes its prompts on GitHub only. A commit rather than the branch: the same prompts in each run.
FLOW_GRPO = "yifan123/flow_grpo"
FLOW_GRPO_REVISION = "879042cf5707f8b90daa98d147d7deac2317c5da"
GITHUB = "https://raw.githubusercontent.com"
HPDV2 = "ymhao/HPDv2"
HPDV2_STYLES = ("anime", "concept-art", "paintings", "photo")
DRAWBENCH = "sayakpaul/drawbench"
UNIGENBENCH = "CodeGoat24/UniGenBench"

# A copy to read instead of downloading
Source = str | os.PathLike | None

# As many as Flow-GRPO trains on
GENERATED = 50_000

# The keys of UniGenBench's descriptions: theme, theme within it, test points, what each of these is in the prompt
_UNIGENBENCH_KEYS = {
    "en": ("Primary Categories", "Secondary Categories", "Testpoints", "Testpoint Description"),
    "zh": ("一级垂类", "二级垂类", "考点", "考点对应描述"),
}


class UnknownSplitError(ValueError):
    """
    A prompt set has no such split.

    Attributes:
        splits (`tuple[str, ...]`): those that it has.
    """

    def __init__(self, name: str, split: str, splits: tuple[str, ...]):
        super().__init__(f"the data set {name!r} has no split {split!r}, only {', '.join(splits)}.")
        self.splits = splits


@dataclass(frozen=True)
class PromptSet:
    """
    What to know of a prompt set.

    Attributes:
        source (`str`): where it comes from.
        license (`str`): as its publishers state it.
        paper (`str`): where it was published.
        splits (`Mapping[str, str]`): each split, and how many prompts it has.
        columns (`tuple[str, ...]`): of the data set.
        rewards (`str`): which rewards it is for.
        load (`Callable`): what loads it: `load(split, path=None, revision=None)`.
    """

    source: str
    license: str
    paper: str
    splits: Mapping[str, str]
    columns: tuple[str, ...]
    rewards: str
    load: Callable[..., "Dataset"]


def load_geneval(split: str = "train", *, path: Source = None, revision: str | None = None) -> "Dataset":
    """
    Flow-GRPO's GenEval prompts: 50,000 to train on (33,199 different ones) and 2,212 to test on (the 553 of GenEval,
    four times each). The rules that score them are GenEval's (https://arxiv.org/abs/2310.11513).

    Args:
        split (`str`, defaults to `"train"`): `"train"` or `"test"`.
        path, revision (*optional*): as for all sets, see the module.

    Returns:
        `datasets.Dataset` with the columns `prompt` (`str`), `tag` (`str`: `single_object`, `two_object`, `counting`,
        `colors`, `position` or `color_attr`), `include` and `exclude` (lists of objects with `class`, `count`, and
        `color` or `position` where they matter; `None` where the file has none).
    """
    _check_split("geneval", split)
    dataset = _flow_grpo_prompts("geneval", f"geneval/{split}_metadata.jsonl", path, revision)
    if "include" not in dataset.column_names:
        raise ValueError(
            f"the data set 'geneval' cannot be read: it has no column 'include', only {dataset.column_names}."
        )
    names = list(dict.fromkeys(("prompt", "tag", "include", "exclude", *dataset.column_names)))
    missing = [None] * len(dataset)
    return dataset_of({name: dataset[name][:] if name in dataset.column_names else missing for name in names})


def load_ocr(split: str = "train", *, path: Source = None, revision: str | None = None) -> "Dataset":
    """
    Flow-GRPO's prompts for text rendering (https://arxiv.org/abs/2505.05470), about 20,000 to train on and 1,000 to
    test on. Each quotes the text that the image must show.

    Args:
        split (`str`, defaults to `"train"`): `"train"` or `"test"`.
        path, revision (*optional*): as for all sets, see the module.

    Returns:
        `datasets.Dataset` with the columns `prompt` (`str`) and `text` (`str`), the quoted text.
    """
    _check_split("ocr", split)
    prompts = _flow_grpo_prompts("ocr", f"ocr/{split}.txt", path, revision)["prompt"][:]
    texts = []
    for row, prompt in enumerate(prompts):
        try:
            texts.append(quoted_text(prompt))
        except ValueError as error:
            raise ValueError(f"the data set 'ocr' cannot be used, because of row {row}. {error}") from error
    return dataset_of({"prompt": [prompt.strip() for prompt in prompts], "text": texts})


def load_pickscore(
    split: str = "train", *, sfw: bool = False, path: Source = None, revision: str | None = None
) -> "Dataset":
    """
    Flow-GRPO's prompts for preference scores: what users of Pick-a-Pic typed (https://arxiv.org/abs/2305.01569), about
    25,000 to train on and 2,000 to test on. Some are not safe for work; `sfw=True` gives the set without them, which
    Flow-GRPO's authors recommend.

    Args:
        split (`str`, defaults to `"train"`): `"train"` or `"test"`.
        sfw (`bool`, defaults to `False`): the set `pickscore_sfw` instead of `pickscore`.
        path, revision (*optional*): as for all sets, see the module.

    Returns:
        `datasets.Dataset` with the column `prompt` (`str`).
    """
    name = "pickscore_sfw" if sfw else "pickscore"
    _check_split(name, split)
    prompts = _flow_grpo_prompts(name, f"{name}/{split}.txt", path, revision)["prompt"][:]
    return dataset_of({"prompt": [prompt.strip() for prompt in prompts]})


def load_hpdv2(split: str = "train", *, path: Source = None, revision: str | None = None) -> "Dataset":
    """
    The prompts of HPDv2 (https://arxiv.org/abs/2306.09341), without its images.

    Args:
        split (`str`, defaults to `"train"`): `"train"` (the different prompts of the training pairs, some 100,000),
            `"test"` (the 400 of the test pairs) or `"benchmark"` (3,200, 800 in each of the styles).
        path, revision (*optional*): as for all sets, see the module.

    Returns:
        `datasets.Dataset` with the column `prompt` (`str`), and for `"benchmark"` `style` (`str`: `anime`,
        `concept-art`, `paintings` or `photo`).
    """
    _check_split("hpdv2", split)
    if split != "benchmark":
        prompts = read_prompts(_hub_file("hpdv2", HPDV2, f"{split}.json", path, revision))["prompt"][:]
        # One entry for each comparison of images
        return dataset_of({"prompt": list(dict.fromkeys(prompts))})
    if path is not None and Path(path).is_file():
        files = {Path(path).stem: Path(path)}
    else:
        files = {style: _hub_file("hpdv2", HPDV2, f"benchmark/{style}.json", path, revision) for style in HPDV2_STYLES}
    rows = [(prompt, style) for style, file in files.items() for prompt in read_prompts(file)["prompt"][:]]
    return dataset_of({"prompt": [prompt for prompt, _ in rows], "style": [style for _, style in rows]})


def load_drawbench(split: str = "test", *, path: Source = None, revision: str | None = None) -> "Dataset":
    """
    DrawBench, the 200 prompts of Imagen's paper (https://arxiv.org/abs/2205.11487).

    Args:
        split (`str`, defaults to `"test"`): `"test"`, the only one.
        path, revision (*optional*): as for all sets, see the module.

    Returns:
        `datasets.Dataset` with the columns `prompt` and `category` (`str`, one of 11 such as `Colors`).
    """
    from datasets import load_dataset

    _check_split("drawbench", split)
    if path is not None:
        dataset = read_prompts(path, prompt_column="Prompts")
    else:
        # Called `train` there, though nobody trains on it
        get = partial(load_dataset, DRAWBENCH, revision=revision, split="train")
        dataset = _fetched("drawbench", f"huggingface.co/datasets/{DRAWBENCH}", "its file of prompts", get)
        dataset = with_prompt_column(dataset, "Prompts")
    if "Category" not in dataset.column_names:
        raise ValueError(
            f"the data set 'drawbench' cannot be used: it has no column 'Category', only {dataset.column_names}."
        )
    return dataset_of({"prompt": dataset["prompt"][:], "category": dataset["Category"][:]})


def load_unigenbench(
    split: str = "train",
    *,
    language: str = "en",
    long: bool = False,
    path: Source = None,
    revision: str | None = None,
) -> "Dataset":
    """
    UniGenBench++ (https://arxiv.org/abs/2510.18701): 600 prompts in English and Chinese, each short and long, and what
    an image is tested for, and the English prompts that its authors trained on.

    Args:
        split (`str`, defaults to `"train"`): `"train"` (English only) or `"test"`.
        language (`str`, defaults to `"en"`): `"en"` or `"zh"`.
        long (`bool`, defaults to `False`): the long prompts; they have more test points.
        path, revision (*optional*): as for all sets, see the module.

    Returns:
        `datasets.Dataset` with the column `prompt` (`str`), and for `"test"` also `theme` and `subtheme` (`str`),
        `dimensions`, `testpoints` and `testpoint_descriptions` (`list[str]`): a test point such as "Attribute - Color"
        belongs to the dimension "Attribute"; each has one description, what it is in this prompt.
    """
    if language not in _UNIGENBENCH_KEYS:
        raise ValueError(f"language is {language!r}, but must be one of {', '.join(_UNIGENBENCH_KEYS)}.")
    if split == "train" and language == "en" and not long:
        file = _hub_file("unigenbench", UNIGENBENCH, "train/train_prompt.txt", path, revision)
        return dataset_of({"prompt": [prompt.strip() for prompt in read_prompts(file)["prompt"][:]]})
    variant = language + ("_long" if long else "")
    _check_split(_unigenbench_name(language, long), split)
    file = _hub_file("unigenbench", UNIGENBENCH, f"eval/test_{variant}.csv", path, revision)
    dataset = read_prompts(file, prompt_column=f"prompt_{language}")
    column = f"sub_dims_{language}"
    if column not in dataset.column_names:
        raise ValueError(
            f"the data set 'unigenbench' cannot be read: {os.fspath(file)!r} has no column {column!r}, only "
            f"{dataset.column_names}."
        )
    rows = [_unigenbench_row(text, row, _UNIGENBENCH_KEYS[language]) for row, text in enumerate(dataset[column][:])]
    return dataset_of({"prompt": dataset["prompt"][:], **{name: [row[name] for row in rows] for name in rows[0]}})


def _unigenbench_name(language: str, long: bool) -> str:
    return "unigenbench" + ("_zh" if language == "zh" else "") + ("_long" if long else "")


def _unigenbench_row(text: str, row: int, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        theme, subtheme, testpoints, descriptions = (json.loads(text)[key] for key in keys)
        if len(testpoints) != len(descriptions):
            raise ValueError(f"{len(testpoints)} test points and {len(descriptions)} descriptions")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"the data set 'unigenbench' cannot be read: the description in row {row} is not understood ({error!r}). "
            f"It must be a JSON object with the keys {', '.join(keys)}: {text!r}."
        ) from error
    return {
        "theme": theme,
        "subtheme": subtheme,
        "dimensions": list(dict.fromkeys(point.split("-")[0].strip() for point in testpoints)),
        "testpoints": testpoints,
        "testpoint_descriptions": descriptions,
    }


def _load_generated_geneval(split: str = "train", *, path: Source = None, revision: str | None = None) -> "Dataset":
    _check_split("generated_geneval", split)
    if path is not None or revision is not None:
        raise ValueError("the data set 'generated_geneval' is made here: it has neither a path nor a revision.")
    return geneval_benchmark() if split == "test" else generate_geneval_prompts(GENERATED)


# ---- Where the files come from ----


def _check_split(name: str, split: str) -> None:
    splits = tuple(PROMPT_SETS[name].splits)
    if split not in splits:
        raise UnknownSplitError(name, split, splits)


def _flow_grpo_prompts(name: str, file: str, path: Source, revision: str | None) -> "Dataset":
    if path is not None:
        return read_prompts(_local_file(name, f"dataset/{file}", path))
    revision = revision or FLOW_GRPO_REVISION

    kept = Path(constants.HF_HOME, "trl_flow", "prompts", FLOW_GRPO, revision, file)
    # What a commit holds never changes, so that nobody need be asked about a file that is there
    if not (re.fullmatch(r"[0-9a-f]{40}", revision) and kept.is_file()):
        get = partial(_download, f"{GITHUB}/{FLOW_GRPO}/{revision}/dataset/{file}", kept)
        _fetched(name, f"github.com/{FLOW_GRPO}", f"dataset/{file}", get)
    return read_prompts(kept)


def _download(url: str, path: Path) -> None:
    """Saves what is at `url`, by the Hub's client: it knows of proxies, certificates and offline mode."""
    response = get_session().get(url, follow_redirects=True, timeout=60)
    response.raise_for_status()
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that no other process has, until it is complete
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    temporary.write_bytes(response.content)
    os.replace(temporary, path)


def _hub_file(name: str, repo: str, file: str, path: Source, revision: str | None) -> Path:
    if path is not None:
        return _local_file(name, file, path)
    get = partial(hf_hub_download, repo, file, repo_type="dataset", revision=revision)
    return Path(_fetched(name, f"huggingface.co/datasets/{repo}", file, get))


def _local_file(name: str, file: str, path: str | os.PathLike) -> Path:
    """`path` itself, or what lies in it as in the repository or next to each other."""
    candidates = [Path(path), Path(path, file), Path(path, Path(file).name)]
    if found := next(filter(Path.is_file, candidates), None):
        return found
    raise ValueError(
        f"the data set {name!r} cannot be read: {os.fspath(path)!r} is neither a file nor a folder with {file} or "
        f"{Path(file).name}."
    )


def _fetched(name: str, source: str, file: str, get: Callable[[], Any]) -> Any:
    try:
        return get()
    # The libraries raise errors of many kinds; all of them mean that it is not here
    except Exception as error:
        cause = str(error).rstrip(".") or type(error).__name__
        raise ValueError(
            f"the data set {name!r} cannot be fetched from {source}: {cause}. Without network get {file} from "
            f"there by other means, and give the file or its folder: path=... in Python, {name}:PATH on the command "
            "line."
        ) from error


# The names under which `load_prompts` and the command line have them
PROMPT_SETS: dict[str, PromptSet] = {
    "geneval": PromptSet(
        source="github.com/yifan123/flow_grpo, dataset/geneval",
        license="MIT (GenEval's and Flow-GRPO's repositories)",
        paper="https://arxiv.org/abs/2310.11513",
        splits={"train": "50,000 (33,199 different)", "test": "2,212 (553 different)"},
        columns=("prompt", "tag", "include", "exclude"),
        rewards="GenEval",
        load=load_geneval,
    ),
    "generated_geneval": PromptSet(
        source="made here, nothing is downloaded (generate_geneval_prompts)",
        license="Apache-2.0 (this package)",
        paper="https://arxiv.org/abs/2310.11513",
        splits={"train": "50,000 (none of GenEval's own)", "test": "553 (GenEval's own)"},
        columns=("prompt", "tag", "include", "exclude"),
        rewards="GenEval",
        load=_load_generated_geneval,
    ),
    "ocr": PromptSet(
        source="github.com/yifan123/flow_grpo, dataset/ocr",
        license="MIT (Flow-GRPO's repository)",
        paper="https://arxiv.org/abs/2505.05470",
        splits={"train": "about 20,000", "test": "about 1,000"},
        columns=("prompt", "text"),
        rewards="OCR",
        load=load_ocr,
    ),
    **{
        name: PromptSet(
            source=f"github.com/yifan123/flow_grpo, dataset/{name}",
            license="MIT (Flow-GRPO's repository and Pick-a-Pic)",
            paper="https://arxiv.org/abs/2305.01569",
            splits=splits,
            columns=("prompt",),
            rewards="PickScore and others of preference or quality",
            load=partial(load_pickscore, sfw=name == "pickscore_sfw"),
        )
        for name, splits in {
            "pickscore": {"train": "about 25,000", "test": "about 2,000"},
            "pickscore_sfw": {"train": "those of pickscore that are safe for work", "test": "the same"},
        }.items()
    },
    "hpdv2": PromptSet(
        source="huggingface.co/datasets/ymhao/HPDv2",
        license="Apache-2.0",
        paper="https://arxiv.org/abs/2306.09341",
        splits={"train": "about 100,000", "test": "400", "benchmark": "3,200"},
        columns=("prompt", "style (benchmark)"),
        rewards="HPSv2 and others of preference or quality",
        load=load_hpdv2,
    ),
    "drawbench": PromptSet(
        source="huggingface.co/datasets/sayakpaul/drawbench",
        license="not stated by Imagen's authors; Apache-2.0 on the copy",
        paper="https://arxiv.org/abs/2205.11487",
        splits={"test": "200"},
        columns=("prompt", "category"),
        rewards="evaluation by any of preference or quality",
        load=load_drawbench,
    ),
    **{
        _unigenbench_name(language, long): PromptSet(
            source="huggingface.co/datasets/CodeGoat24/UniGenBench",
            license="MIT",
            paper="https://arxiv.org/abs/2510.18701",
            splits={**({} if long or language != "en" else {"train": "several thousand"}), "test": "600"},
            columns=("prompt", "theme", "subtheme", "dimensions", "testpoints", "testpoint_descriptions"),
            rewards="vision-language judges",
            load=partial(load_unigenbench, language=language, long=long),
        )
        for language in ("en", "zh")
        for long in (False, True)
    },
}
