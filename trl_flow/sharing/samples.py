"""Sample images of a run for its model card: the first prompts of each evaluation, from the same seeds each time."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from trl_flow.evaluation.grids import enlarged
from trl_flow.images import Sample


_NUMBER = 4
_PROMPT = "prompt"  # in the PNG files


@dataclass(frozen=True)
class SamplePair:
    """An image of the evaluation after update `step`, relative to the run's folder, its prompt, and the image before
    training from the same seed, if that was drawn."""

    step: int
    after: Path
    prompt: str
    before: Path | None


def write_samples(folder: str | os.PathLike, images: Sequence[Sample], prompts: Sequence[str], step: int) -> None:
    """Keeps the first image of each of the first prompts of an evaluation after update `step`."""
    firsts = [i for i, prompt in enumerate(prompts) if i == 0 or prompt != prompts[i - 1]][:_NUMBER]
    for number, i in enumerate(firsts):
        path = _path(Path(folder), step, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = PngInfo()
        text.add_itxt(_PROMPT, prompts[i])
        enlarged([images[i]], None)[0].save(path, pnginfo=text)


def read_samples(folder: str | os.PathLike, step: int) -> list[SamplePair]:
    """What was kept after update `step`, beside that of update 0 from the same prompts."""
    folder, found = Path(folder), []
    for number in range(_NUMBER):
        after, before = _path(folder, step, number), _path(folder, 0, number)
        if (prompt := _prompt(after)) is not None:
            is_pair = step > 0 and _prompt(before) == prompt
            earlier = before.relative_to(folder) if is_pair else None
            found.append(SamplePair(step, after.relative_to(folder), prompt, earlier))
    return found


def _path(folder: Path, step: int, number: int) -> Path:
    return folder / "images" / "samples" / f"{step:06d}-{number + 1}.png"


def _prompt(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            image.load()
            return image.text.get(_PROMPT)
    except (OSError, SyntaxError, ValueError, AttributeError):
        return None
