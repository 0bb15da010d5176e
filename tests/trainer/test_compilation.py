"""`torch_compile`: sampling and updates run one graph, and nothing else of a run changes."""

import pytest
import torch
from families import FAMILIES
from family_checks import check_training
from safetensors.torch import load_file
from tiny_flux import tiny_kontext_sizes
from tiny_models import tiny_sd3_pipeline
from tiny_training import assert_equal, brightness, prompts, tiny_config, tiny_trainer, trained_weights, warnings_of

from trl_flow import DiffusionNFTConfig, FlowGRPOConfig, GuardConfig
from trl_flow.trainer import compilation


# Traced and guarded as for any backend, but what runs are torch's own kernels
TRACED = {"torch_compile_backend": "eager"}


def no_cats(prompts, images, **kwargs):
    pairs = zip(prompts, brightness(prompts, images), strict=True)
    return [0.0 if prompt == "a cat" else value for prompt, value in pairs]


def stages_of(trainer) -> list[str]:
    """What the trainer says that it is doing, as it goes on."""
    stages, callback = [], trainer._progress
    show = callback.show_stage

    def collect(stage: str) -> None:
        stages.append(stage)
        show(stage)

    callback.show_stage = collect
    return stages


def test_sampling_compiles_what_updates_run(tmp_path, capsys):
    plain = tiny_trainer(tmp_path / "plain")
    plain.train()
    trainer = tiny_trainer(tmp_path / "compiled", **TRACED)
    stages = stages_of(trainer)
    trainer.train()
    assert "Compiling 2 parts of the model (eager)" in capsys.readouterr().out
    # One graph for each of the two blocks, which differ, in the first step of all
    compiling = [stage for stage in stages if stage.startswith("compiling")]
    assert compiling == ["compiling, while sampling images 1 to 8 of 8, step 1 of 4"] * 2
    first, second = trainer.state.log_history[:2]
    assert first["ratio/first_update_deviation"] == 0
    assert first["time/compiling"] > 0 and "time/compiling" not in second
    assert_equal(trained_weights(trainer), trained_weights(plain))
    # Afterwards the pipeline is as it was passed in
    assert not any(module._compiled_call_impl for module in trainer.pipeline.transformer.modules())


RUNS = {
    "all weights, KL": {"lora": None, "beta": 0.04},
    "KL": {"beta": 0.04},
    "DiffusionNFT": {"cls": DiffusionNFTConfig},
    "DiffusionNFT, all weights": {"cls": DiffusionNFTConfig, "lora": None},
    "as a whole": {"use_regional_compilation": False, "gradient_checkpointing": True, "beta": 0.04},
    "probe": {"ratio_probe": 4, "num_iterations": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "part of each group": {"num_generations_trained": 2},
    "groups sampled again": {"dynamic_sample": True, "reward_funcs": no_cats},
    "common steps": {"share_initial_noise": True, "sde_window_size": 1, "sde_window_range": [1, 2]},
    "evaluation, average": {
        "use_ema": True,
        "eval_dataset": prompts(3),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 2,
        "eval_guidance_scale": 1.0,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_what_it_does_uncompiled(name, tmp_path):
    trainers = [tiny_trainer(tmp_path / str(i), **RUNS[name], **fields) for i, fields in enumerate(({}, TRACED))]
    with warnings_of("trl_flow") as warnings:
        for trainer in trainers:
            trainer.train()
    plain, compiled = trainers
    assert_equal(trained_weights(compiled), trained_weights(plain))
    for log, expected in zip(compiled.state.log_history, plain.state.log_history, strict=True):
        for key in ("eval_reward", "reward", "kl", "ratio/first_update_deviation"):
            assert (key in log) == (key in expected)
            assert log.get(key, 0.0) == pytest.approx(expected.get(key, 0.0), abs=1e-5)
    assert not [warning for warning in warnings if "recompile_limit" in warning]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_compiles(name, tmp_path):
    with tiny_kontext_sizes():
        check_training(FAMILIES[name], GuardConfig, torch.float32, tmp_path, **TRACED)


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_inductors_kernels_are_the_same_in_sampling_and_updates(half, tmp_path):
    """Those of a forward without gradients are others, which in half precision round differently."""
    pipeline = tiny_sd3_pipeline()
    pipeline.transformer.to(torch.bfloat16 if half else torch.float32)
    trainer = tiny_trainer(tmp_path, cls=GuardConfig, pipeline=pipeline, torch_compile=True, bf16=half, max_steps=1)
    assert trainer.args.torch_compile_backend == "inductor"
    trainer.train()
    assert trainer.state.log_history[0]["ratio/first_update_deviation"] == 0


@pytest.mark.parametrize("lora", ["default", None], ids=["lora", "full"])
def test_a_run_resumes_compiled_or_not(lora, tmp_path):
    fields = {"lora": lora, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    plain = tiny_trainer(tmp_path / "plain", **fields)
    plain.train()
    compiled = tiny_trainer(tmp_path / "compiled", **fields, **TRACED)
    compiled.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-1"))
    assert_equal(trained_weights(compiled), trained_weights(plain))
    # The names, too, are those of the module inside
    name = "diffusion_pytorch_model.safetensors" if lora is None else "adapter_model.safetensors"
    saved = [load_file(tmp_path / kind / "checkpoint-2" / name) for kind in ("compiled", "plain")]
    assert_equal(*saved)
    again = tiny_trainer(tmp_path / "again", **fields | {"max_steps": 3})
    again.train(resume_from_checkpoint=str(tmp_path / "compiled" / "checkpoint-2"))
    assert again.state.global_step == 3


def test_more_variants_than_torch_takes_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "RECOMPILE_LIMIT", 1)
    torch._dynamo.reset()
    trainer = tiny_trainer(tmp_path, max_steps=1, **TRACED)
    with warnings_of("trl_flow") as warnings, torch._dynamo.config.patch(recompile_limit=1):
        trainer.train()
    assert len([warning for warning in warnings if "recompile_limit" in warning]) == 1


# ---- What is refused ----


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"torch_compile_backend": "inductr"}, ("'inductr'", "inductor", "eager")),
        ({"torch_compile_mode": "fast"}, ("'fast'", "max-autotune-no-cudagraphs")),
        ({"torch_compile_mode": "reduce-overhead"}, ("'reduce-overhead'", "CUDA graphs", "'default'")),
        ({"torch_compile_mode": "max-autotune-no-cudagraphs", **TRACED}, ("torch_compile_backend='inductor'",)),
    ],
    ids=str,
)
def test_what_cannot_compile_is_refused_by_the_config(fields, parts, tmp_path):
    with pytest.raises(ValueError, match="torch_compile") as error:
        tiny_config(tmp_path, **fields)
    assert all(part in str(error.value) for part in parts)


def test_a_compiler_that_fails_is_found_before_training(tmp_path):
    def broken(graph, inputs):
        raise RuntimeError("No working C++ compiler found")

    torch._dynamo.register_backend(broken, name="broken_for_a_test")
    with pytest.raises(ValueError, match=r"No working C\+\+ compiler found.*torch_compile=False"):
        tiny_trainer(tmp_path / "run", torch_compile_backend="broken_for_a_test")
    assert not (tmp_path / "run").exists()


def test_tf32_stays_off_unless_it_is_asked_for(tmp_path):
    assert tiny_config(tmp_path, torch_compile=True).tf32 is False
    assert tiny_config(tmp_path).tf32 is None


def test_what_accelerate_launch_says_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    trainer = tiny_trainer(tmp_path)
    assert (trainer.args.torch_compile, trainer.args.torch_compile_backend) == (True, "eager")
    # and updates alone are not compiled once more
    assert trainer.accelerator.state.dynamo_plugin.backend == "NO"
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    assert isinstance(tiny_config(tmp_path), FlowGRPOConfig) and not tiny_config(tmp_path).torch_compile
