"""The trainer's pushes, by the real client, to a Hub on the loopback interface."""

import re

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load, load_file
from tiny_training import tiny_trainer


def test_push_to_hub_shares_an_adapter_that_draws_the_trainers_images(hub_server, tiny_sd3_path, tmp_path):
    trainer = tiny_trainer(tmp_path / "tuned", max_steps=1, logging_steps=1, save_strategy="no", log_images=True)
    trainer.train()
    trainer.push_to_hub(dataset_name="tester/prompts")

    files = hub_server.repos["tester/tuned"]
    assert {"README.md", "pytorch_lora_weights.safetensors", "rewards.png", "images/step-000001.png"} <= files.keys()
    card = files["README.md"].decode()
    assert "library_name: diffusers" in card and "pipeline_tag: text-to-image" in card
    assert re.search(r"load_lora_weights\(['\"]tester/tuned['\"]\)|load_lora_weights\(['\"]tuned['\"]\)", card)
    # No optimizer, no arguments with their tokens, and nothing sent under another project's name
    assert not [name for name in files if name.endswith((".pt", ".bin"))]
    assert not [path for _, path in hub_server.requests if "telemetry" in path]

    def draw(pipeline) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipeline("a dog", num_inference_steps=2, generator=generator, output_type="np").images

    stock = DiffusionPipeline.from_pretrained(tiny_sd3_path)
    untrained = draw(stock)
    stock.load_lora_weights("tester/tuned")
    np.testing.assert_allclose(draw(stock), draw(trainer.pipeline), atol=1e-5)
    assert abs(untrained - draw(stock)).max() > 1e-3


def test_every_checkpoint_is_pushed_while_training(hub_server, tmp_path):
    trainer = tiny_trainer(
        tmp_path / "tuned",
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_strategy="all_checkpoints",
        hub_always_push=True,
    )
    trainer.train()
    files = hub_server.repos["tester/tuned"]
    # Uploads go on beside training, so that one may find the next checkpoint's files: the last state is what counts
    titles = {title for _, title in hub_server.commits}
    assert titles <= {"Training in progress, step 1", "Training in progress, step 2"}
    pushed = load(files["pytorch_lora_weights.safetensors"])
    saved = load_file(tmp_path / "tuned" / "checkpoint-2" / "pytorch_lora_weights.safetensors")
    assert pushed.keys() == saved.keys() and all(torch.equal(pushed[name], saved[name]) for name in saved)
    with_optimizer = {path.split("/")[0] for path in files if path.endswith("optimizer.pt")}
    assert with_optimizer == {"checkpoint-1", "checkpoint-2"}


def test_a_hub_that_refuses_costs_nothing_but_the_upload(hub_server, tmp_path):
    trainer = tiny_trainer(tmp_path / "tuned", max_steps=1, save_strategy="no")
    trainer.train()
    hub_server.fail("commit", 500)
    with pytest.raises(RuntimeError, match="could not be pushed"):
        trainer.push_to_hub()
    assert (tmp_path / "tuned" / "pytorch_lora_weights.safetensors").is_file()
