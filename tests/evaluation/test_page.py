import base64
import hashlib
import html
import io
import json
import re
from html.parser import HTMLParser
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image
from tiny_comparisons import painted_folder, plain_image

from trl_flow.evaluation.comparison import compare_scores
from trl_flow.evaluation.page import script_json, with_policy, write_page


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'\u2028<!-- "


def page(tmp_path, prompts, *, number=1, side=16, models=("base", "ours"), noise=False, **options) -> str:
    folder = painted_folder(tmp_path / "run", prompts, models=models, number=number, side=side)
    random = np.random.default_rng(0)
    if noise:
        for path in (tmp_path / "run").rglob("*.png"):
            Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    scores = {model: {"q": random.random(len(prompts) * number)} for model in models}
    results = {
        "models": folder.settings()["models"],
        "settings": {"num_images_per_prompt": number},
        "proxy": ["q"],
        "gold": [],
        "sets": {"shapes": compare_scores(scores, proxy=["q"], num_images_per_prompt=number)},
    }
    path = tmp_path / "page.html"
    write_page(path, folder, results, prompts={"shapes": prompts}, scores={"shapes": scores}, **options)
    return path.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Start tags with their attributes, and the content of the elements that hold none."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.raw: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] in ("script", "style"):
            self.raw.append(data)


def data_of(text: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1))


def image(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))


def test_images_in_the_page_are_those_in_the_folder(tmp_path):
    data = data_of(page(tmp_path, ["a", "b"], number=2))
    shown = data["sets"][0]
    assert shown["prompts"] == ["a", "b"] and shown["indices"] == [0, 1, 2, 3]
    for i, model in enumerate(("base", "ours")):
        for index, uri in enumerate(shown["images"][model]):
            assert image(uri).format == "PNG"
            np.testing.assert_array_equal(np.asarray(image(uri)), np.asarray(plain_image(i, index)))
    assert "unchanged" in data["note"]


def test_prompts_cannot_leave_their_element(tmp_path):
    text = page(tmp_path, [HOSTILE, "b"])
    assert data_of(text)["sets"][0]["prompts"][0] == HOSTILE
    found = Elements(text)
    template = Elements((files("trl_flow.evaluation") / "web" / "comparison.html").read_text(encoding="utf-8"))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in template.tags]
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)


def test_the_page_asks_for_nothing(tmp_path):
    text = page(tmp_path, ["a"])
    for tag, attributes in Elements(text).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert "src" not in attributes and "href" not in attributes
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest", text)
    policy = html.unescape(re.search(r'Content-Security-Policy" content="(.*?)"', text).group(1))
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_the_policy_names_the_pages_own_script_and_style():
    page = with_policy('<meta content="__POLICY__"><style>b{}</style><script>let a = "<";</script>', "img-src data:")
    policy = html.unescape(page)
    for content in ("b{}", 'let a = "<";'):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in policy
    assert "img-src data:" in policy


@pytest.mark.parametrize("value", [HOSTILE, {"<a>": ["&", "\u2029"]}, [None, 1.5]])
def test_script_json_is_json_without_markup(value):
    text = script_json(value)
    assert json.loads(text) == value
    assert text.isascii() and not set(text) & set("<>&")


def test_large_images_become_smaller_copies_and_the_page_says_so(tmp_path):
    # Noise of 600 x 600 pixels cannot be compressed: a megabyte each
    text = page(tmp_path, ["a", "b"], side=600, noise=True, megabytes=0.4)
    data = data_of(text)
    copy = image(data["sets"][0]["images"]["ours"][1])
    assert copy.format == "WEBP" and max(copy.size) in (384, 256)
    assert f"at most {max(copy.size)} pixels" in data["note"] and "originals are in images/" in data["note"]
    assert len(text) < 0.55e6


def test_of_too_many_prompts_some_are_shown_evenly(tmp_path):
    prompts = [f"prompt {i}" for i in range(24)]
    text = page(tmp_path, prompts, side=300, noise=True, megabytes=0.8)
    data = data_of(text)
    shown = data["sets"][0]
    rows = [int(prompt.split()[1]) for prompt in shown["prompts"]]
    assert 2 < len(rows) < 12 and rows[0] == 0 and rows[-1] >= 16
    gaps = np.diff(rows)
    assert gaps.max() - gaps.min() <= 1
    assert f"{len(rows)} of 24 prompts" in data["note"] and shown["total"] == 24
    assert len(shown["images"]["base"]) == len(shown["scores"]["base"]["q"]) == len(rows)
    assert len(text) < 1.1e6
