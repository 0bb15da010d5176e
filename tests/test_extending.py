"""docs/extending.md is followed to the letter: its code runs and does what the page says."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_sd3_pipeline
from tiny_training import tiny_config, tiny_lora, tiny_trainer

from trl_flow import FlowGRPOTrainer
from trl_flow.backbones import Backbone, get_backbone
from trl_flow.trainer.checks import BACKBONE_MEMBERS


PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")


def code_of(title: str) -> str:
    """The Python blocks of a section."""
    section = re.split(r"^#+ ", PAGE, flags=re.MULTILINE)
    (found,) = [part for part in section if part.startswith(title + "\n")]
    return "\n".join(re.findall(r"```python\n(.*?)```", found, flags=re.DOTALL))


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    """What the section on a pipeline of one's own leaves behind, on a CPU."""
    code = code_of("Your own pipeline")
    fields = 'use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, '
    assert code.count("FlowGRPOConfig(\n") == 1
    code = code.replace("FlowGRPOConfig(\n", f"FlowGRPOConfig({fields}\n")
    folder = tmp_path_factory.mktemp("extending")
    scope = {}
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patch.chdir(folder)
        exec(code, scope)
    return scope | {"folder": folder / "painter"}


def test_a_pipeline_of_ones_own_trains_without_a_change_here(painter):
    assert not isinstance(painter["trainer"].backbone, Backbone)
    logs = [log for log in painter["trainer"].state.log_history if "reward" in log]
    assert len(logs) == 50
    assert logs[0]["ratio/first_update_deviation"] == pytest.approx(0, abs=1e-6)
    first, last = (np.mean([log["reward"] for log in part]) for part in (logs[:5], logs[-5:]))
    assert last > first + 0.05


def test_its_weights_are_saved_where_its_class_finds_them(painter):
    loaded = painter["Painter"].from_pretrained(painter["folder"])
    trained = painter["pipeline"].painter.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in loaded.state_dict().items())
    assert load_file(painter["folder"] / "diffusion_pytorch_model.safetensors").keys() == trained.keys()


@pytest.mark.parametrize(
    ("fields", "lora", "message"),
    [
        ({}, tiny_lora(), "PainterPipeline has no save_lora_weights"),
        ({"precompute_prompt_embeds": True}, None, "precompute_prompt_embeds .* PainterBackbone is not known"),
        ({"gradient_checkpointing": True}, None, "Painter does not support. Set gradient_checkpointing=False"),
        ({"negative_prompt": "night"}, None, "'night', but PainterBackbone takes none"),
    ],
    ids=["lora", "disk", "checkpointing", "negative"],
)
def test_what_it_can_not_do_is_refused(painter, fields, lora, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        FlowGRPOTrainer(
            model=painter["pipeline"],
            reward_funcs=painter["brightness"],
            args=tiny_config(tmp_path / "out", **fields),
            train_dataset=painter["trainer"].train_dataset,
            peft_config=lora,
            backbone=painter["trainer"].backbone,
        )
    assert not (tmp_path / "out").exists()


def test_the_table_of_members_is_complete(tmp_path):
    table = PAGE.split("### Your own pipeline")[1].split("```")[0]
    assert all(re.search(rf"`{name}[`(]", table) for name in BACKBONE_MEMBERS)

    class Half:
        component = "transformer"

        def decode(self, latents):
            return []

    trainer = tiny_trainer(tmp_path)
    with pytest.raises(TypeError, match="Half without pipeline, model, dtype, device, .*velocity"):
        FlowGRPOTrainer(
            model=tiny_sd3_pipeline(),
            reward_funcs=lambda prompts, images, **kwargs: [0.0] * len(images),
            args=trainer.args,
            train_dataset=trainer.train_dataset,
            backbone=Half(),
        )


def test_a_backbone_that_edits_must_judge_sizes(painter, tmp_path):
    editor = copy.copy(painter["trainer"].backbone)
    editor.takes_image = True
    with pytest.raises(TypeError, match="PainterBackbone without check_image_size"):
        FlowGRPOTrainer(
            model=painter["pipeline"],
            reward_funcs=painter["brightness"],
            args=tiny_config(tmp_path),
            train_dataset=painter["trainer"].train_dataset,
            backbone=editor,
        )


def test_a_backbone_of_another_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match="backbone was made for another pipeline than model.*model=backbone.pipeline"):
        FlowGRPOTrainer(
            model=tiny_sd3_pipeline(),
            reward_funcs=lambda prompts, images, **kwargs: [0.0] * len(images),
            args=tiny_config(tmp_path / "out"),
            train_dataset=Dataset.from_dict({"prompt": ["a cat", "a dog"]}),
            backbone=get_backbone(tiny_sd3_pipeline(), height=16, width=16, max_sequence_length=16),
        )
    assert not (tmp_path / "out").exists()


def test_the_reward_of_edited_images():
    scope = {"np": np}
    exec(code_of("Editing images"), scope)
    black, gray = (Image.new("RGB", (16, 16), (level,) * 3) for level in (0, 51))
    assert scope["keeps_the_image"]([""] * 2, [black, gray], image=[black, black]) == pytest.approx([1.0, 0.8])
