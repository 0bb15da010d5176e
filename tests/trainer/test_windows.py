"""Windows of stochastic steps: where they lie, and what is not computed twice before them."""

import pytest
import torch
from tiny_training import distance, prompts, tiny_config, tiny_trainer, trained_weights

from trl_flow import FlowGRPOConfig


def starts(tmp_path, generations: int, **fields) -> list[int]:
    trainer = tiny_trainer(tmp_path, num_inference_steps=10, sde_window_schedule="progressive", **fields)
    windows = [trainer._choose_steps(generation) for generation in range(generations)]
    assert all(stochastic == trained for stochastic, trained in windows)
    assert {len(stochastic) for stochastic, _ in windows} == {fields["sde_window_size"]}
    return [stochastic[0] for stochastic, _ in windows]


def test_a_progressive_window_moves_on_and_stays_at_the_end(tmp_path):
    assert starts(tmp_path, 9, sde_window_size=7, sde_window_interval=2) == [0, 0, 1, 1, 2, 2, 3, 3, 3]


def test_a_progressive_window_moves_by_its_stride_within_its_range(tmp_path):
    fields = {"sde_window_size": 2, "sde_window_range": [1, 8], "sde_window_interval": 1, "sde_window_stride": 2}
    # the last move is cut short by the end of the range
    assert starts(tmp_path, 6, **fields) == [1, 3, 5, 6, 6, 6]


def test_mixgrpos_schedule_is_the_default_of_a_progressive_window(tmp_path):
    assert starts(tmp_path, 51, sde_window_size=4) == [0] * 25 + [1] * 25 + [2]


def test_a_progressive_window_ends_before_the_deterministic_step_of_cps(tmp_path):
    assert starts(tmp_path, 12, sde_window_size=2, sde_type="cps", sde_window_interval=1)[-1] == 7


def test_a_resumed_run_has_the_window_where_it_was(tmp_path):
    fields = {
        "sde_window_size": 1,
        "sde_window_schedule": "progressive",
        "sde_window_interval": 2,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole = tiny_trainer(tmp_path, **fields)
    whole.train()
    rest = tiny_trainer(tmp_path, **fields)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert distance(trained_weights(rest), trained_weights(whole)) == 0
    trained_steps = [
        sorted(k for k in logs if k.startswith("ratio/mean_step")) for logs in whole.state.log_history[:4]
    ]
    assert trained_steps == [["ratio/mean_step_0"]] * 2 + [["ratio/mean_step_1"]] * 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sde_window_schedule": "backwards"}, ["sde_window_schedule is 'backwards'", "random, progressive"]),
        ({"sde_window_schedule": "progressive"}, ["sde_window_size is not set"]),
        ({"sde_window_size": 2, "sde_window_interval": 3}, ["sde_window_interval is 3", "'random'"]),
        ({"sde_window_stride": 3}, ["sde_window_stride is 3", "'random'"]),
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
    with pytest.raises(ValueError) as error:
        tiny_config(tmp_path, cls=FlowGRPOConfig, **fields)
    for word in words:
        assert word in str(error.value)


# ---- The ODE steps before the window ----


def forwards(trainer) -> list[int]:
    """Batch size of every forward of one sampling phase."""
    sizes = []
    handle = trainer.backbone.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    handle.remove()
    return sizes


WINDOW = {"sde_window_size": 1, "sde_window_range": [2, 3], "share_initial_noise": True, "guidance_scale": 1.0}


def test_common_steps_are_taken_once_for_each_group(tmp_path):
    # Two groups of four: two ODE steps of two samples, then the window's step of all eight
    assert forwards(tiny_trainer(tmp_path, **WINDOW)) == [2, 2, 8]


def test_common_steps_are_taken_once_for_all_micro_batches(tmp_path):
    fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert forwards(tiny_trainer(tmp_path, **WINDOW, **fields)) == [2, 2] + [2] * 4


def test_common_steps_are_split_as_all_batches_are(tmp_path):
    # Four groups of two in parts of two samples
    fields = {"num_generations": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert forwards(tiny_trainer(tmp_path, **WINDOW, **fields)) == [2, 2, 2, 2] + [2] * 4


def test_without_a_common_noise_every_sample_takes_its_own_steps(tmp_path):
    assert forwards(tiny_trainer(tmp_path, **WINDOW | {"share_initial_noise": False})) == [8, 8, 8]


@pytest.mark.parametrize("fields", [{}, {"guidance_scale": 2.0}, {"dense_rewards": True}], ids=str)
def test_common_steps_lead_to_where_each_samples_own_would(fields, tmp_path, monkeypatch):
    def batch(**more):
        fields_ = WINDOW | {"sde_window_range": [1, 2], "train_dataset": prompts(4), "seed": 3} | fields | more
        trainer = tiny_trainer(tmp_path, **fields_)
        if more:
            # each sample from its group's noise on
            monkeypatch.setattr(trainer, "_starts", lambda generation, inputs, stochastic: (0, own(trainer)))
        return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))

    def own(trainer):
        return trainer._initial_noise(0, [0, 1]).repeat_interleave(4, dim=0)

    common, apart = batch(), batch(log_images=False)
    assert common.prompts == apart.prompts
    for name in ("latents", "next_latents", "means", "log_probs", "advantages"):
        torch.testing.assert_close(getattr(common, name), getattr(apart, name), rtol=1e-4, atol=1e-4)
    start = common.latents.view(2, 4, -1)
    assert (start == start[:, :1]).all()
