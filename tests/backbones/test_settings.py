"""Which settings have an effect in each family, and what they are where nobody has said."""

import pytest
from families import FAMILIES
from tiny_painter import tiny_painter_backbone

from trl_flow.backbones.settings import check_settings, effective, evaluation_steps, own_settings, with_own_settings
from trl_flow.shapes import load_pipeline


# Number of steps and guidance of each pipeline's call without arguments; of distilled models those of their release
OWN = {
    "sd3": (28, 7.0),
    "sd35-medium": (28, 7.0),
    "sd35-large": (28, 7.0),
    "sd": (50, 7.5),
    "sd-v": (50, 7.5),
    "sdxl": (50, 5.0),
    "sdxl-v": (50, 5.0),
    "flux-dev": (28, 3.5),
    "flux-schnell": (4, 1.0),
    "kontext": (28, 3.5),
    "klein-base": (50, 4.0),
    "klein": (4, 1.0),
    "qwen-image": (50, 4.0),
    "qwen-image-edit": (50, 4.0),
    "qwen-image-edit-plus": (50, 4.0),
    "z-image": (50, 5.0),
    **{name: (50, 5.0) for name in FAMILIES if name.startswith("wan")},
}
DISTILLED = ("flux-schnell", "klein")
WITHOUT_NEGATIVE = ("flux-dev", "flux-schnell", "kontext", "klein-base", "klein")
U_NETS = ("sd", "sd-v", "sdxl", "sdxl-v")

each_family = pytest.mark.parametrize("name", FAMILIES)
pytestmark = pytest.mark.usefixtures("small_input_images")


@each_family
def test_what_is_not_said_is_the_pipelines_own(name):
    backbone = FAMILIES[name].backbone()
    steps, scale = OWN[name]
    assert own_settings(backbone) == {"num_inference_steps": steps, "guidance_scale": scale}
    assert with_own_settings(backbone, {"guidance_scale": 2.0}) == {
        "num_inference_steps": steps,
        "guidance_scale": 2.0,
    }
    assert evaluation_steps(backbone, 6) == (6 if name in DISTILLED else steps)


def test_the_bundled_model_is_evaluated_in_the_steps_of_training():
    backbone = FAMILIES["sd3"].backbone(pipeline=load_pipeline())
    assert evaluation_steps(backbone, 6) == 6
    assert own_settings(backbone) == {"num_inference_steps": 10, "guidance_scale": 2.0}


def test_a_pipeline_of_ones_own_may_have_no_defaults(monkeypatch):
    backbone = tiny_painter_backbone()
    assert evaluation_steps(backbone, 6) == 10  # its call says so
    monkeypatch.setattr(type(backbone.pipeline), "__call__", lambda self, prompt: None)
    assert evaluation_steps(backbone, 6) == 6
    assert with_own_settings(backbone, {"num_inference_steps": 3}) == {"num_inference_steps": 3, "guidance_scale": 1.0}
    with pytest.raises(ValueError, match="num_inference_steps is missing"):
        with_own_settings(backbone, {})


@each_family
def test_a_setting_without_effect_is_refused_by_its_name(name):
    family = FAMILIES[name]
    backbone, guided, unguided = family.backbone(), 5.0, family.unguided

    def refused(scales=(guided,), **given) -> bool:
        try:
            check_settings(backbone, given, scales)
        except ValueError as error:
            assert str(error).startswith(next(iter(given))) and "Leave" in str(error) or "leave" in str(error)
            return True
        return False

    assert refused(negative_prompt="a moth") == (name in WITHOUT_NEGATIVE)
    assert refused(negative_prompt="a moth", scales=[unguided])
    assert refused(negative_prompt="a moth", scales=[unguided, guided]) == (name in WITHOUT_NEGATIVE)
    assert refused(guidance_scale=3.5) == refused(eval_guidance_scale=3.5) == (name in DISTILLED)
    assert refused(max_sequence_length=48) == (name in U_NETS)
    # What asks for nothing
    nothing = {"negative_prompt": "", "guidance_scale": 1.0, "max_sequence_length": None}
    assert not refused(**nothing) and not refused(guidance_scale=0.0) and not refused()
    used = {"negative_prompt": name not in WITHOUT_NEGATIVE, "guidance_scale": name not in DISTILLED}
    used |= {"max_sequence_length": name not in U_NETS, "height": True}
    given = {"negative_prompt": "a moth", "guidance_scale": 5.0, "max_sequence_length": 48, "height": 16}
    assert effective(backbone, given) == {key: value for key, value in given.items() if used[key]}


@pytest.mark.parametrize("name", U_NETS)
def test_the_length_that_prompts_have_anyway_is_not_refused(name):
    backbone = FAMILIES[name].backbone()
    check_settings(backbone, {"max_sequence_length": backbone.pipeline.tokenizer.model_max_length}, [1.0])
