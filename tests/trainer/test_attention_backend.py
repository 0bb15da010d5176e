"""`attention_backend`: one of diffusers' for the trained model, in sampling and updates."""

import pytest
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from families import FAMILIES
from family_checks import family_trainer
from tiny_models import tiny_sd3_pipeline
from tiny_training import distance, tiny_trainer, trained_weights


def backends_of(model) -> set:
    processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
    return {getattr(processor, "_attention_backend", "none") for processor in processors}


@pytest.mark.parametrize("name", ["flux-dev", "qwen-image", "z-image", "klein-base", "wan22-high"])
def test_sampling_and_updates_use_it(name, tmp_path):
    family, active = FAMILIES[name], _AttentionBackendRegistry.get_active_backend()
    plain = family_trainer(family, tmp_path / "plain", max_steps=1)
    trainer = family_trainer(family, tmp_path / "math", max_steps=1, attention_backend="_native_math")
    for model in trainer.backbone.sampled_models:
        assert backends_of(model) == {AttentionBackendName._NATIVE_MATH}
    assert _AttentionBackendRegistry.get_active_backend() == active  # of others in this process
    before = trained_weights(trainer)
    for each in (plain, trainer):
        each.train()
    assert trainer.state.log_history[0]["ratio/first_update_deviation"] < 1e-6
    # Adam's first step follows the gradient's sign alone
    assert distance(trained_weights(trainer), before) > 1e-3
    assert trainer.state.log_history[0]["reward"] == pytest.approx(plain.state.log_history[0]["reward"], abs=1e-3)
    assert '"attention_backend": "_native_math"' in trainer.args.shown()


def test_it_compiles(tmp_path):
    options = {"attention_backend": "_native_math", "torch_compile_backend": "eager", "max_steps": 1}
    trainer = family_trainer(FAMILIES["flux-dev"], tmp_path, **options)
    trainer.train()
    assert trainer.state.log_history[0]["ratio/first_update_deviation"] < 1e-6


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("fast", ("'fast'", "native", "flash_hub")),
        ("flash", ("'flash'", "flash-attn", "cpu")),
        ("sage", ("'sage'", "sageattention")),
        ("xformers", ("'xformers'", "xformers")),
    ],
)
def test_what_does_not_work_here_is_refused_with_what_it_needs(name, parts, tmp_path):
    with pytest.raises(ValueError, match="attention_backend") as error:
        family_trainer(FAMILIES["flux-dev"], tmp_path / "run", attention_backend=name)
    assert all(part in str(error.value) for part in parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_model_without_the_choice_is_named(name, tmp_path):
    if name == "sd":
        with pytest.raises(ValueError, match=r"UNet2DConditionModel does not choose.*Leave attention_backend out"):
            family_trainer(FAMILIES["sd"], tmp_path, attention_backend="native")
    else:
        with pytest.raises(ValueError, match=r"SD3Transformer2DModel does not choose"):
            tiny_trainer(tmp_path, pipeline=tiny_sd3_pipeline(), attention_backend="native")
