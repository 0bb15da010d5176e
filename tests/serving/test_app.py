"""A reward server takes what it should, refuses everything else with a 4xx, and goes on."""

import http.client
import io
import json
import socket
import struct
import threading
import time
import zlib

import httpx2
import numpy as np
import pytest
from fastapi import HTTPException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from served_rewards import brightness
from slow_requests import slow_request

from trl_flow.rewards import JPEGIncompressibilityReward
from trl_flow.serving.form import decode_images


TOKEN = "a-token-of-tests"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
BOUNDARY = "----between"


def picture(seed=0, size=(12, 8)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def png(image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_size(width, height, data=b""):
    """A PNG file that says it has this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def form(prompts, images, *, columns=None, rewards=None, kind="image/png", name="0.png"):
    fields = {"prompts": prompts, "columns": columns, "rewards": rewards}
    parts = [(key, (None, json.dumps(value))) for key, value in fields.items() if value is not None]
    return parts + [("images", (name, image, kind)) for image in images]


@pytest.fixture(scope="module")
def server(server_parent):
    options = ["--max-images", "4", "--max-image-bytes", "20000", "--max-pixels", "5000", "--max-json-bytes", "3000"]
    options += ["--max-body-bytes", "100000", "--upload-timeout", "2", "--max-waiting", "3"]
    rewards = "served_rewards.brightness,served_rewards.as_told,jpeg_incompressibility,served_rewards.weighted"
    server = server_parent.start(*options, rewards=rewards, token=TOKEN)
    yield server
    assert not server.ended()
    server.kill()


@pytest.fixture(scope="module")
def client(server):
    with httpx2.Client(base_url=server.url, headers=HEADERS, timeout=20) as client:
        yield client


@pytest.fixture
def lives(client):
    """The server still scores when the test has ended."""
    yield
    answer = client.post("/score", files=form(["a"], [png(picture())], rewards=["brightness"]))
    assert answer.json()["rewards"] == {"brightness": brightness([], [picture()])}
    assert client.get("/health").json() == {"ready": True}


def assert_refused(answer, status, words):
    assert (answer.status_code, words in answer.json()["detail"]) == (status, True), answer.text


# ---- What it answers ----


def test_scores_of_several_functions(client):
    images = [picture(seed) for seed in range(3)]
    files = form(["a", "b", "c"], map(png, images), rewards=["jpeg_incompressibility", "brightness"])
    cards = {card["name"]: card for card in client.get("/rewards").json()["rewards"]}
    assert client.post("/score", files=files).json() == {
        "rewards": {
            "jpeg_incompressibility": JPEGIncompressibilityReward()([], images),
            "brightness": brightness([], images),
        },
        "cards": {name: cards[name] for name in ("jpeg_incompressibility", "brightness")},
    }


def test_all_functions_unless_some_are_named(client):
    answer = client.post("/score", files=form(["abc"], [png(picture())], columns={"weight": [2]}))
    assert set(answer.json()["rewards"]) == {"brightness", "as_told", "jpeg_incompressibility", "weighted"}
    assert answer.json()["rewards"]["weighted"] == [6.0]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"},
                                     {"Authorization": TOKEN}, {"Authorization": b"Bearer \xff\xfe"}])  # fmt: skip
@pytest.mark.parametrize("method, path", [("POST", "/score"), ("GET", "/rewards"), ("GET", "/metrics")])
def test_without_the_token_nothing_but_health(server, lives, headers, method, path):
    answer = httpx2.request(method, server.url + path, headers=headers)
    assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
    assert TOKEN not in answer.text
    assert httpx2.get(server.url + "/health", headers=headers).json() == {"ready": True}


def test_no_pages_that_load_scripts_from_elsewhere(client):
    assert {client.get(path).status_code for path in ("/docs", "/redoc", "/openapi.json", "/")} == {404}


def test_cards_and_limits(client):
    offer = client.get("/rewards").json()
    assert [card["name"] for card in offer["rewards"]] == [
        "brightness", "as_told", "jpeg_incompressibility", "weighted"
    ]  # fmt: skip
    assert offer["limits"]["max_images"] == 4
    assert offer["rewards"][2]["info"]["range"] == [0.0, None]


def counters(client):
    lines = client.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_metrics_count_requests_images_and_errors(client):
    before = counters(client)
    client.post("/score", files=form(["a"] * 3, [png(picture())] * 3, rewards=["brightness"]))
    client.post("/score", files=form(["raise x"], [png(picture())], rewards=["as_told"]))
    client.post("/score", files=form(["a"], [], rewards=["as_told"]))
    after = counters(client)
    added = {name: value - before.get(name, 0) for name, value in after.items()}
    expected = {
        'trl_flow_requests_total{status="200"}': 1,
        'trl_flow_requests_total{status="500"}': 1,
        'trl_flow_requests_total{status="422"}': 1,
        "trl_flow_images_total": 3,
        'trl_flow_reward_errors_total{reward="as_told"}': 1,
        "trl_flow_request_seconds_count": 1,
        'trl_flow_request_seconds_bucket{le="+Inf"}': 1,
        "trl_flow_waiting": 0,
    }
    assert {name: added[name] for name in expected} == expected
    assert after["trl_flow_waiting"] == 0
    assert added['trl_flow_scoring_seconds_total{reward="brightness"}'] > 0
    assert 0 < added["trl_flow_request_seconds_sum"] < 10


# ---- Functions that fail ----


@pytest.mark.parametrize(
    "prompt, words",
    [
        ("raise the roof", "The reward function 'as_told' raised KeyError: 'the roof'."),
        ("raise \ud83d\ude00 \\udcff", "raised KeyError"),
        ("exit", "'as_told' raised SystemExit: 3"),
        ("short", "returned 3 rewards for 4 images"),
        ("return nan", "returned nan for image 0, prompt 'return nan'"),
        ("return text", "returned 'high' for image 0"),
    ],
)
def test_a_function_that_fails_is_named(client, lives, prompt, words):
    answer = client.post("/score", files=form([prompt] * 4, [png(picture())] * 4, rewards=["as_told"]))
    assert_refused(answer, 500, words)


# ---- Hostile uploads ----

SOUND = png(picture())
TEXT_BOMB = png_of_size(5, 5, zlib.compress(b"\0" * 80)).replace(
    chunk(b"IEND", b""), chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 30_000_000, 9)[:19000]) + chunk(b"IEND", b"")
)


@pytest.mark.parametrize(
    "image, kind, status, words",
    [
        (png_of_size(50_000, 50_000, zlib.compress(b"\0" * 10_000)), "image/png", 413, "Image 0 has too many pixels"),
        (png_of_size(2**32 - 1, 2**32 - 1), "image/png", 413, "pixels"),
        (png(Image.new("RGB", (71, 71))), "image/png", 413, "Image 0 has 71 x 71 pixels. The limit is 5000 in all"),
        (png_of_size(0, 10), "image/png", 415, "Image 0 is not a PNG file"),
        (png_of_size(10, 10), "image/png", 400, "not a sound PNG"),
        (png_of_size(10, 10, zlib.compress(b"\0" * 20)), "image/png", 400, "not a sound PNG"),
        (SOUND[:-60], "image/png", 400, "not a sound PNG"),
        (SOUND[:30], "image/png", 415, "Image 0 is not a PNG file"),
        (SOUND[:60] + b"\xff" * 40 + SOUND[100:], "image/png", 400, "not a sound PNG"),
        (TEXT_BOMB, "image/png", 400, "not a sound PNG"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "image/png", 415, "Image 0 is not a PNG file"),
        (b"", "image/png", 415, "Image 0 is not a PNG file"),
        (b"GIF89a" + b"\0" * 50, "image/png", 415, "Image 0 is not a PNG file"),
        (b"\x80\x04\x95" + b"cos\nsystem\n" * 5, "image/png", 415, "Image 0 is not a PNG file"),
        (SOUND, "image/jpeg", 415, "Image 0 is sent as 'image/jpeg'"),
        (SOUND, "application/x-python-pickle", 415, "Send PNG files"),
        (b"\x89PNG" + b"x" * 30_000, "image/png", 413, "Image 0 has more than 20000 bytes"),
    ],
)
def test_images_that_are_refused(client, lives, image, kind, status, words):
    assert_refused(client.post("/score", files=form(["a"], [image], kind=kind, rewards=["brightness"])), status, words)


def test_an_image_too_long_for_encoders_is_refused_however_narrow():
    long = [png(Image.new("L", (1, height))) for height in (65_500, 65_501)]
    assert decode_images(long[:1], 2048**2)[0].size == (1, 65_500)
    with pytest.raises(HTTPException, match="413: Image 1 has 1 x 65501 pixels.* and 65500 on a side"):
        decode_images(long, 2048**2)


def test_names_of_files_are_not_looked_at(client, tmp_path):
    for name in ("../../../etc/cron.d/x", str(tmp_path / "x.png"), "x\0y", "é" * 300):
        files = form(["a"], [SOUND], name=name, rewards=["brightness"])
        assert client.post("/score", files=files).status_code == 200
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fields, status, words",
    [
        ({"prompts": "[" * 3000}, 400, "'prompts' is not valid JSON"),
        ({"prompts": "[" * 100 + "]" * 100}, 422, "list of strings"),
        ({"prompts": "[1]"}, 422, "'prompts' must be a list of strings"),
        ({"prompts": '"a"'}, 422, "'prompts' must be a list of strings"),
        ({"prompts": "null"}, 422, "'prompts' must be a list of strings"),
        ({}, 422, "'prompts' must be a list of strings"),
        ({"prompts": '["a", "b"]'}, 422, "There are 2 prompts and 1 images"),
        ({"prompts": "[]"}, 422, "There are 0 prompts and 1 images"),
        ({"prompts": '["\\ud800"]'}, 400, "'prompts' is not valid JSON"),
        ({"prompts": b'["\xff\xfe"]'}, 400, "'prompts' is not valid JSON"),
        ({"prompts": '["a"]'.encode("utf-16")}, 400, "'prompts' is not valid JSON"),
        ({"prompts": json.dumps(["a" * 4000])}, 400, "Part exceeded maximum size"),
        ({"prompts": '["a"]', "columns": '{"weight": [NaN]}'}, 400, "'columns' is not valid JSON"),
        ({"prompts": '["a"]', "columns": '{"weight": [1e999]}'}, 400, "beyond the range"),
        ({"prompts": '["a"]', "columns": '{"weight": [%s]}' % ("1" * 2900)}, 500, "as_told"),
        ({"prompts": '["a"]', "columns": "[]"}, 422, "'columns' must be an object"),
        ({"prompts": '["a"]', "columns": '{"weight": 1}'}, 422, "'weight' must be a list of 1 values"),
        ({"prompts": '["a"]', "columns": '{"weight": [1, 2]}'}, 422, "'weight' must be a list of 1 values"),
        ({"prompts": '["a"]', "columns": '{"images": [1]}'}, 422, "cannot be called 'images'"),
        ({"prompts": '["a"]', "columns": '{"log_metric": [1]}'}, 422, "cannot be called 'log_metric'"),
        ({"prompts": '["a"]', "columns": '{"self": [1]}'}, 422, "cannot be called 'self'"),
        ({"prompts": '["a"]', "rewards": '["weighted"]'}, 422, "needs a column 'weight'"),
        ({"prompts": '["a"]', "rewards": '["os.system"]'}, 404, "no reward 'os.system' on this server, only bright"),
        ({"prompts": '["a"]', "videos": "[1, 1]"}, 422, "'videos' must be a list of 1 numbers of frames"),
        ({"prompts": '["a"]', "videos": "[0]"}, 422, "'videos' must be a list of 1 numbers of frames"),
        ({"prompts": '["a"]', "videos": "[true]"}, 422, "'videos' must be a list of 1 numbers of frames"),
        ({"prompts": '["a"]', "videos": "[2]"}, 422, "There are 0 frames, but must be 2"),
        ({"prompts": '["a"]', "columns": '{"videos": [1]}'}, 422, "cannot be called 'videos'"),
        ({"prompts": '["a"]', "rewards": "[]"}, 422, "'rewards' must be a list of names"),
        ({"prompts": '["a"]', "rewards": '"brightness"'}, 422, "'rewards' must be a list of names"),
        ({"prompts": '["a"]', "rewards": "[{}]"}, 422, "'rewards' must be a list of names"),
        ({"prompts": '["a"]', "__class__": "x"}, 400, "has a field '__class__'"),
    ],
    ids=str,
)
def test_json_that_is_refused(client, lives, fields, status, words):
    files = [(name, (None, value)) for name, value in fields.items()] + [("images", ("0.png", SOUND, "image/png"))]
    answer = client.post("/score", files=files)
    if status == 500:  # json reads a number of any length up to a bound, and then it is the function's business
        assert answer.status_code in (200, 500)
    else:
        assert_refused(answer, status, words)


@pytest.mark.parametrize(
    "files, status, words",
    [
        ([("prompts", (None, "[]"))] * 2, 400, "two fields 'prompts'"),
        (form(["a"] * 5, [SOUND] * 5), 400, "Maximum number of files is 4"),
        ([(f"f{i}", (None, "1")) for i in range(900)], 400, "Maximum number of fields is 4"),
        (form(["a"], []), 422, "There are 1 prompts and 0 images"),
        ([("é\ud83d\ude00".encode("utf-16", "surrogatepass").decode("latin-1"), (None, "1"))], 400, "has a field"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_forms_that_are_refused(client, lives, files, status, words):
    assert_refused(client.post("/score", files=files), status, words)


FIELDS = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="prompts"\r\n\r\n[]\r\n'.encode() * 3


@pytest.mark.parametrize(
    "content_type, body, status, words",
    [
        ("application/json", b"{}", 415, "Send multipart/form-data"),
        ("", b"", 415, "Send multipart/form-data"),
        ("multipart/form-data", b"x", 415, "with a boundary"),
        ("multipart/form-data; boundary=" + "x" * 500, b"x", 415, "with a boundary"),
        (f"multipart/form-data; boundary={BOUNDARY}", b"", 400, "ends before its closing boundary"),
        (f"multipart/form-data; boundary={BOUNDARY}", b"\0" * 5000, 400, "Invalid multipart data"),
        (
            f"multipart/form-data; boundary={BOUNDARY}",
            b"--" + BOUNDARY.encode() + b"\r\n\r\nx",
            400,
            "Content-Disposition",
        ),
        (f"multipart/form-data; boundary={BOUNDARY}", FIELDS, 400, "ends before its closing boundary"),
        (
            f"multipart/form-data; boundary={BOUNDARY}",
            FIELDS * 40_000,
            413,
            "may have 100000 bytes, and this one has more",
        ),
        (
            f"multipart/form-data; boundary={BOUNDARY}",
            b"--" + BOUNDARY.encode() + b"\r\n" + b"X-A: b\r\n" * 2000,
            400,
            "Invalid multipart data",
        ),
        (
            f"multipart/form-data; boundary={BOUNDARY}",
            b"--" + BOUNDARY.encode() + b'\r\nContent-Disposition: form-data; name="' + b"a" * 50_000,
            400,
            "Invalid multipart data",
        ),
        (
            f"multipart/form-data; boundary={BOUNDARY}",
            b"--" + BOUNDARY.encode() + b'\r\nContent-Disposition: form-data; name="prompts"\r\n\r\n["a"',
            400,
            "ends before its closing boundary",
        ),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bodies_that_are_refused(client, lives, content_type, body, status, words):
    answer = client.post("/score", content=body, headers={"Content-Type": content_type})
    assert_refused(answer, status, words)


def valid_body():
    request = httpx2.Request(
        "POST", "http://x", files=form(["a"], [SOUND], rewards=["brightness"]), headers={"Content-Type": form_type()}
    )
    return request.read()


def form_type():
    return f"multipart/form-data; boundary={BOUNDARY}"


@given(data=st.data())
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_damaged_uploads_never_fail_the_server(client, data):
    body = bytearray(valid_body())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        change = data.draw(st.sampled_from(["set", "cut", "insert", "repeat"]))
        if change == "set":
            body[at] = data.draw(st.integers(0, 255))
        elif change == "cut":
            del body[at : at + data.draw(st.integers(1, 50))]
        elif change == "insert":
            body[at:at] = data.draw(st.binary(max_size=20))
        else:
            body[at:at] = body[at : at + 60] * data.draw(st.integers(1, 5))
    answer = client.post("/score", content=bytes(body), headers={"Content-Type": form_type()})
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text


def test_the_undamaged_upload_is_accepted(client, lives):
    answer = client.post("/score", content=valid_body(), headers={"Content-Type": form_type()})
    assert answer.json()["rewards"]["brightness"] == brightness([], [picture()])


def test_a_body_without_a_length_is_counted_while_it_arrives(client, lives):
    sent = []

    def endless():
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="images"\r\nContent-Type: image/png\r\n\r\n'
        yield head.replace("\r\nContent-Type", '; filename="0.png"\r\nContent-Type').encode()
        while len(sent) < 10_000:  # 100 MB
            sent.append(1)
            yield b"x" * 10_000

    answer = client.post("/score", content=endless(), headers={"Content-Type": form_type()})
    assert_refused(answer, 413, "may have 100000 bytes, and this one has more")
    # It reads on for a moment, but does not take all of it to refuse it
    assert answer.elapsed.total_seconds() < 10


def raw(server, head, *pieces, pause=0.0):
    """Sends bytes as they are, and returns what comes back until the server closes the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=15) as connection:
        connection.sendall(head)
        for piece in pieces:
            time.sleep(pause)
            try:
                connection.sendall(piece)
            except OSError:
                break
        while data := connection.recv(65536):
            received += data
    return received


HEAD = "POST /score HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
HEAD += f"Authorization: Bearer {TOKEN}\r\nContent-Type: {form_type()}\r\n"


def test_an_upload_that_is_too_slow(server, lives):
    started = time.monotonic()
    body = valid_body()
    head = f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode()
    answer = raw(server, head, *[body[i : i + 1] for i in range(24)], pause=0.1)
    assert b" 408 " in answer.split(b"\r\n")[0] and b"after 2 seconds" in answer
    assert time.monotonic() - started < 14  # the connection is closed, too


@pytest.mark.parametrize(
    "begin, drip, status",
    [
        (b"", b"", b""),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n", b"X: y\r\n", b""),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 90000\r\n\r\n", b"x", b" 200 "),
        (f"{HEAD}Content-Length: 90000\r\n\r\n--{BOUNDARY}\r\n".encode(), b"x", b" 408 "),
    ],
    ids=["nothing", "headers", "a body that is not read", "body"],
)
def test_a_client_that_never_ends_its_request(server, lives, begin, drip, status):
    address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    assert status in slow_request(address, begin, drip)


def test_headers_of_a_second_request_that_are_too_slow(server, lives):
    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rsplit(":", 1)[1]), timeout=20)
    for _ in range(2):
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"ready":true}'
        time.sleep(2.5)  # a connection may rest for longer than a request may take
    started = time.monotonic()
    connection.sock.sendall(b"GET /health HTTP/1.1\r\n")
    assert connection.sock.recv(1) == b"" and time.monotonic() - started > 1
    connection.close()


def test_a_length_that_is_too_long_is_refused_before_it_arrives(server, lives):
    answer = raw(server, f"{HEAD}Content-Length: 100001\r\nExpect: 100-continue\r\n\r\n".encode())
    assert b" 413 " in answer and b"may have 100000 bytes, and this one has more" in answer


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        HEAD.encode() + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        HEAD.encode() + b"Content-Length: " + b"9" * 400 + b"\r\n\r\n",
        HEAD.encode() + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
        HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10 + b"\r\n\r\n",
    ],
    ids=range(6),
)
def test_what_is_not_http(server, lives, head):
    answer = raw(server, head)
    assert answer == b"" or b" 4" in answer.split(b"\r\n")[0], answer


def wait_for(client, name, value):
    """Until this counter of the server has this value."""
    until = time.monotonic() + 20
    while counters(client).get(name, 0) != value:
        assert time.monotonic() < until, name
        time.sleep(0.01)


def test_a_client_that_goes_away_is_not_waited_for(server, client, lives, tmp_path):
    before = counters(client)
    body = valid_body()
    head = f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + body[:50])
    gone, waiting = 'trl_flow_requests_total{status="499"}', "trl_flow_waiting"
    wait_for(client, gone, before.get(gone, 0) + 1)
    running = form([f"wait {tmp_path / 'go on'}"], [SOUND], rewards=["as_told"])
    thread = threading.Thread(target=lambda: client.post("/score", files=running))
    thread.start()
    wait_for(client, waiting, 1)
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + body)
        wait_for(client, waiting, 2)  # it waits behind the first, and leaves
    wait_for(client, gone, before.get(gone, 0) + 2)
    (tmp_path / "go on").touch()
    thread.join()
    after = counters(client)
    ran = 'trl_flow_scoring_seconds_total{reward="brightness"}'
    assert after.get(ran) == before.get(ran)


def test_more_requests_than_it_takes_are_told_to_come_again(client, lives, tmp_path):
    running = form([f"wait {tmp_path / 'go on'}"], [SOUND], rewards=["as_told"])
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(client.post("/score", files=running))) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_for(client, "trl_flow_waiting", 3)
    answer = client.post("/score", files=form(["a"], [SOUND], rewards=["brightness"]))
    assert_refused(answer, 503, "3 requests are waiting, which is the limit")
    assert answer.headers["Retry-After"] == "1"
    (tmp_path / "go on").touch()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 3
