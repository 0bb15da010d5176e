"""An evaluation's folder: what was to be drawn, the images as they are drawn, and their scores."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from trl_flow.evaluation.outputs import LOCK, locked, read_json, whole_file, write_json
from trl_flow.evaluation.videos import read_frames, read_mp4, write_frames, write_mp4
from trl_flow.images import Sample, to_rgb


SETTINGS = "settings.json"
SCORES = "scores.json"
_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,79}")

# By set, model and reward, one for each index
ScoreLists = dict[str, dict[str, dict[str, list[float | None]]]]
# Path and fingerprint, by name
Models = dict[str, dict[str, str]]


@dataclass(frozen=True)
class PromptList:
    """The prompts of one set, and a fingerprint of all that is drawn from: them and the images to be edited."""

    prompts: list[str]
    fingerprint: str


class ImageFolder:
    """A folder of images that several models drew of the same prompts from the same noise, made by the first `claim`:
    `images/{set}/{model}/{index}.png` are the images, `settings.json` says what they are of, and `scores.json` holds
    the scores that were computed. An image's index is `prompt * K + number`. All methods raise `ValueError` if a file
    of the folder is damaged.

    Of a video the PNG file has all frames as they were drawn, which are what is scored, and `{index}.mp4` beside it is
    for people. Where the PNG file is missing the mp4 file is read: scores are then the same up to the codec's loss."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def locked(self) -> AbstractContextManager[None]:
        """Keeps other processes from writing here, see `trl_flow.evaluation.outputs.locked`."""
        return locked(self.path, "evaluating into")

    def claim(self, settings: dict[str, Any], models: Models, sets: dict[str, PromptList], *, write=True) -> None:
        """Makes the folder this evaluation's, or goes on with an earlier one of the same settings. Models and prompt
        sets may be added to those that are there. Settings by which nothing was drawn bind nobody.

        `settings` are everything that decides what is drawn besides `models` (`path` and `fingerprint` by name) and
        prompts. `ValueError` if the folder cannot be written, holds other files, or was drawn with other settings;
        without `write` that is only asked."""
        earlier = None
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output_dir {self.path} is a file. Give a folder.")
        if (self.path / SETTINGS).is_file():
            names = {path.name for path in self.path.rglob("*") if path.is_file()}
            earlier = self.settings() if names - {SETTINGS, LOCK} else None
            if earlier and (differences := _differences(earlier, settings, models, sets)):
                raise ValueError(
                    f"output_dir {self.path} holds images of another evaluation: {', '.join(differences)}. Choose "
                    "another folder, or the same settings."
                )
        elif self.path.is_dir() and any(child.name != LOCK for child in self.path.iterdir()):
            what = f"is not empty and holds no {SETTINGS} of an earlier evaluation, so its files are left alone"
            raise ValueError(f"output_dir {self.path} {what}. Choose another folder.")
        existing = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ValueError(f"output_dir {self.path} cannot be written: this user may not write to {existing}.")
        if write:
            content = earlier or {"settings": settings, "models": {}, "sets": {}}
            content["models"] |= models
            content["sets"] |= {name: asdict(prompts) for name, prompts in sets.items()}
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / SETTINGS, content)

    def settings(self) -> dict[str, Any]:
        """What `claim` wrote; `ValueError` if the folder is no evaluation's."""
        if not (self.path / SETTINGS).is_file():
            hint = "Draw one first: trl-flow evaluate --model ... --prompts ... --output_dir DIR."
            raise ValueError(f"{self.path} is not the folder of an evaluation: it has no {SETTINGS}. {hint}")
        return read_json(self.path / SETTINGS)

    def image_path(self, set_name: str, model: str, index: int) -> Path:
        """Where the image is, or will be, or a video's frames."""
        return self.path / "images" / file_name(set_name) / file_name(model) / f"{index:06d}.png"

    def shown_path(self, set_name: str, model: str, index: int) -> Path:
        """The file to look at: the image, or a video's mp4 file."""
        path = self.image_path(set_name, model, index)
        return mp4 if (mp4 := path.with_suffix(".mp4")).is_file() else path

    def has(self, set_name: str, model: str, indices: Sequence[int]) -> bool:
        """Whether all these images are there."""
        return all(self.shown_path(set_name, model, index).is_file() for index in indices)

    def save(
        self, set_name: str, model: str, index: int, sample: Sample, frames_per_second: float | None = None
    ) -> None:
        """Writes an image, or a video. It gets its name when it is complete: an image that is there is whole."""
        path = self.image_path(set_name, model, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(sample, list):
            write_mp4(path.with_suffix(".mp4"), sample, frames_per_second)
        with whole_file(path) as file:
            if isinstance(sample, list):
                write_frames(file, sample)
            else:
                sample.save(file, format="PNG")

    def load(self, set_name: str, model: str, index: int) -> Sample:
        """The image, or the frames of the video, RGB."""
        path, shown = self.image_path(set_name, model, index), self.shown_path(set_name, model, index)
        try:
            if not path.is_file() and shown != path:
                return read_mp4(path := shown)
            with Image.open(path) as image:
                is_video = shown != path or getattr(image, "n_frames", 1) > 1
                return read_frames(image) if is_video else to_rgb(image)
        except (OSError, SyntaxError) as error:
            hint = "Delete it and evaluate again: it will be redrawn."
            cause = next(iter(str(error).splitlines()), "")  # the codec's say what it was built with, too
            raise ValueError(f"The image {path} is missing or damaged ({cause}). {hint}") from error

    def scores(self, rewards: Mapping[str, str], columns: Mapping[str, str]) -> ScoreLists:
        """The scores that may be used again: but for those of rewards that something else of the same name has
        computed (`rewards` says what computes each; others stay), and those of sets whose fingerprint (in `columns`:
        of what rewards are told besides the prompts) was another."""
        content = self._score_file()
        others = {name for name, what in rewards.items() if content["rewards"].get(name) != what}
        sets = {name for name, what in columns.items() if content["columns"].get(name) != what}
        kept = {name: by_model for name, by_model in content["scores"].items() if name not in sets}
        for by_reward in (found for by_model in kept.values() for found in by_model.values()):
            for reward in others & by_reward.keys():
                del by_reward[reward]
        return kept

    def keep_scores(self, scores: ScoreLists, rewards: Mapping[str, str], columns: Mapping[str, str]) -> None:
        """Replaces all scores. `rewards` and `columns` are as for `scores`; what is known of others stays."""
        earlier = self._score_file()
        content = {"rewards": earlier["rewards"] | rewards, "columns": earlier["columns"] | columns, "scores": scores}
        write_json(self.path / SCORES, content)

    def _score_file(self) -> dict[str, Any]:
        empty = {"rewards": {}, "columns": {}, "scores": {}}
        return empty | (read_json(self.path / SCORES) if (self.path / SCORES).is_file() else {})


def file_name(name: str) -> str:
    """`name` as that of one file: itself where it is harmless on every system, else what is left of it with a hash, so
    that different names stay different."""
    if _SAFE.fullmatch(name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_.+-]+', '_', name)[:60].lstrip('.')}-{digest}"


def _differences(
    earlier: dict[str, Any], settings: dict[str, Any], models: Models, sets: dict[str, PromptList]
) -> list[str]:
    """What an earlier evaluation did otherwise, in words."""
    # As JSON, in which a tuple is a list
    old, new = earlier["settings"], json.loads(json.dumps(settings))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    found = [f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in names]
    for name, model in models.items():
        before = earlier["models"].get(name, model)
        if before["fingerprint"] != model["fingerprint"]:
            found.append(f"{name!r} was {before['path']}, and {model['path']} has other weights")
    for name, prompts in sets.items():
        before = earlier["sets"].get(name, asdict(prompts))
        if before["fingerprint"] != prompts.fingerprint:
            counts = f"{len(before['prompts'])} then, {len(prompts.prompts)} in this evaluation"
            found.append(f"the prompt set {name!r} had other prompts ({counts})")
    return found
