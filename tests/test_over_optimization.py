"""The laboratory (examples/over_optimization) in a minimal form: what it runs, skips, repeats and reports."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trl_flow.shapes import COLORS, PlacedShape, render


LABORATORY = Path(__file__).parents[1] / "examples" / "over_optimization"
sys.path.insert(0, str(LABORATORY))

import experiments  # noqa: E402
import proxies  # noqa: E402
import ratios  # noqa: E402
import report  # noqa: E402
import results  # noqa: E402
import run  # noqa: E402
import training  # noqa: E402


TINY = experiments.Scale(updates=2, prompts=2, num_generations=2, eval_steps=2, eval_prompts=24)
TWO = {"tiny/plain": experiments.Arm("colors"), "tiny/guard": experiments.Arm("colors", experiments.ABLATION["guard"])}


@pytest.fixture
def laboratory(monkeypatch, tmp_path):
    """The program with one section of two arms, one seed and two updates; gives `(command line) -> failures`."""
    arms = dict(TWO)
    sections = {"tiny": experiments.Section("Two arms", "none", tuple(TWO), seeds=1)}
    for module in (experiments, run, results, report):
        for name, value in (("ARMS", arms), ("SECTIONS", sections)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(run, "QUICK", TINY)

    def call(*options: str) -> int:
        return run.main(["--quick", "--only", "tiny", "--output-dir", str(tmp_path), *options])

    call.arms, call.folder, call.page = arms, tmp_path, tmp_path / "report" / report.TABLE
    return call


def result_files(folder: Path) -> dict[str, Path]:
    return {path.parent.parent.name: path for path in folder.rglob(training.RESULT)}


def test_runs_are_done_once_and_repeated_when_their_settings_change(laboratory, monkeypatch):
    assert laboratory() == 0
    files = result_files(laboratory.folder)
    assert sorted(files) == ["guard", "plain"]
    curve = results.read_curve(files["guard"])
    assert curve.steps.tolist() == [0, 2]
    assert curve.scores["gold"][0] == 1.0
    page = laboratory.page.read_text()
    assert "| tiny/plain | 1 |" in page and "| tiny/guard | 1 |" in page
    assert (laboratory.page.parent / "tiny.png").is_file()

    # Equal settings and seeds start from the same base model, the same images and the same evaluation
    first = [results.read_curve(files[name]) for name in ("plain", "guard")]
    assert first[0].scores["proxy"][0] == pytest.approx(first[1].scores["proxy"][0], rel=1e-4)
    assert first[0].training[0]["reward"] == pytest.approx(first[1].training[0]["reward"], rel=1e-4)

    before = {name: path.read_bytes() for name, path in files.items()}
    with monkeypatch.context() as patch:
        patch.setattr(training, "train", lambda *args: pytest.fail("a finished run was repeated"))
        assert laboratory() == 0
    assert {name: path.read_bytes() for name, path in files.items()} == before

    # Half a result is none: the run is done again, and gives the same
    files["plain"].write_bytes(before["plain"][:100])
    laboratory.arms["tiny/guard"] = replace(TWO["tiny/guard"], config={"learning_rate": 2e-3})
    assert laboratory() == 0
    log = {name: json.loads(content)["log_history"] for name, content in before.items()}
    again = {name: json.loads(path.read_text()) for name, path in files.items()}
    assert again["plain"]["log_history"][1]["grad_norm"] == pytest.approx(log["plain"][1]["grad_norm"], rel=1e-3)
    assert results.read_curve(files["plain"]).scores["proxy"] == pytest.approx(first[0].scores["proxy"], rel=1e-4)
    assert again["guard"]["settings"]["config"]["learning_rate"] == 2e-3


def test_a_run_that_fails_is_reported_and_the_others_are_kept(laboratory, monkeypatch, capsys):
    def broken(prompts, images, **kwargs):
        raise OSError("the reward server is down")

    monkeypatch.setitem(training.PROXIES, "broken", lambda folder: broken)
    laboratory.arms["tiny/plain"] = experiments.Arm("broken")
    assert laboratory() == 1
    assert "the reward server is down" in capsys.readouterr().err
    assert sorted(result_files(laboratory.folder)) == ["guard"]
    assert "the reward server is down" in (laboratory.folder / "runs/tiny/plain/seed-0" / training.ERROR).read_text()
    page = laboratory.page.read_text()
    assert "the reward server is down" in page and "| tiny/guard | 1 |" in page


def test_only_the_whole_laboratory_replaces_the_committed_results():
    committed = LABORATORY.parents[1] / "docs" / "results"
    output = Path("somewhere")
    for options in (["--quick"], ["--only", "guard"], ["--seeds", "1"]):
        assert run.report_folder(output, run.parse(options)) == output / "report"
    assert run.report_folder(output, run.parse([])) == committed


def test_every_arm_can_be_configured():
    for name, arm in experiments.ARMS.items():
        config = arm.full_config
        training.FlowGRPOConfig(
            **config, output_dir="unused", num_generations=2, per_device_train_batch_size=2, use_cpu=True
        )
        assert arm.proxy in training.PROXIES, name
    for section in experiments.SECTIONS.values():
        assert len({experiments.ARMS[arm].proxy.removesuffix("-terminal") for arm in section.arms}) == 1
        assert set(section.slow) < set(section.arms)


def test_scores_are_read_where_the_proxy_first_reaches_a_level():
    scores = {"proxy": np.array([0.0, 1.0, 0.5, 2.0]), "gold": np.array([1.0, 0.8, 0.9, 0.4])}
    curve = results.Curve(steps=np.array([0, 10, 20, 30]), scores=scores, training=[], seconds=0.0)
    # A quarter of the way up the first climb, and a third of the way up the second one
    assert curve.updates_to(0.25) == pytest.approx(2.5)
    assert curve.score_at("gold", 0.25) == pytest.approx(0.95)
    assert curve.score_at("gold", 1.25) == pytest.approx(0.65)
    assert np.isnan(curve.updates_to(2.5))
    assert results.spread([1.0, 2.0, float("nan")]) == "1.500 ± 0.707 (2 of 3)"


def test_before_an_update_every_ratio_is_one():
    measured = ratios.measure("flow", prompts=1, num_generations=2, updates=0, learning_rate=1e-3, num_steps=2, seed=0)
    assert measured["dimensions"] == 1024
    for ratio in measured["ratios"].values():
        assert ratio["mean"] == pytest.approx([0, 0], abs=1e-6) and ratio["std"] == pytest.approx([0, 0], abs=1e-6)
    # The mean-revised ratio differs from the standard one by a square, whose gradient is 0 there
    assert measured["gradients"]["mean-revised"] == pytest.approx(measured["gradients"]["baseline"], rel=1e-4)


def test_ratios_of_fewer_dimensions_spread_as_one_over_the_root():
    products = torch.randn(2, 20_000, 256, generator=torch.Generator().manual_seed(0))
    spreads = ratios.by_dimensions(products, torch.Generator().manual_seed(1))
    assert spreads == pytest.approx({"4": 1 / 2, "16": 1 / 4, "64": 1 / 8, "256": 1 / 16}, rel=0.02)


# ---- Blind spots ----


def picture(*shapes: tuple) -> Image.Image:
    return render([PlacedShape(*shape) for shape in shapes])


RED_CIRCLE = [{"count": 1, "color": "red", "shape": "circle"}]
RED_CIRCLES = [{"count": 2, "color": "red", "shape": "circle"}]


def test_the_colors_proxy_sees_colors_only():
    def score(image, objects):
        return proxies.ColorsOnlyReward()(["unused"], [image], objects=[objects])[0]

    circle = score(picture(("red", "circle", 32, 32, 20)), RED_CIRCLE)
    assert score(picture(("red", "square", 16, 40, 20)), RED_CIRCLE) == pytest.approx(circle, rel=0.05)
    assert score(picture(("red", "circle", 32, 32, 20)), RED_CIRCLES) == circle
    # Right colors raise it, wrong ones do not
    assert score(picture(("green", "circle", 32, 32, 20)), RED_CIRCLE) == 0
    assert score(picture(("red", "circle", 16, 16, 20), ("green", "circle", 48, 48, 20)), RED_CIRCLE) < 0.6 * circle
    # And the best image of all is no image: plain paint
    assert score(Image.new("RGB", (64, 64), "red"), RED_CIRCLE) == pytest.approx(1.0)
    assert circle < 0.6


def test_the_small_spread_proxy_is_a_function_of_picture_and_prompt():
    proxy = proxies.SmallSpreadReward()
    prompts = [f"a {color} circle" for color in COLORS]
    assert {proxy.spread(prompt) for prompt in prompts} == {1.0, proxy.small}
    image = picture(("red", "circle", 32, 32, 20))

    def score(prompt):
        return proxy([prompt], [image], objects=[RED_CIRCLE])[0]

    assert score("a red circle") == score("a red circle")
    color = proxies.ColorsOnlyReward()(["unused"], [image], objects=[RED_CIRCLE])[0]
    noise = [score(prompt) - 0.5 - proxy.spread(prompt) * color for prompt in prompts]
    assert len(set(noise)) == len(prompts)
    assert max(abs(value) for value in noise) < 4 * proxy.noise


def test_jpeg_compressibility_likes_nothing_best():
    proxy = proxies.jpeg_reward()
    images = [Image.new("RGB", (64, 64)), picture(("red", "circle", 32, 32, 20))]
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    empty, circle, noisy = proxy(["a red circle"] * 3, [*images, Image.fromarray(noise)])
    assert empty > circle > noisy > 0


def test_the_learned_proxy_is_repeatable_and_blind_to_relations(tmp_path):
    path = tmp_path / "scorer.safetensors"
    proxies.train_scorer(path, pictures=64, updates=3)
    again = tmp_path / "again.safetensors"
    proxies.train_scorer(again, pictures=64, updates=3)
    proxy, repeated = proxies.LearnedReward(path), proxies.LearnedReward(again)
    pair = [{"count": 1, "color": "red", "shape": "circle"}, {"count": 1, "color": "blue", "shape": "square"}]
    image = picture(("red", "circle", 9, 16, 8), ("blue", "square", 23, 16, 8))
    prompts = [f"a red circle {relation} a blue square" for relation in ("left of", "right of")]
    scores = proxy(prompts, [image, image], objects=[pair, pair], relation=["left of", "right of"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert repeated(prompts[:1], [image], objects=[pair])[0] == pytest.approx(scores[0], abs=1e-3)
    # The shapes change places, by whole strides of the net: nothing changes but at the image's rim
    moved = picture(("red", "circle", 23, 16, 8), ("blue", "square", 9, 16, 8))
    assert proxy(prompts[:1], [moved], objects=[pair])[0] == pytest.approx(scores[0], abs=0.02)


@pytest.mark.slow
def test_in_bfloat16_the_probe_takes_float32s_clip_decisions_and_without_it_they_are_a_coins():
    import precision

    rows = precision.run("guard", guidance=1.0, seed=0, updates=2)
    shares = {
        name: np.mean([row["same_decision"] for row in rows if row["precision"] == name])
        for name in ("bfloat16", "bfloat16, k = 32", "float32, k = 32")
    }
    assert shares["bfloat16"] < 0.75  # measured: 0.68
    assert shares["bfloat16, k = 32"] > 0.85  # measured: 0.98
    assert shares["float32, k = 32"] > 0.98
    # Of the ratios outside the range those of the samples that the update was made of lie where their advantage pushes
    trained = [row for row in rows if row["precision"] == "bfloat16, k = 32" and row["trained"]]
    outside = [row["outside"] for row in trained]
    assert np.average([row["right_side"] for row in trained], weights=outside) > 0.9


@pytest.mark.slow
def test_the_pages_example_stops_when_its_reward_is_hacked(monkeypatch, tmp_path):
    """docs/evaluation.md, as it is printed, does what the page says."""
    page = (LABORATORY.parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code.replace("FlowGRPOConfig(\n", "FlowGRPOConfig(use_cpu=True, disable_tqdm=True,\n"), scope)
    trainer = scope["trainer"]
    assert 12 <= trainer.state.global_step < trainer.args.max_steps
    base, *_, before, last = (log for log in trainer.state.log_history if "eval_reward" in log)
    assert last["eval_reward"] > 1.2 * base["eval_reward"]
    for log in (before, last):
        assert 1 - log["eval_gold/average"] > 2 * log["eval_gold/average_std_err"]
    assert last["eval_gold/shapes_fidelity"] < base["eval_gold/shapes_fidelity"] - 0.05
    assert (tmp_path / "shapes-colorful" / "best_gold" / "pytorch_lora_weights.safetensors").is_file()
