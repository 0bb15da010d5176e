"""What a card shows of a run besides its settings: images before and after, scores for the Hub, how to repeat it."""

import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from tiny_training import darkness, prompts, tiny_trainer

from trl_flow.commands.options import parse_training, training_parser
from trl_flow.commands.recipe import read_recipe
from trl_flow.commands.shared_recipe import shared_recipe
from trl_flow.shapes import pipeline_path
from trl_flow.sharing.card_facts import evaluation_results, evaluation_scores, license_of, training_rewards
from trl_flow.sharing.hub import published
from trl_flow.sharing.samples import read_samples, write_samples


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that was evaluated before its first and after its last update, with its card."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    every = {"eval_strategy": "steps", "eval_steps": 2, "log_images": True, "num_generations_eval": 2}
    trainer = tiny_trainer(folder, eval_dataset=prompts(3), eval_reward_funcs=darkness, **every)
    trainer.train()
    trainer.publisher.recipe = "method: guard\nnegative_prompt: '```'\n"
    trainer.create_model_card()
    return folder, trainer


def test_images_stand_side_by_side_and_in_the_gallery(run):
    folder, trainer = run
    card = ModelCard.load(folder / "README.md")
    widget = card.data.to_dict()["widget"]
    assert [each["text"] for each in widget] == prompts(3)["prompt"]
    rows = re.findall(r"^\| (.+?) \| !\[.+?\]\((.+?)\) \| !\[.+?\]\((.+?)\) \|$", card.text, flags=re.MULTILINE)
    assert [(row[0], row[2]) for row in rows] == [(each["text"], each["output"]["url"]) for each in widget]
    assert "| prompt | before training | after update 2 |" in card.text
    # The same noise: before training it is what the pipeline draws, and the weights have changed
    for _, before, after in rows:
        first, second = (Image.open(folder / path) for path in (before, after))
        assert first.size == second.size == (128, 128) and first.tobytes() != second.tobytes()
    shared = set(map(str, published(folder)))
    assert {path for row in rows for path in row[1:]} <= shared
    assert not any("step-" in path or "eval-" in path for path in shared)
    assert "template:sd-lora" in card.data.tags


def test_scores_are_metadata_that_the_hub_reads(run):
    folder, trainer = run
    card = ModelCard.load(folder / "README.md")
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    log = next(log for log in reversed(trainer.state.log_history) if "eval_reward" in log)
    assert name == "run" and {each.task_type for each in results} == {"text-to-image"}
    by_type = {each.metric_type: each for each in results}
    assert by_type["reward"].metric_value == pytest.approx(log["eval_reward"], rel=1e-5)
    assert by_type["gold"].metric_name == "darkness (not optimized)"
    average, half = log["eval_gold/average"], 1.96 * log["eval_gold/average_std_err"]
    assert by_type["gold_average"].metric_value == pytest.approx(average, rel=1e-5)
    assert f"95% interval {average - half:.4g} to {average + half:.4g}" in by_type["gold_average"].metric_name


def test_only_evaluations_of_the_trained_model_are_results():
    logs = [{"step": 0, "eval_reward": 1.0}, {"step": 2, "reward": 1.0}]
    assert evaluation_results(logs, task="text-to-image", dataset=None) == []
    logs += [
        {"step": 2, "eval_hard_reward": 0.5, "eval_hard_gold/average": 1.0, "eval_hard_gold/average_std_err": None}
    ]
    reward, average = evaluation_results(logs, task="text-to-image", dataset="me/prompts")
    assert (reward.dataset_type, reward.dataset_name, reward.metric_value) == ("me/prompts", "me/prompts hard", 0.5)
    assert average.metric_name == "gold average, relative to the base model"


def test_means_over_nothing_are_no_results():
    """The Hub's metadata are JSON, which knows no NaN."""
    nan = float("nan")
    gold = {"eval_gold/average": 1.1, "eval_gold/average_std_err": nan, "eval_gold/a": nan}
    logs = [{"step": 0, "eval_reward": nan, **gold}, {"step": 2, "reward": nan, "eval_reward": nan, **gold}]
    (average,) = evaluation_results(logs, task="text-to-image", dataset=None)
    assert (average.metric_value, average.metric_name) == (1.1, "gold average, relative to the base model")
    rows = {row[0]: row[1:] for row in evaluation_scores(logs)[""]}
    assert rows["reward (optimized)"] == rows["a (gold, not optimized)"] == ["", ""]
    assert rows["gold average, relative to the base model"] == ["1.1", "1.1"] and training_rewards(logs) is None


def test_the_run_is_told_in_one_command(run):
    text = (run[0] / "README.md").read_text()
    block = re.search(r"^(`{4,})yaml\n(.*?)^\1$", text, flags=re.MULTILINE | re.DOTALL)
    assert yaml.safe_load(block[2]) == {"method": "guard", "negative_prompt": "```"}
    assert "trl-flow train --config recipe.yaml" in text and "no trigger words" in text


def test_a_shared_recipe_repeats_the_run_and_tells_nothing_private(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a cat"}\n')
    (tmp_path / "base.yaml").write_text(
        "method: guard\nnum_generations: 4\nlearning_rate: 1e-5\nseed: 1\nuse_cpu: true\n"
    )
    (tmp_path / "recipe.yaml").write_text(
        "extends: base.yaml\nmodel_name_or_path: bundled\nreward_funcs: [deqa@http://10.0.0.7:8000/v1, ocr]\n"
        f"dataset_name: {tmp_path}/prompts.jsonl\noutput_dir: {tmp_path}/secret-project\nhub_token: hf_secret\n"
        "hub_model_id: me/private\nmodel_init_kwargs: {token: hf_secret}\nadam_beta2: 0.99\nlogging_steps: 1\n"
    )
    argv = ["--config", str(tmp_path / "recipe.yaml"), "--learning_rate", "2e-4", "--epsilon=1e-5"]
    argv, recipe = read_recipe(argv)
    *parsed, _ = parse_training(training_parser(argv, recipe), argv, recipe)
    text = shared_recipe(argv, recipe, parsed)
    assert yaml.safe_load(text) == {
        "model_name_or_path": "bundled", "method": "guard", "dataset_name": "prompts.jsonl", "num_generations": 4,
        "reward_funcs": ["deqa@http://SERVER", "ocr"], "learning_rate": 2e-4, "seed": 1, "epsilon": 1e-5,
        "adam_beta2": 0.99, "logging_steps": 1,
    }  # fmt: skip
    assert "secret" not in text and "10.0.0.7" not in text and str(tmp_path) not in text
    # It is a recipe
    (tmp_path / "again.yaml").write_text(text)
    argv, again = read_recipe(["--config", str(tmp_path / "again.yaml"), "--use_cpu", "true", "--output_dir", "x"])
    args = parse_training(training_parser(argv, again), argv, again)[1]
    assert (args.learning_rate, args.epsilon, args.num_generations, args.adam_beta2) == (2e-4, 1e-5, 4, 0.99)


def test_a_shared_recipe_has_what_is_switched_off_mappings_mixtures_and_no_folders(tmp_path):
    own = (
        "model_name_or_path: bundled\nmethod: guard\nuse_cpu: true\nlr_scheduler_kwargs: {num_cycles: 2}\n"
        "dataset_name: ocr:/home/me/secret/texts\ninit_adapter: ~/secret/adapter\neval_strategy: steps\n"
        "eval_steps: 30\nsave_steps: 60\nreward_funcs: [deqa@HTTPS://me:pw@host/v1]\nload_best_model_at_end: true\n"
        f"metric_for_best_model: gold\ndatasets: [{{path: me/data, split: test}}, {{path: {tmp_path}/secret}}]\n"
    )
    (tmp_path / "recipe.yaml").write_text(own)
    argv, recipe = read_recipe(["--config", str(tmp_path / "recipe.yaml"), "--no_shuffle_dataset"])
    *parsed, _ = parse_training(training_parser(argv, recipe), argv, recipe)
    text = shared_recipe(argv, recipe, parsed)
    (tmp_path / "again.yaml").write_text(text)
    argv, again = read_recipe(["--config", str(tmp_path / "again.yaml"), "--use_cpu", "true"])
    script, args, _, mixture, _ = parse_training(training_parser(argv, again), argv, again)
    assert (script.dataset_name, args.init_adapter, args.shuffle_dataset) == ("ocr:./texts", "./adapter", False)
    assert script.reward_funcs == ["deqa@HTTPS://SERVER"] and args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert (args.save_steps, args.metric_for_best_model) == (60, parsed[1].metric_for_best_model)
    assert [(each.path, each.split) for each in mixture.datasets] == [("me/data", "test"), ("./secret", "train")]
    assert "/secret/" not in text and str(tmp_path) not in text and "me:pw" not in text


def test_samples_are_paired_by_prompt(tmp_path):
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    write_samples(tmp_path, [red, red, blue], ["a", "a", "ü"], step=0)
    write_samples(tmp_path, [blue, red, red], ["a", "other", "c"], step=4)
    first, second, third = read_samples(tmp_path, 4)
    assert (first.prompt, first.before) == ("a", Path("images/samples/000000-1.png"))
    assert (second.prompt, second.before) == ("other", None) and third.before is None
    assert [each.prompt for each in read_samples(tmp_path, 0)] == ["a", "ü"]
    # One that is half written is left out
    path = tmp_path / "images" / "samples" / "000004-1.png"
    path.write_bytes(path.read_bytes()[:40])
    assert [each.prompt for each in read_samples(tmp_path, 4)] == ["other", "c"]
    assert read_samples(tmp_path, 8) == read_samples(tmp_path / "none", 0) == []


def test_the_license_of_a_well_known_model_needs_no_network(hub_server):
    link = "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
    assert license_of("black-forest-labs/FLUX.1-dev") == {
        "license": "other", "license_name": "flux-1-dev-non-commercial-license", "license_link": link,
    }  # fmt: skip
    assert license_of("Qwen/Qwen-Image") == license_of(pipeline_path()) == {"license": "apache-2.0"}
    # What the model's own card says comes first
    hub_server.repos["Qwen/Qwen-Image"] = {"README.md": b"---\nlicense: mit\n---\n"}
    assert license_of("Qwen/Qwen-Image") == {"license": "mit"}


def test_the_metadata_keeps_the_hubs_rules(run):
    """Those that it has for licenses, relations, tasks and examples, as its documentation lists them."""
    data = ModelCard.load(run[0] / "README.md").data.to_dict()
    assert data["pipeline_tag"] == "text-to-image" and data["library_name"] == "diffusers"
    assert all(isinstance(tag, str) and re.fullmatch(r"[\w:.-]+", tag) for tag in data["tags"])
    assert all(each.keys() == {"text", "output"} and each["output"].keys() == {"url"} for each in data["widget"])
    for result in data["model-index"][0]["results"]:
        assert {"type", "name"} <= result["dataset"].keys() and result["task"]["type"] == data["pipeline_tag"]
        assert all(isinstance(metric["value"], float) for metric in result["metrics"])


def test_every_known_license_is_one_that_the_hub_knows_or_has_a_name_and_a_link():
    import json

    import trl_flow.sharing

    known = json.loads(Path(trl_flow.sharing.__file__).with_name("licenses.json").read_text())
    for name, about in known.items():
        is_named = about["license"] == "other" and re.fullmatch(r"[a-z0-9-.]+", about["license_name"])
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", name)
        assert is_named and about["license_link"] or about["license"] in {
            "apache-2.0", "creativeml-openrail-m", "openrail++",
        }  # fmt: skip
