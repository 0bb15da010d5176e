import http.client
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from slow_requests import slow_request
from tiny_comparisons import painted_folder

from trl_flow.evaluation import VoteServer
from trl_flow.evaluation.local_handler import LocalHandler
from trl_flow.evaluation.vote_plan import Ballots


LEFT = {"quality": "left", "alignment": "left", "overall": "left"}
MODELS = ("base", "secret-adapter")


@pytest.fixture
def run(tmp_path):
    return painted_folder(tmp_path / "run", [f"prompt {i} <b>&amp;" for i in range(4)], models=MODELS)


@pytest.fixture
def serve(run):
    """Starts servers of one folder, which are closed at the end."""
    started = []

    def start(**options) -> VoteServer:
        server = VoteServer(run.path, **options)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.close()


def ask(server: VoteServer, method: str, path: str, body=None, **headers) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rsplit(":", 1)[1].strip("/")), timeout=30)
    try:
        if isinstance(body, dict | list):
            body = json.dumps(body)
            headers = {"Content-Type": "application/json"} | headers
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def post(server: VoteServer, action: str, **request) -> tuple[int, dict]:
    status, _, content = ask(server, "POST", f"/{action}", request)
    return status, json.loads(content)


def vote_to_the_end(server: VoteServer, voter: str) -> dict:
    _, state = post(server, "next", voter=voter)
    while state["pair"]:
        _, state = post(server, "vote", voter=voter, pair=state["pair"]["token"], answers=LEFT)
    return state


# ---- blindness ----


def test_nothing_that_is_sent_names_a_model(serve, run):
    server = serve()
    sent = [ask(server, "GET", "/")]
    _, state = post(server, "next", voter="me")
    while state["pair"]:
        sent += [ask(server, "GET", state["pair"][side]) for side in ("left", "right")]
        sent.append(ask(server, "POST", "/vote", {"voter": "me", "pair": state["pair"]["token"], "answers": LEFT}))
        state = json.loads(sent[-1][2])
    assert len(sent) == 1 + 4 * 3
    for status, headers, content in sent:
        assert status == 200
        for name in (*MODELS, "path/of", "000000"):
            assert name.encode() not in content.replace(b"base-uri", b"") and name not in str(headers)
    # Only at the end, when they are asked for
    status, found = post(server, "results", voter="me")
    assert status == 200
    assert found["results"]["comparisons"][0]["other"] == "secret-adapter"


def test_images_are_the_pairs_on_the_sides_that_are_noted(serve, run):
    server = serve()
    for _ in range(4):
        _, state = post(server, "next", voter="me")
        shown = [ask(server, "GET", state["pair"][side])[2] for side in ("left", "right")]
        post(server, "vote", voter="me", pair=state["pair"]["token"], answers=LEFT)
        vote = Ballots(run.path).read("me")["votes"][-1]
        models = MODELS if vote["left"] == "base" else MODELS[::-1]
        assert shown == [run.image_path("shapes", model, vote["index"]).read_bytes() for model in models]
        assert state["pair"]["prompt"] == vote["prompt"] == f"prompt {vote['row']} <b>&amp;"
        assert vote["answers"]["overall"] == ("lose" if vote["left"] == "base" else "win")
    assert {vote["row"] for vote in Ballots(run.path).read("me")["votes"]} == {0, 1, 2, 3}


def test_results_wait_for_the_end_and_close_the_vote(serve):
    server = serve(pairs=2)
    _, state = post(server, "next", voter="me")
    assert post(server, "results", voter="me")[0] == 409
    post(server, "vote", voter="me", pair=state["pair"]["token"], answers=LEFT)
    assert post(server, "results", voter="me")[0] == 409
    assert vote_to_the_end(server, "me")["can_undo"] is True
    assert post(server, "results", voter="me")[0] == 200
    status, answer = post(server, "undo", voter="me")
    assert status == 409 and "stay as they are" in answer["error"]


# ---- going on ----


def test_a_vote_is_on_disk_before_the_answer_and_a_new_server_goes_on(serve, run):
    server = serve()
    _, first = post(server, "next", voter="me")
    _, second = post(server, "vote", voter="me", pair=first["pair"]["token"], answers=LEFT)
    assert len(Ballots(run.path).read("me")["votes"]) == 1 == second["done"]
    # As after a kill: another process, whose random names of images are others
    server.close()
    again = serve()
    _, state = post(again, "next", voter="me")
    assert (state["done"], state["total"], state["pair"]["prompt"]) == (1, 4, second["pair"]["prompt"])
    assert state["pair"]["token"] != second["pair"]["token"]
    status, answer = post(again, "vote", voter="me", pair=second["pair"]["token"], answers=LEFT)
    assert status == 409 and "restarted" in answer["error"]
    assert ask(again, "GET", second["pair"]["left"])[0] == 404


def test_undo_brings_the_last_pair_back(serve, run):
    server = serve()
    _, first = post(server, "next", voter="me")
    assert first["can_undo"] is False and post(server, "undo", voter="me")[0] == 409
    post(server, "vote", voter="me", pair=first["pair"]["token"], answers=LEFT)
    status, back = post(server, "undo", voter="me")
    assert status == 200 and back == first
    assert Ballots(run.path).read("me")["votes"] == []


def test_two_tabs_of_one_voter_do_not_vote_twice(serve, run):
    server = serve()
    _, state = post(server, "next", voter="me")
    token = state["pair"]["token"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(server, "vote", voter="me", pair=token, answers=LEFT)[0], range(8)))
    assert sorted(answers) == [200] + [409] * 7
    assert len(Ballots(run.path).read("me")["votes"]) == 1


def test_voters_do_not_see_each_others_votes(serve, run):
    server = serve()
    vote_to_the_end(server, "Ann")
    _, state = post(server, "next", voter="Bob")
    assert state["done"] == 0
    # A pair of Ann's is none of Bob's
    _, ann = post(server, "next", voter="Ann ")
    assert ann["voter"] == "Ann" and ann["pair"] is None
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: vote_to_the_end(server, f"voter {i}"), range(4)))
    assert sorted(len(ballot["votes"]) for ballot in Ballots(run.path).voters()) == [4] * 5


# ---- who may ask ----


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", "[bad"])
def test_other_hosts_names_are_refused(host, serve):
    server = serve()
    for method, path, body in (("GET", "/", None), ("POST", "/next", {"voter": "me"})):
        status, _, content = ask(server, method, path, body, Host=host)
        assert status in (400, 403) and b"<html" not in content


def test_this_machines_names_are_served_through_a_tunnel_too(serve):
    server = serve()
    for host in ("localhost:1234", "127.0.0.1:99", "[::1]:5"):
        assert ask(server, "GET", "/", Host=host)[0] == 200
        assert ask(server, "POST", "/next", {"voter": "me"}, Host=host, Origin=f"http://{host}")[0] == 200


@pytest.mark.parametrize(
    "headers, body, status",
    [
        ({"Origin": "https://evil.example"}, {"voter": "me"}, 403),
        ({"Origin": "null"}, {"voter": "me"}, 403),
        ({"Content-Type": "text/plain"}, '{"voter": "me"}', 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, "voter=me", 415),
        ({"Content-Type": "application/json"}, "{", 400),
        ({"Content-Type": "application/json"}, "[" * 9000, 400),
        ({"Content-Type": "application/json"}, b"\xff\xfe", 400),
        ({}, ["me"], 400),
        ({}, {"voter": ""}, 400),
        ({}, {"voter": ["me"]}, 400),
        ({}, {}, 400),
        ({}, {"voter": "x" * 20_000}, 413),
    ],
)
def test_hostile_requests_are_refused_and_the_server_lives(headers, body, status, serve, run):
    server = serve()
    found, _, content = ask(server, "POST", "/vote", body, **headers)
    assert found == status and json.loads(content)["error"]
    assert not (run.path / "votes").exists()
    assert post(server, "next", voter="me")[0] == 200


@pytest.mark.parametrize(
    "path",
    ["/settings.json", "/image/", "/image/../settings.json", "/image/%2e%2e/x", "//etc/passwd", "/votes/"],
)
def test_nothing_else_is_served(path, serve):
    assert ask(serve(), "GET", path)[0] == 404


def test_wrong_votes_change_nothing(serve, run):
    server = serve()
    _, state = post(server, "next", voter="me")
    token = state["pair"]["token"]
    wrong = [
        (None, LEFT),
        ([token], LEFT),
        (token, None),
        (token, LEFT | {"overall": "both"}),
        (token, {}),
        ("", LEFT),
    ]
    for pair, answers in wrong:
        assert post(server, "vote", voter="me", pair=pair, answers=answers)[0] == 409
    # Another voter's token
    assert post(server, "vote", voter="you", pair=token, answers=LEFT)[0] == 409
    assert not (run.path / "votes").exists()


def test_names_that_look_like_paths_stay_in_the_folder(serve, run):
    server = serve()
    for name in ("../../escape", "/etc/passwd", "..", "CON", "a/b"):
        vote_to_the_end(server, name)
    files = sorted(path.relative_to(run.path) for path in run.path.rglob("*.json"))
    assert len(files) == 6  # with settings.json
    assert all(len(path.parts) == 2 for path in files if path.name != "settings.json")


def test_only_this_machine_is_listened_to(serve, tmp_path):
    server = serve()
    assert server.url.startswith("http://127.0.0.1:")
    assert server._server.socket.getsockname()[0] == "127.0.0.1"
    other = painted_folder(tmp_path / "other", ["a prompt"], models=MODELS).path
    with pytest.raises(ValueError, match="Choose another"):
        VoteServer(other, port=server._server.server_address[1])
    VoteServer(other).close()  # the folder is not locked by the one that failed


def test_a_server_can_be_closed_before_it_serves_and_twice(run):
    server = VoteServer(run.path)
    server.close()
    server.close()
    server.serve_forever()  # returns


# ---- two servers, slow browsers ----


def test_one_server_asks_about_a_folder(run):
    first = VoteServer(run.path)
    with pytest.raises(ValueError, match=rf"another process is asking for votes on .*\(pid {os.getpid()} on \S+\)"):
        VoteServer(run.path)
    first.close()
    VoteServer(run.path).close()


def test_one_that_was_killed_locks_nobody_out(run):
    ask_forever = "import sys; from trl_flow.evaluation import VoteServer; s = VoteServer(sys.argv[1])"
    ask_forever += "; print(s.url, flush=True); s.serve_forever()"
    process = subprocess.Popen([sys.executable, "-c", ask_forever, run.path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("http://127.0.0.1:")
    with pytest.raises(ValueError, match=rf"\(pid {process.pid} on \S+\). Wait until it ends, or let everyone vote"):
        VoteServer(run.path)
    process.kill()
    process.communicate()
    VoteServer(run.path).close()


@pytest.mark.parametrize(
    "begin, drip, answer",
    [
        (b"", b"", b""),
        (b"GET / HTTP/1.1\r\n", b"X: y\r\n", b""),
        (b"POST /next HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9000\r\n\r\n",
         b" ", b" 408 "),
    ],
    ids=["nothing", "headers", "body"],
)  # fmt: skip
def test_a_request_that_is_too_slow(begin, drip, answer, serve, monkeypatch):
    monkeypatch.setattr(LocalHandler, "timeout", 0.5)
    server = serve()
    status = slow_request(("127.0.0.1", int(server.url.rsplit(":", 1)[1].strip("/"))), begin, drip)
    assert answer in status and bool(answer) == bool(status)
    assert ask(server, "GET", "/")[0] == 200
