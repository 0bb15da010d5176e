"""The main tables of the papers, as `trl-flow evaluate --table` makes them: prompt sets, rewards and columns."""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusers import AutoencoderKL, DiffusionPipeline

from trl_flow.evaluation.adapters import parse_adapters
from trl_flow.evaluation.evaluate import REPORT, RESULTS, Comparison
from trl_flow.evaluation.grids import evenly
from trl_flow.evaluation.outputs import write_json
from trl_flow.prompts import load_prompts
from trl_flow.rewards.base import ModelReward
from trl_flow.rewards.checks import reward_names
from trl_flow.rewards.judge import Question
from trl_flow.rewards.named import named_reward
from trl_flow.rewards.unigenbench import UniGenBenchReward
from trl_flow.shapes.bundled import is_bundled


@dataclass(frozen=True)
class PaperTable:
    """
    What a paper's main table is made of.

    `sets` are the prompt sets with the rewards that score each. A reward is a proxy or, if in `gold`, a gold reward.
    `columns` are heading, prompt set and reward. The last heading of `average` is the mean of the gold rewards over
    the base model's, on that prompt set. `by_category` tables are title, prompt set, reward and category instead.
    `sampling` are drawing options by pipeline class, those of the recipes in `examples/recipes`.
    """

    title: str
    sets: Mapping[str, tuple[str, ...]]
    gold: tuple[str, ...] = ()
    columns: tuple[tuple[str, str, str], ...] = ()
    average: str | None = None
    by_category: tuple[tuple[str, str, str, str], ...] = ()
    num_images_per_prompt: int = 1
    sampling: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    note: str = ""

    @property
    def rewards(self) -> list[str]:
        """All, each once, the proxies first."""
        return sorted(dict.fromkeys(r for names in self.sets.values() for r in names), key=self.gold.__contains__)


_FLUX = {"num_inference_steps": 28, "guidance_scale": 3.5}
_SD35 = {"num_inference_steps": 40, "guidance_scale": 4.5, "max_sequence_length": 128}
_FLOW_GRPO = {
    "StableDiffusion3Pipeline": {"height": 512, "width": 512, **_SD35},
    "FluxPipeline": {"height": 512, "width": 512, **_FLUX},
}
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
        sampling=_FLOW_GRPO,
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
        sampling=_FLOW_GRPO,
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
        sampling={
            "FluxPipeline": {"height": 720, "width": 720, **_FLUX},
            "StableDiffusionPipeline": {"height": 512, "width": 512, "num_inference_steps": 50, "guidance_scale": 5.0},
        },
        note="Overall is the mean of GenEval's six tasks, and of UniGenBench++'s ten dimensions in its Table 3 too.",
    ),
}
# What is served for each judge
_JUDGES = {
    "deqa": "zhiyuanyou/DeQA-Score-Mix3",
    "unifiedreward": "CodeGoat24/UnifiedReward-qwen-7b",
    "unigenbench": "CodeGoat24/UniGenBench-EvalModel-qwen-72b-v1",
}
# By what is missing
_HINTS = {
    "judge": "A judge's address is given by --table_rewards NAME@http://host:8000/v1, with #MODEL behind it where "
    "several are served.",
    "reward": "A reward on another machine is given by --table_rewards NAME=http://host:8000#NAME.",
    "prompts": "A copy of a prompt set is given by --table_prompts SET:PATH.",
}


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
) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """
    What `evaluate_models` is given for a table, what each of its rewards is called there, and its drawing options.

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

    options = found("the model", _sampling, table, model)
    found("the adapters", parse_adapters, adapters)
    sets = {s: found(f"the prompts {s}", load_prompts, copies.get(s, s), "test") for s in table.sets}
    ready = {r: found(f"the reward {r}", _ready, r, others.get(r)) or (None, None) for r in table.rewards}
    asked: dict[Any, list[str]] = {}
    for reward, (_, server) in ready.items():
        asked.setdefault(server, []).append(reward)
    for server, judges in asked.items():
        if server is not None and len(judges) > 1:
            url, served = ("OPENAI_BASE_URL" if set(judges).isdisjoint(others) else server[0]), server[1]
            missing.append(f"the judges {' and '.join(judges)} are two models, but {url} is one address, of {served}")
    if missing:
        lines = "\n".join(f"* {text}" for text in missing)
        # "the prompts ocr: ...", "the judges deqa and ..."
        kinds = {"judge" if set(_JUDGES) & set(re.split("[ :]", text)[2:3]) else text.split()[1] for text in missing}
        hint = " ".join(hint for kind, hint in _HINTS.items() if kind in kinds)
        raise MissingError(f"{table.title} cannot be made yet. Nothing was drawn. Missing are:\n{lines}\n{hint}")
    funcs = {reward: func for reward, (func, _) in ready.items()}
    names = dict(zip(funcs, reward_names(funcs.values()), strict=True))
    chosen = {
        "prompts": {n: d.select(evenly(len(d), limit)) if limit else d for n, d in sets.items()},
        "proxy": [func for reward, func in funcs.items() if reward not in table.gold],
        "gold": [func for reward, func in funcs.items() if reward in table.gold],
        "rewards_by_set": {set_name: [names[r] for r in own] for set_name, own in table.sets.items()},
        # Which of the proxies a model was trained on is not known
        "brackets": False,
    }
    return chosen, names, options | {"num_images_per_prompt": table.num_images_per_prompt}


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
        all_found = sets[set_name]["categories"]
        found = next((t for t in all_found if (t["reward"], t["by"]) == (rewards[reward], by)), None)
        note = f"There is no such table: the scores by {rewards[reward]} on {set_name} have no {by}."
        empty = {"reward": rewards[reward], "by": by, "columns": [], "counts": {}, "rows": {}}
        if found is not None:
            note = " ".join(filter(None, (table.note, found["note"])))
        tables.append({**(found or empty), "title": title, "note": note})
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


def _sampling(table: PaperTable, model: str) -> dict[str, Any]:
    """How the table's images are drawn by a model, of which no weights are read."""
    if is_bundled(model):
        return {}  # it has its own
    pipeline = DiffusionPipeline.load_config(model)
    options = dict(table.sampling.get(pipeline["_class_name"], {}))
    if options:
        parts = ("vae", "unet" if "unet" in pipeline else "transformer")
        vae, trained = (AutoencoderKL.load_config(model, subfolder=part) for part in parts)
        # FLUX.1's pipelines have 128 of their own
        own = trained.get("sample_size", 128) * 2 ** (len(vae["block_out_channels"]) - 1)
        if own < options["height"]:  # a model of smaller images, which draws its own
            del options["height"], options["width"]
        if trained.get("guidance_embeds") is False:  # schnell, which is drawn in a few steps without guidance
            del options["num_inference_steps"], options["guidance_scale"]
    return options


def _ready(name: str, other: str | None) -> tuple[Any, tuple[str, str] | None]:
    """The reward, known to work as far as can be known without an image, and the address and model that a judge
    asks."""
    try:
        func = named_reward(other or name)
    except ValueError as error:
        served = f" Its model: vllm serve {_JUDGES[name]}" if name in _JUDGES and other is None else ""
        raise ValueError(f"{error}{served}") from error
    if name == "unigenbench" and not isinstance(func, UniGenBenchReward):
        raise ValueError(
            f"{other} gives one score for each image, but the tables are made of one for each test point, which only "
            f"the judge itself gives: --table_rewards {name}@http://host:8000/v1, vllm serve {_JUDGES[name]}"
        )
    server = None
    if isinstance(func, Question):
        server = (func.chat.base_url.rstrip("/"), asyncio.run(func.chat.check()))
    if isinstance(func, ModelReward):
        func.load()
        func.close()
    return func, server
