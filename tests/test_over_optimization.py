"""The laboratory (examples/over_optimization) in a minimal form: what it runs, skips, repeats and reports."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trl_flow.shapes import IMAGE_SIZE, PlacedShape, load_pipeline, load_prompts, render
from trl_flow.shapes.bundled import T5_TOKENS


LABORATORY = Path(__file__).parents[1] / "examples" / "over_optimization"
sys.path.insert(0, str(LABORATORY))

import analysis  # noqa: E402
import experiments  # noqa: E402
import mechanism  # noqa: E402
import proxies  # noqa: E402
import report  # noqa: E402
import rounding  # noqa: E402
import run  # noqa: E402
import training  # noqa: E402
import work  # noqa: E402


PLAIN, GUARD = "recall: baseline", "recall: guard"


@pytest.fixture
def laboratory(monkeypatch, tmp_path):
    """The program with one claim of two arms, one seed and a few updates; gives `(command line) -> failures`."""
    claim = replace(experiments.CLAIMS["guard-recall"], title="Two arms")
    tables = {"ARMS": dict(experiments.ARMS), "CLAIMS": {"tiny": claim}, "MEASUREMENTS": ()}
    for module in (experiments, run, analysis, report):
        for name, value in tables.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(work, "measured", lambda: 1e-3)

    def call(*options: str) -> int:
        return run.main(["--quick", "--output", str(tmp_path / "results.jsonl"), *options])

    call.arms, call.results, call.page = run.ARMS, tmp_path / "results.jsonl", tmp_path / "report" / report.PAGE
    return call


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_runs_are_done_once_and_repeated_when_their_settings_change(laboratory, monkeypatch, capsys):
    assert laboratory("--estimate") == 0
    assert "2 runs to do" in capsys.readouterr().out and not laboratory.results.exists()
    assert laboratory() == 0
    plain, guard = lines(laboratory.results)
    assert (plain["arm"], guard["arm"]) == (PLAIN, GUARD)
    assert plain["evaluations"]["update"] == [0, 4]
    page = laboratory.page.read_text()
    assert "| baseline | 1 of 5 |" in page and "| guard | 1 of 5 |" in page
    assert "1 of 5 seeds" in page.split("\n\n")[1]  # the first paragraph
    assert (laboratory.page.parent / "tiny.png").is_file()
    # Equal seeds start from the same base model, the same images and the same evaluation
    assert plain["evaluations"]["soft"][0] == pytest.approx(guard["evaluations"]["soft"][0], rel=1e-4)
    assert plain["evaluations"]["reward"][1] == pytest.approx(guard["evaluations"]["reward"][1], rel=1e-4)

    with monkeypatch.context() as patch:
        patch.setattr(training, "run", lambda *args: pytest.fail("a finished run was repeated"))
        assert laboratory() == 0

    # Half a line is none: the run is done again, and gives the same
    whole = laboratory.results.read_text().splitlines()
    laboratory.results.write_text(whole[0][:100] + "\n" + whole[1] + "\n")
    assert laboratory() == 0
    again = analysis.read(laboratory.results)[plain["fingerprint"]]
    assert again["evaluations"]["proxy"] == pytest.approx(plain["evaluations"]["proxy"], abs=1e-3)

    changed = replace(laboratory.arms[GUARD], fields=laboratory.arms[GUARD].fields | {"learning_rate": 2e-4})
    assert training.fingerprint(changed.settings(0, True)) not in analysis.read(laboratory.results)


def test_a_run_that_fails_is_reported_and_the_others_are_kept(laboratory, monkeypatch, capsys):
    def broken(prompts, images, **kwargs):
        raise OSError("the reward server is down")

    monkeypatch.setitem(training.PROXIES, "broken", lambda folder: broken)
    monkeypatch.setitem(laboratory.arms, PLAIN, replace(laboratory.arms[PLAIN], proxy="broken"))
    assert laboratory() == 1
    assert "the reward server is down" in capsys.readouterr().out
    assert [row["arm"] for row in lines(laboratory.results)] == [GUARD]
    assert "| baseline | 0 of 5 |" in laboratory.page.read_text()


def test_after_its_hours_no_run_is_begun(laboratory):
    assert laboratory("--hours", "0") == 0
    assert not laboratory.results.exists()


def test_every_arm_can_be_configured_with_the_papers_proportions():
    for name, arm in experiments.ARMS.items():
        settings = arm.settings(0, quick=False)
        assert work.units(settings) > 0
        if settings["kind"] != "training":
            continue
        assert settings["proxy"] in training.PROXIES, name
        fields = settings["fields"]
        fields = fields if settings["method"] == "FlowGRPO" else training.without_noise(fields)
        config = getattr(training.trl_flow, f"{settings['method']}Config")
        args = config(output_dir="unused", num_generations=2, per_device_train_batch_size=2, use_cpu=True, **fields)
        assert not getattr(args, "train_last_step", False)
    plain, guard = (
        experiments.ARMS[f"learned: {name}"].settings(0, False)["fields"] for name in ("baseline", "guard")
    )
    assert guard["learning_rate"] == pytest.approx(plain["learning_rate"] / 3)
    assert guard["epsilon"] / 2e-6 == pytest.approx(plain["epsilon"] / 1e-4)
    for claim in experiments.CLAIMS.values():
        assert claim.subject in claim.arms[1:] and set(claim.arms) <= set(experiments.ARMS)


def curve(proxy, gold, updates=(0, 10, 20, 30)) -> analysis.Curve:
    scores = {"proxy": np.array(proxy), "gold": np.array(gold)}
    return analysis.Curve(np.array(updates), scores, {})


def test_runs_are_compared_where_both_have_been():
    fast, slow = curve([0.0, 1.0, 2.0, 4.0], [1.0, 0.9, 0.8, 0.6]), curve([0.0, 0.5, 0.8, 1.0], [1.0, 1.0, 1.0, 1.0])
    # Of the way to 1: 5/8, 6/8, 7/8 and 8/8, where the fast one has lost a tenth of it
    assert analysis.difference("gold", "proxy", fast, slow) == pytest.approx(-0.1 * (5 + 6 + 7 + 8) / 32)
    assert analysis.difference("gold", "updates", fast, slow) == pytest.approx(0.7 - 1.0)
    # To 5/8: 6.25 updates against 10 and 10 / 3 x 1.25
    assert math.exp(analysis.slowness(fast, slow)) == pytest.approx(6.25 / (10 + 10 * 0.125 / 0.3))


def test_intervals_are_students_over_seeds():
    effect = analysis.Effect.of([0.1, 0.2, 0.3, math.nan])
    assert (effect.mean, effect.seeds) == (pytest.approx(0.2), 3)
    assert effect.half == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    assert not effect.is_detected and not analysis.Effect.of([1.0]).is_detected
    assert analysis.Effect.of([0.1, 0.11, 0.09]).is_detected
    assert report._told(effect).startswith("not detected")


def test_a_claim_needs_five_seeds_and_an_interval_without_zero():
    claim = experiments.CLAIMS["guard-recall"]

    def verdict(gold: float, seeds: int) -> str:
        first = {seed: curve([0.0, 1.0], [1.0, 0.8 + seed / 100], (0, 10)) for seed in range(seeds)}
        own = {seed: curve([0.0, 1.0], [1.0, gold + seed / 90], (0, 10)) for seed in range(seeds)}
        return analysis.verdict(claim, {PLAIN: first, GUARD: own})

    assert verdict(0.9, 5) == "holds" and verdict(0.7, 5) == "does not hold"
    assert verdict(0.7999, 5) == "not detected" and verdict(0.9, 4) == "not decided"


def test_a_run_ends_when_two_evaluations_are_hacked():
    stop, control = training.StopWhenHacked(0.8), type("Control", (), {"should_training_stop": False})()
    for value, ends in ((1.0, False), (0.7, False), (0.85, True)):
        metrics = dict.fromkeys(training.SCORES.values(), value)
        stop.on_evaluate(None, None, control, metrics)
        assert control.should_training_stop is ends


def test_the_lag_grows_and_is_published_for_more_dimensions():
    measured = mechanism.lag(seed=0, prompts=2, num_generations=3, lags=[1, 2])
    assert measured["dimensions"] == math.prod(mechanism.Policy(0).backbone.latent_shape())
    one, two = (measured["lags"][lag] for lag in ("1", "2"))
    assert all(first < second for first, second in zip(one["move"], two["move"], strict=True))
    # Published for more dimensions: the same move has a larger delta sqrt(D)
    scale = math.sqrt(mechanism.REFERENCE_DIM / measured["dimensions"])
    assert measured["published"] == pytest.approx([move * scale for move in one["move"]])


def test_a_random_walk_and_a_signal_are_told_apart():
    noise = torch.randn(400, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    walk, signal = mechanism.walk(noise, chunk=2), mechanism.walk(noise + 1, chunk=2)
    assert list(walk["norms"])[-1] == "800"
    assert report._exponent(walk["norms"]) == pytest.approx(-0.5, abs=0.1)
    assert abs(walk["signal"]) < 0.5 and signal["signal"] > 0.95
    assert abs(report._exponent(signal["norms"])) < 0.1


def test_emulated_rounding_is_autocasts():
    transformer = load_pipeline().transformer
    config, generator = transformer.config, torch.Generator().manual_seed(0)
    latents = torch.randn(2, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    given = {
        "encoder_hidden_states": torch.randn(2, 12 + T5_TOKENS, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim, generator=generator),
        "timestep": torch.tensor([668.0, 100.0]),
    }

    @torch.no_grad()
    def error(forward, context=None) -> float:
        with context or torch.autocast("cpu", enabled=False):
            return (forward(latents, **given).sample.float() - exact).square().mean().sqrt().item()

    exact = transformer(latents, **given).sample.detach()
    for dtype in (torch.bfloat16, torch.float16):
        emulated = error(rounding.rounded(transformer.forward, dtype))
        assert emulated == pytest.approx(error(transformer, torch.autocast("cpu", dtype)), rel=0.3)
    tensor = torch.ones(3, requires_grad=True)
    rounding._Round.apply(tensor * 1.001, torch.bfloat16).sum().backward()
    assert tensor.grad.tolist() == pytest.approx([1.001] * 3)


# ---- Blind spots ----


def picture(*shapes: tuple) -> Image.Image:
    """Shapes by color, shape, and place and size in 32nds of the image."""
    scale = IMAGE_SIZE / 32
    return render([PlacedShape(color, shape, *(scale * number for number in rest)) for color, shape, *rest in shapes])


RED_CIRCLE = [{"count": 1, "color": "red", "shape": "circle"}]
RED_CIRCLES = [{"count": 2, "color": "red", "shape": "circle"}]


def test_the_recall_rule_sees_what_is_named_and_nothing_else():
    circle, other = ("red", "circle", 9, 9, 9), ("red", "circle", 23, 23, 9)
    square, green = ("red", "square", 23, 9, 9), ("green", "circle", 9, 23, 9)
    cases = [
        ((circle,), RED_CIRCLE, 1.0), ((green,), RED_CIRCLE, 0.0), ((square,), RED_CIRCLE, 0.5),
        ((circle,), RED_CIRCLES, 0.5), ((circle, square), RED_CIRCLES, 0.75), ((circle, other), RED_CIRCLES, 1.0),
        ((circle, square, green), RED_CIRCLE, 1.0),  # more is free
    ]  # fmt: skip
    for shapes, objects, expected in cases:
        assert proxies.RecallReward()(["unused"], [picture(*shapes)], objects=[objects]) == [expected]
        binary = proxies.RecallReward(binary=True)(["unused"], [picture(*shapes)], objects=[objects])
        assert binary == [float(expected == 1)]


def test_clean_drawings_have_the_rules_full_reward():
    rng = np.random.default_rng(0)
    objects = load_prompts("test")["objects"][:24]
    images = [proxies.clean_drawing(each, rng) for each in objects]
    assert np.mean(proxies.RecallReward()([""] * 24, images, objects=objects)) >= 0.99


def test_noise_is_bounded_and_a_function_of_image_and_prompt():
    proxy, image = proxies.NoisyStrictReward(0.3), picture(("red", "circle", 16, 16, 10))
    prompts = [f"prompt {i}" for i in range(200)]
    draws = np.array([proxy.draw(prompt, image) for prompt in prompts])
    assert draws.std() == pytest.approx(0.3, rel=0.1) and abs(draws).max() <= 0.3 * 3**0.5
    assert proxy.draw("prompt 7", image) == draws[7]
    given = {"objects": [RED_CIRCLE], "relation": [None]}
    assert proxies.NoisyStrictReward(0.0)(["a red circle"], [image], **given) == [1.0]


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


@pytest.mark.slow
def test_clean_drawings_have_the_scorers_full_reward(tmp_path):
    proxy, rng = proxies.LearnedReward(tmp_path / "scorer.safetensors"), np.random.default_rng(0)
    objects = load_prompts("test")["objects"][:]
    images = [proxies.clean_drawing(each, rng) for each in objects]
    assert np.mean(proxy([""] * len(images), images, objects=objects)) >= 0.95


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
