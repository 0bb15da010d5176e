"""The configs' defaults are the published ones, they are read from command lines and YAML, and refuse nonsense."""

import dataclasses
import math
import pickle
import re

import pytest
import yaml
from tiny_models import tiny_sd3_pipeline
from tiny_training import brightness, prompts, tiny_config, tiny_lora
from transformers import HfArgumentParser
from trl import TrlParser

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer, GuardConfig, SLASConfig, VGPOConfig
from trl_flow.trainer.flow_rl_config import FlowRLConfig


CONFIGS = [FlowGRPOConfig, GuardConfig, SLASConfig, VGPOConfig]

FLOW_GRPO = {
    "num_generations": 8,
    "num_generations_eval": 1,
    "num_inference_steps": 10,
    "guidance_scale": 4.5,
    "negative_prompt": None,
    "height": 512,
    "width": 512,
    "max_sequence_length": 128,
    "eval_num_inference_steps": None,  # the pipeline's own
    "eval_guidance_scale": None,
    "sde_type": "flow",
    "noise_level": 0.7,
    "sde_window_size": None,
    "sde_window_range": None,
    "train_last_step": False,
    "timestep_fraction": 1.0,
    "timestep_fraction_per_sample": False,
    "ratio_probe": "auto",
    "ema_update_every": 1,
    "share_initial_noise": False,
    "importance_ratio": "standard",
    "timestep_weighting": "none",
    "epsilon": 1e-4,
    "epsilon_high": None,
    "scale_epsilon": True,
    "beta": 0.0,
    "scale_rewards": "batch",
    "advantage_power": 0.0,
    "advantage_clip": 5.0,
    "dense_rewards": False,
    "value_discount": 0.9,
    "value_scale": 0.0,
    "projection_vae": None,
    "reward_weights": None,
    "num_iterations": 1,
    "learning_rate": 3e-4,
    "log_images": True,
}
CHANGES = {
    FlowGRPOConfig: {},
    GuardConfig: {
        "importance_ratio": "ratio_norm",
        "timestep_weighting": "inverse_dt",
        "epsilon": 2e-6,
        "scale_rewards": "group",
        "learning_rate": 1e-4,
    },
    SLASConfig: {
        "sde_type": "dance",
        "noise_level": 0.3,
        "timestep_fraction": 0.6,
        "timestep_fraction_per_sample": True,
        "share_initial_noise": True,
        "scale_rewards": "batch",
        "advantage_power": 0.25,
    },
    VGPOConfig: {"share_initial_noise": True, "dense_rewards": True, "value_discount": 0.9, "value_scale": 0.05},
}


def config(cls=FlowGRPOConfig, **fields):
    return cls(output_dir="out", use_cpu=True, report_to="none", **fields)


@pytest.mark.parametrize("cls", CONFIGS)
def test_the_defaults_are_the_published_ones(cls):
    args = config(cls)
    for name, value in (FLOW_GRPO | CHANGES[cls]).items():
        assert getattr(args, name) == value, name


@pytest.mark.parametrize("cls", CONFIGS[1:])
def test_a_preset_adds_no_field(cls):
    assert issubclass(cls, FlowGRPOConfig)
    assert {f.name for f in dataclasses.fields(cls)} == {f.name for f in dataclasses.fields(FlowGRPOConfig)}


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_field_can_be_set_on_every_preset(cls):
    fields = {
        "num_inference_steps": 4,
        "sde_type": "dance",
        "noise_level": 0.5,
        "timestep_fraction": 0.5,
        "share_initial_noise": False,
        "importance_ratio": "mean_revised",
        "timestep_weighting": "beta_over_dt",
        "epsilon": 1e-3,
        "epsilon_high": 2e-3,
        "beta": 0.04,
        "scale_rewards": "none",
        "advantage_power": 0.25,
        "dense_rewards": True,
        "value_discount": 0.5,
        "value_scale": 0.2,
    }
    args = config(cls, **fields)
    for name, value in fields.items():
        assert getattr(args, name) == value, name


@pytest.mark.parametrize(
    ("fields", "weight"),
    [
        ({}, "inverse_dt"),
        ({"sde_type": "cps"}, "inverse_gain"),
        ({"sde_type": "dance"}, "beta_over_dt"),
        ({"sde_type": "dance", "timestep_weighting": "inverse_beta_dt"}, "inverse_beta_dt"),
        ({"sde_type": "dance", "timestep_weighting": "inverse_dt"}, "inverse_dt"),
        ({"timestep_weighting": "none"}, "none"),
    ],
)
def test_the_weight_of_guard_follows_the_dynamics(fields, weight):
    assert config(GuardConfig, **fields).timestep_weighting == weight


@pytest.mark.parametrize(("value", "meant"), [(True, "group"), (False, "none"), ("batch", "batch")])
def test_scale_rewards_as_in_trl(value, meant):
    assert config(scale_rewards=value).scale_rewards == meant


# ---- Batches ----


@pytest.mark.parametrize(
    ("fields", "steps_per_generation", "generation_batch_size"),
    [
        # two updates a phase, unless it is said otherwise
        ({"per_device_train_batch_size": 8}, 2, 16),
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3}, 6, 48),
        ({"per_device_train_batch_size": 8, "steps_per_generation": 1}, 1, 8),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 6}, 6, 24),
        ({"per_device_train_batch_size": 4, "generation_batch_size": 32}, 8, 32),
    ],
)
def test_batches_by_hand(fields, steps_per_generation, generation_batch_size):
    args = config(**fields)
    assert args.steps_per_generation == steps_per_generation
    assert args.generation_batch_size == generation_batch_size


# ---- What is refused ----


@pytest.mark.parametrize("cls", [FlowGRPOConfig, GuardConfig, VGPOConfig])
@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        # choices
        ({"sde_type": "ode"}, ["sde_type is 'ode'", "flow, dance, cps"]),
        ({"importance_ratio": "guard"}, ["importance_ratio is 'guard'", "standard, mean_revised, ratio_norm"]),
        ({"timestep_weighting": "dt"}, ["timestep_weighting is 'dt'", "inverse_dt"]),
        ({"scale_rewards": "global"}, ["scale_rewards is 'global'", "group, batch, batch_centered, none"]),
        # combinations
        ({"timestep_weighting": "beta_over_dt"}, ["beta_over_dt", "sde_type is 'flow'", "sde_type='dance'"]),
        ({"timestep_weighting": "inverse_beta_dt", "sde_type": "cps"}, ["inverse_beta_dt", "sde_type is 'cps'"]),
        ({"dense_rewards": False, "value_scale": 0.1}, ["value_scale is 0.1", "dense_rewards=True", "value_scale=0"]),
        ({"auto_find_batch_size": True}, ["auto_find_batch_size", "per_device_train_batch_size"]),
        ({"sde_type": "cps", "noise_level": 1.2}, ["noise_level is 1.2", "at most 1"]),
        ({"sde_type": "cps", "num_inference_steps": 1}, ["num_inference_steps is 1", "at least 2"]),
        # windows
        ({"sde_window_range": [0, 5]}, ["sde_window_range is [0, 5]", "sde_window_size is not set"]),
        ({"sde_window_size": 11}, ["sde_window_size is 11", "[0, 9]"]),
        ({"sde_window_size": 0}, ["sde_window_size is 0", "at least 1"]),
        ({"sde_window_size": 3, "sde_window_range": [1, 3]}, ["sde_window_size is 3", "[1, 3], which has 2"]),
        ({"sde_window_size": 1, "sde_window_range": [1]}, ["sde_window_range is [1]", "two whole numbers"]),
        ({"sde_window_size": 1, "sde_window_range": [0.0, 5.0]}, ["sde_window_range is [0.0, 5.0]", "whole numbers"]),
        ({"sde_window_size": 2.0}, ["sde_window_size is 2.0", "whole number"]),
        ({"sde_window_size": 1, "sde_window_range": 5}, ["sde_window_range is 5", "two whole numbers"]),
        ({"diagnostics_steps": 1.5}, ["diagnostics_steps is 1.5", "whole number"]),
        ({"sde_window_size": 1, "sde_window_range": [5, 11]}, ["[5, 11]", "num_inference_steps (10)"]),
        ({"sde_window_size": 1, "sde_window_range": [-1, 3]}, ["[-1, 3]", "0 <= first"]),
        ({"sde_window_size": 1, "sde_window_range": [3, 3]}, ["[3, 3]", "first < end"]),
        ({"sde_type": "cps", "sde_window_size": 2, "sde_window_range": [8, 10]}, ["[8, 10]", "cps", "end <= 9"]),
        # ranges
        ({"num_inference_steps": 0}, ["num_inference_steps is 0", "at least 1"]),
        ({"eval_num_inference_steps": 0}, ["eval_num_inference_steps is 0"]),
        ({"num_inference_steps": 2.5}, ["num_inference_steps is 2.5", "whole number"]),
        ({"height": 0}, ["height is 0"]),
        ({"width": -8}, ["width is -8"]),
        ({"num_generations": 1}, ["num_generations is 1", "at least 2"]),
        ({"num_iterations": 0}, ["num_iterations is 0"]),
        ({"num_images_to_log": 0}, ["num_images_to_log is 0"]),
        ({"noise_level": 0.0}, ["noise_level is 0.0", "above 0", "no log-probability"]),
        ({"guidance_scale": -1.0}, ["guidance_scale is -1.0"]),
        ({"timestep_fraction": 0.0}, ["timestep_fraction is 0.0", "(0, 1]"]),
        ({"timestep_fraction": 1.5}, ["timestep_fraction is 1.5"]),
        ({"epsilon": 0.0}, ["epsilon is 0.0"]),
        ({"epsilon_high": -0.1}, ["epsilon_high is -0.1"]),
        ({"beta": -0.1}, ["beta is -0.1"]),
        ({"advantage_power": -0.5}, ["advantage_power is -0.5"]),
        ({"advantage_clip": 0.0}, ["advantage_clip is 0.0"]),
        ({"value_discount": 1.0}, ["value_discount is 1.0", "[0, 1)"]),
        ({"value_scale": -0.1}, ["value_scale is -0.1"]),
        ({"ema_decay": 1.0}, ["ema_decay is 1.0"]),
        ({"reward_timeout": 0.0}, ["reward_timeout is 0.0"]),
        ({"reward_weights": [0.0, 0.0]}, ["reward_weights is [0.0, 0.0]", "not all 0"]),
        ({"reward_weights": [1.0, math.nan]}, ["reward_weights is [1.0, nan]", "finite"]),
        ({"reward_weights": ["one"]}, ["reward_weights is ['one']", "finite numbers"]),
        ({"reward_weights": 1.0}, ["reward_weights is 1.0", "a list"]),
        ({"diagnostics_steps": -1}, ["diagnostics_steps is -1"]),
        # batches
        ({"num_generations": 5}, ["generation_batch_size is 16", "num_generations (5)", "Change num_generations"]),
        ({"generation_batch_size": 20}, ["generation_batch_size (20)", "= 8"]),
        ({"generation_batch_size": 16, "steps_per_generation": 3}, ["(16)", "(3)", "cannot both be set"]),
        ({"steps_per_generation": 0}, ["steps_per_generation is 0"]),
        ({"num_inference_steps": 1}, ["num_inference_steps is 1", "at least 2 steps"]),
        ({"train_last_step": True, "sde_type": "cps"}, ["train_last_step is True", "adds no noise", "Leave it out"]),
        ({"ratio_probe": 0.5}, ["ratio_probe is 0.5", "0 for none", "above 1"]),
        ({"ratio_probe": "often"}, ["ratio_probe is 'often'", "a number or 'auto'"]),
        ({"ratio_probe": -2}, ["ratio_probe is -2"]),
        ({"ratio_probe": True}, ["ratio_probe is True", "a number or 'auto'"]),
        ({"train_last_step": "yes"}, ["train_last_step is 'yes' of type str", "True or False"]),
        ({"timestep_weighting": "foo"}, ["timestep_weighting is 'foo'", "inverse_gain"]),
        ({"ema_update_every": 0}, ["ema_update_every is 0", "at least 1"]),
        ({"value_scale": [0.1, 0.2], "dense_rewards": True}, ["value_scale is [0.1, 0.2]", "each of the 10 steps"]),
        ({"value_scale": [-0.1] * 10, "dense_rewards": True}, ["value_scale is [-0.1", "0 or more"]),
        ({"value_scale": "much", "dense_rewards": True}, ["value_scale is 'much'"]),
        (
            {"value_scale": [0.0] * 9 + [0.1], "dense_rewards": False},
            ["value_scale is [0.0", "dense_rewards is False"],
        ),
    ],
    ids=lambda value: ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_what_is_refused(cls, fields, parts):
    with pytest.raises((TypeError, ValueError)) as raised:
        config(cls, **fields)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize("name", ["noise_level", "beta", "epsilon_high", "reward_timeout", "value_discount"])
def test_a_number_as_text_is_named(name, tmp_path):
    with pytest.raises(TypeError, match=f"{name} is '0.3' of type str, but must be a number"):
        tiny_config(tmp_path, **{name: "0.3"})


@pytest.mark.parametrize("cls", [FlowGRPOConfig, GuardConfig, SLASConfig, VGPOConfig])
def test_a_copy_with_one_change_is_the_config_with_it(cls, tmp_path):
    fields = {"steps_per_generation": 3, "sde_window_size": 2} if cls is FlowGRPOConfig else {}
    config = tiny_config(tmp_path, cls=cls, **fields)
    copy = dataclasses.replace(config, learning_rate=0.5)
    assert copy.to_dict() == {**config.to_dict(), "learning_rate": 0.5}


@pytest.mark.parametrize(
    ("fields", "change"),
    [
        ({"cls": GuardConfig}, {"sde_type": "dance"}),
        ({"cls": GuardConfig, "timestep_weighting": "temp"}, {"sde_type": "dance"}),
        ({"generation_batch_size": 16}, {"per_device_train_batch_size": 4}),
        ({"steps_per_generation": None}, {"per_device_train_batch_size": 4}),
        ({"steps_per_generation": None}, {"gradient_accumulation_steps": 4}),
        ({"steps_per_generation": None}, {"generation_batch_size": 48}),
        ({"sde_window_size": 2}, {"num_inference_steps": 3}),
        ({"sde_window_size": 2}, {"sde_window_size": None}),
        ({"sde_window_size": 2, "sde_window_schedule": "progressive"}, {"sde_window_schedule": "random"}),
    ],
)
def test_a_copy_derives_what_was_not_given(fields, change, tmp_path):
    """The copy of a copy is what the constructor makes of the fields that were given, with the change."""
    config = tiny_config(tmp_path, **fields)
    for _ in range(2):
        pickled = pickle.loads(pickle.dumps(dataclasses.replace(config)))  # as processes are handed it
        assert pickled.to_dict() == config.to_dict()
        copy = dataclasses.replace(pickled, **change)
        assert copy.to_dict() == tiny_config(tmp_path, **fields | change).to_dict()
        config = dataclasses.replace(config)


# ---- SLAS's power ----


@pytest.mark.parametrize("cls", CONFIGS)
def test_a_power_is_a_number_or_adapted(cls):
    args = config(cls, advantage_power="auto", target_kl=1e-5)
    assert (args.advantage_power, args.target_kl) == ("auto", 1e-5)
    assert config(cls, advantage_power="auto").target_kl is None
    fixed = config(cls, advantage_power="0.25")  # as it comes from a command line
    assert (fixed.advantage_power, fixed.target_kl) == (0.25, None)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"advantage_power": "automatic"}, "advantage_power is 'automatic', but must be a number or 'auto'"),
        ({"advantage_power": None}, "advantage_power is None"),
        ({"advantage_power": "-1"}, "advantage_power is -1.0"),
        ({"advantage_power": 0.5, "target_kl": 1e-5}, "target_kl is 1e-05, but advantage_power is 0.5"),
        ({"advantage_power": "auto", "target_kl": 0.0}, "target_kl is 0.0"),
        ({"advantage_power": "auto", "target_kl": float("nan")}, "target_kl is nan"),
        ({"advantage_power": "auto", "target_kl": "1e-5"}, "target_kl is '1e-5'"),
    ],
    ids=str,
)
def test_a_power_that_makes_no_sense_is_refused(fields, part):
    with pytest.raises((TypeError, ValueError)) as raised:
        config(**fields)
    assert part in str(raised.value)


@pytest.mark.parametrize("cls", CONFIGS)
@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("0.5", 0.5)])
def test_the_power_from_a_command_line_and_from_a_file(text, value, cls, tmp_path):
    settings = ["--target_kl", "1e-5"] if text == "auto" else []
    line = ["--output_dir", "out", "--use_cpu", "--report_to", "none", *settings]
    args = TrlParser((cls,)).parse_args_into_dataclasses([*line, "--advantage_power", text])[0]
    assert args.advantage_power == value
    assert args.target_kl == (1e-5 if settings else None)
    (tmp_path / "recipe.yaml").write_text(f"advantage_power: {text}\n")
    (args,) = TrlParser((cls,)).parse_args_and_config(["--config", str(tmp_path / "recipe.yaml"), *line])
    assert args.advantage_power == value


def test_a_misspelt_option_is_refused():
    with pytest.raises(TypeError, match="'noise_levl'"):
        config(noise_levl=0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["noise_level", "guidance_scale", "beta", "advantage_power", "value_scale"])
def test_nan_and_infinity_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        config(dense_rewards=True, **{name: value})


def test_the_largest_window_of_each_dynamics_is_allowed():
    assert config(sde_window_size=9).sde_window_range == [0, 9]
    assert config(sde_window_size=10, train_last_step=True).sde_window_range == [0, 10]
    assert config(sde_window_size=9, sde_type="cps").sde_window_range == [0, 9]
    assert config(sde_type="cps").num_stochastic_steps == 9
    assert config(sde_type="cps", noise_level=1.0).noise_level == 1


# ---- Command lines and files ----


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
@pytest.mark.parametrize("cls", CONFIGS)
def test_a_command_line(cls, parser):
    line = "--output_dir out --use_cpu --report_to none --noise_level 0.5 --sde_window_size 2 --sde_window_range 1 4"
    line += " --dense_rewards --importance_ratio mean_revised --negative_prompt blurred --reward_weights 1.0 0.5"
    line += ' --model_init_kwargs {"variant":"fp16"}'
    args = parser((cls,)).parse_args_into_dataclasses(line.split())[0]
    assert type(args) is cls
    assert args.noise_level == 0.5
    assert args.sde_window_range == [1, 4]
    assert args.dense_rewards is True
    assert args.importance_ratio == "mean_revised"
    assert args.reward_weights == [1.0, 0.5]
    assert args.model_init_kwargs == {"variant": "fp16"}
    # what is not given keeps the preset's value
    assert args.scale_rewards == (FLOW_GRPO | CHANGES[cls])["scale_rewards"]
    assert args.learning_rate == (FLOW_GRPO | CHANGES[cls])["learning_rate"]
    if cls is GuardConfig:
        assert args.timestep_weighting == "inverse_dt"


@pytest.mark.parametrize("cls", CONFIGS)
def test_a_yaml_file(cls, tmp_path):
    content = {
        "output_dir": "out",
        "use_cpu": True,
        "report_to": "none",
        "sde_window_size": 2,
        "sde_window_range": [1, 4],
        "reward_weights": [1.0, "5e-1"],
        "epsilon": 1e-3,
        "scale_rewards": "none",
    }
    # which YAML takes for a string
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content) + "beta: 2e-3\nsave_strategy: no\n")
    parser = TrlParser((cls,))
    (args,) = parser.parse_args_and_config(["--config", str(tmp_path / "recipe.yaml"), "--epsilon", "0.01"])
    assert args.sde_window_range == [1, 4]
    assert args.reward_weights == [1.0, 0.5]
    assert args.epsilon == 0.01  # the command line's word is the last
    assert args.scale_rewards == "none"
    assert args.beta == 0.002
    assert args.save_strategy == "no"


def test_a_misspelt_option_on_a_command_line_is_refused():
    with pytest.raises(ValueError, match="noise_levl"):
        HfArgumentParser((FlowGRPOConfig,)).parse_args_into_dataclasses(["--output_dir", "out", "--noise_levl", "1"])


@pytest.mark.parametrize("cls", CONFIGS)
def test_the_help_names_every_field_of_ours_and_what_it_is(cls, capsys):
    with pytest.raises(SystemExit) as ended:
        HfArgumentParser((cls,)).parse_args_into_dataclasses(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name in FLOW_GRPO:
        assert f"--{name}" in shown
    for field in dataclasses.fields(cls):
        if field.name in FLOW_GRPO and field.name not in {"learning_rate"}:
            assert field.metadata.get("help"), field.name


def test_every_field_is_documented():
    from transformers import TrainingArguments
    from trl.trainer.base_config import _BaseConfig

    inherited = {field.name for cls in (_BaseConfig, TrainingArguments) for field in dataclasses.fields(cls)}
    own = {field.name for field in dataclasses.fields(FlowGRPOConfig)} - inherited
    described = set(re.findall(r"(\w+) \(`[^`]+`", FlowRLConfig.__doc__ + FlowGRPOConfig.__doc__))
    assert own <= described, own - described


def test_a_config_survives_its_own_dictionary(tmp_path):
    args = tiny_config(tmp_path, cls=GuardConfig, sde_window_size=2)
    written = args.to_dict()
    assert written["sde_window_range"] == [0, 3]
    assert written["timestep_weighting"] == "inverse_dt"


def test_the_best_model_is_that_of_the_highest_reward_unless_said(tmp_path):
    fields = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 5, "save_steps": 5}
    config = FlowGRPOConfig(str(tmp_path), **fields)
    assert (config.metric_for_best_model, config.greater_is_better) == ("reward", True)
    config = FlowGRPOConfig(str(tmp_path), metric_for_best_model="rewards/jpeg/std", greater_is_better=False, **fields)
    assert (config.metric_for_best_model, config.greater_is_better) == ("rewards/jpeg/std", False)


def test_a_config_serves_two_trainers(tmp_path):
    config = tiny_config(tmp_path, gradient_checkpointing=True)
    before = config.to_dict()
    for _ in range(2):
        pipeline = tiny_sd3_pipeline()
        FlowGRPOTrainer(pipeline, brightness, config, prompts(), peft_config=tiny_lora())
        assert pipeline.transformer.gradient_checkpointing
    assert config.to_dict() == before


def test_a_clip_range_is_scaled_whether_it_is_set_or_not():
    # Writing a default down changes nothing
    assert config(epsilon=1e-4).to_dict() == config().to_dict()
    assert config(epsilon=1e-4).scale_epsilon is True


# ---- Presets ----


@pytest.mark.parametrize(
    ("preset", "fields"),
    [
        (
            GuardConfig,
            {
                "importance_ratio": "ratio_norm",
                "timestep_weighting": "inverse_dt",
                "scale_rewards": "group",
                "epsilon": 2e-6,
                "learning_rate": 1e-4,
            },
        ),
        (
            SLASConfig,
            {
                "sde_type": "dance",
                "noise_level": 0.3,
                "timestep_fraction": 0.6,
                "timestep_fraction_per_sample": True,
                "share_initial_noise": True,
                "advantage_power": 0.25,
            },
        ),
        (VGPOConfig, {"dense_rewards": True, "value_scale": 0.05, "share_initial_noise": True}),
    ],
)
def test_a_preset_is_nothing_but_defaults(preset, fields):
    assert config(preset).to_dict() == config(**fields).to_dict()


# ---- Which steps are trained, in which precision ----


@pytest.mark.parametrize(
    ("fraction", "steps", "number"),
    [
        (0.99, 10, 9),  # Flow-GRPO's released fraction of its ten steps
        (0.6, 15, 9),  # DanceGRPO's, of FLUX's sixteen without the last
        (0.6, 49, 29),  # and of fifty
        (0.29, 100, 29),  # 28.999999999999996 in floating point
        (0.05, 9, 1),
        (1.0, 9, 9),
    ],
)
def test_a_fraction_of_the_steps_rounds_down(fraction, steps, number):
    assert config(timestep_fraction=fraction).num_trained_steps(steps) == number


def test_without_a_probe_guard_trains_in_float16_on_gpus_that_have_bfloat16(monkeypatch):
    for module in ("flow_grpo_config", "flow_rl_config"):
        monkeypatch.setattr(f"trl_flow.trainer.{module}.is_torch_bf16_gpu_available", lambda: True)
    args = config(GuardConfig, ratio_probe=0)
    assert (args.fp16, args.bf16) == (True, False)
    for other in (config(GuardConfig), config(ratio_probe=0)):
        assert (other.fp16, other.bf16) == (False, True)
    assert config(GuardConfig, ratio_probe=0, bf16=True).bf16


@pytest.mark.parametrize(("text", "meant"), [("0.1", 0.1), ("0", 0), ("[0.1, 0.1, 0]", [0.1, 0.1, 0])], ids=str)
def test_a_value_scale_from_a_command_line(text, meant):
    line = ["--output_dir", "out", "--use_cpu", "--dense_rewards", "--num_inference_steps", "3", "--value_scale", text]
    (args,) = TrlParser((FlowGRPOConfig,)).parse_args_and_config(line)
    assert args.value_scale == meant
