"""Two thousand hostile uploads are each refused with a 4xx, in flat memory, and the server still scores afterwards."""

import io
import json
import random
import struct
import zlib
from pathlib import Path

import httpx2
import pytest
from PIL import Image
from served_rewards import brightness


NUMBER = 2000
MAX_BODY = 200_000
OPTIONS = ["--max-images", "4", "--max-image-bytes", "50000", "--max-pixels", "5000", "--max-json-bytes", "3000"]
OPTIONS += ["--max-body-bytes", str(MAX_BODY), "--upload-timeout", "10"]


def png(image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


SOUND = png(Image.new("RGB", (12, 8), (200, 100, 50)))
TYPE = "multipart/form-data; boundary=between"


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width, height, *chunks, depth=8, color=2):
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *chunks, chunk(b"IEND", b"")])


BOMB = zlib.compress(b"\0" * 40_000_000, 9)
PIXELS = chunk(b"IDAT", zlib.compress(b"\0" * 10_000))


def part(name, data, *headers, filename=None, kind=None):
    line = f'Content-Disposition: form-data; name="{name}"' + (f'; filename="{filename}"' if filename else "")
    lines = [line.encode(), *([f"Content-Type: {kind}".encode()] if kind else []), *headers]
    return b"--between\r\n" + b"\r\n".join(lines) + b"\r\n\r\n" + data + b"\r\n"


def image_part(data, kind="image/png"):
    return part("images", data, filename="0.png", kind=kind)


def form(*parts, end=b"--between--\r\n"):
    return b"".join(parts) + end


PROMPTS = part("prompts", b'["a"]')


def broken_boundary(random):
    boundary = random.choice(["", "x", "b" * 71, "b" * 60_000, '"', "between--", "\xe9"])
    content_type = random.choice(["multipart/form-data; boundary=", "multipart/form-data;boundary="]) + boundary
    sound = form(PROMPTS, image_part(SOUND))
    body = random.choice([sound, random.randbytes(1000), b"--", b"\r\n" * 5000, b"-" * 9000])
    return content_type.encode("latin-1"), body


def endless_headers(random):
    number = random.randint(9, 4000)
    headers = random.choice([
        [b"X: " + b"y" * random.randint(5000, 150_000)],
        [b"X-%d: y" % i for i in range(number)],
        [b"y" * random.randint(5000, 150_000)],
        [b'Content-Disposition: form-data; name="' + b"a" * random.randint(5000, 150_000) + b'"'],
    ])  # fmt: skip
    return TYPE, form(part("prompts", b'["a"]', *headers), image_part(SOUND))


def huge_part(random):
    size = random.randint(MAX_BODY, 3 * MAX_BODY)
    return TYPE, random.choice([
        form(part("prompts", json.dumps(["a" * random.randint(3000, 150_000)]).encode()), image_part(SOUND)),
        form(PROMPTS, image_part(b"\x89PNG\r\n\x1a\n" + random.randbytes(random.randint(50_001, 150_000)))),
        form(PROMPTS, image_part(SOUND + b"\0" * size)),
        form(part("columns", b"[" * size), PROMPTS, image_part(SOUND)),
    ])  # fmt: skip


def many_parts(random):
    number = random.randint(5, 2000)
    return TYPE, form(*random.choice([
        [image_part(b"")] * number,
        [part(f"f{i}", b"1") for i in range(number)],
        [PROMPTS] * number,
        [part("", b"")] * number,
        [part("images", b"", filename="x")] * number,
    ]))  # fmt: skip


def wrong_type(random):
    content_type = random.choice([
        "application/json", "text/plain", "image/png", "application/x-www-form-urlencoded", "multipart/mixed",
        "multipart/form-data", "", "multipart/form-data; charset=punycode", ";;;", "x" * 60_000,
    ])  # fmt: skip
    body = random.choice([form(PROMPTS, image_part(SOUND)), b"{}", b"a=1&" * 20_000, SOUND])
    kind = random.choice(["image/jpeg", "text/html", "application/octet-stream", "", "image/png\x01"])
    return random.choice([
        (content_type, body),
        (TYPE, form(PROMPTS, image_part(SOUND, kind))),
        (f"{TYPE}; charset={random.choice(['punycode', 'idna', 'zlib', 'utf-16', 'no'])}",
         form(part("prompts", b'["\xff' + b"-" * 2000 + b'"]'), image_part(SOUND))),
    ])  # fmt: skip


def truncated(random):
    whole = form(PROMPTS, part("rewards", b'["brightness"]'), image_part(SOUND))
    return TYPE, whole[: random.randint(0, len(whole) - 9)]


def bomb(random):
    width, height = random.choice([(50_000, 50_000), (2**31 - 1, 1), (2**31, 2**31), (71, 71), (1, 5001), (0, 5)])
    image = random.choice([
        png_of(width, height, chunk(b"IDAT", BOMB)),
        png_of(5, 5, chunk(b"zTXt", b"k\0\0" + BOMB), PIXELS),
        png_of(5, 5, chunk(b"iCCP", b"k\0\0" + BOMB[:20_000])),
        png_of(5, 5, *[chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB[:9000])] * 5, PIXELS),
        png_of(5, 5, chunk(b"acTL", struct.pack(">II", 2**31, 0)), chunk(b"fdAT", b"\0" * 4 + BOMB[:20_000])),
        png_of(60, 60, *[chunk(b"PLTE", b"\0" * 769)] * 20, depth=16, color=3),
        png_of(60, 60, chunk(b"IDAT", BOMB[:20])),
        SOUND[: random.randint(1, len(SOUND) - 20)],
        SOUND[:41] + random.randbytes(30),
        b"GIF89a" + random.randbytes(100),
    ])  # fmt: skip
    return TYPE, form(PROMPTS, image_part(image))


def wrong_json(random):
    name, value = random.choice([
        ("prompts", b"[" * 2900), ("prompts", b'["\xff\xfe"]'), ("prompts", b'["\\ud800"]'), ("prompts", b"1" * 2900),
        ("prompts", b'{"a": 1}'), ("prompts", b"[]"), ("columns", b'{"x": [NaN]}'), ("columns", b'{"x": [1e999]}'),
        ("columns", b'{"images": [1]}'), ("columns", b'{"self": [1]}'), ("columns", b'{"x": 1}'),
        ("rewards", b'["x"]'), ("rewards", b"[[]]"), ("__class__", b"x"), ("images", b"[1]"),
        ("columns", b'{"prompt": ["a"]}'),
    ])  # fmt: skip
    others = [] if name == "prompts" else [PROMPTS]
    return TYPE, form(*others, part(name, value), image_part(SOUND))


KINDS = [broken_boundary, endless_headers, huge_part, many_parts, wrong_type, truncated, bomb, wrong_json]


def memory(pid):
    """Resident memory of a process in bytes."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
def test_hostile_uploads_are_refused_in_flat_memory_and_the_server_goes_on(serve_rewards):
    server = serve_rewards(*OPTIONS, rewards="served_rewards.brightness")
    chosen = random.Random(0)
    before = most = 0
    with httpx2.Client(base_url=server.url, timeout=20) as client:
        for number in range(NUMBER):
            kind = KINDS[number % len(KINDS)]
            content_type, body = kind(chosen)
            # Half of them do not say how long they are
            content = body if chosen.random() < 0.5 else iter([body[:777], body[777:]])
            answer = client.post("/score", content=content, headers={"Content-Type": content_type})
            assert 400 <= answer.status_code < 500, (number, kind.__name__, content_type[:80], body[:500], answer.text)
            if number % 100 == 99:
                # What the first few hundred take is the allocator's, which does not give it back
                before = before or (memory(server.pid) if number > 300 else 0)
                most = max(most, memory(server.pid))
        assert most - before < 20_000_000
        answer = client.post("/score", content=form(PROMPTS, image_part(SOUND)), headers={"Content-Type": TYPE})
    assert answer.json()["rewards"] == {"brightness": brightness([], [Image.open(io.BytesIO(SOUND))])}
    assert "Traceback" not in server.output()
