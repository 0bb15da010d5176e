"""The help of `trl-flow train` is made of the configs' source: it says what the parser does."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trl_flow import GuardConfig
from trl_flow.cli import main
from trl_flow.commands import methods
from trl_flow.commands.fields import dataclass_fields
from trl_flow.commands.methods import METHODS, changes, methods_table, shown
from trl_flow.commands.options import METHODS as CONFIGS
from trl_flow.commands.options import FlowScriptArguments, training_parser
from trl_flow.commands.training_help import REFUSED, REST, SUBJECTS, by_subject, training_fields
from trl_flow.prompts import PROMPT_SETS
from trl_flow.rewards.named import NAMED_REWARDS
from trl_flow.trainer import FlowRLConfig
from trl_flow.trainer.trl_compat import _BaseConfig


PAPERS = Path(__file__).parents[1] / "docs" / "papers.md"


@pytest.mark.parametrize("method", METHODS)
def test_the_help_has_the_options_defaults_and_choices_of_the_parser(method):
    real = [f for cls in training_parser(["--method", method], {}).dataclass_types for f in dataclasses.fields(cls)]
    real = {each.name: each for each in real if each.init}
    read = training_fields(method)
    assert read.keys() == real.keys()
    for name, field in real.items():
        default = None if field.default is dataclasses.MISSING else field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        assert read[name].default == getattr(default, "value", default), name
        assert read[name].help, name
    actions = {action.dest: action for action in training_parser(["--method", method], {})._actions}
    chosen = {name: field.choices for name, field in read.items() if field.choices}
    assert chosen["method"] == tuple(METHODS) == tuple(CONFIGS) and "scale_rewards" in chosen
    for name, choices in chosen.items():
        assert set(choices) <= set(actions[name].choices or choices), name


@pytest.mark.parametrize("method", METHODS)
def test_every_option_stands_once_and_ours_under_a_subject(method):
    fields = training_fields(method)
    found = by_subject(method, fields)
    names = [each.name for members in found.values() for each in members]
    assert len(names) == len(set(names)) and set(names) == fields.keys() - set(REFUSED)
    theirs = {each.name for each in dataclasses.fields(_BaseConfig)}
    ours = {each.name for cls in (CONFIGS[method], FlowScriptArguments) for each in dataclasses.fields(cls)}
    assert not {each.name for each in found[REST]} & (ours - theirs) - {"datasets"}
    first = next(iter(found.values()))
    own = {each.name for each in dataclasses.fields(CONFIGS[method])}
    assert own - {each.name for each in dataclasses.fields(FlowRLConfig)} <= {each.name for each in first}


def test_subjects_name_options_that_exist():
    known = {name for method in METHODS for name in training_fields(method)}
    assert {name for names in SUBJECTS.values() for name in names} <= known


def test_prompt_sets_and_rewards_are_listed():
    fields = dataclass_fields("trl_flow.commands.options", "FlowScriptArguments")
    for name, listed in (("dataset_name", PROMPT_SETS), ("reward_funcs", NAMED_REWARDS)):
        assert f"{', '.join(f'`{each}`' for each in listed)}" in fields[name].help


def test_the_methods_own_options_come_first_with_what_it_changes(capsys):
    assert main(["train", "--method", "guard", "--help"]) == 0
    shown_help = capsys.readouterr().out
    own = shown_help[shown_help.index("The method, guard:") : shown_help.index("\nModel:")]
    assert "--epsilon 2e-6 " in own and "(flow_grpo: 1e-4)" in own and "--sde_type flow" in own
    assert "--adam_beta1" not in shown_help and "--help all" in shown_help
    assert main(["train", "--method=nft", "--model_name_or_path", "bundled", "--help", "all"]) == 0
    everything = capsys.readouterr().out
    assert "--nft_beta 1.0" in everything and "--adam_beta1 0.9 " in everything and "--epsilon " not in everything
    assert "--height 64 " in everything and not any(f"--{name} " in everything for name in REFUSED)


def test_help_by_a_recipe_is_of_its_method_and_memory_has_options_of_its_own(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("method: awm\n")
    assert main(["memory", "--config", str(tmp_path / "recipe.yaml"), "-h"]) == 0
    text = capsys.readouterr().out
    assert "--huber_power 0.25" in text and "--json" in text and "--num_processes" in text
    assert main(["train", "--method", "gard", "--help"]) == 2
    assert "Did you mean guard?" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["train", "--help"], ["memory", "--help"], ["methods"]])
def test_neither_torch_nor_transformers_is_loaded(argv):
    program = (
        f"import sys; from trl_flow.cli import main; assert main({argv}) == 0\n"
        "slow = {'torch', 'transformers', 'diffusers', 'trl', 'datasets', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("argv", [["train", "--help"], ["memory", "--help"], ["methods"]])
def test_a_reader_who_has_seen_enough_is_no_error(argv):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "trl_flow", *argv]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_table_of_methods_says_what_the_configs_do(capsys):
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert methods_table() in text
    rows = changes()
    for name, values in rows.items():
        for method, value in values.items():
            default = CONFIGS[method].__dataclass_fields__[name].default
            assert value == default
    for method, config in CONFIGS.items():
        base = CONFIGS["flow_grpo"].__dataclass_fields__
        changed = {n for n, f in config.__dataclass_fields__.items() if n in base and f.default != base[n].default}
        assert changed <= rows.keys(), method
    # As the description says of what is null
    assert GuardConfig("out", use_cpu=True).timestep_weighting == "inverse_dt" in methods.DESCRIPTION


def test_the_table_in_the_docs_is_this_one():
    assert methods_table(markdown=True) in PAPERS.read_text()


@pytest.mark.parametrize(
    "value, text",
    [(1e-4, "1e-4"), (2.5e-6, "2.5e-6"), (3e-3, "3e-3"), (0.25, "0.25"), (None, "null"), (True, "true"), ([], "null")],
)
def test_defaults_are_shown_as_a_recipe_has_them(value, text):
    assert shown(value) == text
