"""Samples that come in their own order are trained on in the documented one."""

import pytest
import torch
from PIL import Image
from tiny_training import tiny_config

from trl_flow.trainer.rollout_buffer import (
    RolloutBuffer,
    load_micro_batches,
    micro_batch_indices,
    save_micro_batches,
)


def test_the_example_of_the_documentation():
    # docs/batches.md: six samples for each of two processes, two micro-batches, two updates
    assert micro_batch_indices(6, 2, 2) == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize("number", [12, 24])
@pytest.mark.parametrize(("micro_batches", "updates"), [(1, 1), (4, 1), (4, 2), (6, 3), (12, 12)])
def test_update_u_has_every_uth_sample_from_the_uth_on(number, micro_batches, updates):
    batches = micro_batch_indices(number, micro_batches, updates)
    assert all(len(batch) == number // micro_batches for batch in batches)
    each = micro_batches // updates
    for update in range(updates):
        samples = sorted(i for batch in batches[update * each : (update + 1) * each] for i in batch)
        assert samples == list(range(update, number, updates))


NUMBER, SIZE = 12, 3


def filled(tmp_path):
    """A buffer of 12 samples in 4 micro-batches for 2 updates, which came in parts of 3, and what came."""
    args = tiny_config(
        tmp_path,
        per_device_train_batch_size=SIZE,
        steps_per_generation=4,
        gradient_accumulation_steps=2,
        num_generations=4,
    )
    whole = {"latents": torch.randn(NUMBER, 2, 5), "noise": torch.randn(NUMBER, 3)}
    buffer = RolloutBuffer(NUMBER, args)
    for first in range(0, NUMBER, SIZE):
        buffer.add(first, {name: value[first : first + SIZE] for name, value in whole.items()})
    return buffer, whole


def test_what_came_is_what_is_trained_on(tmp_path):
    buffer, whole = filled(tmp_path)
    advantages, images = torch.randn(NUMBER, 2), [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(NUMBER)]
    batches = buffer.finish([{"prompt": f"{i}"} for i in range(NUMBER)], (0, 2), advantages, images)
    for batch, indices in zip(batches, micro_batch_indices(NUMBER, 4, 2), strict=True):
        assert batch.prompts == [f"{i}" for i in indices]
        assert batch.steps == (0, 2)
        assert [image.getpixel((0, 0))[0] for image in batch.images] == indices
        assert torch.equal(batch.advantages, advantages[indices])
        for name, value in whole.items():
            assert torch.equal(batch.tensors[name], value[indices])
    # kept once: the micro-batches are parts of one tensor
    assert len({batch.tensors["latents"].untyped_storage().data_ptr() for batch in batches}) == 1


@pytest.mark.parametrize("edits", [False, True])
def test_what_is_saved_is_what_is_loaded(edits, tmp_path):
    buffer, _ = filled(tmp_path)
    # an image belongs to a group, and so to several samples
    images = [Image.new("RGB", (4, 4), (i // 4, 7, 0)) for i in range(NUMBER)] if edits else None
    rows = [{"prompt": f"{i}"} for i in range(NUMBER)]
    batches = buffer.finish(rows, (0, 2), torch.randn(NUMBER, 2), images)
    save_micro_batches(batches, tmp_path, rank=1)
    loaded = load_micro_batches(tmp_path, 1, torch.device("cpu"))
    for batch, saved in zip(loaded, batches, strict=True):
        assert (batch.prompts, batch.steps) == (saved.prompts, saved.steps)
        assert torch.equal(batch.advantages, saved.advantages)
        assert batch.tensors.keys() == saved.tensors.keys()
        assert all(torch.equal(batch.tensors[name], value) for name, value in saved.tensors.items())
        if edits:
            assert [image.tobytes() for image in batch.images] == [image.tobytes() for image in saved.images]
        else:
            assert batch.images is saved.images is None
