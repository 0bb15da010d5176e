"""Reward functions are called as documented, and every way to get one wrong is reported with its name."""

import asyncio
import functools
import inspect
import math
import subprocess
import sys
import textwrap
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from trl_flow.rewards.calling import (
    RewardError,
    call_reward_func,
    call_reward_funcs,
    check_reward_func,
    reward_name,
    reward_names,
)


PROMPTS = ["a red circle", "two blue squares", "a green triangle"]
GIVEN_UP = 20.0  # seconds after which a test that waits for another thread calls it a failure


@pytest.fixture
def images():
    return [Image.new("RGB", (4, 4), color) for color in ("red", "black", "white")]


@pytest.fixture
def release():
    """Set when the test ends, so that functions that hang on it end too."""
    event = threading.Event()
    yield event
    event.set()


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


def returns(value):
    def reward(prompts, images, **kwargs):
        return value

    return reward


def async_returns(value):
    async def reward(prompts, images, **kwargs):
        return value

    return reward


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
def test_what_the_check_lets_through_can_be_called(func, images):
    check_reward_func(func, ["prompt", "answer"])
    rewards = call_reward_funcs(
        [func],
        ["r"],
        PROMPTS,
        images,
        {"answer": ["one", "two", "three"]},
        timeout=None,
        trainer_state=None,
        log_metric=None,
        log_extra=None,
    )
    assert rewards.isfinite().all()


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
def test_what_can_not_be_called_is_refused_with_the_remedy(func, columns, error, parts):
    with pytest.raises(error) as raised:
        check_reward_func(func, columns)
    for part in parts:
        assert part in str(raised.value)


def test_a_callable_without_a_signature_is_let_through():
    with pytest.raises(ValueError):
        inspect.signature(max)
    check_reward_func(max, [])


# --- what is passed ---


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("timeout", [None, GIVEN_UP])
def test_columns_and_extras_arrive_under_their_names(images, kind, timeout):
    received = {}

    def reward(**kwargs):
        received.update(kwargs)
        return [0] * 3

    async def async_reward(**kwargs):
        return reward(**kwargs)

    func, state, log_metric = (reward if kind == "sync" else async_reward), object(), print
    columns = {"answer": ["a", "b", "c"], "weight": [1, 2, 3]}
    call_reward_funcs([func], ["r"], PROMPTS, images, columns, timeout=timeout, trainer_state=state, log_metric=print)
    assert received.keys() == {"prompts", "images", "answer", "weight", "trainer_state", "log_metric"}
    assert received["prompts"] == PROMPTS
    assert received["answer"] == ["a", "b", "c"] and received["weight"] == [1, 2, 3]
    assert received["trainer_state"] is state and received["log_metric"] is log_metric
    assert [np.asarray(image).tolist() for image in received["images"]] == [np.asarray(i).tolist() for i in images]


@pytest.mark.parametrize("timeout", [None, GIVEN_UP])
def test_a_function_that_spoils_its_arguments_does_not_reach_the_others(images, timeout):
    def vandal(prompts, images, answer, **kwargs):
        for image in images:
            image.paste("white", (0, 0, *image.size))
        prompts.clear()
        answer.clear()
        images.clear()
        return [0.0, 0.0, 0.0]

    async def async_vandal(prompts, images, answer, **kwargs):
        return vandal(prompts, images, answer)

    def answers(prompts, images, answer, **kwargs):
        return [int(a) + len(p) for a, p in zip(answer, prompts, strict=True)]

    expected = brightness(PROMPTS, images)
    rewards = call_reward_funcs(
        [async_vandal, vandal, brightness, async_brightness, answers],
        ["async_vandal", "vandal", "brightness", "async_brightness", "answers"],
        PROMPTS,
        images,
        {"answer": ["100", "200", "300"]},
        timeout=timeout,
    )
    assert rewards[:, 2].tolist() == rewards[:, 3].tolist() == expected == [85.0, 0.0, 255.0]
    assert rewards[:, 4].tolist() == [112.0, 216.0, 316.0]
    assert brightness(PROMPTS, images) == expected


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
@pytest.mark.parametrize("make", [returns, async_returns])
def test_numbers_of_every_kind_are_taken_and_none_becomes_nan(value, make, images):
    rewards = call_reward_func(make(value), "r", PROMPTS, images, {}, None)
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
def test_arrays_and_tensors_are_taken(value, images):
    assert call_reward_func(returns(value), "r", PROMPTS, images, {}, None) == [1.5, -2.0, 0.0]


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
@pytest.mark.parametrize("make", [returns, async_returns])
def test_anything_else_is_an_error_that_names_function_image_prompt_and_value(value, parts, make, images):
    with pytest.raises(RewardError) as raised:
        call_reward_func(make(value), "my_reward", PROMPTS, images, {}, None)
    message = str(raised.value)
    assert message.startswith("The reward function 'my_reward' returned ")
    for part in parts:
        assert part in message


def test_a_long_value_is_cut_short_in_the_message(images):
    with pytest.raises(RewardError) as raised:
        call_reward_func(returns("x" * 10_000), "my_reward", PROMPTS, images, {}, None)
    assert len(str(raised.value)) < 400


def test_largest_float32_is_a_finite_reward(images):
    largest = torch.finfo(torch.float32).max
    rewards = call_reward_funcs([returns([largest, -largest, 0])], ["r"], PROMPTS, images, {}, timeout=None)
    assert rewards[:, 0].tolist() == [largest, -largest, 0]


def test_columns_of_the_result_are_in_the_order_of_the_functions(images):
    rewards = call_reward_funcs(
        [async_returns([1, 2, 3]), returns([4, None, 6]), async_returns([7, 8, None]), returns([10, 11, 12])],
        ["same", "same", "same", "same"],
        PROMPTS,
        images,
        {},
        timeout=None,
    )
    expected = torch.tensor([[1, 4, 7, 10], [2, math.nan, 8, 11], [3, 6, math.nan, 12]], dtype=torch.float32)
    torch.testing.assert_close(rewards, expected, rtol=0, atol=0, equal_nan=True)


# --- failures ---


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("timeout", [None, GIVEN_UP])
@pytest.mark.parametrize("error_type", [ZeroDivisionError, TimeoutError, KeyError])
def test_an_exception_is_wrapped_with_the_name_and_kept_as_cause(error_type, kind, timeout, images):
    error = error_type("server gone")

    def failing_reward(prompts, images, **kwargs):
        raise error

    async def async_failing_reward(prompts, images, **kwargs):
        raise error

    func = failing_reward if kind == "sync" else async_failing_reward
    with pytest.raises(RewardError) as raised:
        call_reward_func(func, "my_reward", PROMPTS, images, {}, timeout)
    assert f"The reward function 'my_reward' raised {error_type.__name__}: {error}" in str(raised.value)
    assert "had not answered" not in str(raised.value)  # its own TimeoutError is not our time limit
    assert raised.value.__cause__ is error
    frames, traceback = [], error.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    assert frames[-1] == func.__name__


@pytest.mark.parametrize("timeout", [None, GIVEN_UP])
def test_leaving_the_program_is_not_a_failed_reward(images, timeout):
    def quits(prompts, images, **kwargs):
        sys.exit(3)

    with pytest.raises(SystemExit) as raised:
        call_reward_func(quits, "quits", PROMPTS, images, {}, timeout)
    assert raised.value.code == 3


def test_a_failure_ends_the_others_at_once_although_there_is_no_time_limit(images):
    started, cancelled = asyncio.Event(), threading.Event()

    async def hangs(prompts, images, **kwargs):
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def fails(prompts, images, **kwargs):
        await started.wait()
        raise ValueError("broken")

    with pytest.raises(RewardError, match="'fails' raised ValueError: broken"):
        call_reward_funcs([hangs, fails], ["hangs", "fails"], PROMPTS, images, {}, timeout=None)
    assert cancelled.wait(GIVEN_UP)


def test_a_sync_failure_cancels_the_async_functions(images):
    started, cancelled = threading.Event(), threading.Event()

    async def hangs(prompts, images, **kwargs):
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    def fails(prompts, images, **kwargs):
        assert started.wait(GIVEN_UP)
        raise ValueError("broken")

    with pytest.raises(RewardError, match="'fails' raised ValueError: broken"):
        call_reward_funcs([hangs, fails], ["hangs", "fails"], PROMPTS, images, {}, timeout=None)
    assert cancelled.wait(GIVEN_UP)


# --- async functions ---


@pytest.mark.parametrize("wrap", [lambda func: func, functools.partial], ids=["function", "partial"])
def test_async_functions_run_at_the_same_time(images, wrap):
    # Each waits for the other: run one after the other, they would never end.
    first, second = asyncio.Event(), asyncio.Event()

    async def sets_first(prompts, images, **kwargs):
        first.set()
        await second.wait()
        return [1, 1, 1]

    class SetsSecond:
        async def __call__(self, prompts, images, **kwargs):
            await first.wait()
            second.set()
            return [2, 2, 2]

    funcs = [wrap(sets_first), wrap(SetsSecond())]
    rewards = call_reward_funcs(funcs, ["a", "b"], PROMPTS, images, {}, timeout=GIVEN_UP)
    assert rewards.tolist() == [[1, 2]] * 3


def test_sync_functions_run_while_async_ones_wait(images):
    # Each waits for the other, whatever their order in the list.
    sync_runs, async_runs = threading.Event(), threading.Event()

    def sync_reward(prompts, images, **kwargs):
        met = async_runs.wait(GIVEN_UP)
        sync_runs.set()
        return [met] * 3

    async def async_reward(prompts, images, **kwargs):
        async_runs.set()
        return [await asyncio.to_thread(sync_runs.wait, GIVEN_UP)] * 3

    rewards = call_reward_funcs([sync_reward, async_reward], ["s", "a"], PROMPTS, images, {}, timeout=None)
    assert rewards.tolist() == [[1, 1]] * 3


def test_async_functions_find_the_same_event_loop_at_every_call(images):
    loops = []

    async def reward(prompts, images, **kwargs):
        loops.append(asyncio.get_running_loop())
        return [0, 0, 0]

    for _ in range(2):
        call_reward_func(reward, "r", PROMPTS, images, {}, None)
    assert loops[0] is loops[1] and not loops[0].is_closed()


def test_async_functions_work_where_a_loop_is_running_already(images):
    async def notebook_cell():
        return call_reward_func(async_returns([1, 2, 3]), "r", PROMPTS, images, {}, GIVEN_UP)

    assert asyncio.run(notebook_cell()) == [1, 2, 3]


# --- time limits and threads ---


def test_a_sync_function_that_hangs_is_named(images, release):
    def hangs(prompts, images, **kwargs):
        release.wait()

    with pytest.raises(RewardError, match="'slow_server' had not answered after 0.05 seconds") as raised:
        call_reward_func(hangs, "slow_server", PROMPTS, images, {}, 0.05)
    assert "reward_timeout" in str(raised.value)


def test_an_async_function_that_hangs_is_named_and_cancelled_and_the_others_are_not_blamed(images):
    cancelled = threading.Event()

    async def hangs(prompts, images, **kwargs):
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(RewardError) as raised:
        call_reward_funcs([async_returns([1, 2, 3]), hangs], ["quick", "hangs"], PROMPTS, images, {}, timeout=0.2)
    assert "The reward function 'hangs' had not answered after 0.2 seconds" in str(raised.value)
    assert "quick" not in str(raised.value)
    assert cancelled.wait(GIVEN_UP)


def test_an_async_function_that_blocks_the_loop_is_among_those_named_and_later_calls_work(images, release):
    async def blocks(prompts, images, **kwargs):
        release.wait()

    async def waits(prompts, images, **kwargs):
        await asyncio.Event().wait()

    with pytest.raises(RewardError) as raised:
        call_reward_funcs([waits, blocks], ["waits", "blocks"], PROMPTS, images, {}, timeout=0.05)
    assert "The reward functions 'waits', 'blocks' had not answered after 0.05 seconds" in str(raised.value)
    assert "without awaiting" in str(raised.value)
    assert call_reward_func(async_returns([1, 2, 3]), "r", PROMPTS, images, {}, GIVEN_UP) == [1, 2, 3]


def test_without_a_limit_a_sync_function_runs_in_the_thread_of_the_caller(images):
    threads = []

    def reward(prompts, images, **kwargs):
        threads.append(threading.get_ident())
        return [0, 0, 0]

    call_reward_func(reward, "r", PROMPTS, images, {}, None)
    call_reward_func(reward, "r", PROMPTS, images, {}, GIVEN_UP)
    assert threads[0] == threading.get_ident() != threads[1]


@pytest.mark.parametrize("timeout", [None, GIVEN_UP])
@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_are_recorded_in_a_reward_as_in_its_caller(images, timeout, enabled):
    def reward(prompts, images, **kwargs):
        return [torch.is_grad_enabled()] * 3

    with torch.set_grad_enabled(enabled):
        assert call_reward_func(reward, "r", PROMPTS, images, {}, timeout) == [float(enabled)] * 3
        assert torch.is_grad_enabled() == enabled


@pytest.mark.parametrize("definition", ["def", "async def"])
def test_a_function_that_hangs_does_not_keep_the_process_from_ending(definition):
    script = f"""
        import threading
        from PIL import Image
        from trl_flow.rewards.calling import RewardError, call_reward_func

        {definition} hangs(prompts, images, **kwargs):
            threading.Event().wait()

        try:
            call_reward_func(hangs, "hangs", ["a cat"], [Image.new("RGB", (4, 4))], {{}}, 0.05)
        except RewardError as error:
            print("ended by", error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("ended by The reward function 'hangs' had not answered")
