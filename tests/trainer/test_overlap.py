"""Rewards that are computed while the rest is sampled are those of the serial order."""

import asyncio
import random
import threading
import time

import numpy as np
import pytest
import torch
from tiny_training import assert_equal, brightness, tiny_trainer, trained_weights

from trl_flow.rewards.checks import RewardError
from trl_flow.rollout import decode


# Two sampling phases of 16 images each: four groups, sampled in four parts
FIELDS = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 4}


class Recorder:
    """Rewards by several functions that would show it, were they called in another order or on other images."""

    def __init__(self):
        self.calls = []
        self.total = 0.0

    def note(self, name, prompts, images):
        in_main = threading.current_thread() is threading.main_thread()
        self.calls.append((name, list(prompts), [image.tobytes() for image in images], in_main))

    def functions(self):
        def stateful(prompts, images, log_metric, trainer_state, **kwargs):
            self.note("stateful", prompts, images)
            values = brightness(prompts, images)
            self.total = 0.5 * self.total + sum(values)
            log_metric("total", self.total)
            time.sleep(0.01 * (len(self.calls) % 3))
            return [value * (1 + self.total + trainer_state.global_step) for value in values]

        def drawing(prompts, images, log_extra, **kwargs):
            self.note("drawing", prompts, images)
            values = [random.random() + np.random.rand() + torch.rand(()).item() for _ in images]
            log_extra("drawn", values)
            return [None if value > 2.5 else value for value in values]

        async def asynchronous(prompts, images, **kwargs):
            await asyncio.sleep(0.01)
            return [1 - value for value in brightness(prompts, images)]

        return [stateful, drawing, asynchronous]


def run(folder, overlap, monkeypatch, **fields):
    recorder, captions = Recorder(), []
    monkeypatch.setattr(
        "trl_flow.trainer.metrics.image_grid", lambda images, texts: captions.append(list(texts)) or images[0]
    )
    fields = {**FIELDS, "max_steps": 3, "log_images": True, **fields}
    trainer = tiny_trainer(folder, reward_funcs=recorder.functions(), overlap_rewards=overlap, **fields)
    trainer.train()
    logs = [{name: value for name, value in log.items() if "time" not in name} for log in trainer.state.log_history]
    # the last are of the run as a whole, and its speed
    return trained_weights(trainer), logs[:-1], captions, recorder.calls


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"per_device_train_batch_size": 2, "num_iterations": 2, "max_steps": 4, "reward_timeout": 60.0},
        # parts that end within a group
        {"per_device_train_batch_size": 6, "steps_per_generation": 2, "gradient_accumulation_steps": 1},
        {"dense_rewards": True, "max_steps": 2},
        {"multi_objective_aggregation": "normalize_then_sum", "max_steps": 2},
    ],
    ids=["accumulation", "half a group and time limit", "one and a half groups", "dense", "normalize then sum"],
)
def test_the_same_calls_images_and_weights(fields, tmp_path, monkeypatch):
    weights, logs, captions, calls = run(tmp_path / "overlapped", True, monkeypatch, **fields)
    serial_weights, serial_logs, serial_captions, serial_calls = run(tmp_path / "serial", False, monkeypatch, **fields)
    assert_equal(weights, serial_weights)
    assert logs == serial_logs
    assert captions == serial_captions and all("drawn" in caption for caption in captions[0])
    assert [call[:3] for call in calls] == [call[:3] for call in serial_calls]
    # Groups are complete in every call
    for _, prompts, *_ in calls:
        assert len(prompts) % 4 == 0
        assert all(len(set(prompts[first : first + 4])) == 1 for first in range(0, len(prompts), 4))
    if "reward_timeout" not in fields:
        assert all(in_main for *_, in_main in serial_calls)
        assert not all(in_main for *_, in_main in calls)


def test_the_next_part_is_sampled_meanwhile_but_in_the_first_phase(tmp_path, decoding):
    second_part, met = threading.Event(), []

    def reward(prompts, images, trainer_state, **kwargs):
        in_main = threading.current_thread() is threading.main_thread()
        assert in_main == (trainer_state.global_step == 0)
        if not in_main:
            met.append(second_part.wait(60))  # in vain, were the second part sampled after the first one's reward
        return brightness(prompts, images)

    trainer = tiny_trainer(tmp_path, reward_funcs=reward, **FIELDS, max_steps=2)
    parts = decoding(trainer, second_part.set)
    trainer.train()
    assert met == [True] * 4 and parts == [4] * 4


def test_nothing_overlaps_with_dropout_which_draws_from_the_same_generators(tmp_path):
    threads = set()

    def reward(prompts, images, **kwargs):
        threads.add(threading.current_thread())
        return brightness(prompts, images)

    tiny_trainer(tmp_path, reward_funcs=reward, disable_dropout=False, **FIELDS, max_steps=2).train()
    assert threads == {threading.main_thread()}


# ---- Errors ----


class Later:
    """Good rewards in the first phase; from then on `act` in the thread."""

    def __init__(self, act):
        self.act = act
        self.started = threading.Event()

    def __call__(self, prompts, images, trainer_state, **kwargs):
        if trainer_state.global_step > 0:
            self.started.set()
            self.act()
        return brightness(prompts, images)


@pytest.fixture
def decoding(monkeypatch):
    """Counts the parts that a trainer decodes after its first update; at the second `when_second` is called."""

    def of(trainer, when_second):
        parts = []

        def counted(backbone, latents):
            if trainer.state.global_step > 0:
                parts.append(len(latents))
                if len(parts) == 2:
                    when_second()
            return decode(backbone, latents)

        monkeypatch.setattr("trl_flow.trainer.sampler.decode", counted)
        return parts

    return of


def no_thread_is_left() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("rewards")]


def test_an_error_ends_the_sampling_at_the_next_part(tmp_path, decoding):
    def fail():
        raise OSError("the server is gone")

    reward = Later(fail)
    trainer = tiny_trainer(tmp_path, reward_funcs=reward, **FIELDS)
    parts = decoding(trainer, lambda: reward.started.wait(30) and time.sleep(0.3))
    with pytest.raises(RewardError, match="'Later' raised OSError: the server is gone"):
        trainer.train()
    assert parts in ([4], [4, 4])  # the thread may have failed before the first part is left
    assert no_thread_is_left()


def test_ctrl_c_does_not_wait(tmp_path, decoding):
    gate = threading.Event()
    reward = Later(lambda: gate.wait(60))
    trainer = tiny_trainer(tmp_path, reward_funcs=reward, **FIELDS)

    def interrupt():
        assert reward.started.wait(30)
        raise KeyboardInterrupt

    decoding(trainer, interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not no_thread_is_left()  # the call that nothing can stop: it was not waited for
    gate.set()
    (thread,) = [thread for thread in threading.enumerate() if thread.name.startswith("rewards")]
    thread.join(30)
    assert no_thread_is_left()


def test_memory_that_both_need_is_named_with_the_remedy(tmp_path, decoding):
    def fail():
        raise torch.OutOfMemoryError("out of memory")

    trainer = tiny_trainer(tmp_path / "reward", reward_funcs=Later(fail), **FIELDS)
    with pytest.raises(RewardError, match=r"'Later' raised OutOfMemoryError.*overlap_rewards=False.*batch size"):
        trainer.train()
    trainer = tiny_trainer(tmp_path / "serial", reward_funcs=Later(fail), overlap_rewards=False, **FIELDS)
    with pytest.raises(RewardError) as error:
        trainer.train()
    assert "overlap_rewards" not in str(error.value)

    gate = threading.Event()
    reward = Later(lambda: gate.wait(1))
    trainer = tiny_trainer(tmp_path / "sampling", reward_funcs=reward, **FIELDS)
    decoding(trainer, lambda: reward.started.wait(30) and fail())
    with pytest.raises(torch.OutOfMemoryError, match="out of memory.*overlap_rewards=False"):
        trainer.train()
    assert no_thread_is_left()
