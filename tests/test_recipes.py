"""Recipes: those that are shipped, and what one can extend another by."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import yaml
from full_size_configs import write_configs
from test_cli import mistake
from test_examples import load_program
from tiny_flux import tiny_flux_pipeline
from tiny_unets import tiny_sd_pipeline
from tiny_wan import tiny_wan_pipeline

from trl_flow.cli import main
from trl_flow.commands.options import parse_training, peft_config, training_parser
from trl_flow.commands.recipe import read_recipe
from trl_flow.prompts import PROMPT_SETS
from trl_flow.rewards.named import NAMED_REWARDS
from trl_flow.shapes import pipeline_path


FOLDER = Path(__file__).parents[1] / "examples" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
ABLATION = {
    "baseline": {},
    "temp_reweight": {"timestep_weighting": "temp"},
    "guard_reweight": {"timestep_weighting": "inverse_dt"},
    "mean_revised": {"importance_ratio": "mean_revised"},
    "ratio_norm": {"importance_ratio": "ratio_norm", "epsilon": 2e-6, "learning_rate": 1e-4},
}
# One for each model and method; the others differ from these in numbers
QUICK = ("flux_ocr_guard", "sd14_slas", "sd35_geneval_vgpo", "sd35_ocr_guard_kl", "shapes_guard")
QUICK += ("sd35_multi_nft", "sd35_ocr_awm", "wan21_ocr_guard")
all_recipes = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)


def parsed(recipe: Path | str, *options: str):
    """What a recipe gives on one process of this machine: script, training and model arguments."""
    recipe = recipe if isinstance(recipe, Path) else FOLDER / f"{recipe}.yaml"
    argv = ["--config", str(recipe), "--use_cpu", "true", "--bf16", "false", "--fp16", "false", *options]
    argv, options = read_recipe(argv)
    return parse_training(training_parser(argv, options), argv, options)[:3]


def differing(one, other) -> dict:
    """The fields in which two configurations differ, but for where they write, with the first's values."""
    one, other = one.to_dict(), other.to_dict()
    names = one.keys() - {"output_dir", "logging_dir", "run_name"}
    return {name: one[name] for name in names if one[name] != other[name]}


# ---- The shipped ones train ----


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory, tiny_sd3_path):
    """A folder with a tiny pipeline for each model that the recipes train."""
    folder = tmp_path_factory.mktemp("models")
    tiny = {"flux": tiny_flux_pipeline(), "sd14": tiny_sd_pipeline(), "wan21": tiny_wan_pipeline()}
    for name, pipeline in tiny.items():
        pipeline.save_pretrained(folder / name)
    return {
        "stabilityai/stable-diffusion-3.5-medium": (tiny_sd3_path, 16),
        "black-forest-labs/FLUX.1-dev": (str(folder / "flux"), 16),
        "CompVis/stable-diffusion-v1-4": (str(folder / "sd14"), 32),
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (str(folder / "wan21"), 16),
    }


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    """A working folder with prompts and rewards of one's own: those of the recipes have models too large to load."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_scores", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red circle"}\n{"prompt": "two blue squares"}\n')
    (tmp_path / "own_scores.py").write_text(
        "def score(prompts, images, **kwargs):\n    return [1.0 + i for i in range(len(images))]\n"
        "def __getattr__(name):\n    def score(prompts, images, **kwargs):\n        return [1.0 + i for i in "
        "range(len(images))]\n    score.__name__ = name\n    return score\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(path, marks=() if path.stem in QUICK else pytest.mark.slow, id=path.stem) for path in RECIPES],
)
def test_recipes_train_one_phase(recipe, prompts, tiny_models):
    """With all their settings but those of size: averages, evaluation and gold scores among them."""
    _, settings = read_recipe(["--config", str(recipe)])
    given = ["--dataset_name", "prompts.jsonl", "--dataset_test_split", "train", "--output_dir", "out"]
    for name in ("reward_funcs", "eval_reward_funcs"):
        given += [f"--{name}", *(f"own_scores.{name}_{i}" for i in range(len(settings[name])))]
    if settings["model_name_or_path"] != "bundled":
        path, size = tiny_models[settings["model_name_or_path"]]
        given += ["--model_name_or_path", path, "--height", str(size), "--width", str(size)]
        given += ["--max_sequence_length", "16", "--num_inference_steps", "4"]
        if settings.get("num_frames", 1) > 1:
            given += ["--num_frames", "5"]
        if "timestep_range" in settings:
            given += ["--timestep_range", "1", "4", "--timesteps_per_sample", "2"]
    if settings.get("load_in_4bit"):
        given += ["--load_in_4bit", "false"]  # which needs a GPU
    updates = settings["steps_per_generation"] // settings.get("gradient_accumulation_steps", 1)
    number = "2"
    if "num_generations_trained" in settings:
        number = "4"
        given += ["--num_generations_trained", "2"]
    given += ["--num_generations", number, "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"]
    given += ["--steps_per_generation", str(updates), "--max_steps", str(updates), "--eval_num_inference_steps", "2"]
    given += ["--eval_steps", str(updates), "--logging_steps", str(updates), "--save_strategy", "no"]
    given += ["--use_cpu", "true", "--bf16", "false", "--fp16", "false", "--report_to", "none"]
    assert main(["train", "--config", str(recipe), *given]) == 0
    name = "pytorch_lora_weights" if settings["use_peft"] else "diffusion_pytorch_model"
    assert (prompts / "out" / f"{name}.safetensors").is_file()
    gold = json.loads((prompts / "out" / "best_gold" / "scores.json").read_text())
    assert gold["step"] == updates and len(gold["gold"]) == len(settings["eval_reward_funcs"])


MEMORY = [("sd35_pickscore_guard", "sd35-medium"), ("flux_geneval_guard", "flux-dev"), ("sd14_slas", "sd14")]
MEMORY += [("sd35_pickscore_nft", "sd35-medium"), ("sd35_pickscore_awm", "sd35-medium")]
MEMORY += [("wan21_ocr_flow_grpo", "wan21-1.3b")]


@pytest.mark.slow
@pytest.mark.parametrize("base, model", MEMORY, ids=lambda value: value)
@pytest.mark.parametrize("gigabytes", [24, 80])
def test_recipes_for_one_gpu_fit(tmp_path, capsys, base, model, gigabytes):
    """Their published sizes, on the meta device."""
    folder = write_configs(model, tmp_path / "model")
    recipe = FOLDER / f"{base}_{gigabytes}gb.yaml"
    assert main(["memory", "--config", str(recipe), "--model", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] < gigabytes * 1e9


# ---- They say what the papers say ----


@all_recipes
def test_recipes_have_whole_groups_and_updates(recipe):
    _, config, _ = parsed(recipe)
    updates = config.updates_per_generation
    assert config.generation_batch_size % config.num_generations == 0
    noised = "nft" in recipe.stem or "awm" in recipe.stem
    one_update = (noised and recipe.stem != "sd35_ocr_nft") or recipe.stem == "wan21_dance"
    assert updates == (1 if one_update else 3 if recipe.stem.startswith("flux") else 2)
    # Rewards are logged by updates that sampled; an evaluation is followed by a checkpoint or comes between
    assert config.logging_steps % updates == config.eval_steps % updates == config.max_steps % updates == 0
    assert config.save_steps % config.eval_steps == 0 or config.save_strategy == "no"
    # The command for several processes that the recipe prints gives the same batches
    pattern = r"--num_processes (\d+) --steps_per_generation (\d+) --gradient_accumulation_steps (\d+)"
    if command := re.search(pattern, recipe.read_text(encoding="utf-8")):
        processes, steps, accumulation = map(int, command.groups())
        assert processes * steps == config.steps_per_generation
        assert processes * accumulation == config.gradient_accumulation_steps


@all_recipes
def test_recipes_name_rewards_and_prompts_of_the_package(recipe):
    script, config, model = parsed(recipe)
    for names in (script.reward_funcs, script.eval_reward_funcs):
        assert names and {name.removeprefix("frames:") for name in names} <= NAMED_REWARDS.keys()
    assert len(config.reward_weights or script.reward_funcs) == len(script.reward_funcs)
    assert not set(script.reward_funcs) & set(script.eval_reward_funcs)
    assert script.dataset_name in {None, *PROMPT_SETS}
    assert config.eval_strategy == "steps" and script.over_optimization_patience == 2
    assert Path(config.output_dir).name == recipe.stem.replace("_", "-")
    if model.use_peft and script.dataset_name is not None:
        assert peft_config(script, config, model).init_lora_weights == "gaussian"


@all_recipes
def test_recipes_say_where_every_number_comes_from(recipe):
    """A line with a number has a comment, but for the batch's, which has one above, and the bundled model's."""
    if recipe.stem.startswith("shapes"):
        return
    bare = ("num_generations", "per_device_train_batch_size", "steps_per_generation", "gradient_accumulation_steps")
    for line in recipe.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if not name.startswith("#") and re.match(r"\s*\[?[-\d.]", value) and name not in bare:
            assert "# " in value, line


@pytest.mark.parametrize("name", ["flux_dance", "flux_slas", "sd14_dance", "sd14_slas"])
def test_dancegrpos_300_sampling_phases(name):
    """The released `max_train_steps` counts sampling phases, `max_steps` updates: three for FLUX.1, two for SD 1.4."""
    config = parsed(name)[1]
    assert config.max_steps == 300 * config.updates_per_generation


@pytest.mark.parametrize("recipe", [path for path in RECIPES if path.stem.endswith("gb")], ids=lambda path: path.stem)
def test_recipes_for_one_gpu_train_on_the_same_groups_and_images(recipe):
    base, config = parsed(recipe.stem.rsplit("_", 1)[0])[1], parsed(recipe)[1]
    # What may differ: how the images are cut into micro-batches, and what saves memory
    allowed = {"per_device_train_batch_size", "steps_per_generation", "gradient_accumulation_steps"}
    allowed |= {"gradient_checkpointing", "activation_checkpointing", "enable_vae_slicing", "precompute_prompt_embeds"}
    assert differing(config, base).keys() <= allowed
    assert config.generation_batch_size == base.generation_batch_size
    assert config.updates_per_generation == base.updates_per_generation


@pytest.mark.parametrize("name", ABLATION)
def test_the_ablation_differs_from_the_baseline_in_the_papers_two_choices(name):
    recipe = FOLDER / f"sd35_ocr_ablation_{name}.yaml"
    assert len(yaml.safe_load(recipe.read_text()).keys() - {"extends"}) <= 2
    assert differing(parsed(recipe)[1], parsed("sd35_ocr_flow_grpo")[1]) == ABLATION[name]


@pytest.mark.parametrize("task, beta", [("geneval", 0.04), ("ocr", 0.04), ("pickscore", 0.01)])
def test_the_papers_comparisons_are_of_equal_settings(task, beta):
    """GRPO-Guard's and VGPO's Table 1: what a method's recipe does not name is the baseline's."""
    base = parsed(f"sd35_{task}_flow_grpo")[1]
    assert (base.beta, base.scale_rewards, base.use_ema, base.ema_update_every) == (0.0, "group", True, 8)
    assert differing(parsed(f"sd35_{task}_flow_grpo_kl")[1], base) == {"beta": beta}
    guard = {"importance_ratio": "ratio_norm", "timestep_weighting": "inverse_dt", "learning_rate": 1e-4}
    guard["epsilon"] = 4e-6 if task == "pickscore" else 2e-6
    assert differing(parsed(f"sd35_{task}_guard")[1], base) == guard
    vgpo = differing(parsed(f"sd35_{task}_vgpo")[1], base)
    assert vgpo.pop("max_steps", 960) > 650 and vgpo.pop("reward_weights", [0.0385]) == [0.0385]
    assert vgpo == {"dense_rewards": True, "value_scale": 0.05, "share_initial_noise": True}


@pytest.mark.parametrize("model", ["sd14", "flux"])
def test_slas_and_its_baseline_have_the_same_rewards(model):
    (one, slas, _), (other, dance, _) = parsed(f"{model}_slas"), parsed(f"{model}_dance")
    assert one.reward_funcs == other.reward_funcs == ["hpsv2.1", "clipscore_dfn5b"]
    others = differing(slas, dance)
    if model == "sd14":  # neither has an effect on a U-Net of which all steps are trained
        del others["sde_type"], others["timestep_fraction_per_sample"]
    assert others == {"advantage_power": 0.25, "scale_rewards": "batch"}


NFT = {"beta": 1e-4, "nft_beta": 1.0, "old_decay": 0.5, "old_decay_rate": 1e-3, "old_decay_start": 0, "ema_decay": 0.9}
NFT |= {"num_inference_steps": 10, "timesteps_per_sample": 9, "generation_batch_size": 48 * 24, "advantage_clip": 5.0}
AWM = {"beta": 0.003, "beta_old": 1.0, "old_decay": 0.3, "old_decay_rate": 1e-3, "ema_decay": 0.99, "epsilon": 1.0}
AWM |= {"num_inference_steps": 14, "timesteps_per_sample": 6, "timestep_range": [1, 12], "huber_power": 0.25}
AWM |= {"timestep_weighting": "t", "generation_batch_size": 72 * 24, "advantage_clip": 5.0}
NOISED = {
    "geneval_nft": NFT,
    "ocr_nft": NFT | {"nft_beta": 0.1, "old_decay": 0.999, "old_decay_rate": 0.0075, "old_decay_start": 75},
    "pickscore_nft": NFT,
    "multi_nft": NFT | {"nft_beta": 0.1, "num_inference_steps": 25, "timesteps_per_sample": 24},
    "geneval_awm": AWM,
    "ocr_awm": AWM,
    "pickscore_awm": AWM | {"beta": 1e-4, "timestep_range": [0, 12], "generation_batch_size": 24 * 24},
}


@pytest.mark.parametrize("name", NOISED)
def test_learning_on_noised_images_has_the_released_settings(name):
    script, config, model = parsed(f"sd35_{name}")
    settings = config.to_dict()
    common = {"guidance_scale": 1.0, "scale_rewards": "batch", "learning_rate": 3e-4, "weight_decay": 1e-4}
    common |= {"max_grad_norm": 1.0, "use_ema": True, "ema_update_every": 1, "height": 512, "num_generations": 24}
    common |= {"eval_num_inference_steps": 40, "timestep_sampling": "schedule"} | NOISED[name]
    assert {key: settings[key] for key in common} == common
    assert (model.lora_r, model.lora_alpha) == (32, 64)
    if name == "multi_nft":  # 1 each there, of PickScore / 26 and two cosines
        assert script.reward_funcs == ["pickscore", "hpsv2.1", "clipscore"]
        assert config.reward_weights == pytest.approx([1 / 26, 1, 0.01], rel=2e-3)


def test_flow_grpos_settings_of_videos():
    """config/grpo.py, general_ocr_wan2_1, for one GPU."""
    script, config, model = parsed("wan21_ocr_flow_grpo")
    settings = config.to_dict()
    released = {"height": 240, "width": 416, "num_frames": 33, "num_inference_steps": 20, "guidance_scale": 4.5}
    released |= {"eval_num_inference_steps": 50, "learning_rate": 1e-4, "epsilon": 1e-3, "beta": 0.004}
    released |= {"num_generations": 4, "per_device_train_batch_size": 8, "generation_batch_size": 16}
    released |= {"scale_rewards": "group", "ema_decay": 0.9, "ema_update_every": 8, "weight_decay": 1e-4}
    assert {name: settings[name] for name in released} == released and config.updates_per_generation == 2
    assert script.reward_funcs[0] == "frames:ocr" and (model.lora_r, model.lora_alpha) == (32, 64)
    guard = differing(parsed("wan21_ocr_guard")[1], config)
    own = {"importance_ratio": "ratio_norm", "timestep_weighting": "inverse_dt", "epsilon": 2e-6, "beta": 0.0}
    assert guard == own


def test_half_precision_is_the_released_one():
    for recipe in RECIPES:
        _, settings = read_recipe(["--config", str(recipe)])
        assert settings.get("fp16", False) == recipe.stem.startswith("sd35"), recipe


# ---- One that extends another ----


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """Writes recipes, each by name and content, and returns the first one's path from the working folder above it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deeper").mkdir()

    def write(**contents) -> str:
        for name, content in contents.items():
            (tmp_path / "deeper" / f"{name}.yaml").write_text(yaml.safe_dump(content))
        return str(Path("deeper", f"{next(iter(contents))}.yaml"))

    return write


def test_a_recipe_extends_others(recipes):
    path = recipes(
        one={"extends": "two.yaml", "epsilon": 1e-3, "reward_weights": None, "max_steps": 7},
        two={"extends": "../three.yaml", "learning_rate": "3e-4", "reward_weights": [1.0, 2.0], "max_steps": 8},
    )
    Path("three.yaml").write_text("method: guard\nepsilon: 1.0e-5\nbeta: 0.5\nlora_r: 3\noutput_dir: out\n")
    script, config, model = parsed(Path(path), "--max_steps", "9")
    assert (script.method, config.importance_ratio, model.lora_r) == ("guard", "ratio_norm", 3)  # the base's base
    assert (config.learning_rate, config.epsilon, config.beta) == (3e-4, 1e-3, 0.5)  # the nearest one's
    assert config.reward_weights is None  # taken away
    assert config.max_steps == 9  # the command line's


def test_null_is_the_default_whether_the_base_names_the_option_or_not(recipes):
    script, config, _ = parsed(
        Path(recipes(one={"extends": "two.yaml", "beta": None, "height": None}, two={"output_dir": "out"}))
    )
    other = parsed(Path(recipes(two={"output_dir": "out"})))[1]
    assert config.beta == other.beta is not None and config.height == other.height


def test_hyphens_in_names_are_underscores(recipes):
    path = Path(recipes(one={"extends": "two.yaml", "learning-rate": 1e-3}, two={"learning_rate": 1.0, "out-put": 1}))
    argv, recipe = read_recipe(["--config", str(path), "--model-name-or-path", "bundled"])
    assert recipe == {"learning_rate": 1e-3, "out_put": 1}
    del recipe["out_put"]
    parser = training_parser(argv, recipe)
    assert parse_training(parser, [*argv, "--output_dir", "x", "--use_cpu", "true"], recipe)[1].height == 32


@pytest.mark.parametrize("no", ["no", False, None])
def test_a_recipe_without_evaluation_takes_over_no_gold_scores(recipes, no):
    base = {"eval_strategy": "steps", "eval_steps": 2, "eval_reward_funcs": ["ocr"], "over_optimization_patience": 2}
    base |= {"over_optimization_stop": True, "output_dir": "out", "over_optimization_num_standard_errors": 3.0}
    script, config, _ = parsed(Path(recipes(one={"extends": "two.yaml", "eval_strategy": no}, two=base)))
    assert config.eval_strategy == "no" and script.eval_reward_funcs is None
    assert script.over_optimization_patience is None and not script.over_optimization_stop


def test_an_option_given_twice_is_refused_by_name(recipes, capsys):
    path = recipes(one={})
    for text in ("max_steps: 2\nbeta: 1\nmax_steps: 4\n", "max_steps: 2\nbeta: 1\nmax-steps: 4\n"):
        Path(path).write_text(text)
        error = mistake(capsys, "train", "--config", path)
        assert "one.yaml' has max_steps twice, for the second time in line 3." in error


@pytest.mark.parametrize("command", ["train", "memory"])
@pytest.mark.parametrize(
    "contents, words",
    [
        ({"one": {"extends": "bse.yaml"}, "base": {}}, ["one.yaml' extends 'bse.yaml'", "mean base.yaml?"]),
        ({"one": {"extends": "two.yaml"}, "two": {"extends": "one.yaml"}}, ["one.yaml -> deeper/two.yaml -> deeper/"]),
        ({"one": {"extends": "one.yaml"}}, ["extends itself"]),
        ({"one": {"extends": ["two.yaml"]}}, ["extends ['two.yaml'], but must name one file"]),
        ({"one": {"extends": None}}, ["extends None"]),
        ({"one": {"extends": "two.yaml"}, "two": ["a"]}, ["'deeper/two.yaml' must be a YAML mapping"]),
        ({"one": {"extend": "two.yaml"}}, ["no option --extend, which 'deeper/one.yaml' has", "mean --extends?"]),
        ({"one": {"extends": "two.yaml"}, "two": {"lora_rr": 3}}, ["'deeper/two.yaml' has. Did you mean --lora_r?"]),
        ({"one": {"extends": "two.yaml", "bta": None}, "two": {"beta": 1}}, ["--bta, which 'deeper/one.yaml' has"]),
        ({"one": {None: "steps"}}, ["has the option None, which YAML does not read as text"]),
        ({"one": {"on": "steps"}}, ["there is no option --on, which 'deeper/one.yaml' has"]),
        ({"one": {"env": ["A=1"]}}, ["env is ['A=1'], but must be a mapping"]),
    ],
)  # fmt: skip
def test_what_cannot_be_extended_is_refused_by_name(recipes, capsys, contents, words, command):
    error = mistake(capsys, command, "--config", recipes(**contents))
    assert all(word in error for word in words), error


def written(text: str, *options: str):
    """What a recipe of these lines gives: script, training and model arguments."""
    Path("recipe.yaml").write_text(f"output_dir: out\n{text}")
    return parsed(Path("recipe.yaml"), *options)


@pytest.mark.parametrize(
    "line, value",
    [
        *((f"{name}_strategy: no", "no") for name in ("save", "eval", "logging")),
        ("save_strategy: Off", "no"),
        ("eval_strategy: false", "no"),
        ("use_ema: yes", True),
        ("overlap_rewards: off", False),
        ("bf16: 'no'", False),
        ("report_to: none", []),
        ("scale_rewards: no", "none"),
        ("timestep_weighting: none", "none"),
        ("learning_rate: 1e-4", 1e-4),
        ("learning_rate: 2E-5", 2e-5),
        ("reward_weights: [1e-1, 1, .5, 2e0]", [0.1, 1, 0.5, 2.0]),
        ("reward_weights: 1e-1", [0.1]),
        ("reward_weights: None", None),
        ("num_inference_steps: 3\nvalue_scale: [1e-1, 0, 0.2]\ndense_rewards: on", [0.1, 0, 0.2]),
        ("advantage_power: 1e-1", 0.1),
        ("ratio_probe: auto", "auto"),
        ("max_steps: 1e3", 1000),
        ("max_steps: 1_000", 1000),
        ("seed: 010", 10),  # YAML 1.1: eight
        ("seed: 0x10", 16),
        ("run_name: 2024-01-01", "2024-01-01"),
        ("run_name: 1:30", "1:30"),
        ("run_name: 007", "007"),
        ("run_name: 1e5", "1e5"),
        ("run_name: no", "no"),
        ("hub_revision: 1234567", "1234567"),
        ("negative_prompt: off", "off"),
        ("negative_prompt: ~", None),
        ("negative_prompt: None", None),
        ("negative_prompt: 'null'", "null"),
        ("negative_prompt: ''", ""),
        ("lr_scheduler_kwargs: {factor: 1e-1, flag: no, time: 1:30}", {"factor": 0.1, "flag": False, "time": "1:30"}),
        ("model_init_kwargs: {revision: 12345e7, local: yes}", {"revision": "12345e7", "local": True}),
        ("model_init_kwargs: {max_memory: {0: 10GB}, variant: null}", {"max_memory": {0: "10GB"}, "variant": None}),
        ("model_init_kwargs:\n  <<: {variant: fp16}", {"variant": "fp16"}),
    ],
)  # fmt: skip
def test_a_value_means_what_stands_there(line, value, tmp_path, monkeypatch):
    """Of YAML 1.1 neither the words for truth values, exponents without a point, octal and sexagesimal numbers, nor
    dates: the type of the option decides."""
    monkeypatch.chdir(tmp_path)
    name = line.split("\n")[-2 if "value_scale" in line or "<<" in line else -1].split(":")[0]
    found = getattr(written(line)[1], name)
    assert found == value and isinstance(found, type(value))


def test_script_and_model_options_mean_what_stands_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("A_FLAG", raising=False)
    monkeypatch.delenv("A_NUMBER", raising=False)
    text = "reward_funcs: [no, 'on', 1.0]\nenv: {A_FLAG: on, A_NUMBER: 010}\nuse_peft: yes\nlora_alpha: 1e1\n"
    text += "lora_target_modules: all-linear\nmodel_revision: 0123456\nmodel_name_or_path: 5\n"
    text += "over_optimization_patience: null\ndatasets:\n- {path: a, split: 'train[:5]', name: 12e1, columns: [no]}\n"
    Path("recipe.yaml").write_text(f"output_dir: out\n{text}")
    argv, recipe = read_recipe(["--config", "recipe.yaml", "--use_cpu", "true"])
    script, _, model, mixture, _ = parse_training(training_parser(argv, recipe), argv, recipe)
    assert script.reward_funcs == ["no", "on", "1.0"] and script.over_optimization_patience is None
    assert (os.environ["A_FLAG"], os.environ["A_NUMBER"]) == ("on", "010")
    assert model.use_peft is True and model.lora_alpha == 10 and model.lora_target_modules == "all-linear"
    assert (model.model_revision, model.model_name_or_path) == ("0123456", "5")
    (source,) = mixture.datasets
    assert (source.name, source.split, source.columns) == ("12e1", "train[:5]", ["no"])


def test_what_a_base_says_means_what_stands_there(recipes):
    path = recipes(one={"extends": "two.yaml"}, two={})
    Path("deeper", "two.yaml").write_text("output_dir: out\nsave_strategy: no\nreward_weights: [1e-1, 1]\n")
    config = parsed(Path(path))[1]
    assert config.save_strategy == "no" and config.reward_weights == [0.1, 1]


@pytest.mark.parametrize(
    "line, words",
    [
        ("max_steps: 1:30", "argument --max_steps/--max-steps: invalid int value: '1:30'"),
        ("max_steps: 1.5", "argument --max_steps/--max-steps: invalid int value: '1.5'"),
        ("learning_rate: 2024-01-01", "invalid float value: '2024-01-01'"),
        ("use_ema: maybe", "Truthy value expected: got maybe"),
        ("save_strategy: None", "None is not a valid SaveStrategy"),
        ("reward_weights: [one]", "reward_weights is ['one'], but must be a list of finite numbers"),
        ("model_init_kwargs: {a: 1, a: 2}", "recipe.yaml' has a twice"),
    ],
)
def test_what_fits_no_option_is_refused_as_it_stands_there(tmp_path, monkeypatch, capsys, line, words):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(f"output_dir: out\n{line}\n")
    assert words in mistake(capsys, "train", "--config", "recipe.yaml")


@pytest.mark.parametrize("encoding, end", [("utf-8-sig", "\r\n"), ("utf-16", "\n")])
def test_recipes_of_other_editors(tmp_path, monkeypatch, encoding, end):
    monkeypatch.chdir(tmp_path)
    text = f"output_dir: out{end}negative_prompt: Größe{end}max_steps: 7{end}"
    Path("recipe.yaml").write_bytes(text.encode(encoding))
    config = parsed(Path("recipe.yaml"))[1]
    assert (config.negative_prompt, config.max_steps, config.output_dir) == ("Größe", 7, "out")


def test_a_recipe_that_is_no_utf_8(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_bytes("negative_prompt: Größe\n".encode("latin-1"))
    error = mistake(capsys, "train", "--config", "recipe.yaml")
    assert "recipe.yaml' is not UTF-8 text" in error and "Save it as UTF-8" in error


def test_null_on_the_command_line_takes_an_option_away(tmp_path, monkeypatch, capsys):
    """A list, an optional value, or what has a default; in both spellings, and not a misspelled one."""
    monkeypatch.chdir(tmp_path)
    text = "reward_weights: [1, 2]\neval_reward_funcs: [ocr]\nbeta: 0.5\nmethod: slas\nnegative_prompt: bad\n"
    options = ["--reward_weights", "null", "--eval-reward-funcs=null", "--beta", "null", "--method", "null"]
    script, config, _ = written(text, *options, "--negative-prompt", "null")
    assert config.reward_weights is None and script.eval_reward_funcs is None and config.negative_prompt is None
    assert config.beta == 0 and config.advantage_power == 0 and script.method == "flow_grpo"
    argv, recipe = read_recipe(["--config", "recipe.yaml"])
    assert recipe["negative_prompt"] == "bad"
    error = mistake(capsys, "train", "--config", "recipe.yaml", "--reward_weight", "null")
    assert "there is no option --reward_weight" in error and "--reward_weights?" in error


def test_stopping_needs_something_that_watches(recipes, capsys):
    options = {"model_name_or_path": "bundled", "reward_funcs": ["shapes_soft"], "per_device_train_batch_size": 8}
    options |= {"over_optimization_stop": True, "output_dir": "out", "use_cpu": True}
    assert "over_optimization_patience is not set" in mistake(capsys, "train", "--config", recipes(one=options))


def test_a_run_stops_when_the_gold_score_falls(recipes, prompts, capsys):
    """The reward rises with every update, the gold score falls: two such evaluations end the run, which says where the
    better model is, though only the last one is saved."""
    Path("own_falling.py").write_text(
        "calls = {'reward': 0, 'gold': 0}\n"
        "def reward(prompts, images, **kwargs):\n    calls['reward'] += 1\n"
        "    return [calls['reward'] + i for i in range(len(images))]\n"
        "def gold(prompts, images, **kwargs):\n    calls['gold'] += 1\n"
        "    return [2.0 ** -calls['gold']] * len(images)\n"
    )
    options = {"model_name_or_path": "bundled", "reward_funcs": ["own_falling.reward"], "output_dir": "out"}
    options |= {"eval_reward_funcs": ["own_falling.gold"], "eval_strategy": "steps", "eval_steps": 1, "max_steps": 9}
    options |= {"per_device_train_batch_size": 4, "num_generations": 2, "steps_per_generation": 1, "use_peft": True}
    options |= {"num_inference_steps": 2, "eval_num_inference_steps": 2, "dataset_name": "prompts.jsonl"}
    options |= {"guidance_scale": 1.0, "save_strategy": "no", "use_cpu": True, "report_to": "none"}
    options |= {"over_optimization_patience": 2, "over_optimization_stop": True, "dataset_test_split": "train"}
    assert main(["train", "--config", recipes(one=options)]) == 0
    logged = [json.loads(line) for line in Path("out", "log_history.jsonl").read_text().splitlines()]
    assert max(entry["step"] for entry in logged) == 2
    said = capsys.readouterr().out
    assert "These are the weights of update 2" in said and str(Path("out", "best_gold")) in said
    assert json.loads(Path("out", "best_gold", "scores.json").read_text())["step"] == 1
    again = ["train", "--config", str(Path("deeper", "one.yaml")), "--eval-strategy", "no", "--max_steps", "1"]
    assert main(again) == 0
    # What the first run had found is kept beside the second one's
    assert Path("out", "previous-1", "best_gold", "scores.json").is_file()


def test_the_cost_of_a_run_is_its_operations(capsys):
    """Ours on the bundled model: 60 phases of 288 images, six steps, four of them trained."""
    load_program("benchmarks/recipe_cost.py").main(
        [
            str(FOLDER / "shapes_guard.yaml"),
            "--model",
            str(pipeline_path()),
            "--tflops",
            "1e-3",
            "--eval-prompts",
            "108",
        ]
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    forward, both = result["operations"].values()
    assert 2 * forward < both < 4 * forward
    numbers = {"sampling": 60 * 288 * 6 * forward, "training": 60 * 288 * 4 * both}
    numbers["evaluations"] = 4 * 108 * 10 * forward
    assert result["gpu_hours"] == pytest.approx({name: number / 3.6e12 for name, number in numbers.items()})
