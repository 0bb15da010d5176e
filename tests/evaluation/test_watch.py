"""The page on a run: what it shows of a real one, and of files that are half written, missing or another thing's."""

import json
import re
import socket
import struct
import threading
import urllib.error
import urllib.request

import pytest
from slow_requests import slow_request
from tiny_training import brightness, darkness, prompts, tiny_trainer

from trl_flow.cli import main
from trl_flow.evaluation.local_handler import LocalHandler
from trl_flow.evaluation.outputs import locked
from trl_flow.evaluation.run_log import LOG_NAME, PROGRESS_NAME
from trl_flow.evaluation.svg import Series, line_chart
from trl_flow.evaluation.watch import watch_page
from trl_flow.evaluation.watch_server import watch_server


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of three updates, with gold scores and images."""
    folder = tmp_path_factory.mktemp("runs") / "a <run>"
    every = {"eval_strategy": "steps", "eval_steps": 1, "log_images": True, "max_steps": 3, "beta": 0.1}
    rewards = {"reward_funcs": [brightness, darkness], "eval_reward_funcs": brightness_gold}
    trainer = tiny_trainer(folder, eval_dataset=prompts(2), **rewards, **every)
    trainer.train()
    return folder


def brightness_gold(prompts, images, **kwargs):
    return brightness(prompts, images)


@pytest.fixture
def folder(run, tmp_path):
    """A copy of the run's files that may be broken."""
    for path in run.rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.relative_to(run)).write_bytes(path.read_bytes())
    return tmp_path


def progress(folder, **changed) -> None:
    path = folder / PROGRESS_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def test_the_page_of_a_finished_run_has_all_of_it(run):
    page, standing = watch_page(run)
    assert standing.state == "finished" and standing.text == "finished: update 3 of 3"
    assert 'http-equiv="refresh"' not in page and "__" not in page
    for title in ("reward", "brightness", "darkness", "KL to the initial model", "gradient norm", "learning rate"):
        assert f"<figcaption>{title}</figcaption>" in page
    assert "<figcaption>gold (never optimized; base model: 1)</figcaption>" in page
    assert "Samples of training, update 3" in page and "Evaluation, update 3" in page
    assert "a &lt;run&gt;" in page and "<run>" not in page
    last = [json.loads(line) for line in (run / LOG_NAME).read_text().splitlines()]
    reward = next(log["reward"] for log in reversed(last) if "reward" in log)
    assert f"<td>reward</td><td>{reward:.4g}</td><td>3</td>" in page
    assert re.search(r"An update, with what comes between, takes [\d.]+ s", page) and "updating" in page
    # Self-contained: nothing is asked of any server
    assert not re.search(r"(?:src|href)=\"(?!data:)", page) and "<script" not in page


def test_where_a_run_stands(folder):
    progress(folder, finished=False, update=2, max_steps=10, began_at=1000.0, began_at_update=0, written_at=1200.0)
    (folder / LOG_NAME).write_text(
        (folder / LOG_NAME).read_text().split('"train_runtime"')[0].rpartition("\n")[0] + "\n"
    )
    progress(folder, update=4)
    with locked(folder, "training"):
        page, standing = watch_page(folder, now=1210.0)
    # 50 s an update, 6 left, of which 10 s are over
    assert standing.text == "running: update 4 of 10, about 5 minutes left; last heard of 10 seconds ago"
    assert 'http-equiv="refresh"' in page
    _, standing = watch_page(folder, now=1200.0 + 3600)
    assert standing.text == "stopped at update 4 of 10, 60 minutes ago; it was interrupted, or failed"
    (folder / ".lock").unlink()  # as of a copy from elsewhere
    assert watch_page(folder, now=1260.0)[1].state == "running"
    assert (
        "stalled at update 4 of 10: nothing has been written for 60 minutes" == watch_page(folder, now=4800.0)[1].text
    )
    progress(folder, finished=True)
    assert watch_page(folder)[1].text == "finished early: update 4 of 10"


def test_half_written_files_are_left_out(folder):
    grids = sorted((folder / "images").glob("step-*.png"))
    grids[-1].write_bytes(grids[-1].read_bytes()[:200])
    with (folder / LOG_NAME).open("a") as file:
        file.write('{"reward": 123456.0, "ste')
    (folder / PROGRESS_NAME).write_text('{"update": 1')
    page, standing = watch_page(folder)
    assert "Samples of training, update 2" in page and "123456" not in page
    assert standing.state == "finished"


def test_a_run_that_has_logged_nothing_yet(tmp_path):
    about = {"update": 0, "max_steps": 10, "finished": False, "began_at": 1.0, "began_at_update": 0, "written_at": 1.0}
    (tmp_path / PROGRESS_NAME).write_text(json.dumps(about))
    assert "Nothing has been logged yet" in watch_page(tmp_path, now=2.0)[0]
    (tmp_path / LOG_NAME).write_text("")
    page, standing = watch_page(tmp_path, now=2.0)
    assert "Nothing has been logged yet" in page and standing.text.startswith("running: update 0 of 10")


def test_a_run_without_a_word_of_itself(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 3, "reward": NaN, "loss": 1.0}]}')
    page, standing = watch_page(tmp_path)
    assert standing.state == "unknown" and "<td>loss</td><td>1</td><td>3</td>" in page and "nan" not in page


def test_folders_of_another_kind_are_refused(tmp_path, capsys):
    for name, remedy in (("", "not the output_dir of a training run"), ("missing", "is no folder")):
        assert main(["watch", str(tmp_path / name)]) == 2
        assert remedy in capsys.readouterr().err
    (tmp_path / LOG_NAME).write_text("no log\n")
    assert main(["watch", str(tmp_path)]) == 2
    assert "is not a log of a training run" in capsys.readouterr().err


def test_the_page_as_a_file(run, tmp_path, capsys):
    assert main(["watch", str(run), "--output", str(tmp_path / "page.html")]) == 0
    assert "finished: update 3 of 3" in capsys.readouterr().out
    assert (tmp_path / "page.html").read_text() == watch_page(run)[0]


def test_the_page_is_served_to_this_machine_alone(run):
    with watch_server(run, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        assert server.server_address[0] == "127.0.0.1"
        with urllib.request.urlopen(f"http://localhost:{port}/") as answer:
            assert "finished: update 3 of 3" in answer.read().decode()
        for url, host, code in (
            (f"http://localhost:{port}/../x", None, 404),
            (f"http://127.0.0.1:{port}/", "evil", 403),
        ):
            request = urllib.request.Request(url, headers={"Host": host} if host else {})
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request)
            assert refused.value.code == code
        with pytest.raises(ValueError, match=f"port {port} cannot be had.*--port {port + 1}"):
            watch_server(run, port)
        server.shutdown()


def test_a_browser_that_sends_its_headers_too_slowly(run, monkeypatch):
    monkeypatch.setattr(LocalHandler, "timeout", 0.5)
    with watch_server(run, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert slow_request(server.server_address, b"GET / HTTP/1.1\r\n", b"X: y\r\n") == b""
        server.shutdown()


def test_a_browser_that_goes_away_is_no_error(run):
    failed = []
    with watch_server(run, 0) as server:
        server.handle_error = lambda *_: failed.append(True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with socket.create_connection(server.server_address) as browser:
            browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed by a reset
            browser.sendall(b"GET / HTTP/1.1\r\nHost: localhost:1\r\n\r\n")
        urllib.request.urlopen(f"http://localhost:{server.server_address[1]}/").read()
        server.shutdown()
    assert not failed


def test_a_chart_has_its_points_where_they_belong():
    chart = line_chart("a & b", [Series("x", [0, 10], [0.0, 1.0]), Series("e", [5], [0.5], [0.25])], baseline=1.0)
    places = [tuple(map(float, p)) for p in re.findall(r"[ML]([\d.]+) ([\d.]+)", chart.split('line c0" d="')[1])][:2]
    (x0, y0), (x1, y1) = places
    assert x0 == 50 and x1 == 352 and y0 > y1
    ((x, y),) = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)
    assert float(x) == pytest.approx((x0 + x1) / 2, abs=0.1) and float(y) == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert "a &amp; b" in chart and 'class="base"' in chart and "<b>1</b>" in chart
    assert line_chart("nothing", [Series("x", [], [])]) == ""
    assert line_chart("one", [Series("x", [3], [2.0])]).count("<circle") == 1


def test_a_long_run_is_drawn_by_means():
    chart = line_chart("long", [Series("x", range(10_000), [float(i % 2) for i in range(10_000)])])
    assert len(chart) < 12_000


def test_a_file_that_cannot_be_written_is_named(run, tmp_path, capsys):
    for output in (tmp_path / "missing" / "page.html", tmp_path):
        assert main(["watch", str(run), "--output", str(output)]) == 2
        message = capsys.readouterr().err
        assert f"--output {output} cannot be written" in message and ".tmp" not in message
