import csv
import json
from pathlib import Path

import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from trl_flow.prompts import read_prompts


# All of Unicode; half a surrogate pair is none of it
PROMPTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
SEVERAL = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def written(folder, name: str, content: str | bytes):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path, **kwargs) -> str:
    """What is said about a file, which must not be read; it begins with the file's name."""
    with pytest.raises(ValueError) as caught:
        read_prompts(path, **kwargs)
    message = str(caught.value)
    assert message.startswith(f"the data set {str(path)!r} cannot be read: ")
    return message


# ---- Whatever is written comes back ----


@SEVERAL
@given(prompts=st.lists(PROMPTS, min_size=1, max_size=5), encoding=st.sampled_from(["utf-8", "utf-8-sig"]))
def test_prompts_come_back_from_json_lines(tmp_path, prompts, encoding):
    lines = [json.dumps({"prompt": p, "n": i}, ensure_ascii=i % 2 == 0) for i, p in enumerate(prompts)]
    path = written(tmp_path, "p.jsonl", "\n".join(lines).encode(encoding))
    dataset = read_prompts(path)
    assert dataset["prompt"][:] == prompts
    assert dataset["n"][:] == list(range(len(prompts)))


@SEVERAL
@given(prompts=st.lists(PROMPTS, min_size=1, max_size=5))
def test_prompts_come_back_from_json(tmp_path, prompts):
    assert read_prompts(written(tmp_path, "p.json", json.dumps(prompts)))["prompt"][:] == prompts
    objects = json.dumps([{"prompt": p} for p in prompts], ensure_ascii=False, indent=2)
    assert read_prompts(written(tmp_path, "p.json", objects))["prompt"][:] == prompts


@SEVERAL
# Python 3.10's csv module does not read the character 0
@given(prompts=st.lists(PROMPTS.filter(lambda p: "\0" not in p), min_size=1, max_size=5), tab=st.booleans())
def test_prompts_come_back_from_csv(tmp_path, prompts, tab):
    path = tmp_path / ("p.tsv" if tab else "p.csv")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if tab else ",")
        writer.writerows([["weight", "prompt"], *([i / 2, p] for i, p in enumerate(prompts))])
    dataset = read_prompts(path)
    assert dataset["prompt"][:] == prompts
    assert dataset["weight"][:] == [i / 2 for i in range(len(prompts))]


@SEVERAL
@given(
    prompts=st.lists(PROMPTS.filter(lambda p: not set(p) & {"\n", "\r"}), min_size=1, max_size=5),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_prompts_come_back_from_text(tmp_path, prompts, end):
    # With the mark, because a prompt may begin with that very character
    path = written(tmp_path, "p.txt", end.join(prompts).encode("utf-8-sig"))
    assert read_prompts(path)["prompt"][:] == prompts


def test_prompts_come_back_from_parquet(tmp_path):
    rows = {"prompt": ["null", "2024-01-01", "ein Wald 🌲"], "weight": [1, 2, 3]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet")[:] == rows


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.txt"])
def test_what_looks_like_something_else_is_text(tmp_path, name):
    prompts = ["null", "NA", "007", "1e3", "2024-01-01", "true", " a cat ", '"quoted"']
    if name == "p.csv":
        content = "prompt\r\n" + "".join('"' + p.replace('"', '""') + '"\r\n' for p in prompts)
    else:
        content = "\n".join(json.dumps({"prompt": p}) if name == "p.jsonl" else p for p in prompts)
    assert read_prompts(written(tmp_path, name, content))["prompt"][:] == prompts


def test_empty_lines_are_skipped_and_repeated_prompts_kept(tmp_path):
    assert read_prompts(written(tmp_path, "p.txt", "\r\na cat\r\n\r\n  \r\na cat\r\n"))["prompt"][:] == ["a cat"] * 2
    lines = '\n{"prompt": "a cat"}\n\n  \n{"prompt": "a cat"}\n'
    assert read_prompts(written(tmp_path, "p.jsonl", lines))["prompt"][:] == ["a cat"] * 2
    assert read_prompts(written(tmp_path, "p.csv", "prompt\n\na cat\n\na cat\n"))["prompt"][:] == ["a cat"] * 2


# ---- Further columns ----


def test_objects_come_out_as_they_stand_in_the_file(tmp_path):
    rows = [
        {"prompt": "one", "include": [{"class": "dog"}, {"class": "cat", "position": ["above", 0]}], "meta": {"a": 1}},
        {"prompt": "two", "include": [], "meta": {"b": {"c": [1, "x", None]}}},
        {"prompt": "three", "include": None, "meta": None},
    ]  # fmt: skip
    path = written(tmp_path, "p.jsonl", "\n".join(json.dumps(row) for row in rows))
    assert list(read_prompts(path)) == rows


def test_values_of_several_kinds_keep_theirs(tmp_path):
    rows = [
        {"prompt": "a", "x": 1, "y": [1, {"p": "2"}], "z": {"k": "[1]"}},
        {"prompt": "b", "x": "word", "y": [None, {"q": 1}], "z": {"k": 0.5}},
        {"prompt": "c", "x": True, "y": [], "z": None},
    ]
    path = written(tmp_path, "p.jsonl", "\n".join(json.dumps(row) for row in rows))
    assert list(read_prompts(path)) == rows


def test_a_key_that_rows_lack_is_none_there(tmp_path):
    lines = '{"prompt": "one"}\n{"prompt": "two", "weight": 2, "tags": ["x"]}\n{"weight": 3.5, "prompt": "three"}'
    dataset = read_prompts(written(tmp_path, "p.jsonl", lines))
    assert dataset["weight"][:] == [None, 2.0, 3.5]
    assert dataset["tags"][:] == [None, ["x"], None]
    assert dataset.column_names == ["prompt", "weight", "tags"]


def test_columns_of_csv_files_are_numbers_where_they_hold_nothing_else(tmp_path):
    content = "prompt,n,x,flag,word,zip,big\na,1,1,true,1,007,12345678901234567890\nb,-2,2.5e-1,False,x,1,1\nc,,,,,,\n"
    dataset = read_prompts(written(tmp_path, "p.csv", content))
    assert dataset[:] == {
        "prompt": ["a", "b", "c"],
        "n": [1, -2, None],
        "x": [1.0, 0.25, None],
        "flag": [True, False, None],
        "word": ["1", "x", None],
        "zip": ["007", "1", None],  # no number begins so
        "big": ["12345678901234567890", "1", None],  # beyond 64 bits
    }


def test_another_column_can_hold_the_prompts(tmp_path):
    dataset = read_prompts(written(tmp_path, "p.csv", "id,caption\n7,a cat\n"), prompt_column="caption")
    assert dataset[:] == {"prompt": ["a cat"], "id": [7]}
    Dataset.from_dict({"caption": ["a cat"]}).to_parquet(tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet", prompt_column="caption")[:] == {"prompt": ["a cat"]}


def test_the_kind_can_be_told(tmp_path):
    path = written(tmp_path, "5f3a", '{"prompt": "a cat"}')
    assert read_prompts(path, suffix=".jsonl")["prompt"][:] == ["a cat"]
    assert "files end with" in refused(path)


def test_objects_by_name(tmp_path):
    """As MJHQ-30K and ImgEdit have them."""
    path = written(tmp_path, "p.json", '{"1a": {"prompt": "a cat", "n": 1}, "2b": {"prompt": "a dog", "n": 2}}')
    assert read_prompts(path)[:] == {"prompt": ["a cat", "a dog"], "n": [1, 2]}
    path = written(tmp_path, "r.json", '{"prompts": ["a cat", "a dog"]}')
    assert read_prompts(path)["prompt"][:] == ["a cat", "a dog"]
    path = written(tmp_path, "q.json", '{"prompt": "a cat", "n": 1}')
    assert read_prompts(path)[:] == {"prompt": ["a cat"], "n": [1]}


def test_quotation_marks_of_tables_separated_by_tabs(tmp_path):
    """As PartiPrompts has them: part of the text. Those that a writer of CSV has added are not."""
    rows = ['A wall with the words "Fly an airplane".', '"Hello" on a sign', '"half']
    content = "Prompt\tNote\n" + "".join(f"{row}\tx\n" for row in rows)
    assert read_prompts(written(tmp_path, "p.tsv", content), prompt_column="Prompt")["prompt"][:] == rows
    content = 'prompt\tn\n"a ""b""\tc"\t1\n'
    assert read_prompts(written(tmp_path, "q.tsv", content))[:] == {"prompt": ['a "b"\tc'], "n": [1]}


# ---- Images to be edited ----


@pytest.fixture
def pictures(tmp_path):
    """Two images in a folder `in` beside the file that names them."""
    (tmp_path / "in").mkdir()
    for name, color in (("a", (255, 0, 0)), ("b", (0, 0, 255))):
        Image.new("RGB", (4, 2), color).save(tmp_path / "in" / f"{name}.png")
    return tmp_path


EDITS = [{"source_image": f"in/{n}.png", "instruction": f"make {n} green", "target_image": f"{n}.png"} for n in "ab"]


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.parquet"])
def test_paths_of_images_are_relative_to_the_file(pictures, name, monkeypatch):
    """An editing set as DanceGRPO ships it, read from elsewhere."""
    if name == "p.parquet":
        Dataset.from_list(EDITS).to_parquet(pictures / name)
    elif name == "p.csv":
        lines = [",".join(EDITS[0]), *(",".join(row.values()) for row in EDITS)]
        (pictures / name).write_text("\n".join(lines))
    else:
        text = json.dumps(EDITS) if name == "p.json" else "\n".join(map(json.dumps, EDITS))
        (pictures / name).write_text(text)
    monkeypatch.chdir(pictures.parent)
    path = Path(pictures.name, name)
    dataset = read_prompts(path, prompt_column="instruction", image_column="source_image")
    assert sorted(dataset.column_names) == ["image", "prompt", "target_image"]
    assert dataset["prompt"][:] == ["make a green", "make b green"]
    assert [row["image"].getpixel((0, 0)) for row in dataset] == [(255, 0, 0), (0, 0, 255)]
    assert dataset["target_image"][:] == ["a.png", "b.png"]


def test_images_in_a_table_and_absolute_paths(pictures):
    dataset = Dataset.from_dict({"prompt": ["x"], "picture": [str(pictures / "in" / "b.png")]})
    dataset.to_json(pictures / "p.jsonl")
    dataset.cast_column("picture", ImageFeature()).to_parquet(pictures / "p.parquet")
    for name in ("p.jsonl", "p.parquet"):
        (row,) = read_prompts(pictures / name, image_column="picture")
        assert row["image"].getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize(
    "content, column, words",
    [
        ('{"prompt": "a", "img": "x"}', "picture", "no column 'picture', which image_column names; its columns are"),
        ('{"prompt": "a", "img": "x", "image": "y"}', "img", "there is a column 'image' too"),
        ('{"prompt": "a", "img": 5}', "img", "its column 'img' holds Value('int64'), but must hold paths"),
        ('{"prompt": "a", "img": ["x"]}', "img", "its column 'img' holds List"),
    ],
)
def test_columns_that_hold_no_images(tmp_path, content, column, words):
    assert words in refused(written(tmp_path, "p.jsonl", content), image_column=column)


# ---- What is refused ----


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("p.jsonl", "", "it holds nothing"),
        ("p.json", "", "it holds nothing"),
        ("p.json", "[]", "it holds nothing"),
        ("p.csv", "", "it holds nothing"),
        ("p.csv", "prompt\n", "it holds nothing"),
        ("p.txt", " \n\n", "it holds nothing"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": }\n', "line 2 is not valid JSON (Expecting value, column 12)"),
        ("p.json", '[\n{"prompt": "a"},\n{"prompt" "b"}\n]', "line 3 is not valid JSON"),
        ("p.json", '{"prompt": "a"}\n{"prompt": "b"\n', "line 2 is not valid JSON"),
        ("p.json", "5", "it holds 5, but must hold a list"),
        ("p.json", '["a", 5]', "row 1 is 5, neither an object nor a prompt"),
        ("p.jsonl", '["a", "b"]', "line 1 is a list, neither an object nor a prompt"),
        ("p.csv", 'prompt,n\n"a,1\n', "line 2 is not valid CSV (unexpected end of data)"),
        ("p.csv", "prompt,n\na,1\nb, c,2\n", "line 3 has 3 values for the 2 columns"),
        ("p.csv", "prompt,prompt\na,b\n", "each name once, but is ['prompt', 'prompt']"),
        ("p.csv", "prompt,\na,b\n", "must name each column"),
        ("p.jsonl", '{"caption": "a", "n": 1}', "it has no column 'prompt'; its columns are ['caption', 'n']. Give"),
        ("p.csv", "prompt;n\na;1\n", "its columns are ['prompt;n']"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"n": 1}', "line 3 has no 'prompt', only ['n']"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": " \\t"}', "line 2: prompt is ' \\t'; a prompt must not be empty"),
        ("p.json", '["a", "", "b"]', "row 1: prompt is ''"),
        ("p.csv", 'prompt,n\na,1\n" ",2\n', "line 3: prompt is ' '"),
        ("p.csv", "n,prompt\n1\n", "line 2: prompt is ''"),
        ("p.jsonl", '{"prompt": ["a"]}', "line 1: prompt is a list, but must be text"),
        ("p.jsonl", '{"prompt": [{"role": "user", "content": "a cat"}]}', "but must be text. Prompts of lang"),
        ("p.json", json.dumps({f"key{i}": 1 for i in range(99)}), "'key29', '...']. Give the name"),
        ("p.jsonl", '{"prompt": null}', "line 1: prompt is null, but must be text"),
        ("p.jsonl", '{"prompt": 5}', "line 1: prompt is 5, but must be text"),
        ("p.jsonl", '{"prompt": "\\ud800"}', "line 1: prompt is not valid Unicode"),
        ("p.jsonl", '{"prompt": "a", "n": 1000000000000000000000}', "too large"),
        ("p.jsonl", "[" * 100_000, "recursion"),
        ("p.txt", "ein Bär".encode("latin-1"), "it is not UTF-8 text (byte 5: "),
        ("p.txt", "a cat".encode("utf-16"), "it is not UTF-8 text"),
        ("p.parquet", "x", "p.parquet"),
        ("p.xlsx", "x", "files end with .jsonl, .json, .csv, .tsv, .txt, .parquet, this one with '.xlsx'"),
    ],
)  # fmt: skip
def test_what_can_not_be_read_is_told_with_its_place(tmp_path, name, content, words):
    assert words in refused(written(tmp_path, name, content))


def test_missing_files_and_folders_are_refused(tmp_path):
    assert refused(tmp_path / "no-such.txt").endswith("there is no such file.")
    assert refused(tmp_path).endswith("it is a folder.")


def test_tables_are_checked_too(tmp_path):
    Dataset.from_dict({"prompt": ["a", "b", " "]}).to_parquet(tmp_path / "p.parquet")
    assert "row 2: prompt is ' '" in refused(tmp_path / "p.parquet")
    Dataset.from_dict({"caption": ["a"]}).to_parquet(tmp_path / "q.parquet")
    assert "no column 'prompt'; its columns are ['caption']" in refused(tmp_path / "q.parquet")


def test_two_columns_of_prompts_are_refused(tmp_path):
    path = written(tmp_path, "p.csv", "prompt,caption\na,b\n")
    assert "there is a column 'prompt' too" in refused(path, prompt_column="caption")
