import json
import math
import os

import pytest

from trl_flow.evaluation.outputs import versions, write_json
from trl_flow.evaluation.scoring import PairedDifference
from trl_flow.evaluation.tables import score_table


def test_the_table_says_all_and_lines_up():
    table = score_table(
        {
            "shapes_soft": PairedDifference(0.6, 0.7, 0.1, 0.02, 64),
            "x": PairedDifference(10.0, 8.5, -1.5, 0.5, 64),
            "one": PairedDifference(0.0, 0.0, 0.0, math.nan, 1),
        }
    ).splitlines()
    assert len({len(line) for line in table}) == 1
    cells = [line.split() for line in table]
    assert cells[2] == ["shapes_soft", "0.600", "0.700", "+0.100", "±", "0.020", "+5.0"]
    assert cells[3] == ["x", "10.000", "8.500", "-1.500", "±", "0.500", "-3.0"]
    assert cells[4][-1] == "-"


def test_versions_are_those_that_are_imported():
    import numpy
    import torch

    found = versions()
    assert found["numpy"] == numpy.__version__ and found["torch"] == torch.__version__


def test_json_comes_back(tmp_path):
    content = {"a": 1.5, "ü": [None, True]}
    write_json(tmp_path / "results.json", content)
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == content
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "results.json").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("content", [{"a": math.nan}, {"a": object()}])
def test_what_can_not_be_written_leaves_the_old_file(tmp_path, content):
    write_json(tmp_path / "results.json", {"old": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "results.json", content)
    assert json.loads((tmp_path / "results.json").read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_json(tmp_path / "results.json", {"old": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "results.json", {"new": 2})
    assert json.loads((tmp_path / "results.json").read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
