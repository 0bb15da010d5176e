"""Windows of stochastic steps: where they lie, and what is not computed twice before them."""

import pytest
import torch
from tiny_training import tiny_config, tiny_stages

from trl_flow.algorithms import StepPlan


def plans(tmp_path, generations: int, **fields) -> list[StepPlan]:
    algorithm = tiny_stages(tmp_path, num_inference_steps=10, **fields).algorithm
    return [algorithm.plan(generation) for generation in range(generations)]


def starts(tmp_path, generations: int, **fields) -> list[int]:
    found = plans(tmp_path, generations, sde_window_schedule="progressive", **fields)
    assert all(plan.stochastic == plan.kept for plan in found)
    assert {len(plan.stochastic) for plan in found} == {fields["sde_window_size"]}
    return [plan.stochastic[0] for plan in found]


def test_a_progressive_window_moves_on_and_stays_at_the_end(tmp_path):
    assert starts(tmp_path, 9, sde_window_size=6, sde_window_interval=2) == [0, 0, 1, 1, 2, 2, 3, 3, 3]


def test_a_progressive_window_moves_by_its_stride_within_its_range(tmp_path):
    fields = {"sde_window_size": 2, "sde_window_range": [1, 8], "sde_window_interval": 1, "sde_window_stride": 2}
    # the last move is cut short by the end of the range
    assert starts(tmp_path, 6, **fields) == [1, 3, 5, 6, 6, 6]


def test_mixgrpos_schedule_is_the_default_of_a_progressive_window(tmp_path):
    assert starts(tmp_path, 51, sde_window_size=4) == [0] * 25 + [1] * 25 + [2]


def test_a_progressive_window_ends_before_the_deterministic_step_of_cps(tmp_path):
    assert starts(tmp_path, 12, sde_window_size=2, sde_type="cps", sde_window_interval=1)[-1] == 7


@pytest.mark.parametrize("schedule", ["random", "progressive"])
def test_a_plan_depends_on_the_number_of_the_phase_alone(schedule, tmp_path):
    # so that a resumed run has the window where it was
    fields = {"sde_window_size": 3, "sde_window_range": [1, 9], "sde_window_schedule": schedule}
    fields |= {"timestep_fraction": 0.67} | ({"sde_window_interval": 2} if schedule == "progressive" else {})
    found = plans(tmp_path, 12, **fields)
    assert found[7] == tiny_stages(tmp_path, num_inference_steps=10, **fields).algorithm.plan(7)
    for plan in found:
        first = plan.stochastic[0]
        assert plan.stochastic == (first, first + 1, first + 2) and 1 <= first <= 6
        assert len(plan.kept) == 2 and set(plan.kept) < set(plan.stochastic)
    assert len({plan.stochastic for plan in found}) > 3
    assert len({plan.kept[1] - plan.kept[0] for plan in found}) == 2  # which steps are kept is drawn as well


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sde_window_schedule": "backwards"}, ["sde_window_schedule is 'backwards'", "random, progressive"]),
        ({"sde_window_schedule": "progressive"}, ["sde_window_size is not set"]),
        ({"sde_window_size": 2, "sde_window_interval": 5}, ["sde_window_interval is 5", "'random'", "leave"]),
        ({"sde_window_size": 2, "sde_window_stride": 2}, ["sde_window_stride is 2", "only a progressive window"]),
        (
            {"sde_window_size": 2, "sde_window_schedule": "progressive", "sde_window_interval": 0},
            ["sde_window_interval is 0", "at least 1"],
        ),
        (
            {"sde_window_size": 2, "sde_window_schedule": "progressive", "sde_window_stride": 0.5},
            ["sde_window_stride is 0.5", "whole number"],
        ),
    ],
    ids=str,
)
def test_a_schedule_that_makes_no_sense_is_refused(fields, words, tmp_path):
    with pytest.raises((TypeError, ValueError)) as error:
        tiny_config(tmp_path, **fields)
    for word in words:
        assert word in str(error.value)


# ---- The ODE steps before the window ----


def forwards(tmp_path, **fields) -> list[int]:
    """Batch size of every forward of one sampling phase."""
    stages, sizes = tiny_stages(tmp_path, **fields), []
    stages.backbone.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    stages.micro_batches([0.0] * stages.args.generation_batch_size)
    return sizes


WINDOW = {"sde_window_size": 1, "sde_window_range": [2, 3], "share_initial_noise": True, "guidance_scale": 1.0}


def test_common_steps_are_taken_once_for_each_group(tmp_path):
    # Two groups of four: two ODE steps of two samples, then the window's step and the last one of all eight
    assert forwards(tmp_path, **WINDOW) == [2, 2, 8, 8]


def test_common_steps_are_taken_once_for_all_micro_batches(tmp_path):
    fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert forwards(tmp_path, **WINDOW, **fields) == [2, 2] + [2, 2] * 4


def test_common_steps_are_split_as_all_batches_are(tmp_path):
    # Four groups of two in parts of two samples
    fields = {"num_generations": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert forwards(tmp_path, **WINDOW, **fields) == [2, 2, 2, 2] + [2, 2] * 4


def test_without_a_common_noise_every_sample_takes_its_own_steps(tmp_path):
    assert forwards(tmp_path, **WINDOW | {"share_initial_noise": False}) == [8, 8, 8, 8]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_common_steps_lead_to_where_each_samples_own_would(guidance_scale, tmp_path, monkeypatch):
    stages = tiny_stages(tmp_path, **WINDOW | {"sde_window_range": [1, 2], "guidance_scale": guidance_scale})
    (common,) = stages.micro_batches([0.0] * 8)
    # each sample from its group's noise on
    noise = stages.sampler._initial_noise(0, [0, 1]).repeat_interleave(4, dim=0)
    monkeypatch.setattr(stages.sampler, "_starts", lambda *_: (0, noise, None))
    (apart,) = stages.micro_batches([0.0] * 8)
    for name in ("latents", "next_latents", "means"):
        torch.testing.assert_close(common.tensors[name], apart.tensors[name], rtol=1e-4, atol=1e-4)
    start = common.tensors["latents"].view(2, 4, -1)
    assert (start == start[:, :1]).all()


def test_common_steps_are_projected_as_each_samples_own_would_be(tmp_path, monkeypatch):
    # VGPO scores what is predicted after every step, those before the window too
    stages = tiny_stages(tmp_path, **WINDOW, dense_rewards=True)
    plan, rows = stages.algorithm.plan(0), stages.rows()
    (common,) = stages.sampler.sample(rows, plan, 0)
    noise = stages.sampler._initial_noise(0, [0, 1]).repeat_interleave(4, dim=0)
    monkeypatch.setattr(stages.sampler, "_starts", lambda *_: (0, noise, None))
    (apart,) = stages.sampler.sample(rows, plan, 0)
    predicted = common.rollout.pred_original_samples
    assert predicted.shape[1] == 4
    torch.testing.assert_close(predicted, apart.rollout.pred_original_samples, rtol=1e-4, atol=1e-4)
