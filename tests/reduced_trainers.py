"""Trainers that make of any example's settings a training of one update on a tiny model."""

from pathlib import Path

from trl_flow.rewards.base import ModelReward
from trl_flow.trainer import AWMTrainer, DiffusionNFTTrainer, FlowGRPOTrainer


def without_model(func):
    """A learned reward's model is too large to load here: numbers under the same name in its place."""
    if not isinstance(func, ModelReward):
        return func

    def score(prompts, images, **kwargs):
        return [float(place) for place in range(len(images))]

    score.__name__ = func.__name__
    return score


class Reduced:
    """Trains any recipe for one update on four images, with all its other settings; Hub ids become a tiny model."""

    tiny_path = None

    def __init__(self, model, reward_funcs, args, train_dataset, *others, **kwargs):
        args.max_steps = 1
        args.num_generations, args.per_device_train_batch_size = 2, 4
        args.steps_per_generation, args.gradient_accumulation_steps, args.generation_batch_size = 1, 1, 4
        args.eval_num_inference_steps = 2
        args.use_cpu, args.bf16 = True, False
        args.report_to, args.push_to_hub = [], False
        if isinstance(model, str) and not Path(model).exists():
            model = self.tiny_path
            args.height = args.width = args.max_sequence_length = 16
        funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        super().__init__(model, [without_model(func) for func in funcs], args, train_dataset, *others, **kwargs)

    def push_to_hub(self, *args, **kwargs):
        """Tested with a server in tests/test_sharing.py."""


TRAINERS = [type(cls.__name__, (Reduced, cls), {}) for cls in (FlowGRPOTrainer, DiffusionNFTTrainer, AWMTrainer)]
