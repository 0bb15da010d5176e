"""Prompt sets in training: what stands in them reaches the reward functions as it is."""

import json

from tiny_training import tiny_trainer

from trl_flow.cli import main
from trl_flow.prompts import PROMPT_SETS, load_prompts, read_prompts


def collect(rows: list[dict]):
    """A reward function that notes what it is given for each image."""

    def note(prompts, images, tag, include, exclude, **kwargs):
        for prompt, *columns in zip(prompts, tag, include, exclude, strict=True):
            rows.append(dict(zip(("prompt", "tag", "include", "exclude"), (prompt, *columns), strict=True)))
        return [float(i) for i in range(len(prompts))]

    return note


def test_metadata_from_a_file_reaches_the_reward_without_keys_of_other_rows(tmp_path):
    lines = [
        {"prompt": "a", "tag": "position", "include": [{"class": "x"}, {"class": "y", "position": ["above", 0]}]},
        {"prompt": "b", "tag": "colors", "include": [{"class": "x", "color": "red"}], "exclude": [{"class": "z"}]},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    rows: list[dict] = []
    dataset = read_prompts(tmp_path / "p.jsonl")
    tiny_trainer(tmp_path, reward_funcs=collect(rows), train_dataset=dataset, max_steps=1).train()
    expected = [{"exclude": None, **line} for line in lines]
    assert len(rows) == 8 and all(row in expected for row in rows) and all(row in rows for row in expected)


OPTIONS = [
    *("--output_dir", "run", "--num_generations", "4", "--per_device_train_batch_size", "8"),
    *("--num_inference_steps", "2", "--height", "16", "--width", "16", "--max_sequence_length", "16"),
    *("--max_steps", "1", "--logging_steps", "1", "--gradient_checkpointing", "false", "--use_cpu", "true"),
    *("--report_to", "none", "--disable_tqdm", "true", "--use_peft", "true", "--eval_num_inference_steps", "2"),
]
REWARD = """\
def clauses(prompts, images, include, **kwargs):
    return [float(sum(len(clause) for clause in row)) for row in include]
"""


def test_the_command_line_trains_on_sets_and_on_copies_of_them(tmp_path, tiny_sd3_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trl_flow.prompts.sets.GENERATED", 8)
    (tmp_path / "clause_reward.py").write_text(REWARD)
    rows = list(load_prompts("generated_geneval", "test", limit=2))
    for split in ("train", "test"):
        (tmp_path / f"{split}_metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for name in ("generated_geneval", "geneval:."):
        argv = ["train", "--model_name_or_path", tiny_sd3_path, "--dataset_name", name, *OPTIONS]
        argv += ["--reward_funcs", "clause_reward.clauses"]
        if name == "geneval:.":
            argv += ["--eval_strategy", "steps", "--eval_steps", "1"]
        assert main(argv) == 0, capsys.readouterr().err
        log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
        if name == "geneval:.":
            # Single objects: a class and a count each
            assert [entry["eval_reward"] for entry in log if "eval_reward" in entry] == [2.0]


def test_the_command_line_names_what_is_wrong_with_a_set(tmp_path, tiny_sd3_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, words in {
        "drawbench": "the data set has no split 'train', only test: set dataset_train_split",
        "geneval": "geneval:PATH on the command line",
        "drawbnch": "Did you mean drawbench?",
        "geneval:nowhere": "'nowhere' is neither a file nor a folder with dataset/geneval/train_metadata.jsonl",
    }.items():
        argv = ["train", "--model_name_or_path", tiny_sd3_path, "--dataset_name", name, *OPTIONS]
        assert main([*argv, "--reward_funcs", "jpeg_compressibility"]) == 2
        assert words in capsys.readouterr().err


def test_a_column_of_another_name_on_the_command_line(tmp_path, tiny_sd3_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.csv").write_text("caption\na cat\na dog\n")
    argv = ["train", "--model_name_or_path", tiny_sd3_path, "--dataset_name", "p.csv", *OPTIONS]
    argv += ["--reward_funcs", "jpeg_compressibility"]
    assert main(argv) == 2
    assert "its columns are ['caption']. Give the name of the one" in capsys.readouterr().err
    assert main([*argv, "--prompt_column", "caption"]) == 0


def test_the_help_lists_the_sets(capsys):
    main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"`{name}`" in shown for name in PROMPT_SETS)
