"""One HTML file, with everything in it, to look at two models' images side by side."""

import base64
import hashlib
import html
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from trl_flow.evaluation.grids import evenly
from trl_flow.evaluation.image_folder import ImageFolder
from trl_flow.evaluation.intervals import finite
from trl_flow.evaluation.outputs import whole_file
from trl_flow.evaluation.tables import legend, title
from trl_flow.quiet import shows_bars


# Longest sides to which images are reduced until they fit; below the last, prompts are left out
_SIDES = (1024, 768, 512, 384, 256)
_SAMPLED = 24


def write_page(
    path: str | os.PathLike,
    folder: ImageFolder,
    results: Mapping[str, Any],
    *,
    prompts: Mapping[str, Sequence[str]],
    scores: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]],
    megabytes: float = 50.0,
    progress: bool = False,
) -> None:
    """Writes a page that works offline and asks nothing of any server: style, program, scores and images are in it.

    The images are copied as they are while they fit into about `megabytes`. Else they are WebP copies, reduced as far
    as needed but not below 256 pixels; if that is not enough, prompts are chosen evenly from each set. The page says
    what was done. `results` are as in `results.json`, `prompts` those of each set, and `scores` `(N,)` by set, model
    and reward, NaN where a reward does not apply. `OSError` or `ValueError` if an image is missing or damaged."""
    models, number = list(results["models"]), results["settings"]["num_images_per_prompt"]
    # Base64 writes three bytes in four letters
    shown, side, note = _plan(folder, models, prompts, number, megabytes * 1e6 * 3 / 4)
    indices = {name: [row * number + k for row in rows for k in range(number)] for name, rows in shown.items()}
    wanted = [(name, model, index) for name in shown for model in models for index in indices[name]]
    # Pillow works on several images at once
    with ThreadPoolExecutor() as pool:
        encoded = pool.map(lambda image: _data_uri(folder, *image, side), wanted)
        bar = tqdm(
            encoded, total=len(wanted), desc="writing the page", unit="image", disable=not (progress and shows_bars())
        )
        uris = dict(zip(wanted, bar, strict=True))
    sets = []
    for name, rows in shown.items():
        own = indices[name]
        content = {"name": name, "number": number, "total": len(prompts[name]), "indices": own}
        content["prompts"] = [prompts[name][row] for row in rows]
        content["images"] = {model: [uris[name, model, index] for index in own] for model in models}
        content["scores"] = {
            model: {reward: [finite(values[i]) for i in own] for reward, values in by_reward.items()}
            for model, by_reward in scores[name].items()
        }
        sets.append(content)
    data = {"title": title(results), "legend": legend(results), "note": note, "models": models, "sets": sets}
    data |= {"brackets": results.get("brackets", True)}
    data |= {"rewards": results["proxy"] + results["gold"], "results": [results["sets"][name] for name in shown]}
    template = (files("trl_flow.evaluation") / "web" / "comparison.html").read_text(encoding="utf-8")
    content = with_policy(template, "img-src data:").replace("__DATA__", script_json(data))
    with whole_file(path) as file:
        file.write(content.encode())


def script_json(data: Any) -> str:
    """JSON that can stand in a `<script>`: nothing in it ends the element, or begins a comment."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def with_policy(template: str, *sources: str) -> str:
    """The page (with `__POLICY__`, one `<style>` and one `<script>`) with a policy that lets the browser run its own
    style and script, known by their hashes, and nothing else. `sources` are further directives, as `"img-src data:"`.
    """
    directives = ["default-src 'none'"]
    for name in ("style", "script"):
        (text,) = re.findall(rf"<{name}>(.*?)</{name}>", template, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        directives.append(f"{name}-src 'sha256-{digest}'")
    policy = "; ".join([*directives, *sources, "base-uri 'none'", "form-action 'none'"])
    return template.replace("__POLICY__", html.escape(policy))


def _plan(
    folder: ImageFolder, models: Sequence[str], prompts: Mapping[str, Sequence[str]], number: int, room: float
) -> tuple[dict[str, list[int]], int | None, str]:
    """Which rows of each set are shown, to which side images are reduced (`None`: copied), and a note of it."""
    rows = {name: list(range(len(texts))) for name, texts in prompts.items()}
    all_images = [(n, m, i) for n, texts in prompts.items() for i in range(len(texts) * number) for m in models]
    if sum(folder.image_path(*image).stat().st_size for image in all_images) <= room:
        return rows, None, "The images in this page are those that were drawn, unchanged."
    sampled = [folder.load(*all_images[i]) for i in evenly(len(all_images), _SAMPLED)]
    longest = max(max(image.size) for image in sampled)
    for side in (longest, *(side for side in _SIDES if side < longest)):
        size = len(all_images) * sum(len(_webp(image, side)) for image in sampled) / len(sampled)
        if size <= room:
            break
    note = f"The images in this page are WebP copies of at most {side} pixels; the originals are in images/."
    if size > room:
        rows = {name: evenly(len(all_), max(1, math.floor(len(all_) * room / size))) for name, all_ in rows.items()}
        kept, of = sum(map(len, rows.values())), sum(map(len, prompts.values()))
        note += f" For the size of the page it shows {kept} of {of} prompts, spread evenly; the tables are of all."
    return rows, side, note


def _data_uri(folder: ImageFolder, name: str, model: str, index: int, side: int | None) -> str:
    if side is None:
        kind, content = "png", folder.image_path(name, model, index).read_bytes()
    else:
        kind, content = "webp", _webp(folder.load(name, model, index), side)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _webp(image: Image.Image, side: int) -> bytes:
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=85)
    return buffer.getvalue()
