"""The papers behind a training run, for the citations in its model card."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Paper:
    """
    A paper to cite.

    Attributes:
        tag (`str`): the method's tag on the Hub, and its BibTeX key.
        name (`str`): what the method is called.
        arxiv (`str`): the arXiv number, which begins with year and month.
        title (`str`): the paper's title.
        authors (`list[str]`): their full names.
    """

    tag: str
    name: str
    arxiv: str
    title: str
    authors: list[str]

    @property
    def bibtex(self) -> str:
        return (
            f"@article{{{self.tag},\n"
            f"    title   = {{{{{self.title}}}}},\n"
            f"    author  = {{{' and '.join(self.authors)}}},\n"
            f"    year    = {{20{self.arxiv[:2]}}},\n"
            f"    journal = {{arXiv preprint arXiv:{self.arxiv}}},\n"
            f"}}"
        )


_FILE = Path(__file__).with_name("papers.json")
PAPERS = {tag: Paper(tag, **fields) for tag, fields in json.loads(_FILE.read_text(encoding="utf-8")).items()}


def papers_behind(settings: Mapping[str, object]) -> list[Paper]:
    """
    The papers whose methods a run used, by the fields of its config: none for an algorithm with fields of its own.

    Args:
        settings (`Mapping[str, object]`): values of `FlowGRPOConfig`'s fields by name; what is missing counts as off.
    """
    ratio, weighting = settings.get("importance_ratio"), settings.get("timestep_weighting")
    used = {
        "flow-grpo": not {"sde_type", "importance_ratio", "timestep_weighting"}.isdisjoint(settings),
        "dance-grpo": settings.get("sde_type") == "dance",
        "flow-cps": settings.get("sde_type") == "cps",
        "mix-grpo": bool(settings.get("sde_window_size")),
        "tempflow-grpo": weighting == "temp",
        "grpo-guard": ratio in ("mean_revised", "ratio_norm")
        or weighting in ("inverse_dt", "beta_over_dt", "inverse_beta_dt"),
        "slas": bool(settings.get("advantage_power")),
        "vgpo": bool(settings.get("dense_rewards")),
    }
    return [PAPERS[tag] for tag, is_used in used.items() if is_used]
