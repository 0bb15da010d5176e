"""`trl-flow serve-rewards` as a program: what it prints, what it refuses, and how it ends."""

import contextlib
import socket
import sys
import threading

import httpx2
import pytest
from server_requests import form, free_port, wait_until

from trl_flow.cli import main
from trl_flow.rewards.base import ModelReward
from trl_flow.serving.command import _configure, _listen


def wait_for_requests(server, number):
    wait_until(lambda: f"trl_flow_waiting {number}.0" in httpx2.get(f"{server.url}/metrics").text)


def answers(url):
    try:
        return httpx2.get(f"{url}/health")
    except httpx2.ConnectError:
        return None


def mistake(capsys, *options):
    """What the command prints when it refuses its options."""
    assert main(["serve-rewards", *options]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "options, words",
    [
        (["--rewards", "pikscore"], "there is no reward function 'pikscore'"),
        (["--rewards", ","], "--rewards is missing"),
        (["--rewards", "no_such_module.f"], "No module named 'no_such_module'"),
        (["--rewards", "json.decoder"], "must be a function or an object with __call__"),
        (["--rewards", "shapes_soft", "--host", "0.0.0.0"], "there is no token"),
        (["--rewards", "shapes_soft", "--host", "::"], "there is no token"),
        (["--rewards", "shapes_soft", "--host", "example.org"], "there is no token"),
        (["--rewards", "shapes_soft", "--host", "127.0.0.300"], "there is no token"),
        (["--rewards", "shapes_soft", "--port", "70000"], "--port is 70000"),
        (["--rewards", "shapes_soft", "--port", "-1"], "--port is -1"),
        (["--rewards", "shapes_soft", "--token-file", "no-such-file"], "no-such-file"),
        (["--rewards", "shapes_soft", "--token-file", "empty"], "one or more printable ASCII characters"),
        (["--rewards", "shapes_soft", "--token-file", "words"], "one or more printable ASCII characters"),
        (["--rewards", "shapes_soft", "--max-images", "0"], "max_images is 0"),
        (["--rewards", "shapes_soft", "--upload-timeout", "nan"], "upload_timeout is nan"),
        (["--rewards", "shapes_soft", "--upload-timeout", "inf"], "upload_timeout is inf"),
        (["--rewards", "shapes_soft", "--grace", "-1"], "--grace is -1"),
        (["--rewards", "shapes_soft", "--workers", "0"], "--workers is 0"),
        (["--rewards", "shapes_soft", "--workers", "40"], "Give --max-waiting 80"),
        (["--rewards", "shapes_soft", "--device", "gpu"], "--device is 'gpu'"),
        (["--rewards", "shapes_soft", "--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_options_that_are_refused(capsys, tmp_path, monkeypatch, options, words):
    monkeypatch.delenv("TRL_FLOW_REWARD_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "words").write_text("geheim und lang")
    error = mistake(capsys, *options)
    assert words in error and "geheim" not in error


def test_a_port_that_is_taken(capsys, serve_rewards):
    port = serve_rewards(rewards="jpeg_compressibility").url.rsplit(":", 1)[1]
    error = mistake(capsys, "--rewards", "jpeg_compressibility", "--port", port)
    assert f"127.0.0.1, port {port}, cannot be listened on: Address already in use" in error


def test_answers_are_not_held_back_by_the_system():
    # Nagle's algorithm and delayed acknowledgements together would cost 40 ms for each request
    with _listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_without_its_packages_it_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert 'pip install "trl_flow[serve]"' in mistake(capsys, "--rewards", "jpeg_compressibility")


@pytest.mark.parametrize("with_file", [False, True])
def test_the_token_comes_from_the_environment_or_a_file(serve_rewards, tmp_path, with_file):
    (tmp_path / "token").write_text("from-the-file\n")
    options = ["--token-file", str(tmp_path / "token")] if with_file else []
    # With a token it may be reached from other machines
    server = serve_rewards(*options, "--host", "0.0.0.0", rewards="jpeg_compressibility", token="from-outside")
    url = server.url.replace("0.0.0.0", "127.0.0.1")
    statuses = {
        token: httpx2.get(f"{url}/rewards", headers={"Authorization": f"Bearer {token}"}).status_code
        for token in ("from-the-file", "from-outside")
    }
    right = "from-the-file" if with_file else "from-outside"
    assert statuses == {token: 200 if token == right else 401 for token in statuses}


def test_options_of_models_reach_those_that_have_one():
    import torch

    from trl_flow.rewards import JPEGCompressibilityReward

    class Model(ModelReward):
        def _load(self, device):
            return None

        def _score(self, loaded, prompts, images, columns):
            return [0.0] * len(images)

    model = Model()
    _configure(model, "cpu", "bfloat16", 3)
    assert (model.device, model.dtype, model.batch_size) == (torch.device("cpu"), torch.bfloat16, 3)
    _configure(model, None, None, None)
    assert (model.device, model.dtype, model.batch_size) == (torch.device("cpu"), torch.bfloat16, 3)
    _configure(JPEGCompressibilityReward(), "cpu", "bfloat16", 3)


# ---- How it ends ----


def test_running_requests_are_finished_before_it_ends(serve_rewards, tmp_path):
    server = serve_rewards(rewards="served_rewards.as_told")
    given = []

    def ask(prompt):
        given.append(httpx2.post(f"{server.url}/score", files=form(prompt), timeout=30).json())

    # The second waits behind the first
    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in (f"wait {tmp_path / 'go on'}", "a")]
    for number, thread in enumerate(threads, 1):
        thread.start()
        wait_for_requests(server, number)
    server.terminate()
    (tmp_path / "go on").touch()
    for thread in threads:
        thread.join()
    assert [answer["rewards"] for answer in given] == [{"as_told": [1.0]}] * 2
    assert server.exit_code() == 0
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{server.url}/health")


def test_it_ends_although_a_function_hangs(serve_rewards):
    server = serve_rewards("--grace", "1", rewards="served_rewards.as_told")

    def ask():
        with contextlib.suppress(httpx2.HTTPError):
            httpx2.post(f"{server.url}/score", files=form("sleep 3600"), timeout=3600)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    wait_for_requests(server, 1)
    server.terminate()
    assert server.exit_code() == 0


def test_models_that_cannot_be_loaded(server_parent):
    server = server_parent.start(rewards="served_rewards.Broken", wait=False)
    assert server.exit_code() == 1
    assert "error: there are no weights" in server.output() and "ready" not in server.output()


def test_health_tells_that_models_are_being_loaded(server_parent, tmp_path):
    server = server_parent.start(rewards="served_rewards.SlowToLoad", wait=False, port=free_port(), cwd=tmp_path)
    try:
        wait_until(lambda: answers(server.url))
        health = httpx2.get(f"{server.url}/health")
        assert (health.status_code, health.json()) == (503, {"ready": False})
        answer = httpx2.post(f"{server.url}/score", files=form("a"))
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert httpx2.get(f"{server.url}/rewards").json()["rewards"][0]["dtype"] == "float32"
        (tmp_path / "go").touch()
        line = f"trl-flow serve-rewards: {server.url} is ready with SlowToLoad\n"
        wait_until(lambda: line in server.output())
        assert httpx2.get(f"{server.url}/health").json() == {"ready": True}
        assert httpx2.post(f"{server.url}/score", files=form("a")).json()["rewards"] == {"SlowToLoad": [0.5]}
        server.terminate()
        assert server.exit_code() == 0
    finally:
        if not server.ended():
            server.kill()
