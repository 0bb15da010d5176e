"""Apple's GPUs have no float64: what needs it is computed on the host."""

import torch
from tiny_training import darkness, prompts, tiny_trainer
from transformers import TrainerState

from trl_flow.algorithms.advantages import AdaptivePower


class OnAppleGPU(torch.Tensor):
    """A tensor that stays what it is until `.cpu()`, and until then refuses to become float64."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.Tensor.cpu:
            return result.as_subclass(torch.Tensor)
        if isinstance(result, OnAppleGPU) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return result


def test_gold_scores_and_the_adapted_power(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, eval_reward_funcs=[darkness], eval_dataset=prompts(2))
    evaluator, scored = trainer.evaluator, trainer.evaluator._scored
    monkeypatch.setattr(evaluator, "_scored", lambda *args: scored(*args).as_subclass(OnAppleGPU))
    result = evaluator.evaluate(prompts(2), TrainerState())
    assert result.metrics["gold/average"] == 1.0  # untrained
    assert result.reward > 0

    power = AdaptivePower(target_kl=None)
    power.observe(torch.tensor([1.0, 3.0]).as_subclass(OnAppleGPU), 1)
    power.gather()
    assert (power._sum, power._count) == (4.0, 2)
