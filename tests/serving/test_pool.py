"""`trl-flow serve-rewards --workers N`: processes that score, die and are replaced."""

import asyncio
import contextlib
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import psutil
import pytest
from PIL import Image
from server_requests import form, free_port, wait_until

from trl_flow.rewards import RemoteReward, RewardServerError
from trl_flow.serving.workers import pool


def children(server) -> list[int]:
    """The processes that score."""
    found = psutil.Process(server.pid).children()
    return [child.pid for child in found if "spawn_main" in " ".join(child.as_dict(["cmdline"])["cmdline"] or ())]


def ask(server, prompt):
    return httpx2.post(f"{server.url}/score", files=form(prompt), timeout=60)


@pytest.fixture(scope="module")
def server(server_parent):
    options = ["--workers", "2", "--max-pixels", "5000"]
    server = server_parent.start(*options, rewards="served_rewards.as_told,served_rewards.process")
    yield server
    pids = children(server)
    server.terminate()
    assert server.exit_code() == 0
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_requests_are_scored_at_the_same_time(server, tmp_path):
    # Of both, one waits for what the other does when it is scored
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda word: ask(server, f"{word} {tmp_path / 'go'}").json(), ("wait", "touch")))
    assert [answer["rewards"]["as_told"] for answer in answers] == [[1.0]] * 2
    pids = {answer["rewards"]["process"][0] for answer in answers}
    assert len(pids) == 2 and pids <= set(children(server))


def test_what_the_server_says_of_itself(server):
    assert httpx2.get(f"{server.url}/rewards").json()["workers"] == 2
    assert "trl_flow_workers 2.0" in httpx2.get(f"{server.url}/metrics").text


def test_a_client_cuts_its_batch_for_all_workers(server):
    reward = RemoteReward(server.url, reward="process")
    images = [Image.new("RGB", (4, 4))] * 6
    assert set(asyncio.run(reward(prompts=["a"] * 6, images=images))) <= set(children(server))
    assert reward._parts(["a"] * 6, reward.batch_size) == [slice(0, 3), slice(3, 6)]


@pytest.mark.parametrize("size, status", [((100, 100), 413), (None, 415)])
def test_images_that_are_refused(server, size, status):
    files = form("a", size or (2, 2))
    if size is None:
        files[1] = ("images", ("0.png", b"no image", "image/png"))
    answer = httpx2.post(f"{server.url}/score", files=files)
    assert answer.status_code == status and "Image 0" in answer.json()["detail"]


def test_a_function_that_raises_is_told_and_logged(server):
    answer = ask(server, "raise of the pool")
    assert answer.status_code == 500 and "'as_told' raised KeyError: 'of the pool'" in answer.json()["detail"]
    assert "Traceback" in server.output() and "of the pool" in server.output()
    assert 'trl_flow_reward_errors_total{reward="as_told"} 1.0' in httpx2.get(f"{server.url}/metrics").text


@pytest.mark.slow
def test_one_that_is_killed_at_rest_is_replaced_and_no_request_fails(server):
    before = children(server)
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: len(set(children(server)) - set(before)) == 1)
    wait_until(lambda: "trl_flow_workers 2.0" in httpx2.get(f"{server.url}/metrics").text)
    assert [ask(server, "a").status_code for _ in range(4)] == [200] * 4


def test_one_that_dies_while_it_scores_is_replaced_and_the_client_asks_again(server, tmp_path):
    before = children(server)
    reward = RemoteReward(server.url, reward="as_told", backoff=0.01)
    prompts, images = [f"die once {tmp_path / 'died'}"], [Image.new("RGB", (4, 4))]
    assert asyncio.run(reward(prompts=prompts, images=images)) == [1.0]
    assert (tmp_path / "died").exists()
    hopeless = RemoteReward(server.url, reward="as_told", retries=0)
    with pytest.raises(RewardServerError, match="status 500: The process that scores ended with exit code 7"):
        asyncio.run(hopeless(prompts=["die"], images=images))
    wait_until(lambda: "trl_flow_workers 2.0" in httpx2.get(f"{server.url}/metrics").text)
    assert not set(children(server)) & set(before)


@pytest.mark.slow
def test_signals_to_all_processes_let_requests_finish(server_parent, tmp_path):
    server = server_parent.start("--workers", "2", rewards="served_rewards.as_told")
    given = []
    thread = threading.Thread(target=lambda: given.append(ask(server, f"wait {tmp_path / 'go'}").json()))
    thread.start()
    wait_until(lambda: "trl_flow_waiting 1.0" in httpx2.get(f"{server.url}/metrics").text)
    pids = children(server)
    for pid in (*pids, server.pid):  # as a scheduler does
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.2)
    (tmp_path / "go").touch()
    thread.join()
    assert given[0]["rewards"] == {"as_told": [1.0]}
    assert server.exit_code() == 0
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.slow
def test_workers_end_when_the_server_is_killed_even_one_that_is_busy(server_parent, tmp_path):
    server = server_parent.start("--workers", "2", rewards="served_rewards.as_told")
    pids = children(server)
    assert len(pids) == 2

    def ask_in_vain():
        with contextlib.suppress(httpx2.TransportError):
            ask(server, f"begin {tmp_path / 'busy'}")

    thread = threading.Thread(target=ask_in_vain)
    thread.start()
    wait_until((tmp_path / "busy").exists)
    server.kill()
    thread.join()
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


@pytest.mark.slow
def test_models_that_cannot_be_loaded(server_parent):
    server = server_parent.start("--workers", "2", rewards="served_rewards.Broken", wait=False, port=free_port())
    assert server.exit_code() == 1
    assert "error: there are no weights" in server.output() and "ready" not in server.output()


def test_how_threads_and_gpus_are_shared_out(monkeypatch):
    def environments(number, device=None):
        return [start.args[2] for start in pool(list, 1, number, device)]

    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    threads = {"OMP_NUM_THREADS": "2"}
    assert environments(3) == [threads | {"CUDA_VISIBLE_DEVICES": gpu} for gpu in "010"]
    assert environments(3, "cuda") == environments(3)
    assert environments(3, "cuda:1") == environments(3, "cpu") == [threads] * 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-ab")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert environments(2) == [{"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "GPU-ab"}]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert environments(2) == [{}, {}]
