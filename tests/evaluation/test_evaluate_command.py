import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from PIL import Image
from tiny_comparisons import painted_folder, random_lora

from trl_flow.cli import _parser, main
from trl_flow.evaluation.evaluate_command import _evaluation
from trl_flow.evaluation.vote_plan import QUESTIONS, Ballots
from trl_flow.shapes import load_prompts


@pytest.fixture(scope="module")
def lora(tiny_sd3_path, tmp_path_factory):
    return random_lora(tiny_sd3_path, tmp_path_factory.mktemp("adapters") / "ours", seed=1)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\ntwo blue squares\nthree ελληνικά\n", encoding="utf-8")
    return str(path)


SAMPLING = "--num_inference_steps 2 --height 16 --width 16 --max_sequence_length 16 --device cpu".split()


def refused(capsys, *arguments: str) -> str:
    """What is said about a mistake, without a traceback."""
    try:
        code = main(["evaluate", *arguments])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error, error
    return error


def test_from_command_line_to_report(tiny_sd3_path, lora, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [
        *("evaluate", "--model", tiny_sd3_path, "--adapters", f"mine={lora}", "--prompts", prompts, f"few={prompts}"),
        *("--limit", "2", "--proxy", "jpeg_compressibility", "--gold", "jpeg_incompressibility"),
        *("--output_dir", str(out), "--seed", "3", "--guidance_scale", "2", *SAMPLING),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert (out / "results.md").read_text(encoding="utf-8") in printed
    assert list(results["sets"]) == ["prompts", "few"]
    assert results["sets"]["few"]["num_prompts"] == 2
    assert results["models"]["mine"]["path"] == lora
    assert {name: results["settings"][name] for name in ("seed", "guidance_scale", "height", "dtype", "device")} == {
        "seed": 3,
        "guidance_scale": 2.0,
        "height": 16,
        "dtype": "float32",
        "device": "cpu",
    }
    # Incompressibility is the other's negative: no mean that can be divided by on one of the sides
    means = results["sets"]["few"]["means"]["mine"]
    assert means["jpeg_incompressibility"]["mean"] == pytest.approx(-means["jpeg_compressibility"]["mean"])
    assert len(list(out.rglob("images/*/*/*.png"))) == 2 * 2 * 2
    # Other settings are another folder's
    assert "seed was 3 and is 4" in refused(capsys, *arguments[1:], "--seed", "4")


def test_columns_of_the_prompt_files(tmp_path):
    """An editing set is read as training reads it."""
    Image.new("RGB", (2, 2), (0, 255, 0)).save(tmp_path / "a.png")
    (tmp_path / "edits.jsonl").write_text('{"instruction": "make it red", "source": "a.png"}\n')
    argv = ["evaluate", "--model", "m", "--prompts", str(tmp_path / "edits.jsonl")]
    argv += ["--prompt_column", "instruction", "--image_column", "source"]
    (row,) = _evaluation(_parser().parse_args(argv))[0]["prompts"]["edits"]
    assert row["prompt"] == "make it red" and row["image"].getpixel((0, 0)) == (0, 255, 0)


def test_the_bundled_model_and_prompts_have_their_own_defaults(tmp_path, capsys):
    arguments = ["--model", "bundled", "--prompts", "bundled", "--limit", "1", "--gold", "shapes_soft"]
    assert main(["evaluate", *arguments, "--device", "cpu", "--output-dir", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    settings = results["settings"]
    # Not the folder that this machine has it in
    assert results["model"] == results["models"]["base"]["path"] == "bundled"
    assert (settings["height"], settings["num_inference_steps"], settings["max_sequence_length"]) == (64, 10, 1)
    stored = json.loads((tmp_path / "settings.json").read_text())["sets"]["bundled"]["prompts"]
    assert stored == load_prompts("test")["prompt"][:1]
    # The checker read the set's further columns
    assert 0 <= results["sets"]["bundled"]["means"]["base"]["shapes_soft"]["mean"] <= 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--model is missing"),
        (["--model", "{model}"], "--prompts is missing"),
        (["--model", "{model}", "--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--model", "{model}", "--prompts", "{prompts}", "{prompts}"], "two prompt sets are called"),
        (["--model", "{model}", "--prompts", "{prompts}", "--limit", "0"], "limit is 0"),
        (["--model", "{model}", "--prompts", "{prompts}", "--proxy", "pikscore"], "no reward function 'pikscore'"),
        (["--model", "{model}", "--prompts", "{prompts}", "--proxy", "ocr", "--gold", "ocr"], "ocr is named twice"),
        (["--model", "{model}", "--prompts", "{prompts}", "--adapters", "no/where/at/all"], "neither a file"),
        (["--model", "{model}", "--prompts", "{prompts}", "--adapters", "{model}"], "whole pipeline"),
        (["--model", "{model}", "--prompts", "{prompts}", "--batch_size", "0"], "batch_size is 0"),
        (["--model", "{model}", "--prompts", "{prompts}", "--device", "warp"], "warp"),
        (["--model", "{model}", "--prompts", "{prompts}", "--vote"], "compares two models"),
        (["--model", "{model}", "--prompts", "{prompts}", "--vote", "a", "--output_dir", "b"], "two folders"),
        (["--model", "{model}", "--prompts", "{prompts}", "--output_dir", "{prompts}"], "is a file"),
        (["--vote", "{tmp}"], "not the folder of an evaluation"),
        (["--vote", "{tmp}", "--proxy", "shapes_soft"], "--proxy is for drawing"),
        (["--vote", "{tmp}", "--steps"], "--steps is for drawing"),
        (["--model", "{model}", "--prompts", "{prompts}", "--steps", "4"], "unrecognized arguments: 4"),
        (["--vote", "{tmp}", "--vote_pairs", "0"], "vote_pairs is 0"),
        (["--vote", "{tmp}", "--port", "70000"], "port is 70000"),
        (["--adaptors", "x"], "Did you mean --adapters?"),
    ],
)
def test_mistakes_are_told_before_anything_is_drawn(
    arguments, message, tiny_sd3_path, prompts, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    filled = [a.format(model=tiny_sd3_path, prompts=prompts, tmp=tmp_path) for a in arguments]
    assert message in refused(capsys, *filled)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_what_fails_later_is_told_without_a_traceback_of_the_program(
    tiny_sd3_path, prompts, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_failing_rewards.py").write_text(
        "def broken(prompts, images, **kwargs):\n    return [1 / 0]\n\n\n"
        "def empty(prompts, images, **kwargs):\n    return [float('nan')] * len(images)\n"
    )
    command = ["--model", tiny_sd3_path, "--prompts", prompts, "--output_dir", "out", *SAMPLING]
    # What the pipeline refuses leaves a folder that can be used
    assert "multiples of 4 pixels" in refused(capsys, *command, "--height", "17")
    assert "'empty' returned nan for image 0" in refused(capsys, *command, "--proxy", "my_failing_rewards.empty")
    assert main(["evaluate", *command, "--proxy", "my_failing_rewards.broken"]) == 2
    error = capsys.readouterr().err
    assert "1 / 0" in error and "scorer.py" not in error and "cli.py" not in error
    assert (
        "'broken' raised ZeroDivisionError" in error and "Run the same command again to continue from there" in error
    )
    # A folder that another user owns, here one that cannot be made
    assert "cannot be written" in refused(capsys, *command[:5], "/proc/nowhere", *SAMPLING)


def vote_over_http(url: str) -> None:
    def post(action: str, **request) -> dict:
        body = json.dumps({"voter": "me", **request}).encode()
        asked = urllib.request.Request(url + action, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as response:
            return json.load(response)

    state = post("next")
    while state["pair"]:
        state = post("vote", pair=state["pair"]["token"], answers=dict.fromkeys(QUESTIONS, "tie"))


def test_a_vote_is_served_and_ends_with_a_report(tmp_path):
    painted_folder(tmp_path, ["a", "b"])
    # A parent in the background may have had SIGINT ignored, which its children inherit
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from trl_flow.cli import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-c", code, "evaluate", "--vote", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        # A server that never comes must not hang the tests
        killer = threading.Timer(120, process.kill)
        killer.start()
        try:
            url = next(line for line in process.stdout if "http://" in line).split("open ")[1].split()[0]
            vote_over_http(url)
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            printed = process.stdout.read()
        finally:
            killer.cancel()
        assert process.wait(60) == 0
    assert "| shapes (2) | ours against base | overall | 0 (0%) | 2 (100%) | 0 (0%) | 50% |" in printed
    assert len(Ballots(tmp_path).read("me")["votes"]) == 2
