"""Every name in a LoRA's config names something: PEFT leaves out in silence what it does not find."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_sd3_pipeline
from tiny_qwen import tiny_qwen_image_pipeline
from tiny_training import tiny_lora, tiny_trainer, warnings_of

from trl_flow import FlowGRPOConfig
from trl_flow.commands.options import FlowScriptArguments, peft_config
from trl_flow.memory.estimate import Plan, estimate
from trl_flow.trainer.lora_targets import check_lora_targets


@pytest.fixture(scope="module")
def names():
    return [name for name, _ in tiny_sd3_pipeline().transformer.named_modules() if name]


BLOCK = {"layers_pattern": "transformer_blocks"}


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"target_modules": ["attn.to_q", "attn.to_qq"]}, ["'attn.to_qq' in target_modules", "mean 'attn.to_q'"]),
        ({"target_modules": ["attention.to_q"]}, ["'attention.to_q'", "mean 'attn.to_q'"]),
        ({"target_modules": r".*\.(to_q|to_qq)"}, ["'to_qq'", "regular expression", "mean 'to_q'"]),
        ({"target_modules": "to_q"}, ["a text is a regular expression for whole names", "give a list"]),
        ({"target_modules": ["to_q"], "exclude_modules": ["to_kk"]}, ["'to_kk' in exclude_modules", "'to_k'"]),
        ({"target_modules": ["to_q"], "exclude_modules": r".*\.to_kk"}, ["'to_kk' in exclude_modules"]),
        ({"target_modules": ["to_q", "to_k"], "exclude_modules": ["to_k"]}, ["['to_k']", "leaves every module"]),
        ({"target_modules": ["to_q"], "layers_to_transform": [0, 2], **BLOCK}, ["[0, 2]", "no layer 2"]),
        ({"target_modules": ["to_q"], "layers_to_transform": 2, **BLOCK}, ["no layer 2"]),
        (
            {"target_modules": ["to_q"], "layers_to_transform": [0], "layers_pattern": "transformer_block"},
            ["'transformer_block' in layers_pattern", "mean 'transformer_blocks'"],
        ),
        # PEFT would count by `ff.net.0`, and train it in every block
        ({"target_modules": ["ff.net.0.proj"], "layers_to_transform": [0]}, ["Set layers_pattern", "transformer_blo"]),
        ({"target_modules": ["to_q"], "rank_pattern": {"to_k": 2}}, ["'to_k' in rank_pattern for targeted", "'to_q'"]),
        ({"target_modules": ["to_q"], "alpha_pattern": {"to_qq": 2}}, ["'to_qq' in alpha_pattern"]),
    ],
    ids=lambda value: " ".join(str(v) for v in value.values())[:40] if isinstance(value, dict) else "",
)
def test_what_names_nothing_is_named(fields, parts, names):
    with pytest.raises(ValueError) as raised:
        check_lora_targets(LoraConfig(**fields), names)
    assert all(part in str(raised.value) for part in parts), raised.value


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["to_q", "attn.to_k", "transformer_blocks.0.attn.to_v", "to_out.0"]},
        {"target_modules": r"transformer_blocks\.\d+\.attn\.to_(q|k)"},
        {"target_modules": r"(?!.*context).*\.(to_[qk]|add_q_projs?)"},
        {"target_modules": "all-linear", "exclude_modules": ["proj_out"]},
        {"target_modules": ["to_q"], "layers_to_transform": [0, 1], **BLOCK},
        {"target_modules": ["to_q"], "rank_pattern": {"to_q": 2}, "alpha_pattern": {r"^transformer_blocks\.0.*": 4}},
    ],
    ids=lambda fields: str(fields["target_modules"])[:40],
)
def test_what_names_something_is_taken(fields, names):
    config = LoraConfig(**fields)
    check_lora_targets(config, names)
    assert get_peft_model(tiny_sd3_pipeline().transformer, config).targeted_module_names


def test_the_trainer_and_the_memory_estimate_say_it(tmp_path):
    lora, wrong = tiny_lora(target_modules=["to_q", "to_qq"]), "'to_qq' in target_modules.*Did you mean 'to_q'"
    with pytest.raises(ValueError, match=wrong):
        tiny_trainer(tmp_path / "out", lora=lora)
    assert not (tmp_path / "out").exists()
    trainer = tiny_trainer(tmp_path / "right")
    trainer.pipeline.transformer = tiny_sd3_pipeline().transformer
    with pytest.raises(ValueError, match=wrong):
        estimate(trainer.backbone, Plan(trainer.args, peft_config=lora))


@pytest.mark.parametrize(("given", "expected"), [(["to_q"], {"to_q"}), (["to_q", "to_k"], {"to_q", "to_k"})])
def test_one_target_of_a_recipe_is_a_name_as_several_are(given, expected):
    # TRL makes a text of a list of one, and PEFT a regular expression of a text
    from trl import ModelConfig

    others = FlowScriptArguments(), FlowGRPOConfig("out", use_cpu=True)
    model_args = ModelConfig(use_peft=True, lora_target_modules=given, lora_task_type=None)
    assert peft_config(*others, model_args).target_modules == expected
    model_args = ModelConfig(use_peft=True, lora_target_modules=[r".*\.to_q"])
    assert peft_config(*others, model_args).target_modules == r".*\.to_q"


# ---- Gradients ----


def unreached(trainer) -> list[str]:
    with warnings_of("trl_flow") as warnings:
        trainer.train()
    return [message for message in warnings if "got no gradient" in message]


def test_a_parameter_that_the_first_update_does_not_reach_is_named_once(tmp_path):
    # Nothing reads the last block's text output
    lora = tiny_lora(target_modules=["attn.to_q", "attn.to_add_out"])
    fields = {"guidance_scale": 1.0, "max_sequence_length": 40, "max_steps": 2}
    trainer = tiny_trainer(tmp_path, pipeline=tiny_qwen_image_pipeline(), lora=lora, **fields)
    (message,) = unreached(trainer)
    last = len(trainer.pipeline.transformer.transformer_blocks) - 1
    layer = f"transformer_blocks.{last}.attn.to_add_out.lora_A.default.weight"
    assert f"2 of {4 * (last + 1)} trained parameters got no gradient in the first update" in message
    assert layer in message and "target_modules" in message


def test_zero_is_a_gradient(tmp_path):
    # A LoRA begins with a matrix of zeros, so that the other's first gradient is 0
    trainer = tiny_trainer(tmp_path, max_steps=1)
    matrices = [p for name, p in trainer.model.named_parameters() if "lora_A" in name]
    gradients = []
    for p in matrices:
        p.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad.abs().max().item()))
    assert unreached(trainer) == []
    assert gradients and not any(gradients)


def test_none_is_missed_in_full_fine_tuning_with_an_average(tmp_path):
    trainer = tiny_trainer(tmp_path, lora=None, use_ema=True, max_steps=1)
    assert unreached(trainer) == []
    trainer.pipeline.transformer.register_parameter("unused", torch.nn.Parameter(torch.ones(2)))
    again = tiny_trainer(tmp_path, pipeline=trainer.pipeline, lora=None, max_steps=1)
    assert len(unreached(again)) == 1
