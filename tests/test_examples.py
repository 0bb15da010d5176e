"""The examples, the recipes and every Python block of the README and the documentation run as they are printed.

Only what makes them long is changed: the size of the model, the number of images, steps and prompts.
"""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from diffusers import StableDiffusion3Pipeline
from tiny_models import tiny_clip_tokenizer
from transformers import CLIPConfig, CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import trl_flow.backbones
import trl_flow.trainer
from trl_flow import cli
from trl_flow.commands.options import training_parser
from trl_flow.prompts import PROMPT_SETS
from trl_flow.rewards.base import ModelReward
from trl_flow.rewards.named import NAMED_REWARDS
from trl_flow.trainer import FlowGRPOTrainer


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def load_program(path: str):
    """A program of the repository that is no part of the package, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_model(func):
    """A learned reward's model is too large to load here: numbers under the same name in its place."""
    if not isinstance(func, ModelReward):
        return func

    def score(prompts, images, **kwargs):
        return [float(place) for place in range(len(images))]

    score.__name__ = func.__name__
    return score


class ReducedTrainer(FlowGRPOTrainer):
    """Trains any recipe for one update on four images, with all its other settings; Hub ids become a tiny model."""

    tiny_path = None

    def __init__(self, model, reward_funcs, args, train_dataset, *others, **kwargs):
        args.max_steps = 1
        args.num_generations, args.per_device_train_batch_size = 2, 4
        args.steps_per_generation, args.gradient_accumulation_steps, args.generation_batch_size = 1, 1, 4
        args.eval_num_inference_steps = 2
        args.use_cpu, args.bf16 = True, False
        args.report_to, args.push_to_hub = [], False
        if isinstance(model, str) and not Path(model).exists():
            model = self.tiny_path
            args.height = args.width = args.max_sequence_length = 16
        funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        super().__init__(model, [without_model(func) for func in funcs], args, train_dataset, *others, **kwargs)

    def push_to_hub(self, *args, **kwargs):
        """Tested with a server in tests/test_sharing.py."""


@pytest.fixture
def reduced(monkeypatch, tmp_path, tiny_sd3_path):
    """An empty working folder, in which trainers are tiny."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ReducedTrainer, "tiny_path", tiny_sd3_path)
    monkeypatch.setattr(trl_flow.trainer, "FlowGRPOTrainer", ReducedTrainer)
    return tmp_path


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


def test_links_lead_somewhere():
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert broken == []


def test_the_site_lists_every_page():
    listed = re.findall(r":\s*(\S+\.md)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:])


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


# Those for one GPU differ from their models in batches and memory settings alone
@pytest.mark.parametrize(
    "recipe",
    [pytest.param(path, marks=pytest.mark.slow if path.stem.endswith("gb") else (), id=path.stem) for path in RECIPES],
)
def test_recipes_train(recipe, reduced, capsys, monkeypatch):
    prompts = reduced / "prompts.jsonl"
    prompts.write_text('{"prompt": "a red circle"}\n{"prompt": "two blue squares"}\n')
    (reduced / "my_rewards.py").write_text(
        "def __getattr__(name):\n    return lambda prompts, **kwargs: [float(i + 1) for i in range(len(prompts))]\n"
    )
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    # The models of the recipes' rewards are too large to load here: a score of the user's own in place of each
    own = [f"my_rewards.score_{i}" for i in range(len(settings.get("reward_funcs", ["one"])))]
    given = [] if settings["model_name_or_path"] == "bundled" else ["--reward_funcs", *own]
    if settings.get("load_in_4bit"):
        given += ["--load_in_4bit", "false"]  # which needs a GPU
    argv = ["train", "--config", str(recipe), "--dataset_name", str(prompts), "--output_dir", "out", *given]
    argv += ["--num_inference_steps", "6"] if settings["num_inference_steps"] > 16 else []
    assert cli.main([*argv, "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]) == 0
    name = "pytorch_lora_weights" if settings["use_peft"] else "diffusion_pytorch_model"
    assert (reduced / "out" / f"{name}.safetensors").is_file()


def recipe_config(recipe: Path):
    """The configuration that a recipe gives on one process, and its text."""
    text = recipe.read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    argv = ["--config", str(recipe), "--use_cpu", "true", "--bf16", "false"]
    _, config, *_ = training_parser(argv, settings).parse_args_and_config(argv)
    return config, text


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_have_whole_groups_and_updates(recipe):
    config, text = recipe_config(recipe)
    assert config.generation_batch_size % config.num_generations == 0
    assert config.steps_per_generation % config.gradient_accumulation_steps == 0
    # Rewards are logged by updates that sampled
    assert config.logging_steps % (config.steps_per_generation // config.gradient_accumulation_steps) == 0
    # The command for several processes that the recipe prints gives the same batches
    command = re.search(
        r"--num_processes (\d+) --steps_per_generation (\d+) --gradient_accumulation_steps (\d+)", text
    )
    if command:
        processes, steps, accumulation = map(int, command.groups())
        assert processes * steps == config.steps_per_generation
        assert processes * accumulation == config.gradient_accumulation_steps


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_name_rewards_and_prompts_of_the_package(recipe):
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    rewards = settings.get("reward_funcs", [])
    assert set(rewards) <= NAMED_REWARDS.keys()
    assert len(settings.get("reward_weights", rewards)) == len(rewards)
    assert settings.get("dataset_name") in {None, *PROMPT_SETS}


@pytest.mark.parametrize("name", ["flux_dance", "flux_slas", "sd14_dance", "sd14_slas"])
def test_dancegrpos_300_sampling_phases(name):
    """The released `max_train_steps` counts sampling phases, `max_steps` updates: three for FLUX.1, two for SD 1.4."""
    config, _ = recipe_config(ROOT / "examples" / "recipes" / f"{name}.yaml")
    updates = config.steps_per_generation // config.gradient_accumulation_steps
    assert updates == (3 if name.startswith("flux") else 2)
    assert config.max_steps == 300 * updates


@pytest.mark.parametrize(
    "recipe", [recipe for recipe in RECIPES if recipe.stem.endswith("gb")], ids=lambda recipe: recipe.stem
)
def test_recipes_for_one_gpu_train_on_the_same_groups_and_images(recipe):
    base, _ = recipe_config(recipe.with_stem(recipe.stem.rsplit("_", 1)[0]))
    config, _ = recipe_config(recipe)
    # What may differ: how the images are cut into micro-batches, and what saves memory
    allowed = {"per_device_train_batch_size", "steps_per_generation", "gradient_accumulation_steps", "output_dir"}
    allowed |= {"gradient_checkpointing", "activation_checkpointing", "enable_vae_slicing", "precompute_prompt_embeds"}
    allowed |= {"logging_dir", "run_name"}
    differing = {name for name, value in base.to_dict().items() if config.to_dict()[name] != value}
    assert differing <= allowed
    assert config.generation_batch_size == base.generation_batch_size
    for one in (config, base):
        one.images = one.per_device_train_batch_size * one.gradient_accumulation_steps
    assert config.images == base.images


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_say_where_every_number_comes_from(recipe):
    """A line with a number has a comment, but for the batch's, which has one above, and the bundled model's."""
    if recipe.stem in ("shapes_guard", "sd35_guard"):
        return
    bare = ("num_generations", "per_device_train_batch_size", "steps_per_generation", "gradient_accumulation_steps")
    for line in recipe.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if not name.startswith("#") and re.match(r"\s*\[?[-\d.]", value) and name not in bare:
            assert "# " in value, line


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


def test_benchmark_of_one_update_prints_the_estimate(monkeypatch, capsys):
    """On a CPU the peak is not measured; the transformers of the full size have the released models' parameters."""
    benchmark = load_program("benchmarks/full_size_update.py")
    options = ("--model=tiny", "--batch-size=2", "--size=64", "--tokens=16", "--repeats=1")
    monkeypatch.setattr(sys, "argv", ["full_size_update.py", *options])
    benchmark.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    weights = 2 * result["parameters"] + 4 * 4 * result["trained_parameters"]
    assert result["update_s"] > 0 and result["estimated_bytes"] > weights
    assert (result["peak_bytes"] is None) == (result["device"] == "cpu")
