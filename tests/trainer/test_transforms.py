"""Data sets whose rows are made as they are read: each row of a phase is read once, and what it is made of looked at
before training."""

import random

import numpy as np
import pytest
from datasets import Dataset
from tiny_training import brightness, prompts, tiny_trainer, warnings_of


def numbered(calls: list):
    """A transform that numbers its readings, as one with a random generator of its own would."""

    def transform(batch):
        calls.append(len(batch["prompt"]))
        return {"prompt": [f"{prompt} {len(calls)}.{i}" for i, prompt in enumerate(batch["prompt"])]}

    return transform


def drawn_by(trainer) -> list:
    drawn, reward = [], trainer.scorer.reward_funcs[0]

    def recording(prompts, images, **kwargs):
        drawn.extend(prompts)
        return reward(prompts, images)

    trainer.scorer.reward_funcs[0] = recording
    return drawn


def test_a_group_has_one_prompt_whatever_the_transform_draws(tmp_path):
    calls = []
    dataset = prompts().with_transform(numbered(calls))
    trainer = tiny_trainer(tmp_path, train_dataset=dataset, max_steps=4, shuffle_dataset=False)
    drawn = drawn_by(trainer)
    trainer.train()
    phases = [drawn[i : i + 8] for i in range(0, len(drawn), 8)]
    assert len(phases) == 4
    for phase in phases:
        assert len(set(phase[:4])) == len(set(phase[4:])) == 1 and phase[0] != phase[4]
    assert len({phase[0] for phase in phases}) == 4  # each phase reads anew
    assert set(calls[1:]) <= {1, 2}  # and each row once: two prompts, not eight


def test_images_of_a_group_are_decoded_once(tmp_path):
    read = []

    def transform(batch):
        read.append(batch["prompt"])
        return batch

    trainer = tiny_trainer(tmp_path, train_dataset=prompts().with_transform(transform), max_steps=1)
    read.clear()
    trainer.train()
    assert read and all(len(batch) == len(set(batch)) == 2 for batch in read)


def test_columns_that_only_the_transform_reads_may_be_removed(tmp_path):
    dataset = Dataset.from_dict({"caption": ["a cat", "two dogs"], "extra": [1, 2]})
    dataset.set_transform(lambda batch: {"prompt": [c + "!" for c in batch["caption"]], "seen": batch["caption"]})
    trainer = tiny_trainer(tmp_path, train_dataset=dataset, max_steps=1, remove_unused_columns=True)
    drawn = drawn_by(trainer)
    trainer.train()
    assert set(drawn) == {"a cat!", "two dogs!"}


def test_an_evaluation_reads_each_row_once_and_the_same_each_time(tmp_path):
    """So that gold scores are of the same prompts as the base model's."""

    def transform(batch):
        return {
            "prompt": [f"{p} {random.randrange(99)} {np.random.randint(99)}" for p in batch["prompt"]],
            "x": batch["prompt"],
        }

    seen = []

    def gold(prompts, images, x, **kwargs):
        seen.append((prompts, x))
        return [1.0] * len(images)

    fields = {"eval_dataset": prompts(3).with_transform(transform), "num_generations_eval": 2}
    trainer = tiny_trainer(tmp_path, eval_reward_funcs=gold, **fields)
    state = random.getstate()
    for _ in range(2):
        assert trainer.evaluate()["eval_gold/average"] == 1.0
    assert random.getstate() == state
    assert seen[0] == seen[1] == seen[2]
    drawn = seen[0][0]
    assert drawn[::2] == drawn[1::2] and len(set(drawn)) == 3


def test_prompts_that_a_transform_makes_too_long_are_counted(tmp_path):
    """Of the first rows: to make all before training may take long."""
    made = []

    def transform(batch):
        made.extend(batch["caption"])
        return {"prompt": [caption * 99 if caption != "a cat" else caption for caption in batch["caption"]]}

    dataset = Dataset.from_dict({"caption": ["a cat"] + [f"a dog {i} " for i in range(99)]}).with_transform(transform)
    with warnings_of("trl_flow") as said:
        trainer = tiny_trainer(tmp_path, train_dataset=dataset, eval_dataset=prompts(1))
        trainer.evaluate(dataset.select([0, 1]))
    cut = [message for message in said if "are longer than the 16 tokens" in message]
    assert [message.partition(" are longer")[0] for message in cut] == [
        "63 of 64 different prompts of train_dataset",
        "1 of 2 different prompts of eval_dataset",
    ]
    assert len(set(made)) == 64


def test_transforms_and_precomputed_embeddings(tmp_path):
    dataset = Dataset.from_dict({"caption": ["a cat", "two dogs"]}).with_transform(
        lambda batch: {"prompt": batch["caption"]}
    )
    fields = {"precompute_prompt_embeds": True, "prompt_embeds_dir": str(tmp_path / "embeds")}
    trainer = tiny_trainer(tmp_path / "out", train_dataset=dataset, eval_dataset=dataset, max_steps=1, **fields)
    trainer.train()
    trainer.evaluate()


def table(**columns):
    return Dataset.from_dict({"prompt": ["a cat", "two dogs"], **columns})


def broken(batch):
    return {"prompt": batch["caption"]}


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (
            table(n=[1, 2]).with_transform(lambda b: {"n": b["n"]}),
            "but its transform leaves it",
        ),
        (table().with_transform(lambda b: {"caption": b["prompt"]}), "rows have ['caption']. Return it too"),
        (table(n=[1, 2]).with_format(columns=["n"]), "but its format leaves it out: rows have"),
        (table().with_transform(broken), "has a transform that raises KeyError for its first row: 'caption'"),
        (table().with_transform(lambda b: {"prompt": [""] * len(b["prompt"])}), "has prompt '' in row 0"),
        (
            table().with_transform(lambda b: {"prompt": [["a"]] * len(b["prompt"])}),
            "prompts must be non-empty strings",
        ),
        (table().with_format("pandas"), "has the format 'pandas', in which a row is a table"),
        (table().with_transform(lambda b: b | {"images": b["prompt"]}), "has columns ['images']"),
        (Dataset.from_dict({"prompt": [[{"role": "user", "content": "a"}]]}), "take what the user says: dataset.map"),
        (["a cat"], "Of a list make one: Dataset.from_list(rows)"),
        ([{"prompt": "a cat"}], "Of a list make one: Dataset.from_list(rows)"),
        ("prompts.jsonl", "trl_flow.prompts.load_prompts(name)"),
        (prompts().to_iterable_dataset(), "without streaming"),
    ],
)
def test_the_first_row_is_looked_at(dataset, words, tmp_path):
    for name in ("train_dataset", "eval_dataset"):
        if name == "eval_dataset" and isinstance(dataset, str):
            continue
        with pytest.raises((TypeError, ValueError)) as raised:
            tiny_trainer(tmp_path / "out", **{name: dataset})
        assert name in str(raised.value) and words in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_rewards_are_given_the_columns_of_the_rows(tmp_path):
    def needs(prompts, images, made, **kwargs):
        return brightness(prompts, images)

    dataset = table(n=[1, 2]).with_transform(lambda b: {"prompt": b["prompt"], "made": b["n"]})
    tiny_trainer(tmp_path / "out", train_dataset=dataset, reward_funcs=needs, max_steps=1).train()
    with pytest.raises((TypeError, ValueError), match="'n'|made"):
        tiny_trainer(tmp_path / "other", train_dataset=table(n=[1, 2]), reward_funcs=needs)


def test_a_later_row_that_is_no_prompt_is_named(tmp_path):
    dataset = table().with_transform(lambda b: {"prompt": [p if p == "a cat" else "" for p in b["prompt"]]})
    with pytest.raises(ValueError, match="A sampling phase has prompt '' in row"):
        tiny_trainer(tmp_path / "out", train_dataset=dataset, max_steps=1).train()


# ---- Prompts that are never drawn ----


@pytest.mark.parametrize(
    ("number", "fields", "words"),
    [
        # Two prompts a phase
        (
            3,
            {"shuffle_dataset": False, "max_steps": 2},
            "1 of the 3 prompts are never drawn: a sampling",
        ),
        (4, {"shuffle_dataset": False, "max_steps": 2}, None),
        (3, {"shuffle_dataset": True, "max_steps": 2}, None),
        (
            4,
            {"shuffle_dataset": True, "max_steps": 1},
            "2 of the 4 prompts are never drawn: the run ends after update 1",
        ),
        (4, {"shuffle_dataset": False, "max_steps": 1}, "Raise max_steps"),
        (1, {"shuffle_dataset": False, "max_steps": 1}, None),  # repeated, with a warning of its own
        (4, {"max_steps": 3, "steps_per_generation": 1, "num_iterations": 2}, None),
    ],
)
def test_prompts_that_are_never_drawn_are_counted(number, fields, words, tmp_path):
    trainer = tiny_trainer(tmp_path, train_dataset=prompts(number), **fields)
    with warnings_of("trl_flow") as warnings:
        trainer.train()
    found = [message for message in warnings if "never drawn" in message]
    assert len(found) == (words is not None) and all(words in message for message in found)
