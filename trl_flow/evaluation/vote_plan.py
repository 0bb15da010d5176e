"""Which pairs people are asked about, in which order and on which side, and where their votes are kept."""

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from trl_flow.evaluation.image_folder import ImageFolder, file_name
from trl_flow.evaluation.outputs import read_json, write_json


# What is asked, as in GRPO-Guard's supplement, section 3
QUESTIONS = {"quality": "Image quality", "alignment": "Text alignment", "overall": "Overall"}
SIDES = ("left", "tie", "right")
OUTCOMES = ("win", "tie", "lose")
_LONGEST_NAME = 80


@dataclass(frozen=True)
class VotePair:
    """Two models' images, from the same noise: image `index` of the set, of prompt `row`. A win is one of `other`."""

    set_name: str
    prompt: str
    index: int
    row: int
    reference: str
    other: str

    @property
    def key(self) -> str:
        """Equal for equal pairs."""
        return json.dumps([self.set_name, self.index, self.reference, self.other])


def vote_pairs(
    folder: ImageFolder, *, models: Sequence[str] | None = None, pairs: int = 100, seed: int = 0
) -> list[VotePair]:
    """Chooses `pairs` prompts of each set (or as many as there are), the same for every comparison, and one image of
    each. `models` are as for [`VoteServer`]. More pairs of the same seed contain the fewer. `ValueError` if the folder
    is no evaluation's, models are unknown or fewer than two, or images are missing."""
    if isinstance(pairs, bool) or not isinstance(pairs, int) or pairs < 1:
        raise ValueError(f"the number of pairs is {pairs!r}, but must be a whole number of at least 1.")
    content = folder.settings()
    known = list(content["models"])
    models = known if models is None else list(models)
    if unknown := [name for name in models if name not in known]:
        raise ValueError(f"{folder.path} has no model {unknown[0]!r}, only {', '.join(known)}.")
    if len(models) < 2 or len(set(models)) < len(models):
        raise ValueError(f"a vote needs two different models or more, but there are {models}.")
    number = content["settings"]["num_images_per_prompt"]
    chosen = []
    for name, prompts in content["sets"].items():
        random = np.random.default_rng(_hash(seed, name))
        rows = random.permutation(len(prompts["prompts"]))
        indices = rows * number + random.integers(number, size=len(rows))
        for row, index in zip(rows[:pairs].tolist(), indices[:pairs].tolist(), strict=True):
            for path in (folder.shown_path(name, model, index) for model in models):
                if not path.is_file():
                    raise ValueError(f"the image {path} is missing. Run the evaluation to its end: the same command.")
            prompt = prompts["prompts"][row]
            chosen += [VotePair(name, prompt, index, row, models[0], other) for other in models[1:]]
    return chosen


def voting_order(pairs: Sequence[VotePair], *, voter: str, seed: int) -> list[VotePair]:
    """The pairs in a voter's own random order."""
    return sorted(pairs, key=lambda pair: _hash(seed, voter, "order", pair.key))


def left_models(order: Sequence[VotePair], *, voter: str, seed: int) -> dict[str, str]:
    """Which of the two models a voter sees on the left, by the pair's key. In the voter's `order` every two pairs of a
    comparison have different sides, of which a coin decides: whoever always takes one side favors no model."""
    left: dict[str, str] = {}
    coins: dict[tuple[str, str], list[int]] = {}
    for pair in order:
        thrown = coins.setdefault((pair.reference, pair.other), [])
        thrown.append(1 - thrown[-1] if len(thrown) % 2 else _hash(seed, voter, "side", pair.key) % 2)
        left[pair.key] = (pair.reference, pair.other)[thrown[-1]]
    return left


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big")


def check_voter(name: object) -> str:
    """A voter's name in one spelling; `ValueError` for what is no name."""
    if not isinstance(name, str):
        raise ValueError("The name must be text.")
    name = " ".join(unicodedata.normalize("NFC", name).split())
    if not name or len(name) > _LONGEST_NAME or any(unicodedata.category(letter)[0] == "C" for letter in name):
        raise ValueError(f"A name has 1 to {_LONGEST_NAME} letters, and none that cannot be seen.")
    return name


class Ballots:
    """The votes of an evaluation's folder: one JSON file for each voter in `votes/`, written anew with every vote,
    whole or not at all. Files are read at every call. All methods raise `ValueError` if a file is damaged."""

    def __init__(self, folder: Path):
        self.folder = folder / "votes"

    def _path(self, voter: str) -> Path:
        # One file on systems that do not tell upper from lower case, too
        return self.folder / f"{file_name(voter.casefold())}.json"

    def read(self, voter: str) -> dict[str, Any]:
        """A voter's `votes`, oldest first, and whether the results have been `seen`."""
        path = self._path(voter)
        return self._ballot(path) if path.is_file() else {"voter": voter, "seen": False, "votes": []}

    def voters(self) -> list[dict[str, Any]]:
        """What every voter has voted."""
        return [self._ballot(path) for path in sorted(self.folder.glob("*.json"))]

    @staticmethod
    def _ballot(path: Path) -> dict[str, Any]:
        content = read_json(path)
        if not isinstance(content.get("votes"), list):
            raise ValueError(f"{path} cannot be read: it has no list of votes. Fix it, or move it away.")
        return content

    def add(self, voter: str, pair: VotePair, left: str, answers: Mapping[str, str]) -> None:
        """Keeps a vote: for every question `"left"`, `"tie"` or `"right"`, with the model `left` on the left.
        `ValueError` for other answers, and if the voter has voted on the pair before."""
        is_complete = isinstance(answers, Mapping) and set(answers) == set(QUESTIONS)
        if not is_complete or not all(answer in SIDES for answer in answers.values()):
            raise ValueError(f"The answers must be one of {', '.join(SIDES)} for each of {', '.join(QUESTIONS)}.")
        content = self.read(voter)
        if pair.key in {vote["key"] for vote in content["votes"]}:
            raise ValueError("This pair has been voted on already, in another tab perhaps.")
        # In terms of the models: left and right mean nothing later
        outcomes = dict(zip(SIDES, OUTCOMES if left == pair.other else OUTCOMES[::-1], strict=True))
        vote = {"key": pair.key, "set": pair.set_name, **asdict(pair), "left": left}
        vote["answers"] = {question: outcomes[answers[question]] for question in QUESTIONS}
        del vote["set_name"]
        content["votes"].append(vote | {"time": datetime.now(timezone.utc).isoformat(timespec="seconds")})
        self._write(voter, content)

    def undo(self, voter: str) -> None:
        """Takes back the voter's last vote; `ValueError` if there is none, or the voter has seen the results."""
        content = self.read(voter)
        if content["seen"]:
            raise ValueError("The results have been seen: votes stay as they are.")
        if not content["votes"]:
            raise ValueError("There is no vote to take back.")
        content["votes"].pop()
        self._write(voter, content)

    def mark_seen(self, voter: str) -> None:
        """From here on the voter's votes cannot be taken back."""
        self._write(voter, self.read(voter) | {"seen": True})

    def _write(self, voter: str, content: Mapping[str, Any]) -> None:
        self.folder.mkdir(exist_ok=True)
        write_json(self._path(voter), content)
