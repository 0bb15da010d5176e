"""The two pages in a real browser, where there is one with its driver; elsewhere these tests are skipped."""

import json
import shutil
import threading
import time

import numpy as np
import pytest
from PIL import Image
from tiny_comparisons import painted_folder
from tiny_videos import moving_square

from trl_flow.evaluation import VoteServer
from trl_flow.evaluation.comparison import compare_scores
from trl_flow.evaluation.page import write_page
from trl_flow.evaluation.vote_plan import QUESTIONS, Ballots


webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not CHROMIUM or not DRIVER, reason="there is no chromium with its driver")

HOSTILE = '</script><script>document.title = "taken"</script><img src=x onerror="document.title = 1">'
PROMPTS = [HOSTILE, "a red circle", "two blue circles", "x" * 300, "日本語 and ελληνικά"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        *("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


def size(browser, width: int, height: int) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def text(browser, element: str) -> str:
    return browser.execute_script(f"return document.getElementById('{element}').textContent")


def press(browser, *keys: str) -> None:
    for key in keys:
        browser.execute_script(
            "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0], bubbles: true}))",
            key,
        )


def until(browser, condition: str) -> None:
    end = time.monotonic() + 60
    while not browser.execute_script(f"return Boolean({condition})"):
        assert time.monotonic() < end, f"never came true: {condition}"
        time.sleep(0.05)


def requested(browser) -> list[str]:
    """Addresses of everything that was asked for since the last call, besides what stands in the page itself."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    # Nor what the browser's own pages load, such as the one that it starts with
    return [url for url in urls if not url.startswith(("data:", "chrome://"))]


def errors(browser) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


# ---- the comparison page ----


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("page")
    folder = painted_folder(path / "run", PROMPTS, models=("base", "flow", "<b>guard"))
    scores = {
        "base": {"q": np.array([1.0, 2.0, 3.0, 4.0, np.nan])},
        "flow": {"q": np.array([1.5, 2.0, 1.0, 4.1, 5.0])},
        "<b>guard": {"q": np.array([9.0, 2.0, 3.0, 4.0, 5.0])},
    }
    results = {
        "models": folder.settings()["models"],
        "settings": {"num_images_per_prompt": 1},
        "proxy": ["q"],
        "gold": [],
        "sets": {"shapes": compare_scores(scores, proxy=["q"])},
    }
    write_page(path / "page.html", folder, results, prompts={"shapes": PROMPTS}, scores={"shapes": scores})
    return (path / "page.html").as_uri()


@pytest.fixture
def opened(browser, page):
    size(browser, 1280, 900)
    browser.get_log("performance")
    browser.get(page)
    until(browser, "document.getElementById('left-image').naturalWidth")
    yield browser
    # Nothing was asked for but the file, nothing broke or was blocked, and no prompt ran
    assert set(requested(browser)) == {page}
    assert errors(browser) == []
    assert browser.title == "Comparison of 3 models"


def test_a_hostile_prompt_is_shown_as_it_is(opened):
    assert text(opened, "prompt") == HOSTILE
    assert opened.execute_script("return document.querySelectorAll('#prompt *, #list img, #list script').length") == 0


def test_the_keyboard_goes_through_the_pairs(opened):
    press(opened, "ArrowLeft")
    assert text(opened, "position") == "1 of 5"
    press(opened, "ArrowRight", "ArrowRight")
    assert text(opened, "prompt") == "two blue circles"
    assert text(opened, "left-caption") == "baseq3" and text(opened, "right-caption") == "flowq1 (−2)"
    press(opened, "s")
    assert text(opened, "left-caption") == "flowq1" and text(opened, "right-caption") == "baseq3 (+2)"
    press(opened, "s", "End", "ArrowRight")
    assert text(opened, "position") == "5 of 5"
    assert text(opened, "left-caption") == "baseq–"
    pixel = """
        const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
        context.drawImage(document.getElementById(arguments[0]), 0, 0);
        return [...context.getImageData(3, 3, 1, 1).data].slice(0, 3)"""
    until(opened, "document.getElementById('right-image').complete")
    # As `plain_image(1, 4)` painted it
    assert opened.execute_script(pixel, "right-image") == [40, 28, 90]


def choose(browser, element: str, value: str, event: str = "change") -> None:
    browser.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; "
        "e.dispatchEvent(new Event(arguments[2]))",
        element,
        value,
        event,
    )


def shown(browser) -> list[str]:
    return browser.execute_script("return [...document.querySelectorAll('#list .number')].map((e) => e.textContent)")


def test_order_and_filters_by_difference(opened):
    assert shown(opened) == ["+0.5", "0", "−2", "+0.1", ""]
    choose(opened, "order", "up")
    assert shown(opened) == ["+0.5", "+0.1", "0", "−2", ""]
    choose(opened, "order", "down")
    assert shown(opened) == ["−2", "0", "+0.1", "+0.5", ""]
    choose(opened, "order", "far")
    assert shown(opened) == ["−2", "+0.5", "+0.1", "0", ""]
    assert text(opened, "prompt") == "two blue circles"
    choose(opened, "least", "0.3", "input")
    assert shown(opened) == ["−2", "+0.5"] and text(opened, "count") == "2 of 5 pairs"
    choose(opened, "right", "2")  # another model: other differences
    assert shown(opened) == ["+8"] and text(opened, "right-caption") == "<b>guardq9 (+8)"
    choose(opened, "least", "", "input")
    choose(opened, "search", "CIRCLE red", "input")
    assert shown(opened) == ["0"] and text(opened, "prompt") == "a red circle"
    choose(opened, "search", "no such words", "input")
    assert shown(opened) == [] and text(opened, "position") == "0 of 0"
    press(opened, "ArrowRight", "ArrowLeft", "End", "+", "s")
    choose(opened, "search", "", "input")
    assert len(shown(opened)) == 5


def test_both_images_are_zoomed_alike(opened):
    transforms = "return [...document.querySelectorAll('.frame img')].map((e) => e.style.transform)"
    press(opened, "+", "+")
    assert opened.execute_script(transforms) == ["translate(-150%, -150%) scale(4)"] * 2
    assert text(opened, "zoom") == "4×"
    press(opened, "0")
    assert opened.execute_script(transforms) == ["translate(0%, 0%) scale(1)"] * 2
    assert opened.execute_script("return getComputedStyle(document.getElementById('left-image')).imageRendering") == (
        "pixelated"
    )


@pytest.mark.parametrize("width, height", [(360, 740), (1280, 900)])
def test_it_fits_the_window(opened, width, height):
    size(opened, width, height)
    for _ in PROMPTS:
        assert opened.execute_script("return document.documentElement.scrollWidth") <= width
        press(opened, "ArrowRight")
    boxes = opened.execute_script(
        "return [...document.querySelectorAll('.frame')].map((e) => [e.getBoundingClientRect().left, "
        "e.getBoundingClientRect().top, e.clientWidth])"
    )
    # Side by side, large enough to see something
    assert boxes[0][1] == boxes[1][1] and boxes[0][0] < boxes[1][0]
    assert min(box[2] for box in boxes) > 140


# ---- videos ----


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """An evaluation's folder of videos, one of which is longer than that of the other model."""
    path = tmp_path_factory.mktemp("videos") / "run"
    folder = painted_folder(path, ["a red square", "a blue square"])
    for index, color in enumerate(("red", "blue")):
        for model, frames in (("base", 16), ("ours", 16 + 4 * index)):
            folder.save("shapes", model, index, moving_square(color, frames, (96, 64)), 16)
    scores = {model: {"motion": np.array([0.1, 0.2])} for model in ("base", "ours")}
    results = {"models": folder.settings()["models"], "settings": {"num_images_per_prompt": 1}}
    results |= {"proxy": ["motion"], "gold": [], "sets": {"shapes": compare_scores(scores, proxy=["motion"])}}
    prompts = {"shapes": ["a red square", "a blue square"]}
    write_page(path / "page.html", folder, results, prompts=prompts, scores={"shapes": scores})
    return folder


PLAYING = "[...document.querySelectorAll('.{} video')].every(v => !v.paused && v.currentTime > 0.2)"
TIMES = "return [...document.querySelectorAll('.{} video')].map(v => v.currentTime)"


def test_the_page_plays_both_videos_in_step(browser, videos):
    size(browser, 1280, 900)
    browser.get((videos.path / "page.html").as_uri())
    until(browser, PLAYING.format("frame"))
    for _ in range(2):
        press(browser, "ArrowRight")  # to the pair of which one is longer
        until(browser, PLAYING.format("frame"))
        left, right = browser.execute_script(TIMES.format("frame"))
        assert abs(left - right) < 0.2
        until(browser, "clips[0].currentTime < 0.15")  # it began again, and so did the other
        until(browser, "Math.abs(clips[0].currentTime - clips[1].currentTime) < 0.15")
    press(browser, " ")
    assert text(browser, "play") == "play" and browser.execute_script("return clips.every(v => v.paused)")
    browser.execute_script("const t = $('time'); t.value = 0.5; t.dispatchEvent(new Event('input'))")
    until(browser, "clips.every(v => Math.abs(v.currentTime - v.duration / 2) < 0.05)")
    press(browser, "+")
    assert text(browser, "zoom") == "2×" and "scale(2)" in browser.execute_script("return clips[1].style.transform")
    assert errors(browser) == []


def test_the_vote_plays_both_videos_in_step(browser, videos):
    server = VoteServer(videos.path)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        enter(browser, server.url, "Ada", "document.querySelector('#left video').videoWidth")
        until(browser, PLAYING.format("pair"))
        left, right = browser.execute_script(TIMES.format("pair"))
        assert abs(left - right) < 0.2
        assert "Video quality" in text(browser, "questions")
        browser.execute_script("document.getElementById('left').click()")
        until(browser, "document.querySelector('dialog video').currentTime > 0")
        browser.execute_script("document.getElementById('large').close()")
        answer(browser, "ArrowLeft", "ArrowDown", "ArrowRight")
        until(browser, PLAYING.format("pair"))
        assert errors(browser) == []
    finally:
        server.close()


# ---- the vote ----


@pytest.fixture
def run(tmp_path):
    return painted_folder(tmp_path / "run", [HOSTILE, "a red circle " * 60, "two blue circles"], side=32)


@pytest.fixture
def server(run):
    server = VoteServer(run.path)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.close()


def enter(browser, url: str, name: str, there: str = "document.querySelector('#left img').naturalWidth") -> None:
    size(browser, 1280, 900)
    browser.get(url)
    browser.execute_script("sessionStorage.clear()")
    browser.get(url)
    until(browser, "!document.getElementById('start').hidden")
    browser.execute_script("document.getElementById('name').value = arguments[0]", name)
    browser.execute_script("document.querySelector('#enter button').click()")
    until(browser, f"!document.getElementById('vote').hidden && {there}")


def answer(browser, *keys: str) -> None:
    """Votes on a pair, and waits until it is kept."""
    before = text(browser, "position")
    press(browser, *keys)
    until(
        browser,
        f"document.getElementById('position').textContent !== '{before}' || !document.getElementById('end').hidden",
    )
    until(browser, "!busy")


def test_a_vote_by_keyboard_with_undo_and_a_reload(browser, server, run):
    browser.get_log("performance")
    enter(browser, server.url, "Zoë <b>")
    answer(browser, "ArrowLeft", "ArrowDown", "ArrowRight")
    (vote,) = Ballots(run.path).read("Zoë <b>")["votes"]
    win, lose = ("win", "lose") if vote["left"] == "ours" else ("lose", "win")
    assert vote["answers"] == dict(zip(QUESTIONS, (win, "tie", lose), strict=True))

    # One answer taken back on the page, then the whole vote
    press(browser, "ArrowLeft", "Backspace")
    assert browser.execute_script("return document.querySelectorAll('[aria-pressed=true]').length") == 0
    answer(browser, "Backspace")
    assert Ballots(run.path).read("Zoë <b>")["votes"] == [] and text(browser, "position") == "0 of 3 done"

    answer(browser, *["ArrowDown"] * 3)
    browser.refresh()
    until(browser, "!document.getElementById('vote').hidden")
    assert text(browser, "position") == "1 of 3 done"
    for _ in range(2):
        answer(browser, *["ArrowDown"] * 3)
    until(browser, "!document.getElementById('end').hidden")
    assert "base" not in browser.execute_script("return document.body.innerText")
    browser.execute_script("document.getElementById('reveal').click()")
    until(browser, "document.querySelector('#results table')")
    assert "ours against base (shapes, 3 votes)" in text(browser, "results")
    assert "Overall0 (0%)3 (100%)0 (0%)" in text(browser, "results")
    assert {url.split("/")[2] for url in requested(browser)} == {server.url.split("/")[2]}
    assert errors(browser) == []
    assert browser.title == "Which is better?"


def test_the_next_person_at_the_same_screen(browser, server, run):
    enter(browser, server.url, "me")
    answer(browser, *["ArrowDown"] * 3)
    assert text(browser, "voter") == "Voting as me. Not you?"
    press(browser, "ArrowLeft")  # half a vote, which nobody may inherit
    browser.execute_script("document.getElementById('leave').click()")
    assert not browser.execute_script("return document.getElementById('start').hidden")
    browser.execute_script(
        "document.getElementById('name').value = 'you'; document.querySelector('#enter button').click()"
    )
    until(browser, "!document.getElementById('vote').hidden && !busy")
    assert text(browser, "position") == "0 of 3 done"
    assert browser.execute_script("return document.querySelectorAll('[aria-pressed=true]').length") == 0
    answer(browser, *["ArrowDown"] * 3)
    assert [len(Ballots(run.path).read(name)["votes"]) for name in ("me", "you")] == [1, 1]


def test_a_second_tab_is_told_and_goes_on(browser, server, run):
    enter(browser, server.url, "me")
    first = text(browser, "prompt")
    # Meanwhile, in another tab
    state = server.answer("next", {"voter": "me"})
    done = {"voter": "me", "pair": state["pair"]["token"], "answers": dict.fromkeys(QUESTIONS, "tie")}
    server.answer("vote", done)
    press(browser, *["ArrowLeft"] * 3)
    until(browser, "document.getElementById('message').textContent.includes('already') && !busy")
    assert text(browser, "prompt") != first and text(browser, "position") == "1 of 3 done"
    assert [vote["answers"]["overall"] for vote in Ballots(run.path).read("me")["votes"]] == ["tie"]
    errors(browser)  # the browser notes the 409


def test_a_server_that_is_gone_is_told(browser, run):
    server = VoteServer(run.path)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    enter(browser, server.url, "me")
    server.close()
    press(browser, *["ArrowLeft"] * 3)
    until(browser, "document.getElementById('message').textContent.includes('does not answer')")
    errors(browser)


@pytest.mark.parametrize("width, height", [(360, 740), (1280, 900)])
def test_the_whole_vote_is_seen_at_once(browser, server, width, height):
    enter(browser, server.url, "me")
    size(browser, width, height)
    for prompt in range(3):
        until(browser, "document.querySelector('#left img').naturalWidth")
        bottom, page_width = browser.execute_script(
            "return [document.getElementById('undo').getBoundingClientRect().bottom, "
            "document.documentElement.scrollWidth]"
        )
        assert bottom <= height and page_width <= width
        if prompt < 2:
            answer(browser, *["ArrowDown"] * 3)


def test_images_are_seen_in_full_and_nothing_tells_them_apart(browser, server, run):
    enter(browser, server.url, "me")
    images = browser.execute_script("return [...document.querySelectorAll('.pair img')].map((e) => e.outerHTML)")
    assert all("base" not in html and "ours" not in html for html in images)
    sources = browser.execute_script("return [...document.querySelectorAll('.pair img')].map((e) => e.src)")
    browser.execute_script("document.getElementById('left').click()")
    until(browser, "document.querySelector('dialog').open && document.querySelector('dialog img').naturalWidth")
    assert browser.execute_script("return document.querySelector('dialog img').src") == sources[0]
    press(browser, *["ArrowLeft"] * 3)  # no votes from behind the dialog
    browser.execute_script("document.querySelector('dialog').click()")
    assert browser.execute_script("return document.querySelectorAll('[aria-pressed=true]').length") == 0
    assert Image.open(run.image_path("shapes", "base", 0)).size == (32, 32)
