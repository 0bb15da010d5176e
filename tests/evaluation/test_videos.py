"""Evaluations of models that draw videos: what is kept, scored, read back and shown."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import WanPipeline
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_comparisons import assert_same_images
from tiny_videos import gray, moving_square
from tiny_wan import tiny_wan_pipeline

from trl_flow.evaluation import DrawingOptions, evaluate_models, predict_steps, steps_grid
from trl_flow.evaluation.diversity import diversity, thumbnails
from trl_flow.evaluation.drawing import draw
from trl_flow.evaluation.grids import comparison_grid, image_grid
from trl_flow.evaluation.image_folder import ImageFolder
from trl_flow.evaluation.scoring import score_images
from trl_flow.evaluation.videos import read_frames, read_mp4, write_frames, write_mp4
from trl_flow.rewards import FrameReward, MotionReward
from trl_flow.sharing import save_lora
from trl_flow.trainer.metrics import SampleLog


PROMPTS = ["a red circle", "two blue squares"]
SIZE = {"height": 16, "width": 32, "num_frames": 5}
SAMPLING = {"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 16, **SIZE}


def brightness(prompts, images, **kwargs):
    return [float(np.asarray(image).mean()) for image in images]


def pixels(video):
    return np.stack([np.asarray(frame, dtype=int) for frame in video])


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    torch.manual_seed(1)
    model = get_peft_model(tiny_wan_pipeline().transformer, LoraConfig(r=4, target_modules=["to_q", "to_v"]))
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.add_(torch.randn(parameter.shape))
    folder = tmp_path_factory.mktemp("adapters") / "ours"
    save_lora(WanPipeline, model, folder)
    # What the run says beside its weights
    (folder / "training_args.json").write_text(json.dumps({"reward_frame": "last"}))
    return str(folder)


@pytest.fixture(scope="module")
def evaluate(lora, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "videos"

    def run(**changed):
        rewards = {"proxy": [MotionReward(), brightness], "gold": FrameReward(brightness, every=1)}
        arguments = {"prompts": Dataset.from_dict({"prompt": PROMPTS}), "options": DrawingOptions(**SAMPLING)}
        arguments |= {"output_dir": folder, "progress": False, **rewards, **changed}
        return evaluate_models(tiny_wan_pipeline(), [lora], **arguments)

    return run


@pytest.fixture(scope="module")
def compared(evaluate):
    return evaluate()


def test_frames_are_kept_as_they_were_drawn_and_mp4_beside_them(compared):
    drawn = draw(tiny_wan_pipeline(), PROMPTS, seed=0, batch_size=8, **SAMPLING)
    folder = ImageFolder(compared.folder)
    for index, video in enumerate(drawn):
        assert len(video) == 5 and video[0].size == (32, 16)
        assert_same_images(folder.load("prompts", "base", index), video)
        mp4 = folder.shown_path("prompts", "base", index)
        assert mp4.name == f"{index:06d}.mp4" and len(read_mp4(mp4)) == 5
    assert {path.name for path in compared.folder.iterdir()} >= {"grid-prompts.png", "comparison.html", "results.json"}


def test_scores_are_of_the_frames_and_of_the_run_s_own_frame(compared):
    folder = ImageFolder(compared.folder)
    for model in ("base", "ours"):
        videos = [folder.load("prompts", model, index) for index in range(2)]
        scores = compared.scores["prompts"][model]
        np.testing.assert_allclose(scores["motion"], MotionReward()(PROMPTS, [], videos), rtol=1e-6)
        np.testing.assert_allclose(scores["brightness"], [pixels(video)[-1].mean() for video in videos], rtol=1e-6)
        np.testing.assert_allclose(scores["brightness_frames"], [pixels(video).mean() for video in videos], rtol=1e-6)
    assert compared.results["sets"]["prompts"]["gold"]["base"]["average"] == 1.0
    known = json.loads((compared.folder / "scores.json").read_text())["rewards"]
    assert known["brightness"].endswith(" of the last frame")
    assert "Rewards of images got the last frame of each video." in compared.markdown
    assert "every" in known["brightness_frames"] and "test_videos.brightness" in known["brightness_frames"]


def test_another_frame_is_scored_anew(evaluate, compared):
    folder = ImageFolder(compared.folder)
    first = evaluate(reward_frame="first").scores["prompts"]["ours"]["brightness"]
    expected = [pixels(folder.load("prompts", "ours", index))[0].mean() for index in range(2)]
    np.testing.assert_allclose(first, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="reward_frame is 'second', but must be one of first, middle, last"):
        evaluate(reward_frame="second")


def test_the_page_has_the_mp4_files(compared):
    page = (compared.folder / "comparison.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    uris = data["sets"][0]["images"]["ours"]
    assert [uri[:22] for uri in uris] == ["data:video/mp4;base64,"] * 2
    assert "media-src data:" in page and data["note"].endswith("scored were the frames as they were drawn.")


def test_a_page_that_would_be_too_large_shows_fewer_prompts(evaluate, compared):
    page = (evaluate(page_megabytes=0.004).folder / "comparison.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert len(data["sets"][0]["prompts"]) == 1 and "it shows 1 of 2 prompts" in data["note"]


def test_grids_are_strips(compared):
    # A prompt's row: two models, four frames each, of 32 x 16 pixels enlarged eight times, with gaps
    assert Image.open(compared.folder / "grid-prompts.png").width == 6 + 2 * (4 * 128 + 3 * 2 + 6)


def test_what_models_predict_at_each_step(lora, tmp_path):
    from trl_flow.backbones import get_backbone

    sizes = {name: value for name, value in SAMPLING.items() if name in (*SIZE, "max_sequence_length")}
    backbone = get_backbone(tiny_wan_pipeline(), **sizes)
    predicted = predict_steps(backbone, PROMPTS[0], seed=0, num_inference_steps=2, guidance_scale=1.0)
    assert [len(video) for video in predicted] == [5, 5]
    drawn = draw(tiny_wan_pipeline(), PROMPTS[:1], seed=0, **SAMPLING)
    assert_same_images(predicted[-1], drawn[0])
    dataset, options = Dataset.from_dict({"prompt": PROMPTS}), DrawingOptions(**SAMPLING)
    grid = steps_grid(tiny_wan_pipeline(), [lora], prompts=dataset, options=options, num_prompts=1, progress=False)
    assert grid.width > 2 * 128


def test_without_the_extra_nothing_is_drawn(evaluate, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match=r'pip install "trl_flow\[video\]"'):
        evaluate(output_dir=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_rewards_of_videos_are_refused_for_models_of_images(tiny_sd3, tmp_path):
    dataset, options = Dataset.from_dict({"prompt": PROMPTS}), DrawingOptions(height=16, width=16)
    arguments = {"prompts": dataset, "output_dir": tmp_path / "new", "options": options}
    with pytest.raises(ValueError, match="'motion' needs videos, but this model draws images"):
        evaluate_models(tiny_sd3, proxy=MotionReward(), **arguments)


# ---- Files ----


@pytest.mark.parametrize("frames", [1, 2, 9])
def test_an_mp4_is_read_back_up_to_the_codec(tmp_path, frames):
    video = moving_square(frames=frames, size=(96, 64))
    write_mp4(tmp_path / "a.mp4", video, 16)
    found = read_mp4(tmp_path / "a.mp4")
    assert len(found) == frames and found[0].size == (96, 64)
    # The square's edges blur; its place does not
    assert np.abs(pixels(found) - pixels(video)).mean() < 1.5
    before, after = (score_images([v], Dataset.from_dict({"prompt": ["a"]}), MotionReward()) for v in (video, found))
    assert after["motion"] == pytest.approx(before["motion"], abs=0.002)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_frames_are_kept_without_loss_and_those_that_are_alike_stay(tmp_path):
    random = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3), dtype=np.uint8)
    video = [Image.fromarray(frame) for frame in random[[0, 0, 1, 1, 1, 2]]]
    for frame in video:
        frame.info["duration"] = 40
    write_frames(file := io.BytesIO(), video)
    assert np.array_equal(pixels(read_frames(Image.open(file))), pixels(video))


def test_a_folder_reads_what_is_left(tmp_path):
    folder, video = ImageFolder(tmp_path), moving_square(size=(32, 32))
    for index, frames in enumerate([video, video[:1]]):
        folder.save("set", "base", index, frames, 16)
        assert np.array_equal(pixels(folder.load("set", "base", index)), pixels(frames))
    assert folder.has("set", "base", [0, 1])
    folder.image_path("set", "base", 0).unlink()
    assert folder.has("set", "base", [0]) and len(folder.load("set", "base", 0)) == len(video)
    assert np.abs(pixels(folder.load("set", "base", 0)) - pixels(video)).mean() < 1.5
    folder.shown_path("set", "base", 0).write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"000000.mp4 is missing or damaged .* it will be redrawn") as error:
        folder.load("set", "base", 0)
    assert len(str(error.value)) < 300
    folder.save("set", "base", 2, video, 16)
    folder.shown_path("set", "base", 2).unlink()
    assert len(folder.load("set", "base", 2)) == len(video)


# ---- Numbers ----


def test_diversity_of_videos_is_over_four_frames():
    assert thumbnails([gray(0, 10, 20, 30, 40)] * 3).shape == (3, 4 * 3072)
    black, white, half = gray(0, 0, 0, 0), gray(255, 255, 255, 255), gray(0, 0, 255, 255)
    assert diversity([black, black], 2) == 0.0
    assert diversity([black, white], 2) == pytest.approx(1.0)
    # The root mean square over frames: half of them differ by 1
    assert diversity([black, half], 2) == pytest.approx(0.5**0.5)


def test_grids_that_the_trainer_logs_are_strips(tmp_path):
    args = SimpleNamespace(log_images=True, num_images_to_log=2, output_dir=str(tmp_path), report_to=[])
    state = SimpleNamespace(is_world_process_zero=True, global_step=3)
    log = SampleLog(args, ["motion"])
    log.write(
        [gray(0, 1, 2, 3, size=(128, 64))] * 3, ["a", "b", "c"], "step-000003", state, SimpleNamespace(callbacks=[])
    )
    with Image.open(tmp_path / "images" / "step-000003.png") as grid:
        assert grid.width == 6 + 4 * 128 + 3 * 2 + 6


def test_strips_show_the_first_frame_to_the_last():
    video = gray(*range(0, 90, 10), size=(128, 64))
    grid = np.asarray(image_grid([video]))
    assert grid[6 + 32, [6 + 64 + i * 130 for i in range(4)], 0].tolist() == [0, 30, 50, 80]
    assert image_grid([video] * 16).width == 6 + 2 * (4 * 128 + 3 * 2 + 6)  # two columns of eight
    sheet = comparison_grid([[video, video[0]]], ["video", "image"], ["one"], cell=128)
    assert sheet.width == 6 + 2 * (4 * 128 + 3 * 2 + 6)
    # Large frames are reduced
    assert image_grid([gray(0, 1, size=(832, 480))]).width == 6 + 2 * 256 + 2 + 6
