"""One page on a run, running or finished: where it stands, its curves, its latest images and its latest values."""

import base64
import html
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from trl_flow.evaluation.outputs import is_locked
from trl_flow.evaluation.run_log import PARTS, PROGRESS_NAME, LogHistory, is_number, read_log_history
from trl_flow.evaluation.svg import Series, line_chart


_Z = 1.96  # half of a normal distribution's 95% interval, in standard errors
# Of a run elsewhere, whose lock is not seen: silent for so long, or so many times as long as its updates take
_SILENCE, _SILENT_UPDATES = 600.0, 10
_REFRESH = 10


@dataclass(frozen=True)
class Standing:
    """Where a run is: `state` is `running`, `finished`, `stopped` (before its end) or `unknown`; `text` says it."""

    state: str
    text: str


def watch_page(folder: Path, *, now: float | None = None) -> tuple[str, Standing]:
    """
    The page of the run in `folder`, its `output_dir`, and where the run stands; `now` is the time, in seconds. Files
    are read while they are written: what is half there is left out.

    Raises:
        ValueError: if `folder` holds no run.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Give the output_dir of a training run.")
    progress, logs = _progress(folder), []
    if not (progress and not any(folder.glob("*.jsonl"))):  # a run that has just begun has logged nothing
        logs = read_log_history(folder)
    standing = _standing(folder, progress, logs, time.time() if now is None else now)
    refresh = f'<meta http-equiv="refresh" content="{_REFRESH}">' if standing.state == "running" else ""
    model = str(progress.get("model") or "")
    model = Path(model).name if Path(model).is_absolute() else model
    about = [progress.get("config"), model, ", ".join(map(str, progress.get("rewards") or []))]
    content = {
        "__REFRESH__": refresh,
        "__NAME__": html.escape(folder.resolve().name),
        "__STATE__": standing.state,
        "__STANDING__": html.escape(standing.text),
        "__ABOUT__": html.escape(" · ".join(str(each) for each in about if each)),
        "__TIME__": _time_by_part(logs),
        "__CURVES__": "".join(_charts(logs)) or "<p>Nothing has been logged yet.</p>",
        "__IMAGES__": "".join(_images(folder)),
        "__VALUES__": _values(logs),
    }
    template = (files("trl_flow.evaluation") / "web" / "watch.html").read_text(encoding="utf-8")
    # In one pass: what stands in the run may look like a placeholder
    return re.sub("|".join(content), lambda match: content[match[0]], template), standing


def _progress(folder: Path) -> dict[str, Any]:
    """What the run says of itself; nothing if it does not, or is writing it."""
    try:
        content = json.loads((folder / PROGRESS_NAME).read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def _standing(folder: Path, progress: Mapping[str, Any], logs: LogHistory, now: float) -> Standing:
    update = max([progress.get("update") or 0, *(log["step"] for log in logs if is_number(log["step"]))])
    total = progress.get("max_steps")
    place = f"update {update:,} of {total:,}" if total else f"update {update:,}"
    if progress.get("finished") or (not progress and any("train_runtime" in log for log in logs[-1:])):
        early = bool(total) and update < total
        return Standing("finished", f"finished{' early' if early else ''}: {place}")
    if "written_at" not in progress:
        return Standing("unknown", f"{place}; whether it is running is not known: it says nothing of itself")
    since = max(now - progress["written_at"], 0.0)
    done = update - progress.get("began_at_update", 0)
    each = (progress["written_at"] - progress["began_at"]) / done if done > 0 else 0.0
    locked = is_locked(folder)
    if locked is False:
        return Standing("stopped", f"stopped at {place}, {_ago(since)}; it was interrupted, or failed")
    if locked is None and since > max(_SILENCE, _SILENT_UPDATES * each):
        return Standing("stopped", f"stalled at {place}: nothing has been written for {_minutes(since)}")
    left = f", about {_minutes(max(each * (total - update) - since, 0.0))} left" if each and total else ""
    return Standing("running", f"running: {place}{left}; last heard of {_ago(since)}")


def _minutes(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} seconds"
    if minutes < 100:
        return f"{minutes} minute{'' if minutes == 1 else 's'}"
    return f"{minutes / 60:.1f} hours"


def _ago(seconds: float) -> str:
    return f"{_minutes(seconds)} ago"


def _series(logs: LogHistory, key: str, name: str, **options: Any) -> Series:
    entries = [log for log in logs if is_number(log.get(key)) and is_number(log["step"])]
    errors = options.pop("errors", None)
    if errors is not None:
        found = [log.get(errors) for log in entries]
        options["errors"] = [_Z * error if is_number(error) else 0.0 for error in found]
    return Series(name, [log["step"] for log in entries], [log[key] for log in entries], **options)


def _charts(logs: LogHistory) -> list[str]:
    keys = list(dict.fromkeys(key for log in logs for key in log))
    sets = [match[1] or "" for match in (re.fullmatch(r"eval_(?:(.+)_)?reward", key) for key in keys) if match]

    def compared(title: str, key: str) -> str:
        found = [_series(logs, key, "training")]
        for name in sets:
            prefix = f"eval_{name}_" if name else "eval_"
            found.append(_series(logs, prefix + key, f"evaluation {name}".strip(), points=True))
        return line_chart(title, found)

    charts = [compared("reward", "reward")]
    functions = dict.fromkeys(m[1] for m in (re.fullmatch(r"(?:eval_.*)?rewards/(.+)/mean", key) for key in keys) if m)
    charts += [compared(name, f"rewards/{name}/mean") for name in (functions if len(functions) > 1 else ())]
    for name in sets:
        prefix = f"eval_{name}_gold/" if name else "eval_gold/"
        gold = [key for key in keys if key.startswith(prefix) and not key.startswith(f"{prefix}average")]
        average = _series(logs, f"{prefix}average", "average", errors=f"{prefix}average_std_err", points=True)
        others = [_series(logs, key, key.removeprefix(prefix), points=True) for key in gold]
        title = f"gold {name} (never optimized; base model: 1)".replace("  ", " ")
        charts.append(line_chart(title, [average] if len(gold) < 2 else [average, *others], baseline=1.0))
    named = {"kl": "KL to the initial model", "grad_norm": "gradient norm", "learning_rate": "learning rate"}
    clipped = {"clip_ratio/low_mean": "below", "clip_ratio/high_mean": "above"}
    charts.append(line_chart("share that is clipped", [_series(logs, key, name) for key, name in clipped.items()]))
    charts += [line_chart(title, [_series(logs, key, key)]) for key, title in named.items()]
    spread = {"reward_std": "spread of the rewards", "diversity": "diversity within a prompt"}
    charts += [compared(title, key) for key, title in spread.items()]
    charts.append(line_chart("seconds an update", [_series(logs, "step_time", "step_time")]))
    return [chart for chart in charts if chart]


def _time_by_part(logs: LogHistory) -> str:
    """One bar: what share of the latest updates each part took."""
    latest = [log for log in logs if is_number(log.get("step_time"))][-10:]
    seconds = {part: sum(log.get(f"time/{part}") or 0.0 for log in latest) / max(len(latest), 1) for part in PARTS}
    total = sum(seconds.values())
    if not total:
        return ""
    shares = {part: value for part, value in seconds.items() if value > 0.005 * total}
    bar = "".join(
        f'<span class="c{PARTS.index(part)}" style="flex-grow:{value / total:.4f}"></span>'
        for part, value in shares.items()
    )
    legend = "".join(
        f'<span><i class="c{PARTS.index(part)}"></i>{part} <b>{value:.3g} s</b></span>'
        for part, value in shares.items()
    )
    logs = "log" if len(latest) == 1 else f"{len(latest)} logs"
    head = f"An update, with what comes between, takes {total:.3g} s (mean of the latest {logs})"
    return f'<figure class="time"><figcaption>{head}</figcaption><div class="bar">{bar}</div><p>{legend}</p></figure>'


def _images(folder: Path) -> list[str]:
    """The latest grid of training and of each evaluation set that is whole."""
    found: dict[str, list[Path]] = {}
    for path in folder.glob("images/*.png"):
        kind, _, update = path.stem.rpartition("-")
        if update.isdecimal():
            found.setdefault(kind, []).append(path)
    shown = []
    for kind, paths in sorted(found.items(), reverse=True):
        for path in sorted(paths, reverse=True)[:3]:
            try:
                content = path.read_bytes()
                with Image.open(path) as image:
                    size = image.size
                    image.load()  # the newest may be half written
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                continue
            what = "Samples of training" if kind == "step" else f"Evaluation {kind[5:]}".strip()
            source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
            head = html.escape(f"{what}, update {int(path.stem.rpartition('-')[2]):,}")
            drawing = f'<img src="{source}" width="{size[0]}" height="{size[1]}" alt="{head}">'
            shown.append(f"<figure><figcaption>{head}</figcaption>{drawing}</figure>")
            break
    return shown


def _values(logs: LogHistory) -> str:
    """The latest value of everything that was logged, but for single steps, by section."""
    latest: dict[str, tuple[float, float]] = {}
    for log in logs:
        latest |= {key: (value, log["step"]) for key, value in log.items() if is_number(value) and key != "step"}
    sections: dict[str, list[str]] = {}
    for key, (value, step) in sorted(latest.items()):
        if not re.search(r"step_\d+$", key):
            section = key.rpartition("/")[0].split("/")[0] or ("eval" if key.startswith("eval_") else "training")
            row = f"<tr><td>{html.escape(key)}</td><td>{value:.4g}</td><td>{step:g}</td></tr>"
            sections.setdefault(section, []).append(row)
    head = "<thead><tr><th>metric</th><th>latest</th><th>update</th></tr></thead>"
    tables = (f"<table><caption>{html.escape(s)}</caption>{head}{''.join(r)}</table>" for s, r in sections.items())
    return "".join(tables)
