from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from PIL import Image

from trl_flow.prompts import UnknownSplitError, load_prompts


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_is_the_training_split(here):
    (here / "p.txt").write_text("a\nb\n")
    assert load_prompts("p.txt")["prompt"][:] == ["a", "b"]
    with pytest.raises(UnknownSplitError, match="'p.txt' has no split 'test', only train"):
        load_prompts("p.txt", "test")


def test_a_folder_has_a_file_for_each_split(here):
    (here / "train.txt").write_text("a\nb\n")
    (here / "test_metadata.jsonl").write_text('{"prompt": "c", "tag": "x"}\n')
    assert load_prompts(here)["prompt"][:] == ["a", "b"]
    assert load_prompts(str(here), "test")[:] == {"prompt": ["c"], "tag": ["x"]}
    (here / "train.csv").write_text("prompt\nd\n")
    with pytest.raises(ValueError, match="has train.csv and train.txt: give the file"):
        load_prompts(here)


def test_folders_that_datasets_reads(here):
    (here / "data").mkdir()
    Dataset.from_dict({"prompt": ["a"]}).to_parquet(here / "data" / "train-00000-of-00001.parquet")
    Dataset.from_dict({"prompt": ["b"]}).to_parquet(here / "data" / "test-00000-of-00001.parquet")
    assert load_prompts(here)["prompt"][:] == ["a"]
    assert load_prompts(here, "test")["prompt"][:] == ["b"]
    with pytest.raises(UnknownSplitError, match="no split 'validation', only train, test"):
        load_prompts(here, "validation")


def test_data_sets_on_the_hub(dataset_hub):
    dataset_hub.repos["tester/prompts"] = {"train.csv": b"caption,n\na,1\nb,2\n", "test.csv": b"caption,n\nc,3\n"}
    assert load_prompts("tester/prompts", "test", prompt_column="caption")[:] == {"prompt": ["c"], "n": [3]}
    with pytest.raises(UnknownSplitError, match="'tester/prompts' has no split 'dev', only train, test"):
        load_prompts("tester/prompts", "dev")
    with pytest.raises(ValueError, match="'tester/prompts' cannot be used: it has no column 'prompt'; its columns"):
        load_prompts("tester/prompts")


@pytest.mark.parametrize(
    "split, expected",
    [
        ("train[:2]", ["p0", "p1"]),
        ("train[-1:]", ["p9"]),
        ("train[10%:30%]", ["p1", "p2"]),
        ("train[8:]+test", ["p8", "p9", "q0", "q1"]),
        ("test + train[:1]", ["q0", "q1", "p0"]),
        ("train[:1]+train[-1:]", ["p0", "p9"]),
        ("test[:100]", ["q0", "q1"]),
    ],
)
def test_parts_of_splits(here, dataset_hub, split, expected):
    """As `datasets` writes them: of files, folders, data sets on the Hub and prompt sets."""
    train, test = ("".join(f"{letter}{i}\n" for i in range(number)) for letter, number in (("p", 10), ("q", 2)))
    (here / "folder").mkdir()
    (here / "folder" / "train.txt").write_text(train)
    (here / "folder" / "test.txt").write_text(test)
    dataset_hub.repos["tester/prompts"] = {
        "train.csv": b"prompt\n" + train.encode(),
        "test.csv": b"prompt\n" + test.encode(),
    }
    for source in ("folder", "tester/prompts", "pickscore:folder"):
        assert load_prompts(source, split)["prompt"][:] == expected
    if "test" not in split:
        assert load_prompts("folder/train.txt", split)["prompt"][:] == expected
    assert len(load_prompts("folder", split, limit=1)) == 1


@pytest.mark.parametrize(
    "split, words",
    [
        ("train[:x]", "'train\\[:x\\]' is not understood .*Write it as datasets does"),
        ("train[5:2]", "holds nothing: train has 2 rows"),
        ("train[9:]", "holds nothing"),
        ("dev[:1]", "has no split 'dev', only train"),
        ("train+dev", "has no split 'dev', only train"),
        ("train[:1%](pct1_dropremainder)", "cannot be taken: .*less than 100"),
    ],
)
def test_parts_that_there_are_not(here, split, words):
    (here / "p.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=words):
        load_prompts("p.txt", split)


def test_images_of_a_folder_and_of_the_hub(here, dataset_hub):
    Image.new("RGB", (2, 2), (0, 255, 0)).save(here / "a.png")
    (here / "data").mkdir()
    (here / "data" / "train.jsonl").write_text('{"instruction": "x", "src": "../a.png"}\n')
    names = {"prompt_column": "instruction", "image_column": "src"}
    assert load_prompts("data", **names)[0]["image"].getpixel((0, 0)) == (0, 255, 0)
    with pytest.raises(ValueError, match="the data set 'ocr' has no image_column"):
        load_prompts("ocr", image_column="src")
    parquet = here / "remote.parquet"
    rows = Dataset.from_dict({"instruction": ["x"], "src": [str(here / "a.png")]}).cast_column("src", ImageFeature())
    rows.to_parquet(parquet)
    dataset_hub.repos["tester/prompts"] = {"data/train-0.parquet": parquet.read_bytes()}
    assert load_prompts("tester/prompts", **names)[0]["image"].getpixel((0, 0)) == (0, 255, 0)
    dataset_hub.repos["CodeGoat24/UniGenBench"] = {"train.csv": b"instruction,src\nx,a.png\n"}
    with pytest.raises(ValueError, match="its column 'src' holds text, and there is no file that it is of"):
        load_prompts("CodeGoat24/UniGenBench", **names)


def test_what_is_nowhere(here):
    with pytest.raises(ValueError, match="'tester/no-such' cannot be read"):
        load_prompts("tester/no-such")
    with pytest.raises(ValueError, match="Did you mean drawbench?"):
        load_prompts("drawbnch", "test")
    with pytest.raises(ValueError, match="the name of the prompts is empty"):
        load_prompts(" ")
    with pytest.raises(ValueError, match="'no-such.jsonl' cannot be read: there is no such file"):
        load_prompts("no-such.jsonl")


def test_the_name_of_a_set_comes_before_a_folder_of_that_name(here):
    (here / "ocr").mkdir()
    (here / "ocr" / "train.txt").write_text("a picture\n")
    for local in ("./ocr", Path("ocr")):
        assert load_prompts(local)[:] == {"prompt": ["a picture"]}
    with pytest.raises(ValueError, match="cannot be fetched from github"):
        load_prompts("ocr")


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("ocr", {"config": "large"}, "the data set 'ocr' has no config, but config is 'large'. Remove it."),
        ("ocr", {"prompt_column": "caption"}, "the data set 'ocr' has no prompt_column"),
        ("ocr:.", {"revision": "main"}, "a copy of the data set 'ocr' has no revision"),
        ("p.txt", {"revision": "main"}, "the file 'p.txt' has no revision"),
        (".", {"config": "large"}, "the file 'train.txt' has no config"),
    ],
)
def test_options_that_would_do_nothing_are_refused(here, name, options, words):
    for file in ("p.txt", "train.txt"):
        (here / file).write_text('a "word"\n')
    with pytest.raises(ValueError) as caught:
        load_prompts(name, **options)
    assert words in str(caught.value)


def test_each_prompt_once_shuffled_and_the_first_of_them(here):
    rows = [f"p{i}" for i in range(40)]
    (here / "p.txt").write_text("\n".join(rows + rows[::-1]))
    assert load_prompts("p.txt", limit=3)["prompt"][:] == rows[:3]
    assert load_prompts("p.txt", limit=1000)["prompt"][:] == rows + rows[::-1]
    assert load_prompts("p.txt", unique=True)["prompt"][:] == rows
    shuffled = load_prompts("p.txt", unique=True, seed=1)["prompt"][:]
    assert sorted(shuffled) == sorted(rows) and shuffled != rows
    assert load_prompts("p.txt", unique=True, seed=1, limit=5)["prompt"][:] == shuffled[:5]
    assert load_prompts("p.txt", unique=True, seed=2)["prompt"][:] != shuffled


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
def test_limits_that_are_none(here, limit):
    with pytest.raises(ValueError, match="limit is .*whole number of at least 1"):
        load_prompts("p.txt", limit=limit)


def test_a_saved_data_set(here):
    DatasetDict({"train": Dataset.from_dict({"prompt": ["a"], "n": [1]})}).save_to_disk(here / "saved")
    assert load_prompts("./saved")[:] == {"prompt": ["a"], "n": [1]}
