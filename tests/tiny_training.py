"""Whole training runs of a second or two on the tiny pipeline, and how two of them are compared."""

import contextlib
import logging
from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_models import tiny_sd3_pipeline

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer


PROMPTS = ["a cat", "two dogs", "a bird", "three red fish"]


def brightness(prompts, images, **kwargs):
    """Mean of the pixels, in [0, 1]."""
    return [float(np.asarray(image, dtype=np.float32).mean() / 255) for image in images]


def darkness(prompts, images, **kwargs):
    """What is left of 1: a score that falls when the brightness rises."""
    return [1 - value for value in brightness(prompts, images)]


def prompts(number: int = len(PROMPTS), **columns) -> Dataset:
    """The first `number` of `PROMPTS`, repeated with a number behind them when there are not as many."""
    rows = [PROMPTS[i % len(PROMPTS)] + (f" {i}" if i >= len(PROMPTS) else "") for i in range(number)]
    return Dataset.from_dict({"prompt": rows, **columns})


def tiny_config(output_dir, cls: type[FlowGRPOConfig] = FlowGRPOConfig, **fields) -> FlowGRPOConfig:
    """Two groups of four pictures, three sampling steps, two updates; `fields` change whatever a test is about."""
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "num_inference_steps": 3,
        "eval_num_inference_steps": 2,
        "height": 16,
        "width": 16,
        "max_sequence_length": 16,
        "guidance_scale": 2.0,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "log_images": False,
    }
    return cls(**defaults | fields)


def tiny_lora(**fields) -> LoraConfig:
    # A LoRA that begins at 0, as all do: the first update then moves only one of each pair of matrices
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian"} | fields)


def tiny_trainer(
    output_dir,
    *,
    pipeline=None,
    reward_funcs=brightness,
    train_dataset=None,
    eval_dataset=None,
    lora: LoraConfig | None | str = "default",
    callbacks=None,
    eval_reward_funcs=None,
    **fields,
) -> FlowGRPOTrainer:
    """A trainer on a fresh tiny pipeline; `lora=None` trains all weights."""
    return FlowGRPOTrainer(
        model=tiny_sd3_pipeline() if pipeline is None else pipeline,
        reward_funcs=reward_funcs,
        args=tiny_config(output_dir, **fields),
        train_dataset=prompts() if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
        peft_config=tiny_lora() if lora == "default" else lora,
        eval_reward_funcs=eval_reward_funcs,
    )


def trained_weights(trainer: FlowGRPOTrainer) -> dict[str, torch.Tensor]:
    """Copies of the weights that are trained, by name."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train(output_dir, *, resume_from_checkpoint=None, **kwargs) -> dict[str, torch.Tensor]:
    """Trains and returns the weights, all of which have changed but those that no output depends on."""
    trainer = tiny_trainer(output_dir, **kwargs)
    before = trained_weights(trainer)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    after = trained_weights(trainer)
    # The last block gives its text stream's result away, and with it what its queries are for
    unread = ("transformer_blocks.1.attn.add_q_proj", "transformer_blocks.1.attn.norm_added_q")
    unchanged = [
        name for name in before if torch.equal(before[name], after[name]) and not any(part in name for part in unread)
    ]
    assert not unchanged, f"not trained: {unchanged}"
    return after


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same weights, to the last bit."""
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different, f"{len(different)} of {len(expected)} differ, e.g. {different[0]}"


def distance(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of any weight."""
    assert actual.keys() == expected.keys()
    return max((actual[name] - expected[name]).abs().max().item() for name in expected)


@contextlib.contextmanager
def warnings_of(logger: str) -> Iterator[list[str]]:
    """Collects the messages of warnings that are logged below `logger`, which pytest's `caplog` does not see."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    handler = Collect(logging.WARNING)
    logging.getLogger(logger).addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger(logger).removeHandler(handler)
