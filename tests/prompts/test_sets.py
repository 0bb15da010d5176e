"""The published sets, from files of a few rows in their true layout: a local copy, the Hub, GitHub."""

import csv
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trl_flow.prompts import (
    PROMPT_SETS,
    UnknownSplitError,
    load_drawbench,
    load_geneval,
    load_hpdv2,
    load_ocr,
    load_pickscore,
    load_prompts,
    load_unigenbench,
    load_vbench,
    sets,
)


GENEVAL = [
    {"tag": "single_object", "include": [{"class": "kite", "count": 1}], "prompt": "a photo of a kite"},
    {
        "tag": "position",
        "include": [{"class": "fork", "count": 1}, {"class": "cow", "count": 1, "position": ["above", 0]}],
        "prompt": "a photo of a cow above a fork",
    },
    {
        "tag": "counting",
        "include": [{"class": "boat", "count": 2}],
        "exclude": [{"class": "boat", "count": 3}],
        "prompt": "a photo of two boats",
    },
    {
        "tag": "colors",
        "include": [{"class": "vase", "count": 1, "color": "green"}],
        "prompt": "a photo of a green vase",
    },
]
OCR = 'A kiosk with a sign that says "Fresh Pears" at noon.\nThe label “Slow Down” on a snail, and "no" beside it. \n'
UNIGENBENCH_EN = [
    (
        "A heron in a top hat reads two papers.",
        {
            "Primary Categories": "Art",
            "Secondary Categories": "Graphic Art",
            "Subjects": "Animal",
            "Sentence Structure": "Descriptive",
            "Testpoints": ["Attribute - Quantity", "Style", "Attribute - Color"],
            "Testpoint Description": ["two papers", "graphic", 'hat in "black"'],
        },
    )
]
UNIGENBENCH_ZH = [
    (
        "一只戴礼帽的鹭",
        {"一级垂类": "艺术", "二级垂类": "平面艺术", "主体": "动物", "考点": ["属性-数量", "风格"], "句式": "描述式",
         "考点对应描述": ["一只", "平面"]},
    )
]  # fmt: skip


def json_lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def unigenbench_csv(rows, language: str) -> str:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["index", f"prompt_{language}", f"sub_dims_{language}"])
    writer.writerows([i, prompt, json.dumps(about, ensure_ascii=False)] for i, (prompt, about) in enumerate(rows))
    return file.getvalue()


def repository(folder, files: dict[str, str]):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8", newline="")
    return folder


@pytest.fixture
def github(monkeypatch, tmp_path):
    """A server in GitHub's place; what it has is put into the dictionary, what was asked for into its key None."""
    files: dict = {None: []}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            files[None].append(self.path)
            content = files.get(self.path, "").encode()
            self.send_response(200 if self.path in files else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args):
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setattr(sets, "GITHUB", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    yield files
    server.shutdown()
    server.server_close()


# ---- Flow-GRPO's ----


@pytest.mark.parametrize("where", ["", "dataset/geneval", "dataset/geneval/train_metadata.jsonl"])
def test_geneval_from_a_clone(tmp_path, where):
    clone = repository(tmp_path, {"dataset/geneval/train_metadata.jsonl": json_lines(GENEVAL)})
    dataset = load_geneval(path=clone / where)
    assert dataset.column_names == ["prompt", "tag", "include", "exclude"]
    # Nothing is added to the clauses: no color of None
    assert list(dataset) == [{"exclude": None, **row} for row in GENEVAL]


def test_geneval_without_counting_has_the_column_too(tmp_path):
    (tmp_path / "some.jsonl").write_text(json_lines([{**GENEVAL[0], "source": "mine"}]))
    assert load_geneval(path=tmp_path / "some.jsonl")[0] == {**GENEVAL[0], "exclude": None, "source": "mine"}


def test_generated_prompts_can_be_added_to_the_published(tmp_path):
    from datasets import concatenate_datasets

    (tmp_path / "train_metadata.jsonl").write_text(json_lines(GENEVAL))
    both = concatenate_datasets([load_prompts("generated_geneval", "test"), load_geneval(path=tmp_path)])
    assert both[-2]["include"] == GENEVAL[2]["include"] and both[-2]["exclude"] == GENEVAL[2]["exclude"]


def test_ocr_prompts_come_with_their_text(tmp_path):
    repository(tmp_path, {"dataset/ocr/test.txt": OCR})
    dataset = load_ocr("test", path=tmp_path)
    assert dataset["text"][:] == ["Fresh Pears", "Slow Down"]
    assert dataset["prompt"][:] == [line.strip() for line in OCR.splitlines()]


def test_a_prompt_without_text_is_no_ocr_prompt(tmp_path):
    (tmp_path / "train.txt").write_text(OCR + "A sign without words.\n")
    with pytest.raises(ValueError, match="row 2.*'A sign without words.' has no text in quot"):
        load_ocr(path=tmp_path)


def test_pickscore_and_its_part_that_is_safe(tmp_path):
    repository(tmp_path, {"dataset/pickscore/train.txt": "a\nb \n", "dataset/pickscore_sfw/train.txt": "a\n"})
    assert load_pickscore(path=tmp_path)["prompt"][:] == ["a", "b"]
    assert load_pickscore(sfw=True, path=tmp_path)["prompt"][:] == ["a"]
    assert load_prompts(f"pickscore_sfw:{tmp_path}")["prompt"][:] == ["a"]


def test_flow_grpos_sets_are_downloaded_once(github):
    path = f"/yifan123/flow_grpo/{sets.FLOW_GRPO_REVISION}/dataset/geneval/test_metadata.jsonl"
    github[path] = json_lines(GENEVAL)
    assert load_prompts("geneval", "test")["prompt"][:] == [row["prompt"] for row in GENEVAL]
    assert len(load_prompts("geneval", "test")) == 4
    assert github[None] == [path]  # what a commit holds does not change


def test_another_revision_of_flow_grpos_sets(github):
    github["/yifan123/flow_grpo/main/dataset/ocr/train.txt"] = OCR
    assert len(load_prompts("ocr", revision="main")) == 2
    github["/yifan123/flow_grpo/main/dataset/ocr/train.txt"] = OCR * 2
    assert len(load_prompts("ocr", revision="main")) == 4  # a branch moves on
    github["/yifan123/flow_grpo/v2/dataset/pickscore/train.txt"] = "a\n"
    assert load_pickscore(revision="v2")["prompt"][:] == ["a"]


def test_a_file_that_github_does_not_have(github):
    with pytest.raises(ValueError, match="'ocr' cannot be fetched from github.com/yifan123/flow_grpo") as caught:
        load_ocr(revision="no-such")
    assert "get dataset/ocr/train.txt from there" in str(caught.value) and "ocr:PATH" in str(caught.value)


# ---- HPDv2 ----

HPDV2 = {
    "train.json": json.dumps(
        [{"prompt": p, "human_preference": [0, 1], "file_path": ["a.jpg", "b.jpg"]} for p in ("x", "y", "x")]
    ),
    "test.json": json.dumps(
        [{"prompt": "z", "image_path": ["c.jpg"], "rank": [1], "raw_annotations": [{"rank": [1], "user_hash": "u"}]}]
    ),
    **{f"benchmark/{s}.json": json.dumps([f"{s} one", f"{s} two"]) for s in sets.HPDV2_STYLES},
}


def test_hpdv2_from_the_hub(dataset_hub):
    dataset_hub.repos["ymhao/HPDv2"] = {name: content.encode() for name, content in HPDV2.items()}
    assert load_hpdv2()[:] == {"prompt": ["x", "y"]}  # each once, whatever number of pairs was made of it
    assert load_hpdv2("test")[:] == {"prompt": ["z"]}
    dataset_hub.tag("ymhao/HPDv2", "v1")
    benchmark = load_prompts("hpdv2", "benchmark", revision="v1")
    assert benchmark["style"][:] == ["anime"] * 2 + ["concept-art"] * 2 + ["paintings"] * 2 + ["photo"] * 2
    assert benchmark["prompt"][-1] == "photo two"
    assert ("HEAD", "/datasets/ymhao/HPDv2/resolve/v1/benchmark/anime.json") in dataset_hub.requests


def test_hpdv2_from_files(tmp_path):
    folder = repository(tmp_path, HPDV2)
    assert len(load_hpdv2("benchmark", path=folder)) == 8
    assert len(load_hpdv2("benchmark", path=folder / "benchmark")) == 8
    photo = {"prompt": ["photo one", "photo two"], "style": ["photo"] * 2}
    assert load_hpdv2("benchmark", path=folder / "benchmark" / "photo.json")[:] == photo
    assert load_prompts(f"hpdv2:{folder}", "train")["prompt"][:] == ["x", "y"]


def test_a_repository_that_lacks_a_file(dataset_hub):
    dataset_hub.repos["ymhao/HPDv2"] = {"README.md": b""}
    with pytest.raises(ValueError, match="'hpdv2' cannot be fetched from huggingface.co/datasets/ymhao/HPDv2"):
        load_hpdv2("test")


# ---- DrawBench ----


def test_drawbench_from_the_hub_and_from_its_file(dataset_hub, tmp_path):
    content = 'Prompts,Category\nA purple spoon.,Colors\n"A sign, with ""Hi"".",Text\n'
    dataset_hub.repos["sayakpaul/drawbench"] = {"drawbench.csv": content.encode()}
    rows = {"prompt": ["A purple spoon.", 'A sign, with "Hi".'], "category": ["Colors", "Text"]}
    assert load_prompts("drawbench", "test")[:] == rows
    (tmp_path / "d.csv").write_text(content)
    assert load_drawbench(path=tmp_path / "d.csv")[:] == rows
    (tmp_path / "dataset" / "drawbench").mkdir(parents=True)
    (tmp_path / "dataset" / "drawbench" / "test.txt").write_text('A purple spoon.\nA sign, with "Hi".\n')
    for path in (tmp_path, tmp_path / "dataset" / "drawbench" / "test.txt"):  # as DiffusionNFT ships it
        assert load_drawbench(path=path)[:] == rows | {"category": [None, None]}


# ---- VBench ----

VBENCH = [
    {"prompt_en": "In a still frame, a harbor", "dimension": ["temporal_flickering"]},
    {
        "prompt_en": "a green kettle",
        "dimension": ["color"],
        "auxiliary_info": {"color": {"color": "green"}},
    },
    {"prompt_en": "a heron flies off", "dimension": ["subject_consistency", "dynamic_degree", "motion_smoothness"]},
]
VBENCH_COLUMNS = {
    "prompt": [row["prompt_en"] for row in VBENCH],
    "dimension": [row["dimension"] for row in VBENCH],
    "auxiliary_info": [None, {"color": {"color": "green"}}, None],
}


def test_vbench_is_downloaded_once_and_of_other_revisions_from_its_new_place(github):
    path = f"/Vchitect/VBench/{sets.VBENCH_REVISION}/VBench_full_info.json"
    github[path] = github["/Vchitect/VBench/master/vbench/VBench_full_info.json"] = json.dumps(VBENCH)
    assert load_prompts("vbench", "test")[:] == load_vbench()[:] == VBENCH_COLUMNS
    assert github[None] == [path]
    assert load_vbench(revision="master")[:] == VBENCH_COLUMNS


def test_vbench_from_files(tmp_path):
    text = "a green kettle\na red kite \n\n"
    files = {"vbench/VBench_full_info.json": json.dumps(VBENCH)}
    files |= {f"prompts/prompts_per_dimension/{name}.txt": text for name in ("color", "all_dimension")}
    files["prompts/augmented_prompts/color_longer.txt"] = text
    folder = repository(tmp_path, files)
    for path in (folder, folder / "vbench", folder / "vbench" / "VBench_full_info.json"):
        assert load_prompts(f"vbench:{path}", "test")[:] == VBENCH_COLUMNS
    rows = {"prompt": ["a green kettle", "a red kite"], "auxiliary_info": [None, None]}
    for file, dimension in (
        ("prompts_per_dimension/color.txt", ["color"]),
        ("augmented_prompts/color_longer.txt", ["color"]),
        ("prompts_per_dimension/all_dimension.txt", None),
    ):
        assert load_vbench(path=folder / "prompts" / file)[:] == rows | {"dimension": [dimension] * 2}


def test_files_of_vbench_and_hpdv2_are_recognized_without_a_name(tmp_path):
    folder = repository(tmp_path, {"VBench_full_info.json": json.dumps(VBENCH)} | HPDV2)
    assert load_prompts(folder / "VBench_full_info.json")[:] == VBENCH_COLUMNS
    assert load_prompts(folder / "benchmark" / "anime.json")[:] == {"prompt": ["anime one", "anime two"]}
    assert load_prompts(folder / "test.json")["prompt"][:] == ["z"]


def test_a_file_of_something_else_is_not_vbench(tmp_path):
    (tmp_path / "other.json").write_text('[{"prompt": "a"}]')
    with pytest.raises(ValueError, match="'vbench' has no column 'dimension', only"):
        load_vbench(path=tmp_path / "other.json")


# ---- UniGenBench++ ----


def test_unigenbench_from_the_hub(dataset_hub):
    dataset_hub.repos["CodeGoat24/UniGenBench"] = {
        "train/train_prompt.txt": b"one\ntwo\n",
        "eval/test_en.csv": unigenbench_csv(UNIGENBENCH_EN, "en").encode(),
        "eval/test_en_long.csv": unigenbench_csv(UNIGENBENCH_EN * 2, "en").encode(),
        "eval/test_zh.csv": unigenbench_csv(UNIGENBENCH_ZH, "zh").encode(),
        "eval/test_zh_long.csv": unigenbench_csv(UNIGENBENCH_ZH * 3, "zh").encode(),
    }
    assert load_prompts("unigenbench")[:] == {"prompt": ["one", "two"]}
    assert load_prompts("unigenbench", "test")[0] == {
        "prompt": "A heron in a top hat reads two papers.",
        "theme": "Art",
        "subtheme": "Graphic Art",
        "dimensions": ["Attribute", "Style"],
        "testpoints": ["Attribute - Quantity", "Style", "Attribute - Color"],
        "testpoint_descriptions": ["two papers", "graphic", 'hat in "black"'],
    }
    chinese = load_prompts("unigenbench_zh", "test")[0]
    assert (chinese["theme"], chinese["dimensions"]) == ("艺术", ["属性", "风格"])
    assert chinese["testpoint_descriptions"] == ["一只", "平面"]
    assert len(load_prompts("unigenbench_long", "test")) == 2
    assert len(load_prompts("unigenbench_zh_long", "test")) == 3


@pytest.mark.parametrize(
    "about", ["not JSON", '{"Testpoints": []}', '["Style"]', json.dumps({**UNIGENBENCH_EN[0][1], "Testpoints": []})]
)
def test_a_description_that_is_not_understood(tmp_path, about):
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["index", "prompt_en", "sub_dims_en"], [0, "a heron", about]])
    (tmp_path / "test_en.csv").write_text(file.getvalue(), newline="")
    with pytest.raises(ValueError, match="row 0 is not understood"):
        load_unigenbench("test", path=tmp_path)


def test_unigenbench_arguments(tmp_path):
    with pytest.raises(ValueError, match="language is 'de', but must be one of en, zh"):
        load_unigenbench(language="de")
    with pytest.raises(UnknownSplitError, match="'unigenbench_zh' has no split 'train', only test"):
        load_unigenbench(language="zh")
    (tmp_path / "test_en.csv").write_text("index,prompt_en\n0,a\n")
    with pytest.raises(ValueError, match="no column 'sub_dims_en', only"):
        load_unigenbench("test", path=tmp_path)


# ---- All of them ----


@pytest.mark.parametrize("name", sorted(set(PROMPT_SETS) - {"generated_geneval"}))
def test_without_network_it_is_told_what_to_get_and_where_to_put_it(name):
    # The tests have none
    split = next(iter(PROMPT_SETS[name].splits))
    with pytest.raises(ValueError) as caught:
        load_prompts(name, split)
    message = str(caught.value)
    assert "cannot be fetched from" in message and "PATH on the command line" in message
    assert PROMPT_SETS[name].source.split(",")[0] in message


@pytest.mark.parametrize("name", sorted(set(PROMPT_SETS) - {"generated_geneval"}))
def test_a_copy_that_is_not_there(name, tmp_path):
    split = next(iter(PROMPT_SETS[name].splits))
    with pytest.raises(ValueError, match="cannot be read: .*(neither a file nor a folder|no such file|is a folder)"):
        load_prompts(f"{name}:{tmp_path}", split)


@pytest.mark.parametrize("name", sorted(PROMPT_SETS))
def test_splits_that_there_are_not(name):
    with pytest.raises(UnknownSplitError, match=f"'{name}' has no split 'validation', only") as caught:
        load_prompts(name, "validation")
    assert caught.value.splits == tuple(PROMPT_SETS[name].splits)


def test_the_generated_set_has_the_columns_that_it_says():
    dataset = load_prompts("generated_geneval", "test")
    assert len(dataset) == 553 and set(dataset.column_names) == set(PROMPT_SETS["generated_geneval"].columns)
    with pytest.raises(ValueError, match="neither a path nor a revision"):
        load_prompts("generated_geneval:somewhere")
