"""What the VAE gives is looked at after every decode: NaN becomes a black image, which rewards would score."""

from functools import partial

import pytest
import torch
from families import FAMILIES as ALL
from family_checks import Family
from tiny_flux import tiny_flux_pipeline, tiny_klein_pipeline, tiny_kontext_pipeline
from tiny_models import tiny_sd3_pipeline
from tiny_qwen import tiny_qwen_image_pipeline, tiny_z_image_pipeline
from tiny_training import prompts, tiny_trainer
from tiny_unets import tiny_sd_pipeline, tiny_sdxl_pipeline

from trl_flow.cli import main
from trl_flow.evaluation.drawing import draw
from trl_flow.evaluation.steps import predict_steps
from trl_flow.rollout import decode


FAMILIES = {
    "sd3": Family(tiny_sd3_pipeline),
    "sd": Family(tiny_sd_pipeline, size=(32, 32)),
    "sdxl": Family(tiny_sdxl_pipeline, size=(32, 32)),
    "flux": Family(tiny_flux_pipeline),
    "kontext": Family(tiny_kontext_pipeline),
    "klein": Family(tiny_klein_pipeline, max_sequence_length=24),
    "qwen-image": Family(tiny_qwen_image_pipeline, max_sequence_length=40),
    "wan": ALL["wan21"],
    "z-image": Family(tiny_z_image_pipeline, max_sequence_length=48),
}
OVERFLOW = r"The VAE, in torch\.float16, gave NaN or infinite values.*Load it in float32"


def overflowing(pipeline):
    """Its VAE is in half precision, which ends at 65,504."""
    pipeline.vae.to(torch.float16).decoder.conv_in.weight.data.mul_(2e5)
    return pipeline


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_vae_that_overflows_is_named_with_its_dtype(name):
    backbone = FAMILIES[name].backbone()
    latents = torch.randn(1, *backbone.latent_shape(), generator=torch.Generator().manual_seed(0))
    backbone.decode(latents)
    overflowing(backbone.pipeline)
    with pytest.raises(FloatingPointError, match=OVERFLOW):
        backbone.decode(latents)
    # Where the latents are at fault already, it is not the VAE
    with pytest.raises(FloatingPointError, match=rf"The {backbone.component}, in torch\.float32, gave NaN"):
        decode(backbone, latents * float("nan"))


@pytest.mark.parametrize("evaluates", [False, True])
def test_training_and_its_evaluation_end_with_it(evaluates, tmp_path):
    pipeline = overflowing(tiny_sd3_pipeline())
    trainer = tiny_trainer(tmp_path, pipeline=pipeline, eval_dataset=prompts(2))
    with pytest.raises(FloatingPointError, match=OVERFLOW):
        trainer.evaluate() if evaluates else trainer.train()


def test_rewards_of_unfinished_images_end_with_it(tmp_path):
    fields = {"dense_rewards": True, "value_discount": 0.5, "value_scale": 0.2}
    trainer = tiny_trainer(tmp_path, **fields)

    def breaks_the_vae(prompts, images, **kwargs):  # the finished images are scored first
        overflowing(trainer.pipeline)
        return [0.0, 1.0] * (len(images) // 2)

    trainer.scorer.reward_funcs[0] = breaks_the_vae
    with pytest.raises(FloatingPointError, match=OVERFLOW):
        trainer.train()


def test_drawing_ends_with_it():
    options = {"seed": 0, "num_inference_steps": 2}
    backbone = FAMILIES["sd3"].backbone(pipeline=overflowing(tiny_sd3_pipeline()))
    for drawn in (partial(draw, backbone, ["a cat"]), partial(predict_steps, backbone, "a cat", guidance_scale=1.0)):
        with pytest.raises(FloatingPointError, match=OVERFLOW):
            drawn(**options)


def test_a_text_encoder_that_overflows_is_named(tmp_path):
    pipeline = tiny_sd3_pipeline()
    pipeline.text_encoder_3.to(torch.float16).shared.weight.data.fill_(torch.inf)
    what = "The condition 'encoder_hidden_states' of the prompt 'a cat' has NaN.*Load the text encoders in bfloat16"
    with pytest.raises(FloatingPointError, match=what):
        draw(FAMILIES["sd3"].backbone(pipeline=pipeline), ["a cat"], seed=0, num_inference_steps=1)
    with pytest.raises(FloatingPointError, match=what.replace("'a cat'", "'.*'")):
        tiny_trainer(tmp_path, pipeline=pipeline).train()


def test_the_command_says_it_without_a_traceback(tmp_path, capsys):
    overflowing(tiny_sd3_pipeline()).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    options = "--num_inference_steps 1 --height 16 --width 16 --max_sequence_length 16 --device cpu --dtype float16"
    arguments = ["--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.txt")]
    arguments += ["--proxy", "jpeg_compressibility", "--output_dir", str(tmp_path / "out"), *options.split()]
    try:
        code = main(["evaluate", *arguments])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error
    assert "gave NaN or infinite values" in error
