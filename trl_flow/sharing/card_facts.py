"""What a model card tells of a run besides its settings: scores, prompts, and the license of the base model."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, hf_hub_download, metadata_load

from trl_flow.evaluation.run_log import is_number
from trl_flow.shapes.bundled import is_bundled
from trl_flow.sharing.weights import hub_model_id


if TYPE_CHECKING:
    from datasets import Dataset

Table = list[list[str]]
_REWARD = re.compile(r"(eval_(?:(.+)_)?)reward")
# As their cards say, for where these cannot be read
_LICENSES = json.loads(Path(__file__).with_name("licenses.json").read_text(encoding="utf-8"))
_Z = 1.96  # half of a normal distribution's 95% interval, in standard errors


def evaluation_scores(log_history: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
    """The base model's scores (those of update 0) beside the latest evaluation's, from a run's logs: by the evaluation
    set's name (`""` where there is but one) the rows of a table, its head first. Empty without an evaluation."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for log in log_history:
        for match in filter(None, map(_REWARD.fullmatch, log)):
            found.setdefault((match[1], match[2] or ""), []).append(log)
    return {name: _table(prefix, logs) for (prefix, name), logs in found.items() if logs[-1].get("step", 0) > 0}


def _table(prefix: str, logs: Sequence[Mapping[str, Any]]) -> Table:
    base, last = (logs[0] if logs[0].get("step") == 0 else {}), logs[-1]
    own = {key.removeprefix(prefix) for key in last if key.startswith(prefix)}
    rewards = sorted(key for key in own if re.fullmatch(r"rewards/.+/mean", key))
    gold = sorted(key for key in own if re.fullmatch(r"gold/.+", key) and not key.startswith("gold/average"))
    named = {"reward": "reward (optimized)"} | ({} if len(rewards) < 2 else {key: key[8:-5] for key in rewards})
    named |= {key: f"{key[5:]} (gold, not optimized)" for key in gold}
    named |= {"gold/average": "gold average, relative to the base model", "diversity": "diversity within a prompt"}
    rows = [["score", "base model", f"trained (update {last['step']})"]]
    for key, title in named.items():
        cells = [_number(log.get(prefix + key), log.get(f"{prefix}{key}_std_err")) for log in (base, last)]
        rows += [[title, *cells]] if key in own else []
    return rows


def _number(value: float | None, error: float | None) -> str:
    if not is_number(value):  # a mean over nothing
        return ""
    return f"{value:.4g}" + (f" ± {_Z * error:.2g}" if error and is_number(error) else "")


def evaluation_results(
    log_history: Sequence[Mapping[str, Any]], *, task: str, dataset: str | None
) -> list[EvalResult]:
    """The scores of the latest evaluations for the card's metadata, from which the Hub makes its table: optimized
    rewards and gold scores, the gold average with its 95% interval. `dataset` is what the prompts were loaded from."""
    latest: dict[tuple[str, str], Mapping[str, Any]] = {}
    for log in log_history:
        latest |= {(match[1], match[2] or ""): log for match in filter(None, map(_REWARD.fullmatch, log))}
    results = []
    for (prefix, name), log in latest.items():
        if log.get("step", 0) == 0:
            continue
        about = {"task_type": task, "dataset_type": dataset or "prompts"}
        about["dataset_name"] = " ".join(filter(None, [dataset or "evaluation prompts", name]))
        metrics = {f"{prefix}reward": ("reward", "reward (optimized)")}
        for key in log:
            if key.startswith(f"{prefix}gold/") and not key.startswith(f"{prefix}gold/average"):
                score = key.removeprefix(f"{prefix}gold/")
                metrics[key] = ("gold", f"{score} (not optimized)")
        average, error = log.get(f"{prefix}gold/average"), log.get(f"{prefix}gold/average_std_err")
        interval = ""
        if is_number(average) and is_number(error) and error:
            interval = f", 95% interval {average - _Z * error:.4g} to {average + _Z * error:.4g}"
        metrics[f"{prefix}gold/average"] = ("gold_average", f"gold average, relative to the base model{interval}")
        for key, (kind, title) in metrics.items():
            if is_number(log.get(key)):  # the Hub takes no NaN
                value = float(f"{log[key]:.6g}")
                results.append(EvalResult(**about, metric_type=kind, metric_name=title, metric_value=value))
    return results


def training_rewards(log_history: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """The first and the last logged mean of the optimized reward."""
    rewards = [log["reward"] for log in log_history if is_number(log.get("reward"))]
    return (rewards[0], rewards[-1]) if rewards else None


def name_of(dataset: "Dataset | None") -> str | None:
    """What a data set was loaded from, if it says so: a hub id, a name or a file, without the folders before it."""
    info = getattr(dataset, "info", None)
    # `load_dataset("json", ...)` calls all files "json"
    if info is None or not info.dataset_name or info.dataset_name == info.builder_name:
        return None
    return hub_model_id(info.dataset_name) or Path(info.dataset_name).name


def license_of(base_model: str | os.PathLike | None) -> dict[str, str]:
    """`license`, and of another one than the Hub knows `license_name` and `license_link`, as the card of the base
    model has them. Where it cannot be read, those of well-known models are known; else it is empty."""
    if is_bundled(base_model):
        return {"license": "apache-2.0"}
    repo = hub_model_id(base_model)
    try:
        path = Path(base_model or "", "README.md") if repo is None else hf_hub_download(repo, "README.md")
        data = metadata_load(path) or {}
    except Exception:  # whatever is the matter with somebody else's card, or with the network
        data = _LICENSES.get(repo or "", {})
    names = ("license", "license_name", "license_link")
    found = {name: data[name] for name in names if isinstance(data.get(name), str)}
    if "://" not in found.get("license_link", "://"):
        link = found.pop("license_link")
        found |= {} if repo is None else {"license_link": f"https://huggingface.co/{repo}/blob/main/{link}"}
    return found if "license" in found else {}
