"""Calls in a thread are the calls that would have been made at once, in their order."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from trl_flow.rewards.checks import RewardError
from trl_flow.trainer.ordered_calls import OrderedCalls


@pytest.fixture
def threads():
    """Fails if a thread for rewards outlives the test."""
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "rewards"]


@pytest.mark.parametrize("background", [True, False])
def test_calls_are_made_in_order_one_at_a_time(background, threads):
    running, seen = [], []

    def call(number):
        running.append(number)
        time.sleep(0.002 * (5 - number))
        seen.append((number, list(running), threading.current_thread() is threading.main_thread()))
        running.remove(number)
        return number

    with OrderedCalls(background=background) as calls:
        for number in range(5):
            calls.add(lambda number=number: call(number))
        assert calls.results() == [0, 1, 2, 3, 4]
        assert not calls.busy
    assert seen == [(number, [number], not background) for number in range(5)]


def test_the_caller_goes_on_meanwhile(threads):
    gate = threading.Event()
    with OrderedCalls(background=True) as calls:
        calls.add(gate.wait)
        assert calls.busy
        gate.set()  # not reached, were the call made at once
        assert calls.results() == [True]


@pytest.mark.parametrize("background", [True, False])
def test_after_a_reward_error_no_call_is_made(background, threads):
    made = []

    def fail():
        raise RewardError("gone")

    with OrderedCalls(background=background) as calls:
        calls.add(lambda: made.append(1))
        calls.add(fail)
        calls.add(lambda: made.append(3))
        with pytest.raises(RewardError, match="gone"):
            calls.results()
        with pytest.raises(RewardError, match="gone"):
            calls.raise_error()
    assert made == [1]


@pytest.mark.parametrize("background", [True, False])
def test_other_errors_reach_the_caller(background, threads):
    def leave():
        raise SystemExit(3)

    with pytest.raises(SystemExit), OrderedCalls(background=background) as calls:
        calls.add(leave)
        assert background  # at once, where there is no thread
        calls.results()


def test_an_error_of_the_caller_ends_the_calls(threads):
    made, started, gate = [], threading.Event(), threading.Event()

    def slow():
        started.set()
        gate.wait()
        made.append("slow")

    with pytest.raises(FloatingPointError), OrderedCalls(background=True) as calls:
        calls.add(slow)
        calls.add(lambda: made.append("never"))
        started.wait()
        threading.Timer(0.05, gate.set).start()
        raise FloatingPointError
    assert made == ["slow"]  # it has been waited for, and what came behind it dropped


def test_ctrl_c_does_not_wait():
    started, gate, made = threading.Event(), threading.Event(), []

    def slow():
        started.set()
        gate.wait()

    with pytest.raises(KeyboardInterrupt), OrderedCalls(background=True) as calls:
        calls.add(slow)
        calls.add(lambda: made.append("never"))
        started.wait()
        raise KeyboardInterrupt
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "rewards"]
    assert thread.daemon
    gate.set()
    thread.join()
    assert made == []


def test_after_ctrl_c_the_process_ends_in_order():
    # Without a moment for the call, Python would tear its thread out of PyTorch, which aborts the process
    program = """
import sys, threading, time, torch
from trl_flow.trainer.ordered_calls import OrderedCalls

started = threading.Event()

def compute():
    started.set()
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        torch.ones(256, 256) @ torch.ones(256, 256)
    print("has ended")

try:
    with OrderedCalls(background=True) as calls:
        calls.add(compute)
        started.wait()
        raise KeyboardInterrupt
except KeyboardInterrupt:
    sys.exit(130)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (130, "has ended\n"), result.stderr


def test_the_thread_has_the_callers_settings(threads):
    def settings():
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads()

    for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with context(), OrderedCalls(background=True) as calls:
            calls.add(settings)
            assert calls.results() == [settings()]
