"""One script a paper: the settings of its recipe, and a run on a tiny model of the architecture."""

import json

import pytest
from reduced_trainers import TRAINERS, Reduced, without_model
from test_examples import load_program
from test_recipes import differing, parsed
from tiny_sd35 import tiny_sd35_pipeline
from tiny_unets import tiny_sd_pipeline
from trl import ScriptArguments, TrlParser

import trl_flow.trainer
from trl_flow.commands.options import peft_config


# The script, its config and the recipe that has the same settings
SCRIPTS = {
    "sd35_guard": ("GuardConfig", "sd35_ocr_guard"),
    "sd35_vgpo": ("VGPOConfig", "sd35_ocr_vgpo"),
    "sd35_nft": ("DiffusionNFTConfig", "sd35_pickscore_nft"),
    "sd35_awm": ("AWMConfig", "sd35_pickscore_awm"),
    "sd14_slas": ("SLASConfig", "sd14_slas"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_the_settings_of_its_recipe(name, tmp_path):
    script, (config, recipe) = load_program(f"examples/{name}.py"), SCRIPTS[name]
    parser = TrlParser((ScriptArguments, getattr(trl_flow, config)))
    parser.set_defaults_with_config(**script.SETTINGS)
    options = ("--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--fp16", "false")
    own_script_args, own = parser.parse_args_and_config(list(options))
    script_args, args, model_args = parsed(recipe)
    assert differing(own, args) == {}
    assert own_script_args.dataset_name == script_args.dataset_name
    lora = peft_config(script_args, args, model_args)
    own_lora = getattr(script, "LORA", None)
    assert (own_lora is None) == (lora is None)
    if lora is not None:
        fields = ("r", "lora_alpha", "init_lora_weights", "lora_dropout", "target_modules")
        assert all(getattr(own_lora, field) == getattr(lora, field) for field in fields)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A working folder with a few prompts, and trainers that load tiny models for those of the Hub."""
    monkeypatch.chdir(tmp_path)
    for name, pipeline in (("sd35", tiny_sd35_pipeline("medium")), ("sd14", tiny_sd_pipeline())):
        pipeline.save_pretrained(tmp_path / name)
    (tmp_path / "prompts").mkdir()
    for split in ("train", "test"):
        rows = [{"prompt": f'a "{word}"'} for word in ("one", "two")]
        (tmp_path / "prompts" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for trainer in TRAINERS:

        class Tiny(trainer):
            def __init__(self, model, reward_funcs, args, *others, eval_reward_funcs, **kwargs):
                family = "sd14" if "stable-diffusion-v1" in model else "sd35"
                monkeypatch.setattr(Reduced, "tiny_path", str(tmp_path / family))
                args.fp16, args.eval_steps = False, 1
                gold = eval_reward_funcs if isinstance(eval_reward_funcs, list) else [eval_reward_funcs]
                gold = [without_model(func) for func in gold]
                super().__init__(model, reward_funcs, args, *others, eval_reward_funcs=gold, **kwargs)

        monkeypatch.setattr(trl_flow.trainer, trainer.__name__, Tiny)
    return tmp_path


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("sd35_vgpo", "sd35_awm", "sd14_slas")]


@pytest.mark.parametrize("name", ["sd35_guard", "sd35_nft", *SLOW])
def test_a_script_trains_a_pipeline(name, tiny):
    options = ("--dataset_name", str(tiny / "prompts"), "--output_dir", str(tiny / "out"), "--use_cpu", "true")
    trainer = load_program(f"examples/{name}.py").main([*options, "--report_to", "none", "--bf16", "false"])
    assert trainer.state.global_step == 1
    assert any("eval_gold/average" in log for log in trainer.state.log_history)
    assert list((tiny / "out").glob("*.safetensors"))
