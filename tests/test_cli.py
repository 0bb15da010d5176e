import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tiny_comparisons import random_lora
from tiny_training import PROMPTS

from trl_flow import DiffusionNFTConfig, FlowRLTrainer
from trl_flow.cli import main
from trl_flow.commands.options import parse_training, training_parser
from trl_flow.commands.recipe import ACCELERATE_CONFIGS, read_recipe


@pytest.fixture
def recipe(tmp_path, tiny_sd3_path, monkeypatch):
    """Writes a recipe of a two-second training run, changed by `fields`, and returns its path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p, "weight": 2.0}) + "\n" for p in PROMPTS))

    def write(name: str = "recipe.yaml", **fields) -> str:
        content = {
            "model_name_or_path": tiny_sd3_path,
            "dataset_name": "prompts.jsonl",
            "reward_funcs": ["jpeg_compressibility"],
            "output_dir": str(tmp_path / "run"),
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "steps_per_generation": 1,
            "num_inference_steps": 2,
            "height": 16,
            "width": 16,
            "max_sequence_length": 16,
            "learning_rate": "1e-2",
            "max_steps": 2,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "use_peft": True,
            **fields,
        }
        path = tmp_path / name
        path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return str(path)

    return write


def mistake(capsys, *argv: str) -> str:
    """What is printed about `argv`, which must be refused with exit code 2 and without a traceback."""
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2, error
    assert "Traceback" not in error
    return error


def settings(folder) -> dict:
    return json.loads((folder / "training_args.json").read_text())


# ---- The commands ----


def test_help_comes_at_once_and_lists_the_commands():
    program = (
        "import sys; from trl_flow.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'transformers', 'diffusers', 'trl', 'datasets', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("    ") and line.strip()]
    assert {"demo", "train", "env"} <= set(listed)


def test_without_a_command_the_help_is_printed(capsys):
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out


def test_help_of_each_command(capsys):
    for command, words in {
        "demo": ("--full", "--method", "--output-dir", "--seed"),
        "env": ("versions",),
        "train": ("--config", "--accelerate_config", "--num_generations", "--reward_funcs", "--lora_r", "--method"),
    }.items():
        try:
            code = main([command, "--help"])
        except SystemExit as stop:
            code = stop.code
        assert code == 0
        shown = capsys.readouterr().out
        assert all(word in shown for word in words)


def test_env_names_versions_and_devices(capsys):
    assert main(["env"]) == 0
    shown = dict(line[2:].split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert shown["torch"] == torch.__version__
    assert shown["devices"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["tran"], "invalid choice"),
        (["demo", "--ful"], "Did you mean --full?"),
        (["demo", "--method", "gard"], "invalid choice"),
        (["demo", "--seed", "-1"], "whole number"),
        (["demo", "--seed", "one"], "'one' is not a whole number"),
        (["env", "--output-dir", "x"], "there is no option --output-dir"),
        (["train"], "nothing to train"),
        (["train", "--config"], "needs the path"),
        (["train", "--config", "no-such.yaml"], "'no-such.yaml' cannot be read: No such file"),
    ],
)
def test_mistakes_on_the_command_line(capsys, argv, words):
    assert words in mistake(capsys, *argv)


def test_the_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("TRL_FLOW_DEBUG", "1")
    with pytest.raises(Exception, match="nothing to train"):
        main(["train"])


# ---- trl-flow train ----


def test_train_by_a_recipe(recipe, tmp_path, capsys):
    assert main(["train", "--config", recipe(lora_r=3)]) == 0
    folder = tmp_path / "run"
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    down = [tensor for name, tensor in weights.items() if name.endswith("lora_A.weight")]
    up = [tensor for name, tensor in weights.items() if name.endswith("lora_B.weight")]
    assert {tensor.shape[0] for tensor in down} == {3}
    assert sum(tensor.abs().sum() for tensor in up) > 0  # they begin at 0
    assert settings(folder)["learning_rate"] == 0.01  # YAML reads 1e-2 as text
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "rewards/jpeg_compressibility/mean" in entry] == [1, 2]
    assert f"in {folder}" in capsys.readouterr().out


def test_a_scheduler_starts_one_command_until_the_run_is_complete(recipe, tmp_path, capsys):
    argv = ["train", "--config", recipe(save_strategy="steps", save_steps=1), "--resume_from_checkpoint", "auto"]
    for max_steps, said in (("1", "Trained 1 update."), ("2", "Trained 2 updates."), ("2", "the run is complete")):
        assert main([*argv, "--max_steps", max_steps]) == 0
        assert said in capsys.readouterr().out


def test_a_full_disk_is_told_without_a_traceback(recipe, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FlowRLTrainer, "save_model", full)
    assert main(["train", "--config", recipe(save_strategy="steps")]) == 2
    assert "trl-flow train: error: The checkpoint" in (said := capsys.readouterr().err) and "No space left" in said
    assert "the same command and --resume_from_checkpoint true" in said


def test_options_come_before_the_recipe_and_the_recipe_before_the_preset(recipe, tmp_path):
    # Guard's own: ratio_norm, learning rate 1e-4, epsilon 2e-6
    path = recipe(method="guard", epsilon="1e-3", learning_rate=None)
    assert main(["train", f"--config={path}", "--num_generations", "2", "--max_steps=1"]) == 0
    run = settings(tmp_path / "run")
    assert (run["importance_ratio"], run["learning_rate"]) == ("ratio_norm", 1e-4)
    assert (run["epsilon"], run["num_generations"], run["max_steps"]) == (1e-3, 2, 1)


@pytest.mark.parametrize("method", ["nft", "awm"])
def test_methods_with_trainers_of_their_own(recipe, tmp_path, method):
    own = {"guidance_scale": 1.0, "timesteps_per_sample": 1, "steps_per_generation": None, "learning_rate": 1e-3}
    assert main(["train", "--config", recipe(method=method, **own)]) == 0
    settings = json.loads((tmp_path / "run" / "training_args.json").read_text())
    assert settings["old_decay_rate"] == 0.001 and settings["steps_per_generation"] == 1
    assert load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize(
    ("fields", "options", "words"),
    [
        ({"method": "nft", "dense_rewards": True}, [], ("--dense_rewards belongs to", "not to nft", "VGPO's values")),
        ({"method": "awm"}, ["--importance_ratio", "ratio_norm"], ("not to awm", "GRPO-Guard's ratio")),
        ({"method": "guard"}, ["--nft_beta", "0.1"], ("--nft_beta belongs to nft, not to guard",)),
        ({"method": "nft"}, ["--nft_bta", "0.1"], ("no option --nft_bta", "Did you mean --nft_beta")),
    ],
)
def test_options_of_other_methods_are_named(recipe, capsys, fields, options, words):
    error = mistake(capsys, "train", "--config", recipe(**fields), *options)
    assert all(word in error for word in words), error


def test_null_takes_away_an_option_of_another_method(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("method: guard\nuse_cpu: true\noutput_dir: run\nepsilon: 1.0e-4\nsde_window_size: null\n")
    argv, recipe = read_recipe(["--config", str(path), "--method", "nft", "--epsilon", "null"])
    _, args, *_ = parse_training(training_parser(argv, recipe), argv, recipe)
    assert isinstance(args, DiffusionNFTConfig)


def test_a_recipe_goes_on_from_an_adapter_and_resumes_without_its_file(recipe, tmp_path, tiny_sd3_path, capsys):
    first = random_lora(tiny_sd3_path, tmp_path / "first", seed=1)  # of rank 4
    own = recipe(init_adapter=first, use_peft=None, init_lora_weights="gaussian", beta=0.1, save_steps=1, max_steps=1)
    assert main(["train", "--config", own]) == 0
    folder = tmp_path / "run"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert settings(folder)["init_adapter"] == first
    shutil.rmtree(first)
    assert main(["train", "--config", own, "--max_steps", "2", "--resume_from_checkpoint", "true"]) == 0
    assert settings(folder)["init_adapter"] == first
    # The same recipe with the options that it was trained by; others are refused
    checkpoint = str(folder / "checkpoint-1")
    assert "r=16" in mistake(capsys, "train", "--config", recipe(init_adapter=checkpoint, lora_r=16))
    words = "use_peft is False, which trains all weights, but init_adapter is an adapter"
    assert words in mistake(capsys, "train", "--config", recipe(init_adapter=checkpoint, use_peft=False))
    capsys.readouterr()
    assert main(["memory", "--config", recipe(init_adapter=checkpoint), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    weights = load_file(folder / "adapter_model.safetensors")
    assert shown["trained_parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert shown["resident"]["weights of init_adapter"] == 4 * shown["trained_parameters"]


def test_export(tmp_path, tiny_sd3_path, capsys):
    lora = random_lora(tiny_sd3_path, tmp_path / "ours", seed=1)
    output = str(tmp_path / "out" / "ours.safetensors")
    arguments = ["export", lora, "--format", "comfyui", "--output", output]
    assert "base model of" in mistake(capsys, *arguments)
    assert "must be a file .safetensors" in mistake(capsys, *arguments[:-1], "ours.bin", "--model", tiny_sd3_path)
    assert main([*arguments, "--model", tiny_sd3_path]) == 0
    assert f"Wrote {output} for comfyui: 4 modules" in capsys.readouterr().out
    assert load_file(output)["transformer.transformer_blocks.0.attn.to_q.alpha"] == 8
    assert "is not a LoRA for this" in mistake(capsys, *arguments, "--model", "bundled")


def test_rewards_of_ones_own_get_the_columns(recipe, tmp_path):
    (tmp_path / "own_rewards_for_cli.py").write_text(
        "def weighted(prompts, images, weight, **kwargs):\n    return [w * len(p) for p, w in zip(prompts, weight)]\n"
        "class Constant:\n    def __call__(self, prompts, **kwargs):\n        return [7.0] * len(prompts)\n"
    )
    path = recipe(reward_funcs=["own_rewards_for_cli.weighted", "own_rewards_for_cli.Constant"], max_steps=1)
    assert main(["train", "--config", path]) == 0
    (log, *_) = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert log["rewards/Constant/mean"] == 7.0
    # Two of four prompts a step, each twice its length
    lengths = [len(prompt) for prompt in PROMPTS]
    possible = {a + b for i, a in enumerate(lengths) for b in lengths[:i]}
    assert log["rewards/weighted/mean"] in possible


def test_gold_scores(recipe, tmp_path):
    (tmp_path / "gold_for_cli.py").write_text("def two(prompts, images, **kwargs):\n    return [2.0] * len(prompts)\n")
    fields = {"dataset_test_split": "train", "eval_strategy": "steps", "eval_steps": 1}
    path = recipe(eval_reward_funcs=["gold_for_cli.two"], resume_from_checkpoint=False, **fields)
    assert main(["train", "--config", path, "--max_steps", "1", "--eval_num_inference_steps", "2"]) == 0
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [(e["step"], e["eval_gold/two"]) for e in log if "eval_gold/average" in e] == [(0, 2.0), (1, 2.0)]


@pytest.mark.parametrize(
    "name, content, prompts",
    [
        ("p.txt", "a cat\ntwo dogs\n", 2),
        ("p.csv", "prompt,weight\na cat,1\n", 1),
        ("p.json", '[{"prompt": "a cat"}, {"prompt": "a dog"}, {"prompt": "a cow"}]', 3),
    ],
)
def test_files_of_prompts(tmp_path, name, content, prompts):
    (tmp_path / name).write_text(content)
    train, evaluation = datasets_of("--dataset_name", str(tmp_path / name))
    assert len(train) == prompts and train[0]["prompt"] == "a cat" and evaluation is None


def datasets_of(*argv: str, **kwargs):
    """The prompts to train and to evaluate on, by these options."""
    from trl_flow.commands.options import training_parser
    from trl_flow.commands.train import load_datasets

    script_args, *_, mixture_args = training_parser(argv, {}).parse_args_and_config(list(argv))
    return load_datasets(script_args, mixture_args, **{"bundled": False, "evaluate": False} | kwargs)


def test_parts_of_splits_and_columns_of_images(tmp_path):
    """Of a file, of the bundled prompts and of a mixture."""
    Image.new("RGB", (2, 2), (0, 255, 0)).save(tmp_path / "a.png")
    lines = [json.dumps({"instruction": f"edit {i}", "source_image": "a.png"}) for i in range(10)]
    (tmp_path / "edits.jsonl").write_text("\n".join(lines))
    splits = ["--dataset_train_split", "train[2:]", "--dataset_test_split", "train[:20%]"]
    columns = ["--prompt_column", "instruction", "--image_column", "source_image"]
    path = str(tmp_path / "edits.jsonl")
    train, evaluation = datasets_of("--dataset_name", path, *splits, *columns, evaluate=True)
    assert train["prompt"][:] == [f"edit {i}" for i in range(2, 10)] and len(evaluation) == 2
    assert evaluation[1]["image"].getpixel((0, 0)) == (0, 255, 0)
    train, evaluation = datasets_of(*splits, bundled=True, evaluate=True)
    assert len(train) == 214 and len(evaluation) == 43
    with pytest.raises(ValueError, match=r"no split 'dev\[:1\]', only train: set dataset_train_split"):
        datasets_of("--dataset_name", path, *columns, "--dataset_train_split", "dev[:1]")


def test_a_mixture_of_data_sets(recipe, tmp_path):
    mixture = [{"path": "json", "data_files": "prompts.jsonl"}] * 2
    path = recipe(dataset_name=None, datasets=mixture, test_split_size=0.25, eval_strategy="steps", eval_steps=1)
    assert main(["train", "--config", path, "--max_steps", "1", "--eval_num_inference_steps", "2"]) == 0
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_reward" in entry for entry in log)


def test_the_bundled_prompts_are_the_bundled_models_default():
    from trl_flow.shapes import load_prompts

    train, evaluation = datasets_of(bundled=True, evaluate=True)
    assert train["prompt"] == load_prompts("train")["prompt"]
    assert evaluation["prompt"] == load_prompts("test")["prompt"]


def test_the_bundled_models_size_is_its_default_and_can_be_changed():
    from trl_flow.commands.options import training_parser

    def size(*argv):
        argv = ["--model_name_or_path", *argv]
        _, config, *_ = training_parser(argv, {}).parse_args_and_config(argv)
        return config.height, config.width

    assert size("bundled") == size("shapes") == (64, 64)
    assert size("bundled", "--height", "16") == (16, 64)
    assert size("stabilityai/stable-diffusion-3.5-medium") == (512, 512)


@pytest.mark.parametrize(
    "fields, options, words",
    [
        ({"num_generaton": 8}, [], "Did you mean --num_generations?"),
        ({}, ["--learning-rat", "1"], "Did you mean --learning-rate?"),
        ({}, ["--num_gen", "8"], "there is no option --num_gen"),
        ({}, ["--num_processes", "2"], "there is no option --num_processes"),
        ({"method": "gard"}, [], "must be one of flow_grpo, guard, slas, vgpo, nft, awm. Did you mean guard?"),
        ({}, ["--num_generations", "three"], "invalid int value: 'three'"),
        ({"sde_type": "flwo"}, [], "sde_type is 'flwo'"),
        ({"num_generations": 3}, [], "not divisible by num_generations (3)"),
        ({"model_name_or_path": None}, [], "model_name_or_path is missing"),
        ({"model_name_or_path": "."}, [], "no model_index.json"),
        ({"load_in_4bit": True, "load_in_8bit": True}, [], "can't use 8 bit and 4 bit precision at the same time"),
        ({"load_in_4bit": True, "use_peft": False}, [], "Train an adapter"),
        ({"attn_implementation": "sdpa"}, [], "attn_implementation is TRL's option"),
        ({"ignore_bias_buffers": True}, [], "ignore_bias_buffers is TRL's option"),
        ({"dtype": "float23"}, [], "float23"),
        ({"reward_funcs": None}, [], "reward_funcs is missing"),
        ({"eval_reward_funcs": ["shape_soft"]}, [], "Did you mean shapes_soft?"),
        ({"eval_reward_funcs": ["shapes_soft"]}, [], "there is no eval_dataset"),
        ({"reward_funcs": ["shape_soft"]}, [], "Did you mean shapes_soft?"),
        ({"reward_funcs": ["no_such_module.reward"]}, [], "No module named 'no_such_module'"),
        ({"reward_funcs": ["json.no_such_reward"]}, [], "has no 'no_such_reward'"),
        ({"reward_funcs": ["json.decoder"]}, [], "must be a callable"),
        ({"dataset_name": None}, [], "dataset_name is missing"),
        ({"dataset_name": "no-such.jsonl"}, [], "there is no such file"),
        ({"dataset_train_split": "trian"}, [], "has no split 'trian', only train"),
        ({"dataset_streaming": True}, [], "streaming"),
        ({"eval_strategy": "steps", "eval_steps": 1}, [], "has no split 'test'"),
        ({"resume_from_checkpoint": "true"}, [], "no complete checkpoint"),
        ({"resume_from_checkpoint": "no-such"}, [], "'no-such' is not a complete checkpoint"),
        ({"accelerate_config": "multi_gpus"}, [], "neither a file nor one of fsdp2, multi_gpu, single_gpu"),
        ({}, ["--accelerate_config", "single_gpu", "--num_proceses", "2"], "Did you mean --num_processes?"),
        ({}, ["--accelerate_config"], "expected one argument"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(recipe, tmp_path, capsys, fields, options, words):
    assert words in mistake(capsys, "train", "--config", recipe(**fields), *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content, words", [("- a\n- b\n", "holds a list"), ("", "nothing"), ("a: [", "not valid YAML")]
)
def test_a_file_that_is_no_recipe(tmp_path, capsys, content, words):
    (tmp_path / "recipe.yaml").write_text(content)
    assert words in mistake(capsys, "train", "--config", str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize("name, content", [("bad.json", "{"), ("bad.csv", 'a,b\n1,"2\n3,4,5'), ("bad.parquet", "x")])
def test_a_file_of_prompts_that_cannot_be_read(recipe, tmp_path, capsys, name, content):
    (tmp_path / name).write_text(content)
    error = mistake(capsys, "train", "--config", recipe(dataset_name=name))
    assert name in error or "no column 'prompt'" in error


def test_an_empty_file_of_prompts(recipe, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    assert "it holds nothing" in mistake(capsys, "train", "--config", recipe(dataset_name="empty.jsonl"))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
def test_gpu_configs_without_gpus_are_refused_with_a_way_out(recipe, capsys):
    options = ["--accelerate_config", "multi_gpu", "--use_cpu", "false"]
    error = mistake(capsys, "train", "--config", recipe(), *options)
    assert "torch sees none here" in error and "--use_cpu true" in error


UNEVEN = "--per_device_train_batch_size 9 --steps_per_generation 1 --num_generations 6".split()


@pytest.mark.parametrize(
    ("config", "options", "processes", "is_sharded"),
    [
        ("fsdp2", ["--use_cpu", "true"], 2, True),
        ("fsdp2", ["--use_cpu"], 2, True),
        ("fsdp2", ["--use_cpu", "--seed", "1"], 2, True),
        ("fsdp2", ["--use_cpu", "1"], 2, True),
        # 9 images of a process are no whole groups of 6, those of all are
        ("multi_gpu", ["--use_cpu", "true", "--num_processes", "4", *UNEVEN], 4, False),
        ("single_gpu", ["--use_cpu", "true"], 1, False),
        ("cpu.yaml", ["--num_processes", "2"], 2, False),
    ],
)
def test_processes_on_cpus_are_started_as_on_gpus(
    config, options, processes, is_sharded, recipe, tmp_path, monkeypatch
):
    # With --cpu `accelerate launch` starts one process, shards nothing, and does not say so
    from accelerate.commands import launch

    (tmp_path / "cpu.yaml").write_text(CPU_CONFIG.replace("num_processes: 1\n", ""))
    started = []
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for kind in ("multi_gpu", "simple"):
        monkeypatch.setattr(launch, f"{kind}_launcher", lambda args, kind=kind: started.append((kind, args)))
    assert main(["train", "--config", recipe(use_cpu=False), "--accelerate_config", config, *options]) == 0
    ((kind, args),) = started
    assert (kind, args.num_processes) == ("multi_gpu" if processes > 1 else "simple", processes)
    assert args.use_fsdp == is_sharded and "--use_cpu" in args.training_script_args


CPU_CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: "NO"
main_training_function: main
mixed_precision: "no"
num_machines: 1
num_processes: 1
use_cpu: true
"""


def test_accelerate_starts_the_training_with_the_other_options(recipe, tmp_path, monkeypatch):
    (tmp_path / "cpu.yaml").write_text(CPU_CONFIG)
    # For a process of its own that finds the package wherever it runs, and whose environment is this one's
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    argv = ["train", "--config", recipe(accelerate_config="cpu.yaml"), "--max_steps", "1", "--num_generations", "2"]
    assert main(argv) == 0
    assert (settings(tmp_path / "run")["max_steps"], settings(tmp_path / "run")["num_generations"]) == (1, 2)


@pytest.mark.parametrize("path", sorted(ACCELERATE_CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    config = load_config_from_file(str(path))
    expected = {
        "single_gpu": "NO",
        "multi_gpu": "MULTI_GPU",
        "fsdp2": "FSDP",
        "zero2": "DEEPSPEED",
        "zero3": "DEEPSPEED",
    }
    assert config.distributed_type == DistributedType(expected[path.stem])
    assert config.mixed_precision == "no"  # left to the training config
    if path.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2


INTERRUPTING = """\
calls = 0

def interrupting(prompts, images, **kwargs):
    global calls
    calls += 1
    if calls == 2:
        raise KeyboardInterrupt
    return [float(i) for i in range(len(prompts))]
"""


@pytest.mark.parametrize(
    "strategy, words", [("steps", "checkpoint-1. Go on"), ("no", "No checkpoint had been written")]
)
def test_ctrl_c_tells_where_to_go_on(recipe, tmp_path, capsys, strategy, words):
    module = f"interrupting_{strategy}"
    (tmp_path / f"{module}.py").write_text(INTERRUPTING)
    # None is due: what had been trained is saved all the same
    options = {"save_strategy": strategy, "save_steps": 500}
    argv = ["train", "--config", recipe(reward_funcs=[f"{module}.interrupting"], **options)]
    assert main(argv) == 130
    assert words in capsys.readouterr().err
    if strategy == "steps":
        assert main([*argv, "--resume_from_checkpoint", "true"]) == 0
        state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
        assert [entry["step"] for entry in state["log_history"] if "reward" in entry] == [1, 2]


FAILING = """
calls = 0

def failing(prompts, images, **kwargs):
    global calls
    calls += 1
    return [color_of(image) for image in images] if calls == 2 else [float(i) for i in range(len(prompts))]

def color_of(image):
    raise KeyError("color")
"""


def test_a_reward_that_fails_shows_where_and_how_to_go_on(recipe, tmp_path, capsys):
    (tmp_path / "failing_for_cli.py").write_text(FAILING)
    argv = ["train", "--config", recipe(reward_funcs=["failing_for_cli.failing"])]
    assert main(argv) == 2
    error = capsys.readouterr().err
    traceback, message = error[error.index("Traceback") :].split("trl-flow train: error: ")
    assert "in failing\n" in traceback and "in color_of\n" in traceback and "trl_flow" not in traceback
    assert len(traceback.splitlines()) < 15
    assert "'failing' raised KeyError: 'color'" in message and "checkpoint-1" in message
    assert "the same command and --resume_from_checkpoint true." in message and "train(" not in message
    assert main([*argv, "--resume_from_checkpoint", "true"]) == 0


# ---- trl-flow demo ----


def test_demo_passes_on_what_is_asked_for(monkeypatch, tmp_path):
    import trl_flow.demo as demo

    asked = {}
    monkeypatch.setattr(demo, "run_demo", lambda settings, **kwargs: asked.update(kwargs, settings=settings))
    assert main(["demo", "--full", "--method", "flow_grpo", "--output-dir", "here", "--seed", "3"]) == 0
    assert asked == {"settings": demo.FULL["flow_grpo"], "output_dir": "here", "seed": 3}
    assert main(["demo"]) == 0
    assert asked == {"settings": demo.QUICK["nft"], "output_dir": "trl-flow-demo", "seed": 0}


def test_demo_refuses_a_folder_with_other_things(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert "not empty" in mistake(capsys, "demo", "--output-dir", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# ---- trl-flow memory ----


def test_memory_of_a_recipe(recipe, capsys):
    assert main(["memory", "--config", recipe()]) == 0
    shown = capsys.readouterr().out
    assert "transformer weights" in shown and "24 GB: fits" in shown and "To need less" not in shown


def test_memory_as_json_for_several_processes(recipe, capsys):
    options = ["--config", recipe(lora_r=3), "--json"]
    assert main(["memory", *options]) == 0
    one = json.loads(capsys.readouterr().out)
    assert main(["memory", *options, "--accelerate_config", "zero2", "--num_processes", "4"]) == 0
    four = json.loads(capsys.readouterr().out)
    assert one["trained_parameters"] == four["trained_parameters"] > 0
    assert four["resident"]["gradients"] == one["resident"]["gradients"] // 4
    # Each process samples as many images as the one did
    assert four["resident"]["stored samples"] == one["resident"]["stored samples"]
    assert one["total"] == sum(one["resident"].values()) + max(one["phases"].values()) + one["allowance"]


def test_memory_of_the_bundled_model_without_a_recipe(capsys):
    assert main(["memory", "--model", "bundled", "--use_peft", "true", "--per_device_train_batch_size", "8"]) == 0
    assert "total" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "nothing to estimate"),
        (["--json"], "model_name_or_path is missing"),
        (["--model", "no/such/model"], "neither a folder nor a hub id"),
        (["--model", "user/model"], "could not be fetched"),
        (["--model", "."], "no model_index.json"),
        (["--model", "bundled", "--num_processes", "0"], "num_processes is 0"),
        (["--model", "bundled", "--accelerate_config", "fsdp3"], "neither a file nor one of fsdp2"),
        (
            ["--model", "bundled", "--accelerate_config", "list.yaml"],
            "'list.yaml' must be a YAML mapping of settings",
        ),
        (["--model", "bundled", "--accelerate_config", "broken.yaml"], "'broken.yaml' is not valid YAML"),
        (["--config", "number.yaml"], "'5' is neither a folder nor a hub id"),
        (["--model", "list.yaml"], "'list.yaml' is a file. Give the folder"),
        (["--model", "bundled", "--learning-rat", "1"], "Did you mean --learning-rate?"),
        (["--model", "bundled", "--per_device_train_batch_size", "3"], "not divisible by num_generations"),
    ],
)
def test_what_memory_cannot_be_estimated_for(capsys, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    for name, text in {"list": "- a", "broken": "a: [", "number": "model_name_or_path: 5"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    assert words in mistake(capsys, "memory", *argv)


@pytest.mark.parametrize("options", [["--fp16", "true"], ["--fp16"]])
def test_memory_in_float16(recipe, capsys, options):
    config = ["memory", "--json", "--config", recipe()]
    sizes = []
    for more in ([], options):
        assert main([*config, *more]) == 0
        sizes.append(json.loads(capsys.readouterr().out)["resident"]["text_encoder weights"])
    assert sizes[0] == sizes[1]  # half of float32, as in bfloat16
