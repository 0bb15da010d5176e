"""The trainer's pushes, by the real client, to a Hub on the loopback interface."""

import re

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load, load_file
from tiny_training import tiny_trainer


ADAPTER = {
    *(".gitattributes", "README.md"),
    *("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"),
}


def shown_by(card: str) -> set[str]:
    return set(re.findall(r"!\[.*\]\((.*)\)", card))


def test_push_to_hub_shares_an_adapter_that_draws_the_trainers_images(hub_server, tiny_sd3_path, tmp_path):
    trainer = tiny_trainer(tmp_path / "tuned", max_steps=1, logging_steps=1, save_strategy="no", log_images=True)
    trainer.train()
    trainer.push_to_hub(dataset_name="tester/prompts")

    files = hub_server.repos["tester/tuned"]
    card = files["README.md"].decode()
    assert files.keys() == ADAPTER | shown_by(card)
    assert "library_name: diffusers" in card and "pipeline_tag: text-to-image" in card
    assert re.search(r"load_lora_weights\(['\"]tester/tuned['\"]\)|load_lora_weights\(['\"]tuned['\"]\)", card)
    # Nothing sent under another project's name
    assert not [path for _, path in hub_server.requests if "telemetry" in path]

    def draw(pipeline) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipeline("a dog", num_inference_steps=2, generator=generator, output_type="np").images

    stock = DiffusionPipeline.from_pretrained(tiny_sd3_path)
    untrained = draw(stock)
    stock.load_lora_weights("tester/tuned")
    np.testing.assert_allclose(draw(stock), draw(trainer.pipeline), atol=1e-5)
    assert abs(untrained - draw(stock)).max() > 1e-3


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_what_a_push_holds(strategy, hub_server, tmp_path):
    """The adapter, the card and what the card shows; a checkpoint, all of it, only where it is asked for."""
    folder = tmp_path / "tuned"
    save = {"save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "hub_strategy": strategy}
    trainer = tiny_trainer(folder, max_steps=3, log_images=True, hub_always_push=True, **save)
    trainer.train()
    for name in ("notes.txt", "prompts.jsonl", "_private.png", "runs/events.out.tfevents.1"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("private")
    trainer.push_to_hub()
    files = hub_server.repos["tester/tuned"]
    subfolders = {"checkpoint": {"last-checkpoint": 3}, "all_checkpoints": {f"checkpoint-{i}": i for i in (1, 2, 3)}}
    whole = set()
    for name, step in subfolders.get(strategy, {}).items():
        whole |= {f"{name}/{path.name}" for path in (folder / f"checkpoint-{step}").iterdir()}
    assert files.keys() == ADAPTER | shown_by(files["README.md"].decode()) | whole
    # There is one grid for each step in the folder, and one sample in the card
    assert len(list(folder.glob("images/*.png"))) == 3 and len([name for name in files if "images/" in name]) <= 1
    titles = [title for _, title in hub_server.commits]
    steps = [f"Training in progress, step {i}" for i in (1, 2, 3)]
    # At the end nothing may have changed since the last
    assert set(titles) - {"End of training"} == set(steps if strategy != "end" else [])
    pushed = load(files["pytorch_lora_weights.safetensors"])
    saved = load_file(folder / "checkpoint-3" / "pytorch_lora_weights.safetensors")
    assert pushed.keys() == saved.keys() and all(torch.equal(pushed[name], saved[name]) for name in saved)


def test_a_hub_that_refuses_costs_nothing_but_the_upload(hub_server, tmp_path):
    trainer = tiny_trainer(tmp_path / "tuned", max_steps=1, save_strategy="no")
    trainer.train()
    hub_server.fail("commit", 500)
    with pytest.raises(RuntimeError, match="could not be pushed"):
        trainer.push_to_hub()
    assert (tmp_path / "tuned" / "pytorch_lora_weights.safetensors").is_file()
