"""Tables by category, against numbers worked out by hand."""

import math

import numpy as np
import pytest
from datasets import Dataset

from trl_flow.evaluation.categories import category_tables
from trl_flow.evaluation.tables import category_table, markdown_table


TASKS = ["Single Obj.", "Two Obj.", "Counting", "Colors", "Position", "Color Attr."]


def test_geneval_by_task():
    dataset = Dataset.from_dict({"prompt": list("abcd"), "tag": ["colors", "counting", "colors", None]})
    # Two images for each prompt
    base = np.array([1.0, 0.0, 1.0, 1.0, 0.0, math.nan, 1.0, 1.0])
    ours = np.array([1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    scores = {"base": {"geneval_correct": base}, "ours": {"geneval_correct": ours}}
    (table,) = category_tables(dataset, scores, {"base": None, "ours": None}, 2)
    assert (table["reward"], table["by"], table["columns"]) == ("geneval_correct", "task", [*TASKS, "Overall"])
    nothing = dict.fromkeys(TASKS)
    # colors: 1, 0, 0 (one image has no score); counting: 1, 1; overall: (1/3 + 1) / 2, a task without prompts left out
    assert table["rows"]["base"] == pytest.approx(nothing | {"Colors": 1 / 3, "Counting": 1.0, "Overall": 2 / 3})
    assert table["rows"]["ours"] == pytest.approx(nothing | {"Colors": 0.75, "Counting": 0.5, "Overall": 0.625})
    counts = {model: {name: n for name, n in row.items() if n} for model, row in table["counts"].items()}
    assert counts["base"] == {"Counting": 2, "Colors": 3, "Overall": 5}
    assert counts["ours"] == {"Counting": 2, "Colors": 4, "Overall": 6}
    assert table["note"] == ""
    header, _, first, second = category_table(table).splitlines()
    assert header == "| model | Single Obj. | Two Obj. | Counting | Colors | Position | Color Attr. | Overall |"
    assert first == "| base | - | - | 1.00 | 0.33 | - | - | 0.67 |"
    assert second == "| ours | - | - | 0.50 | 0.75 | - | - | 0.62 |"


def test_the_overall_scores_of_slas_are_means_of_the_categories():
    """Its Table 1, from the printed categories: 0.53 for SD1.4 with SLAS."""
    printed = [0.98, 0.71, 0.42, 0.82, 0.11, 0.15]
    tags = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    dataset = Dataset.from_dict({"prompt": tags, "tag": tags})
    (table,) = category_tables(dataset, {"base": {"correct": np.array(printed)}}, {"base": None}, 1)
    assert category_table(table).splitlines()[-1] == "| base | 0.98 | 0.71 | 0.42 | 0.82 | 0.11 | 0.15 | 0.53 |"


def test_unigenbench_by_dimension_and_test_point():
    testpoints = [
        ["Style", "Attribute - Color", "Attribute - Size", "Attribute - Color"],
        ["Entity Layout - Two-Dimensional Space", "Style"],
        ["Text Generation"],
    ]
    dataset = Dataset.from_dict({"prompt": list("abc"), "testpoints": testpoints})
    points = {
        "base": [[1, 1, 0, 0], [1, 0, 0, 1], [0, 1], [1, 1], None, [1]],
        "ours": [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0], [0, 0], None, None],
    }
    scores = {model: {"unigenbench": np.zeros(6)} for model in points}
    dimensions, by_point = category_tables(dataset, scores, points, 2)
    assert dimensions["columns"] == [
        *("Overall", "Style", "World Know.", "Attribute", "Action", "Relation", "Logic. Reason.", "Grammar"),
        *("Compound", "Layout", "Text"),
    ]
    # Attribute: 1, 0, 0 and 0, 0, 1; Style: 1, 1, 1, 1; Layout: 0, 1; Text: 1, the other answer could not be read
    base = {"Style": 100.0, "Attribute": 100 / 3, "Layout": 50.0, "Text": 100.0}
    known = {name: value for name, value in dimensions["rows"]["base"].items() if value is not None}
    # Of our model's Text no answer could be read: it is left out for both
    assert known == pytest.approx(base | {"Overall": (100.0 + 100 / 3 + 50.0) / 3})
    assert dimensions["note"] == by_point["note"] == "Overall leaves out what not every model has scores of: Text."
    counts = dimensions["counts"]
    assert counts["base"]["Attribute"] == 6 and (counts["base"]["Text"], counts["ours"]["Text"]) == (1, 0)
    ours = {name: value for name, value in dimensions["rows"]["ours"].items() if value is not None}
    assert ours == pytest.approx({"Style": 50.0, "Attribute": 100.0, "Layout": 0.0, "Overall": 50.0})
    assert len(by_point["columns"]) == 28
    assert by_point["rows"]["base"]["Attribute - Color"] == pytest.approx(100 * 2 / 4)
    assert by_point["rows"]["base"]["Attribute - Size"] == 0.0
    assert by_point["rows"]["base"]["Overall"] == dimensions["rows"]["base"]["Overall"]
    assert "| base | 61.11 | 100.00 | - | 33.33 | - |" in category_table(dimensions)
    # 27 columns would be too many: test points in rows, those that the set has
    lines = category_table(by_point).splitlines()
    assert lines[0] == "| test point | base | ours |" and len(lines) == 8
    assert "| Entity Layout - Two-Dimensional Space | 50.00 | 0.00 |" in lines
    assert "| Text Generation | 100.00 | - |" in lines


def test_a_model_without_a_readable_answer_is_no_reason_to_drop_the_others():
    dataset = Dataset.from_dict({"prompt": ["a"], "testpoints": [["Style"]]})
    scores = {model: {"unigenbench": np.zeros(1)} for model in ("base", "ours")}
    dimensions, _ = category_tables(dataset, scores, {"base": [[1]], "ours": None}, 1)
    assert (dimensions["rows"]["base"]["Style"], dimensions["rows"]["ours"]["Style"]) == (100.0, None)
    assert dimensions["rows"]["base"]["Overall"] is None and dimensions["note"].endswith(": Style.")


def test_test_points_in_another_language_come_under_their_own_names():
    dataset = Dataset.from_dict({"prompt": ["a"], "testpoints": [["属性-数量", "风格"]]})
    dimensions, by_point = category_tables(dataset, {"base": {"r": np.zeros(1)}}, {"base": [[1, 0]]}, 1)
    known = {name: value for name, value in dimensions["rows"]["base"].items() if value is not None}
    assert known == {"Overall": 50.0, "属性": 100.0, "风格": 0.0}
    assert by_point["rows"]["base"]["属性-数量"] == 100.0


def test_sets_without_categories_have_no_tables():
    dataset = Dataset.from_dict({"prompt": ["a"], "tag": ["my own"]})
    assert category_tables(dataset, {"base": {"r": np.zeros(1)}}, {"base": None}, 1) == []
    assert category_table({"columns": ["a"], "rows": {"x|y": {"a": None}}}) == markdown_table(
        ["model", "a"], [["x\\|y", "-"]]
    )
