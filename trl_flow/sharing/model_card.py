"""The model card: `README.md` of a trained model, as the Hub and diffusers' users expect it, and papers to cite."""

import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData

from trl_flow.backbones import BACKBONES, Backbone
from trl_flow.backbones.base import SAMPLING_SETTINGS
from trl_flow.backbones.settings import effective
from trl_flow.evaluation.outputs import versions
from trl_flow.images import TO_RGB_CODE
from trl_flow.lora.files import loading_options
from trl_flow.shapes.bundled import is_bundled
from trl_flow.sharing.card_facts import evaluation_results, evaluation_scores, license_of, training_rewards
from trl_flow.sharing.samples import SamplePair
from trl_flow.sharing.weights import hub_model_id


# Fields of the config that a reader needs to judge or repeat a run; the rest is in training_args.json
_SETTINGS = (
    "component",
    "num_generations",
    *(*SAMPLING_SETTINGS, "eval_num_inference_steps", "eval_guidance_scale"),
    *("sde_type", "noise_level", "train_last_step", "sde_window_size", "sde_window_range", "sde_window_schedule"),
    *("sde_window_interval", "sde_window_stride", "timestep_fraction", "timestep_fraction_per_sample"),
    *("timestep_sampling", "timesteps_per_sample", "timestep_range", "nft_beta", "self_normalized", "beta_old"),
    *("huber_power", "old_decay", "old_decay_rate", "old_decay_start"),
    *("share_initial_noise", "importance_ratio", "timestep_weighting", "ratio_probe"),
    *("epsilon", "epsilon_high", "scale_epsilon", "beta", "scale_rewards"),
    *("multi_objective_aggregation", "advantage_power", "target_kl", "advantage_clip", "dense_rewards"),
    *("value_discount", "value_scale", "reward_weights", "num_iterations", "generation_batch_size"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "optim"),
    *("weight_decay", "max_grad_norm", "use_ema", "bf16", "fp16", "seed"),
)


@dataclass(frozen=True)
class Paper:
    """A paper to cite. Its `tag` on the Hub is its BibTeX key too; `name` is the method's, `arxiv` the number there,
    which begins with year and month; `authors` are full names.

    Example:

    ```pycon
    >>> from trl_flow.sharing import PAPERS, Paper
    >>> paper: Paper = PAPERS["grpo-guard"]
    >>> paper.arxiv, paper.bibtex.splitlines()[0]
    ('2510.22319', '@article{grpo-guard,')
    ```
    """

    tag: str
    name: str
    arxiv: str
    title: str
    authors: list[str]

    @property
    def bibtex(self) -> str:
        return (
            f"@article{{{self.tag},\n    title   = {{{{{self.title}}}}},\n"
            f"    author  = {{{' and '.join(self.authors)}}},\n    year    = {{20{self.arxiv[:2]}}},\n"
            f"    journal = {{arXiv preprint arXiv:{self.arxiv}}},\n}}"
        )


_FILE = Path(__file__).with_name("papers.json")
PAPERS = {tag: Paper(tag, **fields) for tag, fields in json.loads(_FILE.read_text(encoding="utf-8")).items()}
"""The papers that model cards cite, by tag."""


def papers_behind(settings: Mapping[str, object]) -> list[Paper]:
    """The papers whose methods a run used, by its config's fields, of which missing ones count as off: none for an
    algorithm with fields of its own.

    Example:

    ```pycon
    >>> from trl_flow.sharing import papers_behind
    >>> [paper.name for paper in papers_behind({"sde_type": "flow", "importance_ratio": "ratio_norm"})]
    ['Flow-GRPO', 'GRPO-Guard']
    ```
    """
    ratio, weighting = settings.get("importance_ratio"), settings.get("timestep_weighting")
    guards = {"mean_revised", "ratio_norm", "inverse_dt", "beta_over_dt", "inverse_beta_dt"}
    used = {
        "flow-grpo": not {"sde_type", "importance_ratio"}.isdisjoint(settings),
        "dance-grpo": settings.get("sde_type") == "dance",
        "flow-cps": settings.get("sde_type") == "cps",
        "mix-grpo": bool(settings.get("sde_window_size")) and settings.get("sde_window_schedule") == "progressive",
        "tempflow-grpo": weighting == "temp",
        "grpo-guard": not guards.isdisjoint((ratio, weighting)),
        "slas": bool(settings.get("advantage_power")),
        "vgpo": bool(settings.get("dense_rewards")),
        "diffusion-nft": "nft_beta" in settings,
        "awm": "huber_power" in settings,
    }
    return [PAPERS[tag] for tag, is_used in used.items() if is_used]


def training_settings(args: object) -> dict[str, object]:
    """The values of a config that belong into a model card, by field name; fields that it lacks, or that are unset,
    are left out.

    Example:

    ```pycon
    >>> from trl_flow import GuardConfig
    >>> from trl_flow.sharing import training_settings
    >>> settings = training_settings(GuardConfig("run", bf16=False, use_cpu=True))
    >>> settings["importance_ratio"], settings["num_generations"]
    ('ratio_norm', 8)
    ```
    """
    return {name: getattr(args, name) for name in _SETTINGS if getattr(args, name, None) is not None}


def create_model_card(
    folder: str | os.PathLike, *, backbone: Backbone, base_model: str | os.PathLike | None,
    settings: Mapping[str, object], is_lora: bool, repo_id: str | None = None, model_name: str | None = None,
    reward_names: Sequence[str] = (), dataset_name: str | None = None, prompt: str = "a prompt",
    log_history: Sequence[Mapping[str, Any]] = (), tags: Sequence[str] = (), curves: str | os.PathLike | None = None,
    samples: Sequence[tuple[str | os.PathLike, str | None]] = (),
    comparisons: Sequence[SamplePair] = (), eval_dataset_name: str | None = None, recipe: str | None = None,
    loading: Mapping[str, str] | None = None, init_adapter: str | None = None, note: str = "",
) -> Path:  # fmt: skip
    """
    Writes `README.md` to `folder`: front matter for the Hub, how to load the model, its scores beside the base
    model's, rewards' curves and sample images, the training settings, versions and citations. The Hub is asked for the
    base model's license only, which is left out where it cannot be had. Images that do not exist are left out.

    Args:
        folder (`str` or `os.PathLike`): the run's output folder.
        backbone ([`Backbone`]): what was trained.
        base_model (`str` or `os.PathLike`, *optional*): what the pipeline was loaded from. Becomes the card's
            `base_model` if it is a Hub id; of a local folder only the name is shown.
        settings (`Mapping[str, object]`): see `training_settings`; they decide on the papers that are cited, too.
        is_lora (`bool`): whether the folder holds an adapter; otherwise the whole trained module.
        repo_id (`str`, *optional*): where the model is going to be on the Hub; without, code loads the local folder.
        model_name (`str`, *optional*): title; by default the repository's or the folder's name.
        reward_names, tags (`Sequence[str]`): the rewards that were optimized; further tags.
        dataset_name (`str`, *optional*): Hub id or name of the data set of prompts.
        prompt (`str`): of the image that the code draws.
        log_history (`Sequence[Mapping[str, Any]]`): the run's logs, of which the scores are taken.
        curves (`str` or `os.PathLike`, *optional*): plot of the rewards' curves, inside `folder`.
        samples (`Sequence[tuple[str | os.PathLike, str | None]]`): images inside `folder`, each with its prompt, or
            `None` for a grid of several. Those with a prompt also become the Hub's gallery.
        comparisons (`Sequence[SamplePair]`): images inside `folder` that are shown beside those before training, from
            the same seeds. They become the gallery, too.
        eval_dataset_name (`str`, *optional*): Hub id or name of the prompts of the evaluations.
        recipe (`str`, *optional*): YAML with which `trl-flow train --config` repeats the run.
        loading (`Mapping[str, str]`, *optional*): `revision` and `variant` of the base model.
        init_adapter (`str`, *optional*): the adapter that training started from.

        note (`str`): Markdown that a reader has to know of these weights, such as that they are not the best ones.

    Raises:
        ValueError: if an image lies outside `folder`, where the card could not show it.

    Example:

    ```pycon
    >>> from trl_flow.backbones import get_backbone
    >>> from trl_flow.shapes import load_pipeline
    >>> from trl_flow.sharing import create_model_card
    >>> card = create_model_card(
    ...     "run",
    ...     backbone=get_backbone(load_pipeline(), height=64, width=64),
    ...     base_model="stabilityai/stable-diffusion-3.5-medium",
    ...     settings={"sde_type": "flow", "importance_ratio": "ratio_norm"},
    ...     is_lora=True,
    ...     reward_names=["pickscore"],
    ... )
    >>> card.name
    'README.md'
    ```
    """
    folder = Path(folder)
    name = model_name or (repo_id or folder.resolve().name).split("/")[-1]
    papers = papers_behind(settings)
    base_id = hub_model_id(base_model)
    shown = [(_link(folder, path), prompt) for path, prompt in samples if (folder / path).is_file()]
    pairs = [(_link(folder, each.after), each) for each in comparisons]
    pictures = [(link, each.prompt) for link, each in pairs] + shown
    gallery = [{"text": _one_line(prompt), "output": {"url": link}} for link, prompt in pictures if prompt is not None]
    kind = "image" if backbone.frames_per_second is None else "video"
    task = f"{'image' if backbone.takes_image else 'text'}-to-{kind}"
    own_tags = ["trl_flow", "diffusers-training", task, "lora" if is_lora else "full-finetune"]
    if gallery and is_lora:
        own_tags.append("template:sd-lora")  # with which the Hub shows the gallery
    data = ModelCardData(
        model_name=name,
        eval_results=evaluation_results(log_history, task=task, dataset=eval_dataset_name) or None,
        library_name="diffusers",
        pipeline_tag=task,
        base_model=base_id,
        base_model_relation="adapter" if base_id and is_lora else "finetune" if base_id else None,
        datasets=[dataset_name] if hub_model_id(dataset_name) else None,
        tags=list(dict.fromkeys([*own_tags, *(paper.tag for paper in papers), *tags])),
        widget=gallery or None,
        **license_of(base_model),
    )
    what = "LoRA adapter for" if is_lora else f"fine-tuned {backbone.component} for"
    rewards = f" on {_list([_code(reward) for reward in reward_names])}" if reward_names else ""
    if dataset_name:
        rewards += f" and the prompts of {_dataset(dataset_name)}"
    methods = [f"[{paper.name}](https://arxiv.org/abs/{paper.arxiv})" for paper in papers]
    source = repo_id or f"path/to/{folder.resolve().name}"
    code = _loading_code(backbone, base_model, source, is_lora, settings, prompt, loading or {})
    parts = [
        *(f"# {_text(name)}", "<Gallery />" if gallery else ""),
        f"A {what} {_origin(base_model)[0]}, trained by online reinforcement learning{rewards} with `trl_flow`"
        + (f", after {_list(methods)}." if methods else ".")
        + (f" Training went on from the adapter {_adapter(init_adapter)}." if init_adapter else ""),
        note,
        *("## How to load", f"```python\n{code}\n```"),
        "There are no trigger words: prompts are written as for the base model.",
        f"For ComfyUI or kohya's scripts: {_code(f'trl-flow export {source} --format comfyui --output FILE')}."
        if is_lora and type(backbone.pipeline).__name__ in BACKBONES
        else "",
        *_scores(log_history),
    ]
    if pairs:
        parts += ["## Before and after", *_side_by_side(folder, pairs)]
    if curves is not None and (folder / curves).is_file():
        parts += ["## Rewards", f"![Rewards while training]({_link(folder, curves)})"]
    if shown:
        parts += ["## Samples", *(f"![{_text(prompt or 'Samples')}]({link})" for link, prompt in shown)]
    if recipe is not None:
        fence = max(re.findall("`{3,}", recipe), key=len, default="``") + "`"
        command = "```sh\ntrl-flow train --config recipe.yaml\n```"
        parts += ["## How it was trained", command, "with this `recipe.yaml`:", f"{fence}yaml\n{recipe}{fence}"]
    rows = ["| setting | value |", "| --- | --- |", *(f"| {_text(k)} | {_value(v)} |" for k, v in settings.items())]
    parts += ["## Training settings", "\n".join(rows)]
    parts += ["## Framework versions", "\n".join(f"- {name}: {number}" for name, number in versions().items())]
    if papers:
        parts += ["## Citations", "```bibtex\n" + "\n\n".join(paper.bibtex for paper in papers) + "\n```"]
    path = folder / "README.md"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n").save(path)
    return path


def _loading_code(
    backbone: Backbone, base_model: str | os.PathLike | None, source: str, is_lora: bool, settings: Mapping,
    prompt: str, loading: Mapping[str, str],
) -> str:  # fmt: skip
    """Lines that load the trained model into a stock pipeline and draw `prompt` as the run's evaluations did."""
    component, (_, base) = backbone.component, _origin(base_model)
    pipeline = type(backbone.pipeline)
    # FSDP2 gives a sharded module a class of its own, derived from FSDPModule and the module's
    trained = next(cls for cls in type(backbone.model).__mro__ if not cls.__name__.startswith("FSDP"))
    is_large = bool(hub_model_id(base_model))  # unlike most models of one's own
    classes = [pipeline] if is_lora else [pipeline, trained]
    imports = ["import torch"] * is_large + [_import(cls) for cls in classes]
    on_gpu, dtype = ('.to("cuda")', ", dtype=torch.bfloat16") if is_large else ("", "")
    if base == "pipeline_path()":
        imports.append("from trl_flow.shapes import pipeline_path")
    given = "" if is_lora else f", {component}={component}"
    given += "".join(f", {name}={_quoted(value)}" for name, value in loading.items())
    code = [f"pipeline = {pipeline.__name__}.from_pretrained({base}{given}{dtype}){on_gpu}"]
    if is_lora:
        options = "".join(f", {name}={value}" for name, value in loading_options(component).items())
        code.append(f"pipeline.load_lora_weights({_quoted(source)}{options})")
    else:
        code.insert(0, f"{component} = {trained.__name__}.from_pretrained({_quoted(source)}{dtype})")
    for line in (backbone.scheduler_code or "").splitlines():
        (imports if line.startswith(("import ", "from ")) else code).append(line)
    # As evaluations draw
    evaluation = {name: settings.get(f"eval_{name}") for name in ("num_inference_steps", "guidance_scale")}
    settings = {**settings, **{name: value for name, value in evaluation.items() if value is not None}}
    arguments = backbone.call_arguments(effective(backbone, settings))
    # By keyword: the first argument of pipelines that edit is the image
    call = [f"prompt={_quoted(prompt)}", *(f"{name}={value!r}" for name, value in arguments.items())]
    if backbone.frames_per_second is not None:
        imports.append("from diffusers.utils import export_to_video")
    if backbone.takes_image:
        imports += ["from diffusers.utils import load_image", "from PIL import Image", "", "", TO_RGB_CODE]
        call.insert(0, 'image=load_image("path/to/image.png", convert_method=to_rgb)')
    code.append(f"image = pipeline({', '.join(call)}).images[0]")
    if backbone.frames_per_second is not None:
        code[-1] = f"video = pipeline({', '.join(call)}).frames[0]"
        code.append(f'export_to_video(video, "video.mp4", fps={backbone.frames_per_second:g})')
    return "\n".join([*imports, "", *code])


def _scores(log_history: Sequence[Mapping[str, Any]]) -> list[str]:
    tables = evaluation_scores(log_history)
    if tables:
        what = (
            "Means over the images of the evaluation prompts, from the same seeds for both models. Gold scores are "
            "not optimized; their average is relative to the base model, ± half of its 95% interval over the prompts."
        )
        parts = ["## Scores", what]
        for name, (head, *rows) in tables.items():
            lines = [head, ["---"] * len(head), *([_text(cell) for cell in row] for row in rows)]
            parts += [f"### {_text(name)}"] if name else []
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        return parts
    if (rewards := training_rewards(log_history)) is None:
        return []
    return ["## Scores", "Mean reward while training: {:.4g} in the first log, {:.4g} in the last.".format(*rewards)]


def _side_by_side(folder: Path, pairs: Sequence[tuple[str, SamplePair]]) -> list[str]:
    """A table of the images, each with its prompt."""
    rows = [f"| prompt | before training | after update {pairs[0][1].step} |", "| --- | --- | --- |"]
    for link, sample in pairs:
        before = f"![{_text(sample.prompt)}, before]({_link(folder, sample.before)})" if sample.before else ""
        rows.append(f"| {_text(sample.prompt)} | {before} | ![{_text(sample.prompt)}]({link}) |")
    return ["The first evaluation prompts, from the same seeds.", "\n".join(rows)]


def _dataset(name: str) -> str:
    return f"[{name}](https://huggingface.co/datasets/{name})" if hub_model_id(name) else _code(name)


def _import(cls: type) -> str:
    module = cls.__module__
    return f"from {'diffusers' if module.startswith('diffusers.') else module} import {cls.__name__}"


def _origin(base_model: str | os.PathLike | None) -> tuple[str, str]:
    """What was trained, in the card's prose and as the code's argument."""
    if base_id := hub_model_id(base_model):
        return f"[{base_id}](https://huggingface.co/{base_id})", _quoted(base_id)
    if base_model is None:
        return "a pipeline that was not loaded from the Hub", _quoted("path/to/base_model")
    folder = Path(base_model).resolve()
    if is_bundled(folder):
        return "the shapes pipeline that comes with `trl_flow`", "pipeline_path()"
    return f"a local pipeline, {_code(folder.name)}", _quoted(f"path/to/{folder.name}")


def _adapter(name: str) -> str:
    """An adapter in the card's prose; of a local one only its own name is shown."""
    if adapter_id := hub_model_id(name):
        return f"[{adapter_id}](https://huggingface.co/{adapter_id})"
    return _code(Path(name).resolve().name)


def _link(folder: Path, path: str | os.PathLike) -> str:
    """The image's address relative to the card, in a Markdown link's spelling."""
    try:
        return quote((folder / path).resolve().relative_to(folder.resolve()).as_posix())
    except ValueError:
        why = "a model card only shows images that are uploaded with it: save it there"
        raise ValueError(f"{path} lies outside {folder}, but {why}.") from None


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _text(text: str) -> str:
    """One line of literal text, whatever Markdown, HTML or table characters it has."""
    escaped = html.escape(_one_line(text), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|#!" else c for c in escaped)


def _code(text: str) -> str:
    return f"`{_one_line(text).replace('`', '').replace('|', '/')}`"


def _list(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _value(value: object) -> str:
    """A setting as a cell of the table."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(item) for item in value)
    # `getattr`: enumerations of transformers, such as the optimizer's name
    return "none" if value is None else _text(str(getattr(value, "value", value)))
