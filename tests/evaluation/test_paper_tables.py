"""`trl-flow evaluate --table` from the command line to the table, with cheap rewards in the place of the table's."""

import csv
import io
import json
import sys

import numpy as np
import pytest
from judge_server import JudgeServer
from PIL import Image
from tiny_comparisons import random_lora

from trl_flow.cli import main
from trl_flow.evaluation.paper_tables import TABLES, paper_tables, table_inputs
from trl_flow.prompts import PROMPT_SETS, geneval_benchmark
from trl_flow.rewards.named import NAMED_REWARDS, named_reward


SAMPLING = "--num_inference_steps 2 --height 16 --width 16 --max_sequence_length 16 --device cpu".split()
STAND_INS = """
import numpy as np


class Mean:
    def __init__(self, channel):
        self.channel, self.__name__ = channel, f"mean_{channel}"

    def __call__(self, prompts, images, **kwargs):
        return [float(np.asarray(image)[..., self.channel].mean()) / 255 for image in images]


red, green, blue = Mean(0), Mean(1), Mean(2)


def geneval(prompts, images, tag, include, **kwargs):
    return [float(np.asarray(image)[0, 0, 0] > 127) for image in images]


def ocr(prompts, images, text, **kwargs):
    return [len(one) / 100 for one in text]
"""
TESTPOINTS = [["Style", "Attribute - Color"], ["Text Generation"]]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder with rewards and copies of prompt sets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    monkeypatch.delitem(sys.modules, "stand_ins", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    (tmp_path / "stand_ins.py").write_text(STAND_INS)
    rows = [{"tag": "colors", "include": [{"class": "vase", "count": 1, "color": "green"}], "prompt": "a green vase"}]
    rows += [{"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a cow"}]
    texts = {
        "geneval/test_metadata.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "ocr/test.txt": 'A sign that says "OPEN".\nA label "Slow".\n',
        "pickscore/test.txt": "a heron\na snail\na kite\n",
        "unigenbench/test_en.csv": unigenbench(TESTPOINTS),
        "unigenbench_long/test_en_long.csv": unigenbench(TESTPOINTS[::-1]),
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "drawbench.csv").write_text("Prompts,Category\na red car,Colors\ntwo dogs,Counting\n")
    return tmp_path


def unigenbench(testpoints):
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["index", "prompt_en", "sub_dims_en"])
    for row, names in enumerate(testpoints):
        about = {"Primary Categories": "Art", "Secondary Categories": "Graphic Art", "Testpoints": names}
        about["Testpoint Description"] = [f"what {name} is here" for name in names]
        writer.writerow([row, f"picture {row}", json.dumps(about)])
    return file.getvalue()


@pytest.fixture(scope="module")
def lora(tiny_sd3_path, tmp_path_factory):
    return random_lora(tiny_sd3_path, tmp_path_factory.mktemp("adapters") / "ours", seed=1)


def command(table, model, lora, prompts, rewards, *more):
    given = ["--table_prompts", *prompts, "--table_rewards", *rewards, "--output_dir", "out"]
    return ["evaluate", "--table", table, "--model", model, "--adapters", f"mine={lora}", *given, *SAMPLING, *more]


def drawn(place, name, model):
    paths = sorted((place / "out" / "images" / name / model).iterdir())
    return np.stack([np.asarray(Image.open(path), dtype=np.float64) / 255 for path in paths])


def results(place):
    return json.loads((place / "out" / "results.json").read_text(encoding="utf-8"))


def refused(capsys, *arguments):
    assert main([*arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


GUARD_PROMPTS = ["geneval:geneval", "pickscore:pickscore", "ocr:ocr"]
GUARD_REWARDS = ["geneval_correct=stand_ins.geneval", "pickscore=stand_ins.red", "ocr=stand_ins.ocr"]
GUARD_REWARDS += ["hpsv2=stand_ins.green", "imagereward=stand_ins.blue"]


def test_the_table_of_guard(place, tiny_sd3_path, lora, capsys):
    # A score that depends on the image, on UnifiedReward's scale
    with JudgeServer(lambda request: f"Final Score: {1 + request.image.getpixel((3, 3))[1] / 128}") as server:
        judge = f"unifiedreward@{server.base_url}"
        arguments = command("guard", tiny_sd3_path, lora, GUARD_PROMPTS, [*GUARD_REWARDS, judge])
        assert main(arguments) == 0
        asked = len(server.requests)
        assert main(arguments) == 0
        assert len(server.requests) == asked == 2 * 3  # the second run has all of it
    found = results(place)
    (table,) = found["paper_tables"]
    assert table["title"] == "GRPO-Guard, Table 1"
    assert table["columns"] == ["GenEval", "PickScore", "Text Render", "HPSv2", "ImR", "UniR", "Average"]
    images = {model: drawn(place, "pickscore", model) for model in ("base", "mine")}
    means = {
        model: [of[..., 1].mean(), of[..., 2].mean(), np.mean(1 + of[:, 3, 3, 1] * 255 / 128)]
        for model, of in images.items()
    }
    for model, row in table["rows"].items():
        expected = {
            "GenEval": np.mean(drawn(place, "geneval", model)[:, 0, 0, 0] * 255 > 127.5),
            "PickScore": images[model][..., 0].mean(),
            "Text Render": 0.04,  # "OPEN" and "Slow"
            **dict(zip(("HPSv2", "ImR", "UniR"), means[model], strict=True)),
            "Average": np.mean(np.divide(means[model], means["base"])),
        }
        assert row == pytest.approx(expected, rel=1e-5)
    assert table["rows"]["base"]["Average"] == 1.0 != table["rows"]["mine"]["Average"]
    # Each set was scored by its own rewards only
    assert list(found["sets"]["geneval"]["means"]["mine"]) == ["geneval"]
    assert list(found["sets"]["pickscore"]["means"]["mine"]) == ["mean_0", "mean_1", "mean_2", "unifiedreward"]
    assert found["settings"]["num_images_per_prompt"] == 1
    report = (place / "out" / "results.md").read_text(encoding="utf-8")
    assert report in capsys.readouterr().out
    head, row = [line for line in report.splitlines() if line.startswith(("| model | GenEval", "| mine | "))][:2]
    assert head == "| model | GenEval | PickScore | Text Render | HPSv2 | ImR | UniR | Average |"
    assert row.split(" | ")[2] == f"{table['rows']['mine']['PickScore']:.4g}"
    assert "geneval by task:" in report
    # Which model was trained on what is not known
    assert "[" not in report.split("## geneval")[1]
    page = (place / "out" / "comparison.html").read_text(encoding="utf-8")
    assert '"brackets": false' in page and "[In brackets]" not in page
    grids = {path.name for path in (place / "out").glob("grid-*.png")}
    assert grids == {"grid-geneval.png", "grid-pickscore.png", "grid-ocr.png"}


def test_the_table_of_vgpo(place, tiny_sd3_path, lora):
    prompts = [*GUARD_PROMPTS, "drawbench:drawbench.csv"]
    rewards = ["geneval_correct=stand_ins.geneval", "pickscore=stand_ins.red", "ocr=stand_ins.ocr"]
    rewards += ["aesthetic=stand_ins.green", "imagereward=stand_ins.blue"]
    with JudgeServer(lambda r: "good", models=("a", "b")) as deqa, JudgeServer(lambda r: "Final Score: 3.5") as other:
        judges = [f"deqa@{deqa.base_url}#b", f"unifiedreward@{other.base_url}"]
        assert main(command("vgpo", tiny_sd3_path, lora, prompts, [*rewards, *judges])) == 0
    assert {request.body["model"] for request in deqa.requests} == {"b"}
    (table,) = results(place)["paper_tables"]
    for model, row in table["rows"].items():
        own, bench = (drawn(place, name, model) for name in ("pickscore", "drawbench"))
        assert row == pytest.approx(
            {
                "GenEval": np.mean(drawn(place, "geneval", model)[:, 0, 0, 0] * 255 > 127.5),
                "OCR": 0.04,
                "PickScore": own[..., 0].mean(),
                "Aesthetic on DrawBench": bench[..., 1].mean(),
                "DeQA on DrawBench": 4.0,
                "ImgRwd on DrawBench": bench[..., 2].mean(),
                "PickScore on DrawBench": bench[..., 0].mean(),
                "UniRwd on DrawBench": 3.5,
            },
            rel=1e-5,
        )


def test_the_tables_of_slas(place, tiny_sd3_path, lora):
    def respond(request):
        # The first test point is passed by images that are more red than not at one place
        number = int(request.text.split("Test points, ")[1].split(" of them")[0])
        return f"<score>[{int(request.image.getpixel((0, 0))[0] > 127)}{', 1' * (number - 1)}]</score>"

    prompts = ["unigenbench:unigenbench", "unigenbench_long:unigenbench_long"]
    with JudgeServer(respond) as server:
        rewards = ["geneval_correct=stand_ins.geneval", f"unigenbench@{server.base_url}"]
        arguments = command("slas", tiny_sd3_path, lora, prompts, rewards, "--limit", "6")
        assert main(arguments) == 0
        first = results(place)["paper_tables"]
        assert main(arguments) == 0
        # Four images of two prompts in two sets by two models
        assert len(server.requests) == 4 * 2 * 2 * 2
    found = results(place)
    assert found["paper_tables"] == first and found["settings"]["num_images_per_prompt"] == 4
    assert [table["title"] for table in first] == [
        "SLAS, Table 1: GenEval",
        "SLAS, Table 2: UniGenBench++, short prompts",
        "SLAS, Table 2: UniGenBench++, long prompts",
        "SLAS, Table 3: UniGenBench++, short prompts",
        "SLAS, Table 3: UniGenBench++, long prompts",
    ]
    # A try with six of GenEval's prompts has one of each task
    stored = json.loads((place / "out" / "settings.json").read_text())["sets"]["generated_geneval"]["prompts"]
    tags = dict(zip(geneval_benchmark()["prompt"], geneval_benchmark()["tag"], strict=True))
    assert len({tags[prompt] for prompt in stored}) == len(stored) == 6
    for model in ("base", "mine"):
        hits = (drawn(place, "generated_geneval", model)[:, 0, 0, 0] * 255 > 127.5).reshape(6, 4).mean(axis=1)
        assert list(first[0]["rows"][model].values()) == pytest.approx([*hits, hits.mean()])
        # Style and Text Generation are the first of their prompts, Attribute is always passed
        for table, name, order in ((first[1], "unigenbench", 1), (first[2], "unigenbench_long", -1)):
            hits = 100 * (drawn(place, name, model)[:, 0, 0, 0] * 255 > 127.5).reshape(2, 4).mean(axis=1)
            style, text = hits[::order]
            row = {column: value for column, value in table["rows"][model].items() if value is not None}
            dimensions = {"Style": style, "Attribute": 100.0, "Text": text}
            assert row == pytest.approx(dimensions | {"Overall": (style + 100.0 + text) / 3})
    assert first[3]["rows"]["base"]["Attribute - Color"] == 100.0
    assert "| test point | base | mine |" in (place / "out" / "results.md").read_text()


def test_all_that_is_missing_is_said_at_once(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    prompts = ["geneval:geneval", "ocr:nowhere"]
    rewards = ["hpsv2=stand_ins.green", "imagereward=stand_ins.nothing", "pickscore=http://127.0.0.1:9#pickscore"]
    error = refused(capsys, *command("guard", str(place), "no/where/at/all", prompts, rewards))
    assert "GRPO-Guard, Table 1 cannot be made yet. Nothing was drawn. Missing are:" in error
    lines = [line for line in error.splitlines() if line.startswith("* ")]
    for start, says in (
        ("* the model: ", "model_index.json"),
        ("* the adapters: ", "neither a file, nor a folder"),
        ("* the prompts pickscore: ", "pickscore:PATH"),
        ("* the prompts ocr: ", "'nowhere' is neither a file nor a folder"),
        ("* the reward geneval_correct: ", "facebook/mask2former-swin-small-coco-instance"),
        ("* the reward pickscore: ", "127.0.0.1:9"),
        ("* the reward ocr: ", 'pip install "trl_flow[ocr]"'),
        ("* the reward imagereward: ", "stand_ins.nothing"),
        ("* the reward unifiedreward: ", "vllm serve CodeGoat24/UnifiedReward-qwen-7b"),
    ):
        assert [says in line for line in lines if line.startswith(start)] == [True], (start, error)
    assert len(lines) == 9
    assert "--table_rewards NAME@http://host:8000/v1" in error and "--table_prompts SET:PATH" in error
    assert "--table_rewards NAME=http" in error
    assert not (place / "out").exists()


def test_a_judge_that_is_away_or_is_not_known_is_missing(tiny_sd3_path, lora, capsys):
    with JudgeServer(lambda request: "Final Score: 3", models=("a", "b")) as server:
        judge = f"unifiedreward@{server.base_url}"
        arguments = command("guard", tiny_sd3_path, lora, GUARD_PROMPTS, [*GUARD_REWARDS, judge])
        assert "* the reward unifiedreward: The server at http://127" in (error := refused(capsys, *arguments))
        assert "serves 2 models: a, b" in error
        error = refused(capsys, *arguments[: -len(SAMPLING) - 3], f"{judge}#c", *arguments[-len(SAMPLING) - 2 :])
        assert "does not serve c, but a, b. Name one of these." in error and "SET:PATH" not in error
    error = refused(capsys, *arguments)
    assert "cannot be reached, in 1 try" in error and error.count("\n* ") == 1


def test_two_judges_have_two_addresses(tiny_sd3_path, lora, capsys, monkeypatch):
    prompts = [*GUARD_PROMPTS, "drawbench:drawbench.csv"]
    rewards = [*GUARD_REWARDS[:3], "aesthetic=stand_ins.green", "imagereward=stand_ins.blue"]
    with JudgeServer(lambda request: "Final Score: 3") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        error = refused(capsys, *command("vgpo", tiny_sd3_path, lora, prompts, rewards))
        assert "* the judges deqa and unifiedreward are two models, but OPENAI_BASE_URL is one address" in error
        # Also where one is named by its address, and the other by its model too
        rewards += [f"unifiedreward@{server.base_url}/#judge-7b", f"deqa@{server.base_url}"]
        error = refused(capsys, *command("vgpo", tiny_sd3_path, lora, prompts, rewards))
    assert f"deqa and unifiedreward are two models, but {server.base_url} is one address, of judge-7b" in error


def test_the_tables_of_slas_are_of_test_points(tiny_sd3_path, lora, capsys):
    prompts = ["unigenbench:unigenbench", "unigenbench_long:unigenbench_long"]
    rewards = ["geneval_correct=stand_ins.geneval", "unigenbench=stand_ins.red"]
    error = refused(capsys, *command("slas", tiny_sd3_path, lora, prompts, rewards))
    assert "* the reward unigenbench: stand_ins.red gives one score for each image" in error
    assert "--table_rewards unigenbench@http://host:8000/v1" in error and error.count("\n* ") == 1


def test_a_table_that_there_is_not_is_said():
    sets = {name: {"categories": []} for name in TABLES["slas"].sets}
    found = paper_tables(
        {"models": {"base": {}}, "sets": sets}, TABLES["slas"], {"geneval_correct": "g", "unigenbench": "u"}
    )
    assert [table["rows"] for table in found] == [{}] * 5
    assert found[1]["note"] == "There is no such table: the scores by u on unigenbench have no dimension."


@pytest.mark.parametrize(
    "table, pipeline, expected",
    [
        (
            "guard",
            "StableDiffusion3Pipeline",
            {
                "num_inference_steps": 40,
                "guidance_scale": 4.5,
                "max_sequence_length": 128,
                "height": 512,
                "width": 512,
            },
        ),
        ("guard", "FluxPipeline", {"height": 512, "width": 512, "num_inference_steps": 28, "guidance_scale": 3.5}),
        ("guard", "QwenImagePipeline", {}),
    ],
)
def test_models_are_drawn_as_they_were_trained(place, table, pipeline, expected):
    (place / "model_index.json").write_text(json.dumps({"_class_name": pipeline, "_diffusers_version": "0.41.0"}))
    for part, config in (("vae", {"block_out_channels": [1] * 4}), ("transformer", {"sample_size": 128})):
        (place / part).mkdir()
        (place / part / "config.json").write_text(json.dumps(config))
    rewards = [*GUARD_REWARDS, "unifiedreward=stand_ins.red"]
    given = {"prompts": GUARD_PROMPTS, "rewards": rewards}
    assert table_inputs(table, str(place), [], **given)[2] == expected | {"num_images_per_prompt": 1}
    # A model of 8 x 8 pixels draws its own
    (place / "transformer" / "config.json").write_text(json.dumps({"sample_size": 1}))
    expected = {name: value for name, value in expected.items() if name not in ("height", "width")}
    assert table_inputs(table, str(place), [], **given)[2] == expected | {"num_images_per_prompt": 1}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--table", "guard", "--model", "m", "--prompts", "ocr"], "--prompts has no meaning, since --table chooses"),
        (["--table", "guard", "--model", "m", "--proxy", "ocr"], "--proxy has no meaning"),
        (["--table", "guard", "--model", "m", "--gold", "ocr"], "--gold has no meaning"),
        (["--table", "guard"], "--model is missing"),
        (["--table", "guard", "--model", "m", "--limit", "0"], "limit is 0"),
        (["--vote", "x", "--table", "guard"], "--table is for drawing"),
        (["--model", "m", "--prompts", "p", "--table_prompts", "a:b"], "--table_prompts has no meaning, since there"),
        (["--model", "m", "--prompts", "p", "--table_rewards", "a=b"], "--table_rewards has no meaning"),
        (
            ["--table", "guard", "--model", "m", "--table_prompts", "drawbench:x"],
            "give SET:PATH, each once, for geneva",
        ),
        (
            ["--table", "guard", "--model", "m", "--table_rewards", "deqa=x.y"],
            "for geneval_correct, pickscore, ocr, hp",
        ),
        (["--table", "guard", "--model", "m", "--table_rewards", "hpsv2"], "give NAME=REWARD or NAME@http"),
        (["--table", "guard", "--model", "m", "--table_rewards", "ocr=a.b", "ocr=c.d"], "ocr=c.d: give"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message, capsys):
    assert message in refused(capsys, "evaluate", *arguments)


def test_the_definitions_name_what_there_is():
    for table in TABLES.values():
        for name, own in table.sets.items():
            assert "test" in PROMPT_SETS[name].splits
            assert set(own) <= set(NAMED_REWARDS)
        shown = [column[1:] for column in table.columns] + [category[1:3] for category in table.by_category]
        assert {(name, reward) for name, own in table.sets.items() for reward in own} == set(shown)
        assert set(table.gold) <= set(table.rewards)


def test_a_base_model_that_cannot_be_divided_by_has_no_average():
    means = {"base": {"green": {"mean": 0.0}, "red": {"mean": 1.0}}}
    table = TABLES["guard"]
    sets = {name: {"means": means, "gold": None} for name in table.sets}
    (made,) = paper_tables({"models": means, "sets": sets}, table, dict.fromkeys(table.rewards, "green"))
    assert made["rows"]["base"]["Average"] is None


def test_judges_by_name_and_address():
    reward = named_reward("unifiedreward_style@http://host:8000/v1#my/model")
    assert (reward.chat.base_url, reward.chat.model) == ("http://host:8000/v1", "my/model")
    assert named_reward("unigenbench@https://host/v1").chat.model is None
    for wrong in ("pickscore@http://host:8000/v1", "deqa@host:8000", "deqa@"):
        with pytest.raises(ValueError, match=f"no reward function '{wrong}'. Judges have an address behind an @"):
            named_reward(wrong)
