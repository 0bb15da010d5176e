"""docs/metrics.md names what runs log, and runs log what it names."""

import re
from pathlib import Path

import pytest
from tiny_training import brightness, darkness, prompts, tiny_trainer

from trl_flow import AWMConfig, DiffusionNFTConfig, GuardConfig, VGPOConfig


PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
# Those of reward functions that are too large for a test, what a function calls its own, and of `torch_compile`
ELSEWHERE = {"geneval/{task}", "unigenbench/{dimension}", "{name}/unreadable", "time/compiling"}


def named() -> set[str]:
    """The metrics in the first column of the page's tables, and the histograms that have a section."""
    rows = re.findall(r"^\| (`.+?) \|", PAGE, flags=re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`([^`]+)`", row)} | {"ratio/histogram_step_{i}"}
    return names - ELSEWHERE


def watched(prompts, images, log_metric, **kwargs):
    log_metric("own/metric", 1.0)
    return brightness(prompts, images)


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> set[str]:
    """What runs log that together use all that has metrics, by the names of the page."""
    folder = tmp_path_factory.mktemp("runs")
    common = {"reward_funcs": watched, "per_device_train_batch_size": 4, "steps_per_generation": 2}
    guard = {"cls": GuardConfig, "bf16": True, "beta": 0.1, "diagnostics_steps": 1, "eval_strategy": "steps"}
    guard |= {"eval_dataset": prompts(2), "eval_steps": 2, "eval_reward_funcs": darkness, "num_generations_eval": 2}
    guard |= {"save_strategy": "steps", "save_steps": 1}
    vgpo = {"cls": VGPOConfig, "advantage_power": "auto", "max_steps": 4}
    nft, awm = ({"cls": cls, "guidance_scale": 1.0} for cls in (DiffusionNFTConfig, AWMConfig))
    names = set()
    nft |= {"dynamic_sample": True}
    for name, fields in (("guard", guard), ("vgpo", vgpo), ("nft", nft), ("awm", awm)):
        trainer = tiny_trainer(folder / name, **common, **fields)
        trainer.train()
        names |= {key for log in trainer.state.log_history for key in log}
    names = {re.sub(r"step_\d+$", "step_{i}", name) for name in names}
    assert "own/metric" in names
    return {re.sub(r"rewards/watched/", "rewards/{name}/", name) for name in names - {"own/metric"}}


def test_every_metric_is_on_the_page(logged):
    """`eval_gold/...` stands for a section of another page."""
    assert {name for name in logged - named() if not name.startswith("eval_gold/")} == set()


def test_every_metric_of_the_page_is_logged(logged):
    gold = {name for name in logged if name.startswith("eval_gold/")}
    assert gold == {"eval_gold/darkness", "eval_gold/average", "eval_gold/average_std_err"}
    assert named() - logged == {"eval_gold/..."}
