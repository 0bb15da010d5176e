"""Whole training runs of a second on the tiny pipeline, their stages one by one, and how two runs are compared."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig
from tiny_models import tiny_sd3_pipeline
from transformers import set_seed

from trl_flow import (
    AWMTrainer,
    DiffusionNFTTrainer,
    FlowGRPOConfig,
    FlowGRPOTrainer,
    FlowRLConfig,
    FlowRLTrainer,
)
from trl_flow.algorithms import ClippedPolicyGradient, LossOutput, MicroBatch, PhaseScores
from trl_flow.backbones import Backbone, get_backbone
from trl_flow.trainer.policy import Policy
from trl_flow.trainer.prepare import prepare_module
from trl_flow.trainer.prompt_cache import PromptCache
from trl_flow.trainer.rollout_buffer import RolloutBuffer
from trl_flow.trainer.sampler import Sampler


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


def tiny_config(output_dir, cls: type[FlowRLConfig] = FlowGRPOConfig, **fields) -> FlowRLConfig:
    """Two groups of four images, four sampling steps of which three are trained, two updates of a phase each; `fields`
    change whatever a test is about."""
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "num_inference_steps": 4,
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
    if "generation_batch_size" not in fields:
        defaults["steps_per_generation"] = fields.get("gradient_accumulation_steps", 1)
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
) -> FlowRLTrainer:
    """The trainer of the config `cls` on a fresh tiny pipeline; `lora=None` trains all weights."""
    args, trainers = tiny_config(output_dir, **fields), (FlowGRPOTrainer, DiffusionNFTTrainer, AWMTrainer)
    return next(trainer for trainer in trainers if isinstance(args, trainer.config_class))(
        model=tiny_sd3_pipeline() if pipeline is None else pipeline,
        reward_funcs=reward_funcs,
        args=args,
        train_dataset=prompts() if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
        peft_config=tiny_lora() if lora == "default" else lora,
        eval_reward_funcs=eval_reward_funcs,
    )


@dataclass
class Stages:
    """What a trainer is made of, up to the loss, without the trainer."""

    args: FlowGRPOConfig
    backbone: Backbone
    module: torch.nn.Module
    policy: Policy
    algorithm: ClippedPolicyGradient
    sampler: Sampler

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def rows(self) -> list[dict[str, str]]:
        """A generation batch: the images of a group next to each other."""
        size = self.args.num_generations
        return [{"prompt": PROMPTS[i // size]} for i in range(self.args.generation_batch_size)]

    def micro_batches(
        self, rewards: Sequence[float], *, instant: torch.Tensor | None = None, generation: int = 0
    ) -> list[MicroBatch]:
        """A sampling phase whose images get `rewards`, and with `instant` `(N, T)` those of each step."""
        plan, rows = self.algorithm.plan(generation), self.rows()
        self.policy.sampling_weights = self.policy.copy_weights()
        buffer = RolloutBuffer(len(rows), self.args)
        for part in self.sampler.sample(rows, plan, generation):
            buffer.add(part.first, self.algorithm.keep(part.rollout))
        instant = None if instant is None else instant[:, :, None]
        scores = PhaseScores(torch.tensor(rewards)[:, None], ["reward"], plan, instant)
        advantages, _ = self.algorithm.advantages(scores)
        return buffer.finish(rows, plan.kept, advantages, None)

    def losses(self, batch: MicroBatch) -> dict[int, LossOutput]:
        """Of each unit."""
        condition = self.policy.condition(batch.prompts)
        units = self.algorithm.units(batch)
        return {unit: self.algorithm.loss(self.policy, batch, unit, condition) for unit in units}

    def gradients(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of a scalar loss, by the weights' names."""
        named = self.parameters
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return {
            name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)
        }

    def descend(self, batch: MicroBatch, learning_rate: float) -> None:
        """One step of plain gradient descent."""
        gradients = self.gradients(torch.stack([out.loss.mean() for out in self.losses(batch).values()]).mean())
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter -= learning_rate * gradients[name]
        self.policy.updates_since_sampling += 1


def tiny_stages(output_dir, *, pipeline=None, lora: LoraConfig | None | str = "default", **fields) -> Stages:
    """The stages of [`tiny_trainer`] with the same arguments, and with one reward."""
    args = tiny_config(output_dir, **fields)
    set_seed(args.seed)
    pipeline = tiny_sd3_pipeline() if pipeline is None else pipeline
    sizes = {"height": args.height, "width": args.width, "max_sequence_length": args.max_sequence_length}
    backbone = get_backbone(pipeline, **sizes)
    module = prepare_module(backbone, args, tiny_lora() if lora == "default" else lora).train()
    algorithm = ClippedPolicyGradient(args, backbone, torch.ones(1))
    AcceleratorState._reset_state()  # there is one for the whole process, with one precision
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if args.bf16 else "no")
    policy = Policy(
        backbone,
        args,
        accelerator,
        lambda: module,
        PromptCache.of(backbone, args),
        keep_reference=algorithm.needs_reference,
    )
    sampler = Sampler(policy, algorithm.dynamics, args, lambda stage: None)
    return Stages(args, backbone, module, policy, algorithm, sampler)


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
    """The same weights, to rounding. One in a hundred may be another: an update moves weights by about the learning
    rate, 1e-2, and Adam makes such a step of a gradient that is 0 but for rounding, too."""
    assert actual.keys() == expected.keys()
    different = torch.cat([((actual[name] - expected[name]).abs() > 1e-4).flatten() for name in expected])
    assert different.float().mean() < 0.01, f"{different.sum()} of {len(different)} weights differ"


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
