"""The main tables of the papers, as `trl-flow evaluate --table` makes them: prompt sets, rewards and columns."""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline

from trl_flow.evaluation.adapters import parse_adapters
from trl_flow.evaluation.evaluate import REPORT, RESULTS, Comparison
from trl_flow.evaluation.grids import evenly
from trl_flow.evaluation.outputs import write_json
from trl_flow.prompts import load_prompts
from trl_flow.rewards.base import ModelReward
from trl_flow.rewards.checks import reward_names
from trl_flow.rewards.judge import Question
from trl_flow.rewards.named import named_reward


@dataclass(frozen=True)
class PaperTable:
    """
    What a paper's main table is made of.

    `sets` are the prompt sets with the rewards that score each. A reward is a proxy or, if in `gold`, a gold reward.
    `columns` are heading, prompt set and reward. The last heading of `average` is the mean of the gold rewards over
    the base model's, on that prompt set. `by_category` tables are title, prompt set, reward and category instead.
    """

    title: str
    sets: Mapping[str, tuple[str, ...]]
    gold: tuple[str, ...] = ()
    columns: tuple[tuple[str, str, str], ...] = ()
    average: str | None = None
    by_category: tuple[tuple[str, str, str, str], ...] = ()
    num_images_per_prompt: int = 1
    note: str = ""

    @property
    def rewards(self) -> list[str]:
        """All, each once, the proxies first."""
        return sorted(dict.fromkeys(r for names in self.sets.values() for r in names), key=self.gold.__contains__)


TABLES = {
    "guard": PaperTable(
        "GRPO-Guard, Table 1",
        sets={
            "geneval": ("geneval_correct",),
            "pickscore": ("pickscore", "hpsv2", "imagereward", "unifiedreward"),
            "ocr": ("ocr",),
        },
        gold=("hpsv2", "imagereward", "unifiedreward"),
        columns=(
            ("GenEval", "geneval", "geneval_correct"),
            ("PickScore", "pickscore", "pickscore"),
            ("Text Render", "ocr", "ocr"),
            ("HPSv2", "pickscore", "hpsv2"),
            ("ImR", "pickscore", "imagereward"),
            ("UniR", "pickscore", "unifiedreward"),
        ),
        average="pickscore",
        note="Average: HPSv2, ImageReward and UnifiedReward, all on PickScore's prompts, each divided by the base "
        "model's mean.",
    ),
    "vgpo": PaperTable(
        "VGPO, Table 1",
        sets={
            "geneval": ("geneval_correct",),
            "ocr": ("ocr",),
            "pickscore": ("pickscore",),
            "drawbench": ("aesthetic", "deqa", "imagereward", "pickscore", "unifiedreward"),
        },
        gold=("aesthetic", "deqa", "imagereward", "unifiedreward"),
        columns=(
            ("GenEval", "geneval", "geneval_correct"),
            ("OCR", "ocr", "ocr"),
            ("PickScore", "pickscore", "pickscore"),
            ("Aesthetic on DrawBench", "drawbench", "aesthetic"),
            ("DeQA on DrawBench", "drawbench", "deqa"),
            ("ImgRwd on DrawBench", "drawbench", "imagereward"),
            ("PickScore on DrawBench", "drawbench", "pickscore"),
            ("UniRwd on DrawBench", "drawbench", "unifiedreward"),
        ),
        note="GenEval, OCR and PickScore without further words are on their own prompts.",
    ),
    "slas": PaperTable(
        "SLAS, Tables 1 to 3",
        sets={
            "generated_geneval": ("geneval_correct",),
            "unigenbench": ("unigenbench",),
            "unigenbench_long": ("unigenbench",),
        },
        gold=("geneval_correct", "unigenbench"),
        by_category=(
            ("SLAS, Table 1: GenEval", "generated_geneval", "geneval_correct", "task"),
            ("SLAS, Table 2: UniGenBench++, short prompts", "unigenbench", "unigenbench", "dimension"),
            ("SLAS, Table 2: UniGenBench++, long prompts", "unigenbench_long", "unigenbench", "dimension"),
            ("SLAS, Table 3: UniGenBench++, short prompts", "unigenbench", "unigenbench", "test point"),
            ("SLAS, Table 3: UniGenBench++, long prompts", "unigenbench_long", "unigenbench", "test point"),
        ),
        # As both benchmarks do
        num_images_per_prompt=4,
        note="Overall is the mean of the categories.",
    ),
}
# What is served for each judge
_JUDGES = {
    "deqa": "zhiyuanyou/DeQA-Score-Mix3",
    "unifiedreward": "CodeGoat24/UnifiedReward-qwen-7b",
    "unigenbench": "CodeGoat24/UniGenBench-EvalModel-qwen-72b-v1",
}
_HINT = (
    "A judge's address is given by --table_rewards NAME@http://host:8000/v1 (with #MODEL behind it where several are "
    "served), a reward on another machine by NAME=http://host:8000#NAME, a copy of a prompt set by --table_prompts "
    "SET:PATH."
)


class MissingError(ValueError):
    """What a paper's table needs and is not here, all of it."""


def table_inputs(
    name: str,
    model: str,
    adapters: Sequence[str],
    *,
    prompts: Sequence[str] = (),
    rewards: Sequence[str] = (),
    limit: int | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """
    What `evaluate_models` is given for a table, and what each of the table's rewards is called there.

    Nothing is drawn. Prompts are fetched, and each reward's model is loaded and freed again or its server asked.

    Args:
        name: a key of `TABLES`.
        prompts: copies of prompt sets, `set:path`.
        rewards: others in place of the table's: `name=reward`, or `name@http://...` for a judge, as in
            [`~trl_flow.rewards.named.named_reward`].
        limit: only as many prompts of each set, spread evenly over it.

    Raises:
        MissingError: with everything that is missing, and how to get it.
        ValueError: if `prompts` or `rewards` name what the table does not have.
    """
    table = TABLES[name]
    copies = _replacements("--table_prompts", prompts, list(table.sets), r":")
    others = _replacements("--table_rewards", rewards, table.rewards, r"=|@")
    missing: list[str] = []

    def found(what: str, get: Callable, *arguments: Any) -> Any:
        try:
            return get(*arguments)
        # A reward's library, weights and server fail in ways of their own, and what they say names them
        except Exception as error:
            text = str(error).strip() or type(error).__name__
            missing.append(f"{what}: {text.removeprefix(what.split()[-1] + ': ')}")

    found("the model", DiffusionPipeline.load_config, model)
    found("the adapters", parse_adapters, adapters)
    sets = {s: found(f"the prompts {s}", load_prompts, copies.get(s, s), "test") for s in table.sets}
    funcs = {r: found(f"the reward {r}", _ready, r, others.get(r)) for r in table.rewards}
    asked = [reward for reward in table.rewards if reward in _JUDGES and reward not in others and funcs[reward]]
    if len(asked) > 1:
        missing.append(f"the judges {' and '.join(asked)} are two models, but OPENAI_BASE_URL is one address")
    if missing:
        lines = "\n".join(f"* {text}" for text in missing)
        raise MissingError(f"{table.title} cannot be made yet. Nothing was drawn. Missing are:\n{lines}\n{_HINT}")
    names = dict(zip(funcs, reward_names(funcs.values()), strict=True))
    chosen = {
        "prompts": {n: d.select(evenly(len(d), limit)) if limit else d for n, d in sets.items()},
        "proxy": [func for reward, func in funcs.items() if reward not in table.gold],
        "gold": [func for reward, func in funcs.items() if reward in table.gold],
        "rewards_by_set": {set_name: [names[r] for r in own] for set_name, own in table.sets.items()},
    }
    return chosen, names


def with_table(comparison: Comparison, name: str, rewards: Mapping[str, str]) -> Comparison:
    """The comparison with the paper's table at the head of its report and as `paper_tables` in its results, on disk
    too. `rewards` says what each of the table's rewards is called in the results."""
    results = comparison.results | {"paper_tables": paper_tables(comparison.results, TABLES[name], rewards)}
    comparison = Comparison(comparison.folder, results, comparison.scores)
    write_json(comparison.folder / RESULTS, results)
    (comparison.folder / REPORT).write_text(comparison.markdown, encoding="utf-8")
    return comparison


def paper_tables(results: Mapping[str, Any], table: PaperTable, rewards: Mapping[str, str]) -> list[dict[str, Any]]:
    """From `results.json`'s content: dicts with `title`, `columns`, `rows` (by model and column) and `note`."""
    sets = results["sets"]
    tables = []
    if table.columns:
        rows = {
            model: {head: sets[s]["means"][model][rewards[r]]["mean"] for head, s, r in table.columns}
            for model in results["models"]
        }
        for model, row in rows.items() if table.average else ():
            gold = sets[table.average]["gold"]
            row["Average"] = gold[model]["average"] if gold else None
        columns = list(next(iter(rows.values())))
        tables.append({"title": table.title, "columns": columns, "rows": rows, "note": table.note, "format": ".4g"})
    for title, set_name, reward, by in table.by_category:
        for found in sets[set_name]["categories"]:
            if (found["reward"], found["by"]) == (rewards[reward], by):
                tables.append({**found, "title": title, "note": table.note})
    return tables


def _replacements(option: str, given: Sequence[str], known: Sequence[str], separators: str) -> dict[str, str]:
    """By name what is given in place of what the table has; `NAME@...` is itself a reward, `NAME:...` a prompt set."""
    found: dict[str, str] = {}
    for text in given:
        match = re.fullmatch(rf"([\w.]+)({separators})(.+)", text)
        if match is None or match[1] not in known or match[1] in found:
            shape = "SET:PATH" if separators == ":" else "NAME=REWARD or NAME@http://host:8000/v1"
            raise ValueError(f"{option} {text}: give {shape}, each once, for {', '.join(known)}.")
        found[match[1]] = match[3] if match[2] == "=" else text
    return found


def _ready(name: str, other: str | None) -> Any:
    """The reward, known to work as far as can be known without an image."""
    try:
        func = named_reward(other or name)
    except ValueError as error:
        served = f" Its model: vllm serve {_JUDGES[name]}" if name in _JUDGES else ""
        raise ValueError(f"{error}{served}") from error
    if isinstance(func, Question):
        asyncio.run(func.chat.check())
    if isinstance(func, ModelReward):
        func.load()
        func.close()
    return func
