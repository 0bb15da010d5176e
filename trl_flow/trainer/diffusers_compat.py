"""What `transformers.Trainer` and its callbacks expect of a model and diffusers' models lack."""

import json

from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict


class TrainerConfigDict(FrozenDict):
    """A diffusers config with the methods that reporting callbacks call on a transformers config."""

    def to_dict(self) -> dict:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, default=str)


def make_trainable(model: ModelMixin) -> None:
    """Gives `model.config` the methods above, in place."""
    model._internal_dict = TrainerConfigDict(model.config)
