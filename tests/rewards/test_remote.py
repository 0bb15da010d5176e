"""Scores from reward servers are those of the functions themselves, whatever happens to the servers."""

import asyncio
import http.server
import json
import logging
import math
import socket
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from served_rewards import brightness, thirds
from tiny_videos import gray, moving_square

from trl_flow.rewards import (
    FrameReward,
    JPEGIncompressibilityReward,
    MotionReward,
    RemoteReward,
    RewardServerError,
    ShapesReward,
)
from trl_flow.rewards.checks import check_reward_func, is_dense, reward_name
from trl_flow.rewards.named import named_reward
from trl_flow.rewards.scorer import RewardScorer
from trl_flow.shapes import load_prompts


def pictures(number, size=24, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (number, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(one).convert(mode) for one in pixels]


def ask(reward, prompts, images, **columns):
    return asyncio.run(reward(prompts=prompts, images=images, **columns))


def free_port():
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Answering(http.server.BaseHTTPRequestHandler):
    """Something that is not a reward server, or not a good one: answers all requests in the way of its subclass."""

    protocol_version = "HTTP/1.1"
    answers: dict[str, list] = {}

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        left = self.answers[self.path]
        status, headers, body = left.pop(0) if len(left) > 1 else left[0]
        data = body.encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(data)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = answer

    def log_message(self, *arguments):
        pass


@pytest.fixture
def answering():
    """A function that starts such a server: for each path, the answers in turn, the last of them for ever."""
    running = []

    def start(**answers):
        paths = {f"/{name}": found for name, found in answers.items()}
        handler = type("Handler", (Answering,), {"answers": paths})
        running.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_port}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


CARD = {"name": "fake", "dense": True, "needs_group": False, "dtype": None, "info": None}
OFFER = (200, {}, json.dumps({"protocol": 1, "rewards": [CARD], "limits": {"max_images": 8}}))


def scores(*values):
    return 200, {}, json.dumps({"rewards": {"fake": values}, "cards": {"fake": CARD}})


# ---- The same scores ----


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_scores_are_those_of_the_function_itself(serve_rewards, mode):
    reward = RemoteReward(serve_rewards(rewards="jpeg_incompressibility").url)
    images = pictures(5, mode=mode)
    assert ask(reward, [""] * 5, images) == JPEGIncompressibilityReward()([""] * 5, images)
    assert all(image.mode == mode for image in images)


def test_16_bits_and_cut_outs_are_scored_as_what_they_show(serve_rewards):
    remote, local = RemoteReward(serve_rewards(rewards="jpeg_incompressibility").url), JPEGIncompressibilityReward()
    gray = np.random.default_rng(0).integers(0, 256, (24, 24), dtype=np.uint8)
    noise, left = Image.fromarray(gray), Image.new("L", (24, 24))
    left.paste(255, (0, 0, 12, 24))  # what is opaque
    cut_outs = [
        Image.composite(noise.convert("RGB"), Image.new("RGB", (24, 24), color), left) for color in ("red", "blue")
    ]
    for image in cut_outs:
        image.putalpha(left)
    images = [noise, Image.fromarray(gray.astype(np.uint16) * 257), *cut_outs]
    scores = ask(remote, [""] * 4, images)
    assert scores == local([""] * 4, images)
    assert scores[0] == scores[1] and scores[2] == scores[3] < scores[0]


def test_no_digit_and_no_none_is_lost_on_the_way(serve_rewards):
    reward = RemoteReward(serve_rewards(rewards="served_rewards.thirds").url)
    images = [Image.new("RGB", size) for size in [(100, 1), (1, 100), (7, 7)]]
    assert ask(reward, ["a", "b", "c"], images) == [100 / 3, None, 7 / 3]
    given = {"trainer_state": None, "log_metric": print, "log_extra": print}
    assert ask(reward, ["a", "b", "c"], images, **given) == thirds(
        ["a"], images, None, lambda *a: None, lambda *a: None
    )


def test_columns_and_prompts_of_any_script_arrive(serve_rewards):
    reward = RemoteReward(serve_rewards(rewards="served_rewards.weighted").url)
    texts = ["", "żółć", "猫が二匹", "🦜" * 3, 'a "b"\n\\c']
    weights = [1, 0.1, -2.5e-300, 10**20, True]
    expected = [len(text) * weight for text, weight in zip(texts, weights, strict=True)]
    assert ask(reward, texts, pictures(5), weight=weights, note=[{"ü": [None]}] * 5) == expected


def test_the_rules_of_the_shapes_get_their_columns(serve_rewards):
    reward = RemoteReward(serve_rewards(rewards="shapes_soft").url)
    rows = load_prompts("test").select(range(6))
    columns = {name: rows[name][:] for name in ("objects", "relation")}
    images = pictures(6, 32)
    assert ask(reward, rows["prompt"][:], images, **columns) == ShapesReward()([""] * 6, images, **columns)


def test_it_tells_what_the_function_tells_of_itself(serve_rewards):
    url = serve_rewards(rewards="jpeg_incompressibility,served_rewards.place_in_call,served_rewards.group_size").url
    jpeg = RemoteReward(url, reward="jpeg_incompressibility")
    assert (reward_name(jpeg), is_dense(jpeg), jpeg.needs_group) == ("jpeg_incompressibility", True, False)
    assert jpeg.info == JPEGIncompressibilityReward.info  # its range has no upper end, for which JSON has no word
    other = RemoteReward(url, reward="place_in_call")
    assert (reward_name(other), is_dense(other), other.info) == ("place_in_call", False, None)
    assert RemoteReward(url, reward="group_size").needs_group


def test_by_an_address_in_a_recipe(serve_rewards):
    url = serve_rewards(rewards="jpeg_incompressibility,served_rewards.brightness").url
    images = pictures(2)
    assert ask(named_reward(f"{url}#brightness"), ["", ""], images) == brightness([], images)
    one = serve_rewards(rewards="served_rewards.brightness").url
    assert reward_name(named_reward(f"{one}/")) == "brightness"
    with pytest.raises(ValueError, match=r"Choose one: reward='jpeg_incompressibility'"):
        named_reward(url)


def test_calls_from_many_threads_and_event_loops(serve_rewards):
    reward = RemoteReward(serve_rewards(rewards="served_rewards.brightness").url)
    images = pictures(8)
    expected = brightness([], images)

    def call(i):
        return ask(reward, [""], [images[i]])

    with ThreadPoolExecutor(8) as pool:
        assert [value for (value,) in pool.map(call, range(8))] == expected
    for _ in range(2):
        both = RewardScorer([reward, brightness], timeout=30).score([""] * 8, images, {}).rewards
        assert torch.equal(both[:, 0], both[:, 1])
    assert len(ask(reward, [], [])) == 0


# ---- Parts of a batch, several servers ----


def test_a_batch_is_cut_into_equal_parts_for_all_servers(serve_rewards):
    urls = [serve_rewards("--max-images", "4", rewards="served_rewards.place_in_call").url for _ in range(2)]
    reward = RemoteReward(urls)
    assert reward.batch_size == 4
    assert ask(reward, [""] * 6, pictures(6)) == [3.0, 3.001, 3.002] * 2
    assert ask(reward, [""] * 9, pictures(9)) == [4.0, 4.001, 4.002, 4.003] * 2 + [1.0]
    assert ask(RemoteReward(urls, batch_size=1), [""] * 3, pictures(3)) == [1.0] * 3
    with pytest.raises(ValueError, match="batch_size is 5, but a server accepts 4 images"):
        RemoteReward(urls, batch_size=5)


def test_functions_that_compare_get_whole_groups(serve_rewards):
    urls = [serve_rewards("--max-images", "5", rewards="served_rewards.group_size").url for _ in range(2)]
    reward = RemoteReward(urls)
    groups = ["a"] * 5 + ["b"] * 1 + ["c"] * 2 + ["d"] * 3
    assert ask(reward, groups, pictures(11)) == [5] * 5 + [1] + [2] * 2 + [3] * 3
    with pytest.raises(ValueError, match="there are 6 of 'a' next to each other: more than the 5"):
        ask(reward, ["a"] * 6, pictures(6))


# ---- Videos ----


def test_all_frames_are_sent_to_functions_that_look_at_them(serve_rewards):
    rewards = "motion,frames:jpeg_incompressibility,served_rewards.brightness"
    url = serve_rewards("--max-images", "21", rewards=rewards).url
    videos = [moving_square(color, frames=9) for color in ("red", "blue", "green")] + [gray(3)]
    motion, frames = RemoteReward(url, reward="motion"), RemoteReward(url, reward="jpeg_incompressibility_frames")
    local = [MotionReward(), FrameReward(JPEGIncompressibilityReward())]
    scores = RewardScorer([motion, frames, RemoteReward(url, reward="brightness")], frame="last")
    expected = RewardScorer([*local, brightness], frame="last")
    given = [["a square"] * 4, videos, {"weight": [1.0] * 4}]
    assert scores.score(*given).values == expected.score(*given).values
    # Two of ten frames and their images in a request
    assert motion._most(videos) == 2 and motion._most(None) == 21


def test_a_video_that_does_not_fit_into_a_request(serve_rewards):
    reward = RemoteReward(serve_rewards("--max-images", "9", rewards="motion").url)
    with pytest.raises(ValueError, match="9 frames, .* more than the 9 images .* with --max-images 10 or more"):
        ask(reward, ["a"], [gray(1)[0]], videos=[moving_square(frames=9)])


def test_videos_are_asked_for_before_training(serve_rewards):
    check_reward_func(RemoteReward(serve_rewards(rewards="motion").url), ["prompt"], videos=True)
    with pytest.raises(ValueError, match="'motion' needs videos, but this model draws images"):
        check_reward_func(RemoteReward(serve_rewards(rewards="motion").url), ["prompt"], videos=False)


def requests_answered(url):
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    (line,) = [line for line in text.splitlines() if line.startswith('trl_flow_requests_total{status="200"}')]
    return float(line.split()[1])


def test_servers_are_used_in_turn(serve_rewards):
    urls = [serve_rewards(rewards="served_rewards.brightness").url for _ in range(2)]
    reward = RemoteReward(urls)
    for _ in range(6):
        ask(reward, [""], pictures(1))
    assert [requests_answered(url) for url in urls] == [3, 3]


def test_a_server_that_is_killed_between_and_during_calls_loses_nothing(serve_rewards):
    servers = [serve_rewards(rewards="served_rewards.brightness") for _ in range(3)]
    reward = RemoteReward([server.url for server in servers], batch_size=1, backoff=0.05)
    images = pictures(20)
    expected = brightness([], images)
    results = []

    async def calls():
        for i in range(6):
            if i == 2:
                servers[0].kill()
            call = asyncio.ensure_future(reward(prompts=[""] * 20, images=images))
            if i == 3:
                await asyncio.sleep(0.03)  # while its 20 requests are under way
                servers[1].kill()
            results.append(await call)

    asyncio.run(calls())
    assert results == [expected] * 6


def test_a_server_that_comes_back_is_used_again(serve_rewards):
    first, second = [serve_rewards(rewards="served_rewards.brightness") for _ in range(2)]
    reward = RemoteReward([first.url, second.url], backoff=0.05)
    images = pictures(1)
    first.kill()
    assert [ask(reward, [""], images) for _ in range(3)] == [brightness([], images)] * 3
    serve_rewards(rewards="served_rewards.brightness", port=int(first.url.rsplit(":", 1)[1]))
    second.kill()
    assert ask(reward, [""], images) == brightness([], images)


def test_a_server_that_comes_back_as_another_is_not_asked(serve_rewards):
    first, second = [serve_rewards(rewards="served_rewards.brightness") for _ in range(2)]
    reward = RemoteReward([first.url, second.url], backoff=0.05, retries=1)
    first.kill()
    ask(reward, [""] * 2, pictures(2))
    serve_rewards(rewards="served_rewards.thirds", port=int(first.url.rsplit(":", 1)[1]))
    second.kill()
    with pytest.raises(RewardServerError, match="no reward 'brightness' on this server, only thirds"):
        ask(reward, [""], pictures(1))


@pytest.mark.parametrize(
    "other, words", [("other_brightness", "with other settings"), ("thirds", "no reward 'brightness'")]
)
def test_nor_is_one_that_was_replaced_between_two_calls(serve_rewards, other, words):
    first, second = [serve_rewards(rewards="served_rewards.brightness") for _ in range(2)]
    reward = RemoteReward([first.url, second.url], backoff=0.05, retries=1)
    images = pictures(2)
    assert ask(reward, [""] * 2, images) == brightness([], images)
    # No request sees it away
    first.kill()
    serve_rewards(rewards=f"served_rewards.{other}", port=int(first.url.rsplit(":", 1)[1]))
    assert [ask(reward, [""] * 2, images) for _ in range(4)] == [brightness([], images)] * 4
    second.kill()
    with pytest.raises(RewardServerError, match=words):
        ask(reward, [""] * 2, images)


def test_when_none_is_left_the_error_names_them_all(serve_rewards):
    servers = [serve_rewards(rewards="served_rewards.brightness") for _ in range(2)]
    reward = RemoteReward([server.url for server in servers], retries=2, backoff=0.01)
    for server in servers:
        server.kill()
    with pytest.raises(RewardServerError, match="No reward server answers for 'brightness'") as caught:
        ask(reward, [""], pictures(1))
    assert all(f"{server.url} (ConnectError: " in str(caught.value) for server in servers)


# ---- What is found before training ----


def test_no_server_at_all():
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RewardServerError, match=rf"No reward server offers .*{url} \(ConnectError"):
        RemoteReward(url)


def test_one_of_two_servers_away_is_a_warning(serve_rewards, caplog):
    url, away = serve_rewards(rewards="served_rewards.brightness").url, f"http://127.0.0.1:{free_port()}"
    with caplog.at_level(logging.WARNING):
        reward = RemoteReward([away, url])
    assert f"{away} does not answer" in caplog.text
    assert ask(reward, [""] * 4, pictures(4)) == brightness([], pictures(4))


def test_servers_that_do_not_offer_the_same(serve_rewards):
    one = serve_rewards(rewards="served_rewards.brightness").url
    other = serve_rewards(rewards="served_rewards.thirds").url
    with pytest.raises(ValueError, match=f"{other} does not offer 'brightness', only thirds"):
        RemoteReward([one, other])


def test_servers_with_other_settings(answering):
    def url(dtype):
        card = {**CARD, "dtype": dtype}
        return answering(
            rewards=[(200, {}, json.dumps({"protocol": 1, "rewards": [card], "limits": {"max_images": 8}}))]
        )

    with pytest.raises(ValueError, match="with other settings than the rest: .*'float32'.* instead of .*'bfloat16'"):
        RemoteReward([url("bfloat16"), url("float32")])


@pytest.mark.parametrize(
    "answer, words",
    [
        ((200, {}, "<html>"), "status 200: <html>"),
        ((200, {}, '{"models": []}'), "not a reward server of trl-flow"),
        ((200, {}, "[]"), "not a reward server of trl-flow"),
        ((404, {}, '{"detail": "Not Found"}'), "status 404: Not Found"),
        ((301, {"Location": "http://127.0.0.1:9/"}, ""), "status 301"),
        ((200, {}, '{"protocol": 2}'), "speaks protocol 2 and this client 1"),
    ],
)
def test_something_that_is_no_reward_server(answering, answer, words):
    with pytest.raises(RewardServerError, match=words):
        RemoteReward(answering(rewards=[answer]))


@pytest.mark.parametrize("token", [None, "wrong"])
def test_without_the_token(serve_rewards, monkeypatch, token):
    url = serve_rewards(rewards="served_rewards.brightness", token="secret").url
    with pytest.raises(RewardServerError, match="refuses the token. Set TRL_FLOW_REWARD_TOKEN") as caught:
        RemoteReward(url, token=token)
    assert "secret" not in str(caught.value)
    assert ask(RemoteReward(url, token="secret"), [""], pictures(1)) == brightness([], pictures(1))
    monkeypatch.setenv("TRL_FLOW_REWARD_TOKEN", "secret")
    assert ask(RemoteReward(url), [""], pictures(1)) == brightness([], pictures(1))


@pytest.mark.parametrize(
    "url, options, words",
    [
        ("localhost:8000", {}, "must be an address such as http://localhost:8000"),
        ("ftp://localhost", {}, "must be an address"),
        ("http://", {}, "must be an address"),
        ("http://localhost:8000/score?x=1", {}, "must be an address"),
        ([], {}, "one or more addresses"),
        (["http://localhost:1", "http://localhost:1/"], {}, "all different"),
        (5, {}, "not iterable|must be"),
        ("http://localhost:1", {"batch_size": 0}, "batch_size is 0"),
        ("http://localhost:1", {"batch_size": 2.0}, "batch_size is 2.0"),
        ("http://localhost:1", {"batch_size": "2"}, "batch_size is '2'"),
        ("http://localhost:1", {"timeout": 0}, "timeout is 0"),
        ("http://localhost:1", {"timeout": float("inf")}, "timeout is inf"),
        ("http://localhost:1", {"retries": -1}, "retries is -1"),
        ("http://localhost:1", {"backoff": -1.0}, "backoff is -1.0"),
        ("http://localhost:1", {"columns": "objects"}, "must be a list of names"),
        ("http://localhost:1", {"token": "two words"}, "printable ASCII characters without spaces"),
        ("http://localhost:1", {"token": "ü"}, "printable ASCII characters without spaces"),
    ],
)
def test_arguments_that_are_refused(url, options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        RemoteReward(url, **options)


def test_a_password_in_the_address_is_not_shown():
    with pytest.raises(ValueError, match="holds a user or password") as caught:
        RemoteReward("http://me:hunter2@localhost:8000")
    assert "hunter2" not in str(caught.value)


def test_without_the_package_the_constructor_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(ImportError, match=r'pip install "trl_flow\[remote\]"'):
        RemoteReward("http://localhost:8000")


# ---- What is found when it is called ----


def test_columns_that_json_cannot_hold(serve_rewards):
    url = serve_rewards(rewards="served_rewards.brightness").url
    images = pictures(2)
    with pytest.raises(TypeError, match=r"The column 'image' cannot be sent .* RemoteReward\(..., columns="):
        ask(RemoteReward(url), ["", ""], images, image=images, size=[1, 2])
    with pytest.raises(TypeError, match="The column 'size' cannot be sent"):
        ask(RemoteReward(url), ["", ""], images, size=[1.0, float("nan")])
    assert ask(RemoteReward(url, columns=["size"]), ["", ""], images, image=images, size=[1, 2]) == brightness(
        [], images
    )
    with pytest.raises(ValueError, match="There are 1 prompts for 2 images"):
        ask(RemoteReward(url), [""], images)


def test_what_is_refused_is_not_tried_again(serve_rewards):
    server = serve_rewards("--max-pixels", "100", rewards="served_rewards.brightness")
    with pytest.raises(RewardServerError, match=rf"{server.url} refuses .* status 413: Image 1 has 24 x 24 pixels"):
        ask(RemoteReward(server.url, backoff=30), ["", ""], [Image.new("RGB", (10, 10)), pictures(1)[0]])


def test_a_function_that_fails_is_named_with_its_error(serve_rewards):
    url = serve_rewards(rewards="served_rewards.as_told").url
    with pytest.raises(RewardServerError, match="function 'as_told' raised KeyError: 'that column'"):
        ask(RemoteReward(url, retries=1, backoff=0.01), ["raise that column"], pictures(1))


def test_a_busy_server_is_waited_for(answering):
    busy = (503, {"Retry-After": "0.05"}, '{"detail": "come again"}')
    url = answering(rewards=[OFFER], score=[busy] * 8 + [scores(2.5)])
    assert ask(RemoteReward(url, retries=0), ["a"], pictures(1)) == [2.5]
    url = answering(rewards=[OFFER], score=[busy])
    with pytest.raises(RewardServerError, match="status 503: come again"):
        ask(RemoteReward(url, retries=1, timeout=0.5), ["a"], pictures(1))


@pytest.mark.parametrize(
    "answer",
    [
        scores(),
        scores(1.0, 2.0),
        scores("2"),
        (200, {}, json.dumps({"rewards": {"fake": [math.nan]}, "cards": {"fake": CARD}})),
        (200, {}, json.dumps({"rewards": {"other": [1.0]}, "cards": {"other": CARD}})),
        (200, {}, '{"rewards": {"fake": [1.0]}}'),
        (200, {}, '{"rewards": {"fake": [1.0]}, "cards": 1}'),
        (200, {}, "[]"),
        (200, {}, "not json"),
        (500, {}, "Internal Server Error"),
        (502, {}, "<html>"),
    ],
    ids=str,
)
def test_a_bad_answer_is_asked_for_again_elsewhere(answering, answer):
    bad = answering(rewards=[OFFER], score=[answer])
    good = answering(rewards=[OFFER], score=[scores(2)])
    reward = RemoteReward([bad, good], backoff=0.01)
    assert [ask(reward, ["a"], pictures(1)) for _ in range(3)] == [[2]] * 3
    with pytest.raises(RewardServerError, match=bad):
        ask(RemoteReward(bad, retries=1, backoff=0.01), ["a"], pictures(1))


def test_a_server_that_hangs_is_left_alone(serve_rewards, caplog):
    slow, other = [serve_rewards(rewards="served_rewards.as_told").url for _ in range(2)]
    reward = RemoteReward([slow, other], timeout=0.3, retries=0)
    with pytest.raises(RewardServerError, match="ReadTimeout"):
        ask(reward, ["sleep 3"], pictures(1))
    # Both have been given up; the error tells why, and so does the log
    assert f"{slow} failed (ReadTimeout" in caplog.text and f"{other} failed (ReadTimeout" in caplog.text
