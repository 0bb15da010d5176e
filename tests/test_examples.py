"""The examples and every Python block of the README and the documentation run as they are printed.

Only what makes them long is changed: the size of the model, the number of images, steps and prompts.
"""

import ast
import contextlib
import importlib
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from diffusers import StableDiffusion3Pipeline
from tiny_models import tiny_clip_tokenizer
from transformers import CLIPConfig, CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import trl_flow.backbones
import trl_flow.trainer


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def load_program(path: str):
    """A program of the repository that is no part of the package, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, reduced):
    """The blocks of a page share their names, from top to bottom, as a reader would type them."""
    text = page.read_text(encoding="utf-8")
    (reduced / "prompts.jsonl").write_text('{"prompt": "a cat", "answer": 1}\n{"prompt": "a dog", "answer": 2}\n')
    names = {"__name__": "page"}
    for block in PYTHON_BLOCK.finditer(text):
        line = text[: block.start(1)].count("\n") + 1
        code = compile("\n" * (line - 1) + block.group(1), str(page), "exec")
        exec(code, names)


def test_the_readme_shows_code_that_trains(reduced):
    """Without this the test above would pass on pages without a block."""
    blocks = PYTHON_BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(blocks[0].strip().splitlines()) <= 20
    names = {"__name__": "readme"}
    exec(blocks[0], names)
    assert names["trainer"].state.global_step == 1


def test_blocks_that_are_not_run_import_what_exists():
    """Those that need a network, a server or a large model are marked `py`."""
    blocks = re.findall(
        r"^```py\n(.*?)^```", "\n".join(page.read_text(encoding="utf-8") for page in PAGES), re.M | re.S
    )
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    names = {(node.module, alias.name) for node in nodes for alias in node.names if node.module.startswith("trl_flow")}
    assert names
    missing = [f"{module}.{name}" for module, name in names if not hasattr(importlib.import_module(module), name)]
    assert missing == []


def test_commands_have_the_options_that_pages_give_them(capsys):
    from trl_flow.cli import main

    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES).replace("\\\n", " ")
    lines = re.findall(r"^(?:pip install .* && )?trl-flow (.*)", text, flags=re.MULTILINE)
    used = {(words[0], word) for line in lines if (words := shlex.split(line, comments=True)) for word in words[1:]}
    known = {}
    for command in sorted({command for command, _ in used}):
        capsys.readouterr()
        with contextlib.suppress(SystemExit):
            main([command, "--help", *(["all"] if command in ("train", "memory") else [])])
        known[command] = set(re.findall(r"--[\w-]+", capsys.readouterr().out)) | {"--num_processes"}
    assert len(known) >= 6
    unknown = [f"{command} {word}" for command, word in used if word[:2] == "--" and word not in known[command]]
    assert unknown == []


def test_links_lead_somewhere():
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if "://" not in target and not (page.parent / target).exists() and target != "inherited_fields.md"  # generated
    ]
    assert broken == []


def test_the_site_lists_every_page():
    listed = re.findall(r"[-:] (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]]
    assert sorted(listed) == sorted([*pages, "api/inherited_fields.md"])  # that one is made as the site is built


def tiny_clip_folder(folder: Path) -> str:
    """A CLIP model of stock classes with random weights, as `from_pretrained` reads it."""
    tokenizer = tiny_clip_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPProcessor(CLIPImageProcessorPil(size=size, crop_size=size), tokenizer).save_pretrained(folder)
    return str(folder)


def test_sd35_flow_grpo_trains_a_pipeline(tmp_path, tiny_sd3_path):
    clip = tiny_clip_folder(tmp_path / "clip")
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "train.jsonl").write_text("".join(json.dumps({"prompt": f"a cat {i}"}) + "\n" for i in range(4)))
    trainer = load_program("examples/sd35_flow_grpo.py").main(
        [
            *("--model_name_or_path", tiny_sd3_path, "--reward_model", clip, "--reward_processor", clip),
            *("--dataset_name", str(prompts), "--output_dir", str(tmp_path / "out")),
            *("--height", "16", "--width", "16", "--max_sequence_length", "16", "--num_inference_steps", "2"),
            *("--num_generations", "2", "--per_device_train_batch_size", "2", "--steps_per_generation", "2"),
            *("--gradient_accumulation_steps", "1", "--max_steps", "2", "--logging_steps", "1"),
            *("--use_cpu", "true", "--report_to", "none"),
        ]
    )
    assert trainer.state.global_step == 2
    # The paper's settings reached the trainer, and the reward is a scaled cosine: one sampling phase for two updates
    assert (trainer.args.epsilon, trainer.args.beta, trainer.args.noise_level) == (1e-4, 0.01, 0.7)
    rewards = [log["rewards/pickscore/mean"] for log in trainer.state.log_history if "reward" in log]
    assert len(rewards) == 1 and all(-100 <= reward <= 100 for reward in rewards)
    StableDiffusion3Pipeline.from_pretrained(tiny_sd3_path).load_lora_weights(str(tmp_path / "out"))


def test_sd35_flow_grpo_trains_twice_on_48_groups_of_24(monkeypatch, tmp_path):
    """The released configuration of Flow-GRPO, from the settings of one process."""
    example = load_program("examples/sd35_flow_grpo.py")
    monkeypatch.setattr(sys, "argv", ["sd35_flow_grpo.py"])
    config = trl_flow.FlowGRPOConfig(**example.SETTINGS, output_dir=str(tmp_path), bf16=False, use_cpu=True)
    assert config.generation_batch_size == 48 * 24
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 48 * 24 / 2


def test_five_lines_of_the_public_surface(reduced, tiny_sd3_path):
    """The example of the design: a Hub id or a folder, several rewards, a preset, columns that reach the rewards."""
    from datasets import load_dataset
    from peft import LoraConfig

    from trl_flow import GuardConfig
    from trl_flow.rewards import JPEGCompressibilityReward

    (reduced / "prompts.jsonl").write_text('{"prompt": "a cat", "answer": 1}\n{"prompt": "a dog", "answer": 2}\n')
    answers = []

    def my_reward(prompts, images, answer, **kwargs):
        answers.extend(zip(prompts, answer, strict=True))
        return [float(a) if a == 1 else None for a in answer]

    trainer = trl_flow.trainer.FlowGRPOTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        reward_funcs=[JPEGCompressibilityReward(), my_reward],
        args=GuardConfig(output_dir="sd35-guard", num_generations=12, per_device_train_batch_size=12),
        train_dataset=load_dataset("json", data_files="prompts.jsonl", split="train"),
        peft_config=LoraConfig(r=32, lora_alpha=64),
    )
    trainer.train()
    trainer.push_to_hub()
    assert sorted(answers) == [("a cat", 1)] * 2 + [("a dog", 2)] * 2
    metrics = next(log for log in trainer.state.log_history if "reward" in log)
    assert metrics["rewards/my_reward/mean"] == 1.0


def test_benchmark_compares_equal_work(monkeypatch, capsys, tiny_sd3_path):
    """Its result is one line of JSON, and both sides have run the transformer equally often."""
    benchmark = load_program("benchmarks/step_time.py")
    calls = {"trainer": 0, "bare": 0}

    def counted(name, method):
        def call(*args, **kwargs):
            calls[name] += 1
            return method(*args, **kwargs)

        return call

    backbone = trl_flow.backbones.StableDiffusion3Backbone
    monkeypatch.setattr(backbone, "predict", counted("trainer", backbone.predict))
    monkeypatch.setattr(benchmark.BareTransformer, "forward", counted("bare", benchmark.BareTransformer.forward))
    options = {
        "model": tiny_sd3_path,
        "batch-size": 4,
        "num-generations": 2,
        "num-steps": 3,
        "size": 16,
        "max-sequence-length": 16,
        "repeats": 2,
    }
    argv = [f"--{name}={value}" for name, value in options.items()]
    monkeypatch.setattr(sys, "argv", ["step_time.py", *argv])
    capsys.readouterr()
    benchmark.main()
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert result["trainer_s"] > 0 and result["bare_s"] > 0
    # Three forwards without and three with gradients in each of two steps to warm up and two that are measured
    assert calls == {"trainer": 20, "bare": 20}


@pytest.mark.parametrize("model", ["tiny", "tiny-flux"])
def test_benchmark_of_full_size_updates_has_a_line_for_each_precision(model, monkeypatch, capsys):
    """On a CPU the peak is not measured, and TF32 is float32."""
    benchmark = load_program("benchmarks/full_size_update.py")
    options = ("--batch-size=2", "--size=32", "--tokens=8", "--steps=2", "--compiled=no", f"--model={model}")
    monkeypatch.setattr(sys, "argv", ["full_size_update.py", *options])
    benchmark.main()
    lines = {line["precision"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert lines.keys() == {"float16", "bfloat16", "tf32"}
    for precision in ("bfloat16", "tf32"):
        result = lines[precision]
        # The trainer runs what the bare transformer does, and little else
        assert result["update_ratio"] > 0.01 and result["sampling_ratio"] > 0.01
        assert result["estimated_bytes"] > 4 * 4 * result["trained_parameters"]
        assert result["first_update_deviation"] < 0.1 * result["clip_range"]
        assert (result["peak_bytes"] is None) == (result["device"] == "cpu")
    # What bfloat16 rounds
    assert lines["bfloat16"]["noise_floor"] > 10 * lines["tf32"]["noise_floor"]
    assert "error" not in lines["float16"]


@pytest.mark.slow
def test_benchmark_of_full_size_updates_compiles(monkeypatch, capsys):
    benchmark = load_program("benchmarks/full_size_update.py")
    options = ("--batch-size=2", "--size=32", "--tokens=8", "--steps=2", "--compiled=yes", "--precisions=bfloat16")
    monkeypatch.setattr(sys, "argv", ["full_size_update.py", "--model=tiny", *options])
    benchmark.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["compile_s"] > 0 and result["first_update_deviation"] == 0


@pytest.mark.slow
def test_benchmark_of_compilation_compares_time_and_learning(monkeypatch, capsys):
    benchmark = load_program("benchmarks/compilation.py")
    small = ["--batch-size=8", "--accumulation=1", "--num-steps=2", "--repeats=1", "--updates=2", "--seeds=2"]
    small += ["--backend=eager"]
    for more, key in ([], "both_ratio"), (["--forwards"], "whole_ratio"), (["--learning"], "interval_95"):
        monkeypatch.setattr(sys, "argv", ["compilation.py", *small, *more])
        monkeypatch.setattr(benchmark.progress, "time", benchmark.progress.time)  # which it changes
        benchmark.main()
        assert key in json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_phase_on_many_gpus_is_what_was_counted_divided(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    options = ["--model", "tiny", "--size", "64", "--images", "24", "--steps", "3", "--trained-steps", "2"]
    options += ["--tflops", "1e-3", "--reward-seconds", "0.5", "--gpus", "2", "16", "--save-steps", "10"]
    benchmark = load_program("benchmarks/scale.py")
    results = []
    for more in ([], ["--sharded", "--images-at-once", "12"]):
        benchmark.main([*options, *more])
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    (plain, sharded), counts = [result["phases"] for result in results], results[0]["counted"]
    assert 2 * counts["forward"] < counts["update"] < 4 * counts["forward"]
    # 16 GPUs have one or two images each, and all wait for those with two
    for gpus, own in (("2", 12), ("16", 2)):
        assert plain[gpus]["sampling"] == pytest.approx(own * (3 * counts["forward"] + counts["decoding"]) / 1e9)
        assert plain[gpus]["update"] == pytest.approx(own * 2 * counts["update"] / 1e9)
        assert plain[gpus]["rewards"] == own * 0.5
        total = sum(plain[gpus][name] for name in ("sampling", "rewards", "update", "communication", "checkpoint"))
        assert plain[gpus]["total"] == pytest.approx(total)
    assert plain["2"]["busy"] > 0.99 and plain["16"]["busy"] == pytest.approx(0.75, abs=0.01)
    # Two updates of a ring that adds up and tells, within a node
    reduced = 2 * counts["adapter"] * 0.5 / 400e9 + 2 * 1e-5
    assert plain["2"]["communication"] == pytest.approx(2 * reduced)
    assert sharded["2"]["update"] == pytest.approx(12 * 2 * (counts["update"] + counts["forward"]) / 1e9)
