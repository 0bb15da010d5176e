import json
import os

import numpy as np
import pytest
from PIL import Image
from tiny_comparisons import painted_folder

from trl_flow.evaluation.image_folder import ImageFolder, PromptList, file_name


SETTINGS = {"seed": 0, "num_images_per_prompt": 1, "size": (16, 16)}
MODELS = {"base": {"path": "m", "fingerprint": "m"}, "ours": {"path": "runs/a", "fingerprint": "1"}}
SETS = {"shapes": PromptList(["a", "b"], "f")}


def test_images_come_back_as_they_were(tmp_path):
    folder = ImageFolder(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert not folder.has("shapes", "ours", [3])
    folder.save("shapes", "ours", 3, Image.fromarray(pixels))
    assert folder.has("shapes", "ours", [3]) and not folder.has("shapes", "ours", [3, 4])
    np.testing.assert_array_equal(np.asarray(folder.load("shapes", "ours", 3)), pixels)


def test_what_breaks_off_leaves_no_image(tmp_path, monkeypatch):
    folder = ImageFolder(tmp_path)

    def breaks_off(self, file, **options):
        file.write(b"half a pict")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        folder.save("s", "m", 0, Image.new("RGB", (4, 4)))
    assert not folder.has("s", "m", [0])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_damaged_images_are_named(tmp_path):
    folder = painted_folder(tmp_path, ["a"])
    path = folder.image_path("shapes", "ours", 0)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"000000\.png is missing or damaged"):
        folder.load("shapes", "ours", 0)


def test_a_folder_goes_on_with_equal_settings_and_may_grow(tmp_path):
    folder = ImageFolder(tmp_path / "new" / "folder")
    folder.claim(SETTINGS, MODELS, SETS, write=False)
    assert not (tmp_path / "new").exists()
    folder.claim(SETTINGS, MODELS, SETS)
    folder.save("shapes", "ours", 0, Image.new("RGB", (4, 4)))
    folder.claim(SETTINGS, MODELS, SETS)
    # Another path of the same weights, one more model, one more set; what is not named stays
    folder.claim(SETTINGS, {"ours": {"path": "b", "fingerprint": "1"}, "third": {"path": "c", "fingerprint": "2"}}, {})
    folder.claim(SETTINGS, MODELS, {"texts": PromptList(["x"], "g")})
    content = folder.settings()
    assert list(content["models"]) == ["base", "ours", "third"]
    assert {name: entry["prompts"] for name, entry in content["sets"].items()} == {
        "shapes": ["a", "b"],
        "texts": ["x"],
    }


@pytest.mark.parametrize(
    "settings, models, sets, message",
    [
        (SETTINGS | {"seed": 7}, MODELS, SETS, "seed was 0 and is 7"),
        (SETTINGS | {"steps": 4}, MODELS, SETS, "steps was None and is 4"),
        (SETTINGS, MODELS | {"ours": {"path": "runs/b", "fingerprint": "2"}}, SETS, "runs/b has other weights"),
        (SETTINGS, MODELS, {"shapes": PromptList(["a"], "h")}, r"2 then, 1 in this"),
    ],
)
def test_other_settings_are_refused_with_what_differs(settings, models, sets, message, tmp_path):
    folder = ImageFolder(tmp_path)
    folder.claim(SETTINGS, MODELS, SETS)
    folder.save("shapes", "ours", 0, Image.new("RGB", (4, 4)))
    before = (tmp_path / "settings.json").read_text()
    with pytest.raises(ValueError, match=message):
        folder.claim(settings, models, sets)
    assert (tmp_path / "settings.json").read_text() == before


def test_settings_by_which_nothing_was_drawn_bind_nobody(tmp_path):
    folder = ImageFolder(tmp_path)
    with folder.locked():
        folder.claim(SETTINGS, MODELS, SETS)
    folder.claim(SETTINGS | {"seed": 7}, {}, SETS)
    assert folder.settings()["settings"]["seed"] == 7 and folder.settings()["models"] == {}
    # Where scores are there is something to be mixed up
    folder.keep_scores({}, {}, {})
    with pytest.raises(ValueError, match="seed was 7 and is 0"):
        folder.claim(SETTINGS, MODELS, SETS)


def test_one_process_at_a_time(tmp_path):
    # A lock is its open file's, so that another folder object stands for another process
    with ImageFolder(tmp_path / "new").locked():
        with (
            pytest.raises(ValueError, match="another process is evaluating into"),
            ImageFolder(tmp_path / "new").locked(),
        ):
            pass
    with ImageFolder(tmp_path / "new").locked():
        pass
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"), ImageFolder(tmp_path / "file").locked():
        pass


def test_scores_are_kept_by_what_has_computed_them(tmp_path):
    folder = ImageFolder(tmp_path)
    columns = {"s": "as it was"}
    folder.keep_scores({"s": {"m": {"q": [1.0], "r": [2.0]}}}, {"q": "one.q", "r": "one.r"}, columns)
    assert folder.scores({"q": "one.q"}, columns) == {"s": {"m": {"q": [1.0], "r": [2.0]}}}
    assert folder.scores({"q": "two.q"}, columns) == {"s": {"m": {"r": [2.0]}}}
    assert folder.scores({}, {"s": "otherwise"}) == {}
    folder.keep_scores(folder.scores({"q": "two.q"}, columns), {"q": "two.q"}, {"t": "another set"})
    assert folder.scores({"q": "two.q", "r": "one.r"}, columns) == {"s": {"m": {"r": [2.0]}}}


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        ImageFolder(tmp_path).claim(SETTINGS, MODELS, SETS)
    with pytest.raises(ValueError, match="is a file"):
        ImageFolder(tmp_path / "thesis.txt").claim(SETTINGS, MODELS, SETS)
    with pytest.raises(ValueError, match="not the folder of an evaluation"):
        ImageFolder(tmp_path).settings()


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_that_can_not_be_written_is_found_before_it_is_needed(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="may not write"):
        ImageFolder(tmp_path / "new").claim(SETTINGS, MODELS, SETS, write=False)


def test_damaged_files_are_named(tmp_path):
    folder = ImageFolder(tmp_path)
    folder.claim(SETTINGS, MODELS, SETS)
    folder.keep_scores({"shapes": {"ours": {"q": [1.0, None]}}}, {"q": "mine.q"}, {})
    assert folder.scores({"q": "mine.q"}, {}) == {"shapes": {"ours": {"q": [1.0, None]}}}
    (tmp_path / "scores.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="scores.json cannot be read"):
        folder.scores({}, {})
    (tmp_path / "settings.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="settings.json cannot be read"):
        folder.settings()


def test_every_name_becomes_a_file_of_its_own():
    assert file_name("guard-v1.2") == "guard-v1.2"
    names = ["a/b", "a b", "a_b", "..", ".", "", "ä", "a\0b", "x" * 300, "x" * 301, "-rf", "CON:", "\udc80"]
    written = [file_name(name) for name in names]
    assert len(set(written)) == len(names)
    for name in written:
        assert name not in ("", ".", "..") and not name.startswith(".")
        assert name.isascii() and len(name) < 100 and not set(name) & set('/\\:*?"<>|\0 ')
