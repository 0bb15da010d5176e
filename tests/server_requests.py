"""What tests of reward servers have in common."""

import io
import json
import socket
import time

from PIL import Image


def form(prompt, size=(2, 2)):
    file = io.BytesIO()
    Image.new("RGB", size).save(file, format="PNG")
    return [("prompts", (None, json.dumps([prompt]))), ("images", ("0.png", file.getvalue(), "image/png"))]


def wait_until(condition):
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
