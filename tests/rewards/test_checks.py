"""Reward functions have names, and every way to get one or its answer wrong is reported with its name."""

import functools
import inspect
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from trl_flow.rewards import OCRReward
from trl_flow.rewards.checks import (
    RewardError,
    check_reward_func,
    check_rewards,
    is_async,
    needs_group,
    reward_name,
    reward_names,
)


PROMPTS = ["a red circle", "two blue squares", "a green triangle"]


def brightness(prompts, images, **kwargs):
    return [float(np.asarray(image).mean()) for image in images]


async def async_brightness(prompts, images, **kwargs):
    return brightness(prompts, images)


class Brightness:
    def __call__(self, prompts, images, **kwargs):
        return brightness(prompts, images)


class AsyncBrightness:
    async def __call__(self, prompts, images, **kwargs):
        return brightness(prompts, images)


class NamedBrightness(Brightness):
    __name__ = "luma"


def scaled(prompts, images, scale, **kwargs):
    return [scale * value for value in brightness(prompts, images)]


async def async_scaled(prompts, images, scale, **kwargs):
    return scaled(prompts, images, scale)


# --- names ---


@pytest.mark.parametrize(
    ("func", "name"),
    [
        (brightness, "brightness"),
        (async_brightness, "async_brightness"),
        (Brightness(), "Brightness"),
        (NamedBrightness(), "luma"),
        (NamedBrightness().__call__, "__call__"),
        (functools.partial(scaled, scale=2), "scaled"),
        (functools.partial(functools.partial(NamedBrightness()), scale=2), "luma"),
    ],
)
def test_name_is_the_one_that_trl_gives(func, name):
    assert reward_name(func) == name


def test_equal_names_are_numbered_and_never_meet_a_name_that_is_taken():
    def f_2(prompts, images, **kwargs): ...

    def f(prompts, images, **kwargs): ...

    assert reward_names([f, brightness, f, f]) == ["f", "brightness", "f_2", "f_3"]
    assert reward_names([f, f_2, f]) == ["f", "f_2", "f_3"]
    assert reward_names([f, f, f_2]) == ["f", "f_2", "f_2_2"]


@pytest.mark.parametrize(
    ("func", "expected"),
    [
        (brightness, False),
        (async_brightness, True),
        (Brightness(), False),
        (AsyncBrightness(), True),
        (functools.partial(async_scaled, scale=2), True),
        (functools.partial(functools.partial(AsyncBrightness()), scale=2), True),
    ],
)
def test_async_is_seen_through_partials_and_objects(func, expected):
    assert is_async(func) == expected


# --- refused before training ---


def everything_by_name(prompts, images, trainer_state, log_metric, log_extra, answer):
    return [1.0] * len(images)


@pytest.mark.parametrize(
    "func",
    [
        brightness,
        async_brightness,
        Brightness(),
        AsyncBrightness(),
        Brightness().__call__,
        functools.partial(scaled, scale=2),
        functools.partial(async_scaled, scale=2),
        everything_by_name,
        lambda prompts, images, answer, **kwargs: [len(a) for a in answer],
        lambda prompts, images, scale=1, **kwargs: [scale] * len(images),
        lambda *, images, **kwargs: [1] * len(images),
        lambda **kwargs: [1] * len(kwargs["images"]),
        lambda *args, **kwargs: [1] * len(kwargs["images"]),
    ],
)
def test_what_the_check_lets_through_can_be_called(func):
    check_reward_func(func, ["prompt", "answer"])
    given = dict.fromkeys(("prompts", "images", "trainer_state", "log_metric", "log_extra", "answer"), ["one", "two"])
    inspect.signature(func).bind(**given)


def needs_answer(prompts, images, answer, **kwargs): ...


def needs_prompt(prompt, images, **kwargs): ...


def without_kwargs(prompts, images): ...


def by_position(prompts, /, images, **kwargs): ...


@pytest.mark.parametrize(
    ("func", "columns", "error", "parts"),
    [
        ("PickScore", [], TypeError, ["'PickScore'", "str", "def reward(prompts, images, **kwargs)"]),
        (0.5, [], TypeError, ["0.5", "float"]),
        (Brightness, [], TypeError, ["Brightness is a class", "pass Brightness(...)"]),
        (needs_answer, ["prompt", "target"], ValueError, ["'needs_answer'", "column 'answer'", "['target']"]),
        (needs_prompt, ["prompt"], ValueError, ["'needs_prompt'", "'prompt'"]),
        (without_kwargs, ["prompt"], TypeError, ["'without_kwargs'", "trainer_state", "log_metric", "**kwargs"]),
        (without_kwargs, ["answer"], TypeError, ["'without_kwargs'", "'answer'", "**kwargs"]),
        (by_position, [], TypeError, ["'by_position'", "'prompts'", "by keyword", "'/'"]),
        (functools.partial(needs_answer), [], ValueError, ["'needs_answer'", "column 'answer'"]),
        (brightness, ["prompt", "images"], ValueError, ["['images']", "rename_column('images', 'my_images')"]),
    ],
)
def test_what_cannot_be_called_is_refused_with_the_remedy(func, columns, error, parts):
    with pytest.raises(error) as raised:
        check_reward_func(func, columns)
    for part in parts:
        assert part in str(raised.value)


def test_a_callable_without_a_signature_is_let_through():
    with pytest.raises(ValueError):
        inspect.signature(max)
    check_reward_func(max, [])


# --- what is returned ---


@pytest.mark.parametrize(
    "value",
    [
        [1.5, None, 0],
        (1.5, None, False),
        [np.float32(1.5), None, np.int64(0)],
        [np.float16(1.5), None, np.bool_(False)],
        [torch.tensor(1.5), None, torch.tensor(0)],
        [np.array(1.5), None, torch.tensor(0.0, dtype=torch.bfloat16, requires_grad=True)],
        [Fraction(3, 2), None, 0.0],
        np.array([1.5, None, 0], dtype=object),
    ],
)
def test_numbers_of_every_kind_are_taken_and_none_becomes_nan(value):
    rewards = check_rewards(value, "r", PROMPTS)
    assert [type(reward) for reward in rewards] == [float, float, float]
    assert rewards[0] == 1.5 and math.isnan(rewards[1]) and rewards[2] == 0.0


@pytest.mark.parametrize(
    "value",
    [
        np.array([1.5, -2.0, 0.0]),
        np.array([1.5, -2.0, 0.0], dtype=np.float16),
        torch.tensor([1.5, -2.0, 0.0]),
        torch.tensor([1.5, -2.0, 0.0], dtype=torch.bfloat16),
        torch.tensor([1.5, -2.0, 0.0], requires_grad=True),
    ],
)
def test_arrays_and_tensors_are_taken(value):
    assert check_rewards(value, "r", PROMPTS) == [1.5, -2.0, 0.0]


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        # Not one entry per image
        ([1.0, 2.0], ["returned 2 rewards for 3 images"]),
        ([1.0, 2.0, 3.0, 4.0], ["returned 4 rewards for 3 images"]),
        ([], ["returned 0 rewards for 3 images"]),
        (torch.zeros(2), ["returned 2 rewards for 3 images"]),
        (0.5, ["returned 0.5 of type float", "one number or None per image, 3 in this call"]),
        (torch.tensor(0.5), ["returned 0.5 of type float"]),
        (np.array(0.5), ["returned 0.5 of type float"]),
        (None, ["returned None of type NoneType"]),
        ("abc", ["returned 'abc' of type str"]),
        ({"reward": [1, 2, 3]}, ["returned {'reward': [1, 2, 3]} of type dict"]),
        ((reward for reward in (1, 2, 3)), ["of type generator"]),
        # An entry that is no finite number: the function, the image, the prompt and the value
        ([1, "good", 3], ["returned 'good' for image 1, prompt 'two blue squares'", "type str"]),
        ([1, 2, math.nan], ["returned nan for image 2, prompt 'a green triangle'", "not a number", "None"]),
        ([math.inf, 2, 3], ["returned inf for image 0, prompt 'a red circle'", "beyond the range of float32"]),
        ([1, -math.inf, 3], ["returned -inf for image 1"]),
        ([1, 1e39, 3], ["returned 1e+39 for image 1", "beyond the range of float32"]),
        ([1, 10**400, 3], ["for image 1", "beyond the range of float32"]),
        ([1, 2j, 3], ["returned 2j for image 1", "type complex"]),
        ([1, [2.0], 3], ["returned [2.0] for image 1", "type list"]),
        ([1, torch.tensor([2.0]), 3], ["returned tensor([2.]) for image 1", "type Tensor"]),
        ([1, {"score": 2}, 3], ["returned {'score': 2} for image 1", "type dict"]),
        (np.array([1, np.nan, 3]), ["returned nan for image 1, prompt 'two blue squares'"]),
        (torch.tensor([1.0, 2.0, torch.inf]), ["returned inf for image 2"]),
        (torch.zeros(3, 1), ["returned [0.0] for image 0", "type list"]),
        (torch.zeros(3, dtype=torch.complex64), ["returned 0j for image 0", "type complex"]),
    ],
)
def test_anything_else_is_an_error_that_names_function_image_prompt_and_value(value, parts):
    with pytest.raises(RewardError) as raised:
        check_rewards(value, "my_reward", PROMPTS)
    message = str(raised.value)
    assert message.startswith("The reward function 'my_reward' returned ")
    for part in parts:
        assert part in message


def test_a_long_value_is_cut_short_in_the_message():
    with pytest.raises(RewardError) as raised:
        check_rewards("x" * 10_000, "my_reward", PROMPTS)
    assert len(str(raised.value)) < 400


def test_largest_float32_is_a_finite_reward():
    largest = torch.finfo(torch.float32).max
    assert check_rewards([largest, -largest, 0], "r", PROMPTS) == [largest, -largest, 0]


# ---- Columns that collide with the call ----


class Scaled:
    def __call__(self, prompts, images, scale=1, **kwargs):
        return brightness(prompts, images)

    def method(me, prompts, images, **kwargs):
        return brightness(prompts, images)


class Alone:
    def __call__(self, /, prompts, images, **kwargs):
        return brightness(prompts, images)


def scaled(scale, prompts, images, **kwargs):
    return brightness(prompts, images)


@pytest.mark.parametrize(
    ("func", "column"),
    [
        (Scaled(), "self"),
        (Scaled().method, "me"),
        (functools.partial(Scaled(), scale=2), "self"),
        (functools.partial(scaled, 2), "scale"),
        (functools.partial(functools.partial(scaled, 2)), "scale"),
        (AsyncBrightness(), "self"),
        (OCRReward.__new__(OCRReward), "self"),
    ],
)
def test_a_column_that_is_filled_already_is_refused(func, column):
    with pytest.raises(ValueError, match=rf"called with '{column}'.*rename_column\('{column}', 'my_{column}'\)"):
        check_reward_func(func, ["prompt", column])
    with pytest.raises(TypeError, match=f"multiple values for argument '{column}'"):
        func(prompts=[], images=[], **{column: []})
    check_reward_func(func, ["prompt", "other"])


@pytest.mark.parametrize("func", [brightness, Alone(), functools.partial(brightness)])
def test_a_column_called_self_reaches_what_takes_it(func):
    check_reward_func(func, ["prompt", "self"])


def test_whether_a_function_compares():
    def compare(prompts, images, **kwargs):
        return [0.0] * len(images)

    assert needs_group(compare) is False
    compare.needs_group = True
    assert needs_group(compare) is needs_group(functools.partial(compare)) is True
    compare.needs_group = "yes"
    with pytest.raises(TypeError, match="`needs_group`.* 'compare' is 'yes', but must be False, or"):
        check_reward_func(compare, ["prompt"])
