"""Reward functions are called as documented, one part after another, and a failure is reported with its name."""

import asyncio
import functools
import math
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from trl_flow.rewards.checks import RewardError
from trl_flow.rewards.scorer import RewardScorer


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


def returns(value):
    def reward(prompts, images, **kwargs):
        return value

    return reward


def async_returns(value):
    async def reward(prompts, images, **kwargs):
        return value

    return reward


def call(func, images, timeout=None, name="r"):
    """The rewards of one function."""
    return RewardScorer([func], timeout=timeout, names=[name]).score(PROMPTS, images, {}).rewards[:, 0].tolist()


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

    func, state = (reward if kind == "sync" else async_reward), object()
    columns = {"answer": ["a", "b", "c"], "weight": [1, 2, 3]}
    scores = RewardScorer([func], timeout=timeout).score(PROMPTS, images, columns, trainer_state=state)
    assert received.keys() == {
        "prompts", "images", "answer", "weight", "trainer_state", "log_metric", "log_extra"
    }  # fmt: skip
    assert received["prompts"] == PROMPTS
    assert received["answer"] == ["a", "b", "c"] and received["weight"] == [1, 2, 3]
    assert received["trainer_state"] is state and scores.rewards.tolist() == [[0.0]] * 3
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
    scorer = RewardScorer([async_vandal, vandal, brightness, async_brightness, answers], timeout=timeout)
    rewards = scorer.score(PROMPTS, images, {"answer": ["100", "200", "300"]}).rewards
    assert rewards[:, 2].tolist() == rewards[:, 3].tolist() == expected == [85.0, 0.0, 255.0]
    assert rewards[:, 4].tolist() == [112.0, 216.0, 316.0]
    assert brightness(PROMPTS, images) == expected


# --- what comes back ---


def test_columns_of_the_result_are_in_the_order_of_the_functions(images):
    funcs = [async_returns([1, 2, 3]), returns([4, None, 6]), async_returns([7, 8, None]), returns([10, 11, 12])]
    rewards = RewardScorer(funcs).score(PROMPTS, images, {}).rewards
    expected = torch.tensor([[1, 4, 7, 10], [2, math.nan, 8, 11], [3, 6, math.nan, 12]], dtype=torch.float32)
    torch.testing.assert_close(rewards, expected, rtol=0, atol=0, equal_nan=True)


def test_functions_that_are_not_asked_are_not_called(images):
    def never(prompts, images, **kwargs):
        raise AssertionError

    scorer = RewardScorer([never, returns([4, 5, 6]), never, async_returns([7, 8, 9])])
    rewards = scorer.score(PROMPTS, images, {}, only=[3, 1]).rewards
    assert rewards[:, 1].tolist() == [4, 5, 6] and rewards[:, 3].tolist() == [7, 8, 9]
    assert rewards[:, [0, 2]].isnan().all()


def test_an_answer_that_is_no_reward_is_an_error_with_the_functions_name(images):
    scorer = RewardScorer([brightness, async_returns([1, 2, math.inf])], names=["good", "bad"])
    with pytest.raises(RewardError, match="'bad' returned inf for image 2, prompt 'a green triangle'"):
        scorer.score(PROMPTS, images, {})


def test_what_functions_log_is_kept_under_the_index_of_the_sample(images):
    def logs(prompts, images, log_metric, log_extra, **kwargs):
        log_metric("calls", len(images))
        for prompt in prompts:  # one by one
            log_extra("length", [len(prompt)])
        log_extra("incomplete", [0] * (len(images) - 1))
        log_extra("too many", list(range(10)))
        return [0] * len(images)

    with RewardScorer([logs]).session(background=False) as session:
        session.submit(PROMPTS[:1], images[:1], {})
        session.submit(PROMPTS[1:], images[1:], {})
        found = session.result().logs
    assert found.metrics == {"calls": [1.0, 2.0]}
    # Of a column that is not complete it is not known which image has no value
    assert found.columns == {"length": {0: 12, 1: 16, 2: 16}, "too many": {0: 0, 1: 0, 2: 1}}


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
        call(func, images, timeout, name="my_reward")
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
        call(quits, images, timeout, name="quits")
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
        RewardScorer([hangs, fails]).score(PROMPTS, images, {})
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
        RewardScorer([hangs, fails]).score(PROMPTS, images, {})
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
    rewards = RewardScorer(funcs, timeout=GIVEN_UP).score(PROMPTS, images, {}).rewards
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

    rewards = RewardScorer([sync_reward, async_reward]).score(PROMPTS, images, {}).rewards
    assert rewards.tolist() == [[1, 1]] * 3


def test_async_functions_find_the_same_event_loop_at_every_call(images):
    loops = []

    async def reward(prompts, images, **kwargs):
        loops.append(asyncio.get_running_loop())
        return [0, 0, 0]

    for _ in range(2):
        call(reward, images)
    assert loops[0] is loops[1] and not loops[0].is_closed()


def test_async_functions_work_where_a_loop_is_running_already(images):
    async def notebook_cell():
        return call(async_returns([1, 2, 3]), images, GIVEN_UP)

    assert asyncio.run(notebook_cell()) == [1, 2, 3]


# --- time limits and threads ---


def test_a_sync_function_that_hangs_is_named(images, release):
    def hangs(prompts, images, **kwargs):
        release.wait()

    with pytest.raises(RewardError, match="'slow_server' had not answered after 0.05 seconds") as raised:
        call(hangs, images, 0.05, name="slow_server")
    assert "reward_timeout" in str(raised.value)


def test_an_async_function_that_hangs_is_named_and_cancelled_and_the_others_are_not_blamed(images):
    cancelled = threading.Event()

    async def hangs(prompts, images, **kwargs):
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(RewardError) as raised:
        RewardScorer([async_returns([1, 2, 3]), hangs], timeout=0.2, names=["quick", "hangs"]).score(
            PROMPTS, images, {}
        )
    assert "The reward function 'hangs' had not answered after 0.2 seconds" in str(raised.value)
    assert "quick" not in str(raised.value)
    assert cancelled.wait(GIVEN_UP)


def test_an_async_function_that_blocks_the_loop_is_among_those_named_and_later_calls_work(images, release):
    async def blocks(prompts, images, **kwargs):
        release.wait()

    async def waits(prompts, images, **kwargs):
        await asyncio.Event().wait()

    with pytest.raises(RewardError) as raised:
        RewardScorer([waits, blocks], timeout=0.05, names=["waits", "blocks"]).score(PROMPTS, images, {})
    assert "The reward functions 'waits', 'blocks' had not answered after 0.05 seconds" in str(raised.value)
    assert "without awaiting" in str(raised.value)
    assert call(async_returns([1, 2, 3]), images, GIVEN_UP) == [1, 2, 3]


def test_without_a_limit_a_sync_function_runs_in_the_thread_of_the_caller(images):
    threads = []

    def reward(prompts, images, **kwargs):
        threads.append(threading.get_ident())
        return [0, 0, 0]

    call(reward, images)
    call(reward, images, GIVEN_UP)
    assert threads[0] == threading.get_ident() != threads[1]


@pytest.mark.parametrize("timeout", [None, GIVEN_UP])
@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_are_recorded_in_a_reward_as_in_its_caller(images, timeout, enabled):
    def reward(prompts, images, **kwargs):
        return [torch.is_grad_enabled()] * 3

    with torch.set_grad_enabled(enabled):
        assert call(reward, images, timeout) == [float(enabled)] * 3
        assert torch.is_grad_enabled() == enabled


@pytest.mark.parametrize("definition", ["def", "async def"])
def test_a_function_that_hangs_does_not_keep_the_process_from_ending(definition):
    script = f"""
        import threading
        from PIL import Image
        from trl_flow.rewards import scorer

        scorer._LAST_MOMENT = 0.1

        {definition} hangs(prompts, images, **kwargs):
            threading.Event().wait()

        try:
            scorer.RewardScorer([hangs], timeout=0.05).score(["a cat"], [Image.new("RGB", (4, 4))], {{}})
        except scorer.RewardError as error:
            print("ended by", error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("ended by The reward function 'hangs' had not answered")


# --- part by part ---


@pytest.fixture
def threads():
    """Fails if a thread for rewards outlives the test."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("rewards"):
            thread.join(GIVEN_UP)
            assert not thread.is_alive()


def session(func, background, **options):
    return RewardScorer([func], names=["r"], **options).session(background=background)


def submit(session, number):
    """A part of as many images."""
    session.submit(["a"] * number, [Image.new("RGB", (4, 4))] * number, {})


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("timeout", [None, GIVEN_UP])
def test_parts_are_scored_in_order_one_at_a_time(background, timeout, threads):
    running, seen = [], []

    def reward(prompts, images, **kwargs):
        running.append(len(images))
        time.sleep(0.002 * (5 - len(images)))
        seen.append((len(images), list(running)))
        running.remove(len(images))
        return [len(images)] * len(images)

    with session(reward, background, timeout=timeout) as scoring:
        for number in range(1, 4):
            submit(scoring, number)
        rewards = scoring.result().rewards
        assert not scoring.busy
    assert rewards.tolist() == [[1.0], [2.0], [2.0], [3.0], [3.0], [3.0]]
    assert seen == [(number, [number]) for number in range(1, 4)]


def test_nothing_submitted_is_an_empty_result():
    with session(brightness, False) as scoring:
        assert scoring.result().rewards.shape == (0, 1)


def test_the_caller_goes_on_meanwhile(threads):
    gate = threading.Event()

    def reward(prompts, images, **kwargs):
        return [gate.wait(GIVEN_UP)]

    with session(reward, True) as scoring:
        submit(scoring, 1)
        assert scoring.busy
        gate.set()  # not reached, were it scored at once
        assert scoring.result().rewards.tolist() == [[1.0]]


@pytest.mark.parametrize("background", [True, False])
def test_after_a_failure_no_part_is_scored(background, threads):
    called = []

    def fails(prompts, images, **kwargs):
        called.append(len(images))
        if len(images) == 2:
            raise ValueError("gone")
        return [0] * len(images)

    with session(fails, background) as scoring:
        for number in (1, 2, 3):
            submit(scoring, number)
        for get in (scoring.result, scoring.raise_error):
            with pytest.raises(RewardError, match="'r' raised ValueError: gone"):
                get()
    assert called == [1, 2]


@pytest.mark.parametrize("background", [True, False])
def test_other_errors_reach_the_caller(background, threads):
    def leaves(prompts, images, **kwargs):
        raise SystemExit(3)

    with pytest.raises(SystemExit), session(leaves, background) as scoring:
        submit(scoring, 1)
        assert background  # at once, where there is no thread
        scoring.result()


def test_too_little_memory_for_both_is_explained(threads):
    def needs_memory(prompts, images, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    for background in (True, False):
        with session(needs_memory, background) as scoring:
            submit(scoring, 1)
            with pytest.raises(RewardError, match="'r' raised OutOfMemoryError") as raised:
                scoring.result()
        assert ("overlap_rewards=False" in str(raised.value)) == background


def test_an_error_of_the_caller_ends_the_scoring(threads):
    called, started, gate = [], threading.Event(), threading.Event()

    def slow(prompts, images, **kwargs):
        started.set()
        gate.wait(GIVEN_UP)
        called.append(len(images))
        return [0] * len(images)

    with pytest.raises(FloatingPointError), session(slow, True) as scoring:
        submit(scoring, 1)
        submit(scoring, 2)
        started.wait(GIVEN_UP)
        threading.Timer(0.05, gate.set).start()
        raise FloatingPointError
    assert called == [1]  # it has been waited for, and what came behind it dropped


def test_ctrl_c_does_not_wait():
    called, started, gate = [], threading.Event(), threading.Event()

    def slow(prompts, images, **kwargs):
        called.append(len(images))
        started.set()
        gate.wait(GIVEN_UP)
        return [0] * len(images)

    with pytest.raises(KeyboardInterrupt), session(slow, True) as scoring:
        submit(scoring, 1)
        submit(scoring, 2)
        started.wait(GIVEN_UP)
        raise KeyboardInterrupt
    (thread,) = [thread for thread in threading.enumerate() if thread.name.startswith("rewards")]
    gate.set()
    thread.join(GIVEN_UP)
    assert called == [1]


@pytest.mark.parametrize("background", [True, False])
def test_after_ctrl_c_the_process_ends_in_order(background):
    # Were its thread torn out of PyTorch, the process would be aborted
    program = f"""
import sys, threading, time, torch
from PIL import Image
from trl_flow.rewards.scorer import RewardScorer

started = threading.Event()

def compute(prompts, images, **kwargs):
    started.set()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        torch.ones(256, 256) @ torch.ones(256, 256)
    print("has ended")
    return [0]

sample = ["a"], [Image.new("RGB", (4, 4))], {{}}
try:
    if {background}:
        with RewardScorer([compute]).session(background=True) as scoring:
            scoring.submit(*sample)
            started.wait()
            raise KeyboardInterrupt
    else:
        RewardScorer([compute], timeout=0.1).score(*sample)
except (KeyboardInterrupt, RuntimeError):
    sys.exit(130)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (130, "has ended\n"), result.stderr


def test_the_thread_has_the_callers_settings(threads):
    def settings():
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads()

    seen = []

    def reward(prompts, images, **kwargs):
        seen.append(settings())
        return [0]

    for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with context(), session(reward, True) as scoring:
            submit(scoring, 1)
            scoring.result()
            assert seen.pop() == settings()
