import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_loras import FAMILIES, PATTERNS, assert_same_deltas, component_of, deltas, saved_adapter
from tiny_models import tiny_sd3_pipeline
from tiny_training import (
    assert_equal,
    brightness,
    distance,
    prompts,
    tiny_config,
    tiny_stages,
    tiny_trainer,
    trained_weights,
    warnings_of,
)

from trl_flow import FlowGRPOTrainer
from trl_flow.backbones import get_backbone
from trl_flow.lora import export_lora
from trl_flow.trainer.init_adapter import adapter_of_its_own, with_init_adapter


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    """A LoRA of rank 4 and alpha 6 for the tiny pipeline, of queries and values."""
    folder = tmp_path_factory.mktemp("adapters") / "first"
    saved_adapter("sd3", folder, target_modules=["to_q", "to_v"])
    return str(folder)


def going_on(output_dir, adapter, **options):
    return tiny_trainer(output_dir, **{"lora": None, "init_adapter": adapter} | options)


# ---- The adapter as it is trained ----


@pytest.mark.parametrize("form", ["diffusers", "peft", "kohya"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_policy_is_what_the_stock_pipeline_makes_of_the_file(family, form, tmp_path):
    # diffusers reads none of these, of the released width only, or of all layers alone
    if form == "kohya" and family in ("sd3", "flux", "wan"):
        pytest.skip("no converter")
    patterns = {} if form == "kohya" else PATTERNS
    expected = saved_adapter(family, tmp_path, **patterns)
    pipeline = FAMILIES[family]()
    component, path = component_of(pipeline), tmp_path
    if form == "peft":
        (tmp_path / "pytorch_lora_weights.safetensors").unlink()
    if form == "kohya":
        path = tmp_path / "kohya.safetensors"
        export_lora(pipeline, component, tmp_path, "kohya", path)
    size = {"height": 16, "width": 16}
    backbone = get_backbone(pipeline, **size)
    policy = with_init_adapter(backbone, path, adapter_of_its_own(str(path), None))
    assert_same_deltas(deltas(policy), expected)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in policy.named_parameters())


def test_rank_alpha_and_modules_are_the_files(adapter, tmp_path):
    trainer = going_on(tmp_path, adapter)
    config = trainer.policy.module.peft_config["default"]
    assert (config.r, config.lora_alpha) == (4, 6)
    assert {name.split(".lora_")[0].split(".")[-1] for name in trained_weights(trainer)} == {"to_q", "to_v"}
    trainer.save_model(str(tmp_path))
    before, after = (load_file(f"{folder}/pytorch_lora_weights.safetensors") for folder in (adapter, tmp_path))
    assert_equal(after, before)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "Training went on from the adapter `first`." in card and "| reference | initial |" in card
    assert "trl-flow export path/to/" in card and str(tmp_path.parent) not in card


def test_weights_are_not_rounded_to_the_dtype_of_the_base(adapter, tmp_path, tiny_sd3_path):
    trainer = going_on(tmp_path, adapter, pipeline=tiny_sd3_path, model_init_kwargs={"dtype": "bfloat16"})
    own = load_file(f"{adapter}/adapter_model.safetensors")
    found = {name.replace(".default", ""): tensor for name, tensor in trained_weights(trainer).items()}
    assert distance(found, own) == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 8}, r"r=8.* for transformer_blocks.0.attn.to_q, but init_adapter .* has r=4"),
        ({"lora_alpha": 4}, "lora_alpha=4 for .* has lora_alpha=6"),
        ({"target_modules": ["to_q"]}, "target_modules lack transformer_blocks.0.attn.to_v"),
        ({"target_modules": ["to_q", "to_v", "to_k"]}, "target_modules have transformer_blocks.0.attn.to_k"),
        ({"use_dora": True}, "use_dora=True"),
        ({"use_rslora": True}, "use_rslora=True"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights='gaussian', but the weights are those"),
    ],
)
def test_a_peft_config_that_contradicts_it_is_refused(fields, words, adapter, tmp_path):
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_v"]} | fields)
    with pytest.raises(ValueError, match=words):
        going_on(tmp_path, adapter, lora=config)


@pytest.mark.parametrize("fields", [{"r": 4, "lora_alpha": 6}, {"r": None, "lora_alpha": 6, "lora_dropout": 0.1}])
def test_one_that_agrees_is_taken(fields, adapter, tmp_path):
    trainer = going_on(tmp_path, adapter, lora=LoraConfig(**fields))
    assert len(trained_weights(trainer)) == 8


def test_what_cannot_be_gone_on_from_is_refused(adapter, tmp_path):
    tensors = load_file(f"{adapter}/pytorch_lora_weights.safetensors")
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    width = tiny_sd3_pipeline().text_encoder.config.hidden_size
    pair = {f"{name}.lora_A.weight": torch.ones(4, width), f"{name}.lora_B.weight": torch.ones(width, 4)}
    save_file(tensors | pair, tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="2 tensors for other parts than the transformer.*text_encoder.*Fuse these"):
        going_on(tmp_path / "run", tmp_path / "text.safetensors")
    tiny_sd3_pipeline().transformer.save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match="holds all weights of a model, and no adapter. For full fine-tuning"):
        going_on(tmp_path / "run", tmp_path / "full")
    with pytest.raises(ValueError, match="cannot be trained on .*To resume a run whose init_adapter is gone"):
        going_on(tmp_path / "run", tmp_path / "nothing")
    pipeline = tiny_sd3_pipeline()
    pipeline.load_lora_weights(adapter)
    with pytest.raises(ValueError, match="already has adapters.*and its file as init_adapter"):
        tiny_trainer(tmp_path / "run", pipeline=pipeline)
    assert not (tmp_path / "run").exists()


# ---- The reference ----


def prediction(stages, name=None):
    latents = torch.randn(2, *stages.backbone.latent_shape(), generator=torch.Generator().manual_seed(0))
    condition = stages.policy.condition(["a cat", "a dog"])
    with stages.policy.at(name) if name else torch.no_grad(), torch.no_grad():
        return stages.policy.predict(latents, torch.tensor(500.0), condition)


@pytest.mark.parametrize("reference", ["initial", "base"])
def test_the_reference_is_the_adapter_or_the_base(reference, adapter, tmp_path):
    lora = adapter_of_its_own(adapter, None)
    stages = tiny_stages(tmp_path, lora=lora, init_adapter=adapter, reference=reference, beta=0.1)
    start = prediction(stages)
    base = prediction(tiny_stages(tmp_path))  # a LoRA that begins at zero
    assert (start - base).abs().max() > 0.01
    with torch.no_grad():
        for parameter in stages.parameters.values():
            parameter.add_(0.1)
    moved = prediction(stages)
    expected = start if reference == "initial" else base
    torch.testing.assert_close(prediction(stages, "reference"), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(prediction(stages), moved, rtol=0, atol=0)
    assert (moved - start).abs().max() > 0.01


@pytest.mark.parametrize("reference", ["initial", "base"])
def test_gold_is_relative_to_the_reference(reference, adapter, tmp_path):
    options = {"eval_dataset": prompts(2), "eval_reward_funcs": brightness, "eval_strategy": "no", "max_steps": 1}
    trainer = going_on(tmp_path, adapter, reference=reference, **options)
    trainer.train()
    start = next(entry for entry in trainer.state.log_history if "eval_gold/average" in entry)
    assert start["eval_reward"] == pytest.approx(evaluated(adapter, tmp_path)["eval_reward"], abs=1e-5)
    base = evaluated(None, tmp_path)["eval_reward"]
    gold = 1.0 if reference == "initial" else start["eval_reward"] / base
    assert start["eval_gold/average"] == pytest.approx(gold, abs=1e-5) and abs(start["eval_reward"] / base - 1) > 1e-4


def evaluated(adapter, folder):
    options = {"eval_dataset": prompts(2)}
    return tiny_trainer(
        folder, lora="default" if adapter is None else None, init_adapter=adapter, **options
    ).evaluate()


# ---- Resuming ----


def test_a_checkpoint_needs_the_file_no_more(adapter, tmp_path):
    file = shutil.copytree(adapter, tmp_path / "first")
    options = {"beta": 0.1, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "use_ema": True}
    unbroken = going_on(tmp_path / "run", str(file), **options)
    unbroken.train()
    shutil.rmtree(file)
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    with warnings_of("trl_flow") as said:
        resumed = going_on(tmp_path / "resumed", checkpoint, **options)
        resumed.train(resume_from_checkpoint=checkpoint)
    assert not [message for message in said if "init_adapter" in message]
    assert_equal(trained_weights(resumed), trained_weights(unbroken))
    kl = [[entry["kl"] for entry in run.state.log_history if "kl" in entry] for run in (unbroken, resumed)]
    np.testing.assert_allclose(kl[1], kl[0], rtol=1e-3, atol=1e-9)
    assert resumed.args.init_adapter == str(file)  # what the card says


def test_a_run_with_another_beginning_is_not_resumed(adapter, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "beta": 0.1}
    going_on(tmp_path / "run", adapter, **options).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    for other in ({"reference": "base"}, {"init_adapter": None, "lora": LoraConfig(r=4, lora_alpha=6)}):
        lora = {"target_modules": ["to_q", "to_v"]}
        if "lora" in other:
            other["lora"] = LoraConfig(r=4, lora_alpha=6, **lora)
        with pytest.raises(ValueError, match="the checkpoint is of a run with init_adapter=.*and reference='initial'"):
            going_on(tmp_path / "run", adapter, **options | other).train(resume_from_checkpoint=checkpoint)
    assert not (tmp_path / "run" / "previous-1").exists()  # refused before anything is moved
    other = str(shutil.copytree(adapter, tmp_path / "another"))
    with warnings_of("trl_flow") as said:
        resumed = going_on(tmp_path / "other", other, **options)
        resumed.train(resume_from_checkpoint=checkpoint)
    (message,) = [message for message in said if "init_adapter" in message]
    assert (
        f"init_adapter is '{other}', but the run resumed from {checkpoint}" in message
        and f"began with '{adapter}'" in message
    )
    assert resumed.args.init_adapter == str(adapter)


def test_the_config_says_what_may_be_chosen(tmp_path):
    with pytest.raises(ValueError, match="reference is 'nothing', but must be one of initial, base"):
        tiny_config(tmp_path, reference="nothing")
    assert tiny_config(tmp_path, init_adapter=tmp_path).init_adapter == str(tmp_path)


def test_a_trainer_of_its_own_class_gets_no_config_from_the_user(adapter, tmp_path):
    # As README has it: five lines, no peft_config
    args = tiny_config(tmp_path, init_adapter=adapter)
    trainer = FlowGRPOTrainer(tiny_sd3_pipeline(), brightness, args=args, train_dataset=prompts())
    assert trainer.policy.is_adapter


def test_a_file_of_which_the_converter_needs_more_says_what(tmp_path):
    saved_adapter("wan", tmp_path)
    pipeline, path = FAMILIES["wan"](), tmp_path / "kohya.safetensors"
    export_lora(pipeline, component_of(pipeline), tmp_path, "kohya", path)
    with pytest.raises(ValueError, match="converter of this form needs 'blocks_0_ffn.*which kohya.safetensors lacks"):
        with_init_adapter(get_backbone(pipeline, height=16, width=16), path, adapter_of_its_own(str(path), None))
