"""What a model card tells of a real run: its scores, prompts and license."""

import re

import yaml
from huggingface_hub import ModelCard, ModelCardData
from tiny_models import tiny_sd3_pipeline
from tiny_training import brightness, darkness, prompts, tiny_trainer

from trl_flow.shapes import load_prompts
from trl_flow.sharing.card_facts import evaluation_scores, license_of, name_of


def test_the_card_of_a_run_has_its_scores_prompts_and_license(tiny_sd3_path, tmp_path):
    base = tmp_path / "base"
    tiny_sd3_pipeline().save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\n---\n# Tiny\n")
    trained_on, held_out = prompts(), prompts(6).select([4, 5])
    trained_on.info.dataset_name = "owner/prompts"
    trainer = tiny_trainer(
        tmp_path / "run",
        pipeline=str(base),
        train_dataset=trained_on,
        eval_dataset=held_out,
        eval_reward_funcs=darkness,
        num_generations_eval=2,
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer.train()
    trainer.create_model_card()
    text = (tmp_path / "run" / "README.md").read_text()
    base_log, log = (entry for entry in trainer.state.log_history if "eval_reward" in entry)
    rows = dict(re.findall(r"^\| (.+?) \| (.+ \| .+) \|$", text, flags=re.MULTILINE))
    assert rows["reward (optimized)"] == f"{base_log['eval_reward']:.4g} | {log['eval_reward']:.4g}"
    gold = (entry["eval_gold/darkness"] for entry in (base_log, log))
    assert rows["darkness (gold, not optimized)"] == "{:.4g} | {:.4g}".format(*gold)
    half = 1.96 * log["eval_gold/average_std_err"]
    average = f"1 | {log['eval_gold/average']:.4g} ± {half:.2g}"
    assert rows["gold average, relative to the base model"] == average and half > 0
    assert "trained (update 2)" in text and "| updates | 2 |" in text
    assert f'prompt="{held_out[0]["prompt"]}"' in text
    assert "the prompts of [owner/prompts](https://huggingface.co/datasets/owner/prompts)" in text
    data = ModelCard.load(tmp_path / "run" / "README.md").data.to_dict()
    assert (data["license"], data["license_name"], data["datasets"]) == ("other", "tiny", ["owner/prompts"])
    # A link into a folder that nobody else has is left out; what is there is what the Hub's own class makes of it
    assert "license_link" not in data
    front = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert ModelCardData(**front).to_dict() == front == data


def test_scores_of_several_sets_and_rewards_and_of_none():
    logs = [
        {"step": 0, "eval_easy_reward": 1.0, "eval_easy_rewards/a/mean": 0.5, "eval_easy_rewards/b/mean": 0.25},
        {"step": 4, "reward": 1.0},
        {"step": 4, "eval_easy_reward": 2.0, "eval_easy_rewards/a/mean": 1.5, "eval_easy_rewards/b/mean": 0.125},
        {"step": 4, "eval_hard_reward": 0.5, "eval_hard_rewards/a/mean": 0.5, "eval_hard_diversity": 0.75},
    ]
    head = ["score", "base model", "trained (update 4)"]
    assert evaluation_scores(logs) == {
        "easy": [head, ["reward (optimized)", "1", "2"], ["a", "0.5", "1.5"], ["b", "0.25", "0.125"]],
        "hard": [head, ["reward (optimized)", "", "0.5"], ["diversity within a prompt", "", "0.75"]],
    }
    # Neither the base model alone, nor training's own rewards
    assert evaluation_scores(logs[:2]) == {}


def test_the_license_is_the_base_models(hub_server, tmp_path):
    hub_server.repos["owner/base"] = {
        "README.md": b"---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE.md\ntags: [1]\n---\n"
    }
    link = "https://huggingface.co/owner/base/blob/main/LICENSE.md"
    assert license_of("owner/base") == {"license": "other", "license_name": "x", "license_link": link}
    assert license_of("owner/none") == license_of(None) == license_of(tmp_path) == {}
    (tmp_path / "README.md").write_text("no front matter")
    assert license_of(tmp_path) == {}


def test_a_data_set_is_named_without_the_folders_before_it(tmp_path):
    from datasets import load_dataset

    from trl_flow import prompts as prompt_sets

    assert name_of(load_prompts("train").select([0])) == "trl_flow.shapes"
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "a cat"}\n{"prompt": "a dog"}\n')
    assert name_of(prompt_sets.load_prompts(file, limit=1)) == "mine.jsonl"
    assert name_of(prompt_sets.load_prompts("generated_geneval", "test")) == "generated_geneval"
    assert name_of(load_dataset("json", data_files=str(file), split="train")) is None
    assert name_of(prompts()) is None


def test_the_scores_are_those_of_the_best_weights_where_these_are_loaded(tmp_path):
    def falling(prompts, images, trainer_state, **kwargs):
        return [value / 100 - trainer_state.global_step for value in brightness(prompts, images)]

    every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = tiny_trainer(
        tmp_path, reward_funcs=falling, eval_dataset=prompts(2), load_best_model_at_end=True, max_steps=3, **every
    )
    trainer.train()
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "trained (update 1)" in text and "| updates | 3 |" in text


def test_without_evaluations_the_card_has_the_rewards_of_training(tmp_path):
    trainer = tiny_trainer(tmp_path, reward_funcs=brightness)
    trainer.train()
    trainer.create_model_card(dataset_name="named prompts")
    text = (tmp_path / "README.md").read_text()
    first, last = (log["reward"] for log in trainer.state.log_history if "reward" in log)
    assert f"{first:.4g} in the first log, {last:.4g} in the last" in text
    assert "`named prompts`" in text and "\ndatasets:" not in text
