"""Every reward of the package says what it is, and is found under its own name."""

import inspect
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trl_flow import rewards
from trl_flow.rewards.base import RewardInfo
from trl_flow.rewards.checks import check_reward_func, is_dense, reward_name
from trl_flow.rewards.named import NAMED_REWARDS, named_reward


PAGE = Path(__file__).parents[2] / "docs" / "reward_models.md"


# A reward on another machine, or of frames, has the card of what it stands for
OTHERS = ("FrameReward", "RemoteReward")
REWARDS = [name for name in rewards.__all__ if name.endswith("Reward") and name not in OTHERS]


@pytest.fixture(autouse=True)
def server(monkeypatch):
    """An address for the judges; nothing is asked there."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")


def test_a_reward_without_a_model_does_not_wait_for_those_with_one():
    program = (
        "import sys; from trl_flow.rewards import JPEGCompressibilityReward; import trl_flow.rewards.named; "
        "import trl_flow.rewards.geneval, trl_flow.rewards.scorer; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_public_names_are_sorted_and_exist():
    assert list(rewards.__all__) == sorted(rewards.__all__)
    assert [name for name in rewards.__all__ if not hasattr(rewards, name)] == []


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_has_a_complete_card(name):
    info = getattr(rewards, name).info
    assert isinstance(info, RewardInfo)
    low, high = info.range
    assert not math.isnan(low) and low < high
    assert isinstance(info.higher_is_better, bool)
    assert info.typical.strip() and info.license.strip()
    assert re.fullmatch(r"https://(huggingface\.co/papers/\d{4}\.\d{5}|\S+\.\S+)|none: .+", info.paper)


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_says_whether_it_scores_unfinished_pictures(name):
    assert isinstance(vars_of(getattr(rewards, name)).get("dense"), bool)


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_takes_prompts_images_and_all_else_by_keyword(name):
    parameters = inspect.signature(getattr(rewards, name).__call__).parameters
    assert {"prompts", "images"} <= set(parameters)
    assert any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_that_needs_no_argument_can_be_named(name):
    cls = getattr(rewards, name)
    required = [
        parameter.name
        for parameter in inspect.signature(cls).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    built = [type(named_reward(known)) for known in NAMED_REWARDS]
    assert bool(required) or cls in built


@pytest.mark.parametrize("name", sorted(NAMED_REWARDS))
def test_a_named_reward_is_called_by_that_name_in_metrics(name):
    reward = named_reward(name)
    assert reward_name(reward) == name == name.lower()
    assert is_dense(reward) is type(reward).dense
    check_reward_func(reward, ["prompt", *required_columns(reward)])


def required_columns(reward):
    parameters = inspect.signature(reward).parameters.values()
    return [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.name not in ("prompts", "images", "videos")
    ]


def vars_of(cls):
    """A class's attributes with those that it inherits."""
    return {name: value for base in reversed(cls.__mro__) for name, value in vars(base).items()}


def test_the_range_of_a_built_reward_is_its_own():
    assert rewards.JPEGCompressibilityReward(offset=300.0).info.range == (-math.inf, 300.0)
    assert rewards.JPEGCompressibilityReward.info.range == (-math.inf, 0.0)
    assert rewards.UnifiedReward().info.range == (1.0, 5.0)
    assert rewards.GenEvalReward().info.range == (-14.0, 1.0)
    assert rewards.GenEvalReward(max_objects=100).info.range == (-98.0, 1.0)
    assert rewards.GenEvalReward("strict").info.range == rewards.GenEvalReward("correct").info.range == (0.0, 1.0)


@pytest.mark.parametrize("name", REWARDS)
def test_the_documentation_shows_the_card(name):
    rows = [row.strip("|").split("|") for row in PAGE.read_text(encoding="utf-8").splitlines() if row.startswith("|")]
    cells = next(cells for cells in rows if f"`{name}" in cells[0])
    cls = getattr(rewards, name)
    assert cells[3].strip() == ("yes" if cls.dense else "no")
    assert cls.info.paper in cells[6] or cls.info.paper.startswith("none")
    for key, (class_name, *_) in NAMED_REWARDS.items():
        assert (f"`{key}`" in cells[1]) == (class_name == name)


@pytest.mark.parametrize(
    "name, near", [("hpsv2.2", "hpsv2"), ("pickscor", "pickscore"), ("geneval-strict", "geneval")]
)
def test_a_wrong_name_is_answered_with_the_nearest_even_where_it_looks_like_a_path(name, near):
    with pytest.raises(ValueError, match=rf"'{name}'.* Did you mean {near}"):
        named_reward(name)


def test_a_path_that_is_near_no_name_is_answered_with_what_is_wrong():
    with pytest.raises(ValueError, match=r"'no_such_module.brightness' cannot be imported: No module .*'\.$"):
        named_reward("no_such_module.brightness")
