"""[`OverOptimizationCallback`]: sees the reward rise while the gold score falls, and keeps the best model by gold."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from trl_flow.evaluation.gold import GoldScore, gold_difference
from trl_flow.evaluation.outputs import read_json, write_json
from trl_flow.trainer.evaluator import EvaluationResult


logger = logging.get_logger(__name__)

# Inside `output_dir`
BEST_FOLDER = "best_gold"
SCORES_NAME = "scores.json"


class OverOptimizationCallback(TrainerCallback):
    """
    Watches for over-optimization: the optimized reward (the proxy) keeps rising while the gold score falls.

    Each evaluation is compared with the one that had the highest gold average so far, at first the base model: if its
    reward is higher and its gold average is lower by more than `num_standard_errors` standard errors (of the
    difference, paired over the prompts), for `patience` evaluations in a row, a warning is given, and training stops
    with `stop`. The model with the highest gold average is kept in `output_dir/best_gold`, in diffusers' format, with
    its scores in `scores.json`. Needs `eval_reward_funcs` and an evaluation set of two or more prompts. A resumed run
    keeps counting from its checkpoint.

    Args:
        patience (`int`): evaluations in a row, at least 1.
        stop (`bool`): whether to stop training then.
        num_standard_errors (`float`): how far the gold average must have fallen; 2 are exceeded by chance in one
            evaluation of 44, where prompts are many.
        eval_name (`str`, *optional*): which of several evaluation sets to watch; default: the first.

    Raises `ValueError` if `patience` or `num_standard_errors` makes no sense.

    Example:

    ```python
    from peft import LoraConfig
    from trl_flow import FlowGRPOTrainer, GuardConfig, OverOptimizationCallback
    from trl_flow.shapes import load_prompts, pipeline_path

    args = GuardConfig(
        "outputs/watched", height=64, width=64, max_sequence_length=1, guidance_scale=1.0, num_inference_steps=4,
        num_generations=4, per_device_train_batch_size=8, max_steps=2, eval_strategy="steps", eval_steps=1,
        use_cpu=True,
    )
    trainer = FlowGRPOTrainer(
        model=pipeline_path(),
        reward_funcs="shapes_soft",
        eval_reward_funcs="shapes_fidelity",  # gold: never optimized
        args=args,
        train_dataset=load_prompts("train"),
        eval_dataset=load_prompts("test").select(range(4)),
        peft_config=LoraConfig(r=4),
        callbacks=[OverOptimizationCallback(patience=3, stop=True)],
    )
    trainer.train()
    ```
    """

    STATE_KEY = "over_optimization"

    def __init__(
        self, patience: int = 2, stop: bool = False, num_standard_errors: float = 2.0, eval_name: str | None = None
    ):
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience is {patience!r}, but must be a whole number of evaluations, at least 1.")
        if not isinstance(num_standard_errors, int | float):
            raise TypeError(f"num_standard_errors is {num_standard_errors!r}, but must be a number.")
        if not (math.isfinite(num_standard_errors) and num_standard_errors >= 0):
            raise ValueError(f"num_standard_errors is {num_standard_errors!r}, but must be a number of at least 0.")
        self.patience, self.stop, self.eval_name = patience, stop, eval_name
        self.num_standard_errors = num_standard_errors
        self.watched: str | None = None
        self._training = False
        self._reset()

    @staticmethod
    def by_name(callbacks: list[TrainerCallback]) -> dict[str, "OverOptimizationCallback"]:
        """Finds this callback among `callbacks`: its name in checkpoints and the callback, or an empty dictionary."""
        return {cb.STATE_KEY: cb for cb in callbacks if isinstance(cb, OverOptimizationCallback)}

    def _reset(self) -> None:
        self._key: str | None = None
        self._count = 0
        # The evaluation of the highest gold average: its update, reward and gold score
        self._best_step, self._best_reward = 0, math.nan
        self._best: GoldScore | None = None
        # What `best_gold` holds; the base model, which may be better than all, is not kept
        self._kept_step: int | None = None
        self._kept_average = -math.inf

    def state_dict(self) -> dict[str, Any]:
        if self._best is None:
            return {}
        best = {"step": self._best_step, "reward": self._best_reward}
        best |= {"average": self._best.average, "influence": self._best.influence.tolist()}
        kept = None if self._kept_step is None else [self._kept_step, self._kept_average]
        return {"key": self._key, "count": self._count, "best": best, "kept": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reset()
        if not state:
            return
        self._key, self._count, best = state["key"], state["count"], state["best"]
        self._best_step, self._best_reward = best["step"], best["reward"]
        self._best = GoldScore({}, {}, best["average"], np.asarray(best["influence"], dtype=np.float64))
        if state["kept"] is not None:
            self._kept_step, self._kept_average = state["kept"]

    def on_train_begin(self, args, state, control, **kwargs):
        self._training = True
        # All processes must agree about keeping a model, and the folder may be on one machine only
        if not any(gather_object([Path(args.output_dir, BEST_FOLDER).is_dir()])):
            self._kept_step, self._kept_average = None, -math.inf

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False

    def on_evaluate(
        self, args, state, control, evaluation: EvaluationResult | None = None, **kwargs
    ) -> TrainerControl:
        is_watched = self._training and evaluation is not None and evaluation.name == self.watched
        if not is_watched or math.isnan(evaluation.gold.average):
            return control
        if self._key != evaluation.key:
            if self._key is not None:
                logger.warning(
                    "The evaluation set, its settings or eval_reward_funcs have changed since the checkpoint: "
                    "OverOptimizationCallback compares with the base model again, and keeps the next model."
                )
            self._reset()
            self._key, self._best_reward = evaluation.key, evaluation.base_reward
            self._best = GoldScore({}, {}, 1.0, np.zeros_like(evaluation.gold.influence))

        difference, error = gold_difference(self._best, evaluation.gold)
        is_worse = evaluation.reward > self._best_reward and -difference > self.num_standard_errors * error
        # First: if it fails, on a full disk, this evaluation is repeated when the run is resumed
        if state.global_step > 0 and evaluation.gold.average > self._kept_average:
            self._keep(evaluation, Path(args.output_dir, BEST_FOLDER), state)
        self._count = self._count + 1 if is_worse else 0
        if difference > 0:
            self._best_step, self._best_reward, self._best = state.global_step, evaluation.reward, evaluation.gold
        if self._count < self.patience:
            return control
        if state.is_world_process_zero and (self._count == self.patience or self.stop):
            logger.warning(self._message(evaluation, state.global_step, difference, error, args))
        if self.stop:
            control.should_training_stop = True
        return control

    def _keep(self, evaluation: EvaluationResult, folder: Path, state: TrainerState) -> None:
        evaluation.save(folder)
        if state.is_world_process_zero:
            self._write_scores(evaluation, folder, state)
        self._kept_step, self._kept_average = state.global_step, evaluation.gold.average

    @staticmethod
    def _write_scores(evaluation: EvaluationResult, folder: Path, state: TrainerState) -> None:
        gold = evaluation.gold
        scores = {"reward": evaluation.reward, "base_reward": evaluation.base_reward}
        scores |= {"gold_average": gold.average, "gold_average_std_err": gold.standard_error}
        content = {"step": state.global_step, "eval_dataset": evaluation.name, **_finite(scores)}
        content |= {"gold": _finite(gold.scores), "gold_relative_to_base": _finite(gold.relative)}
        write_json(folder / SCORES_NAME, content)

    def _message(self, evaluation: EvaluationResult, step: int, difference: float, error: float, args) -> str:
        of = "the base model" if self._best_step == 0 else f"update {self._best_step}"
        message = (
            f"Over-optimization: at update {step} the optimized reward is {evaluation.reward:.4g}, above "
            f"{self._best_reward:.4g} of {of}, while the gold average is {evaluation.gold.average:.4g}, below "
            f"{self._best.average:.4g} (difference {difference:+.2g}, with a standard error over the prompts of "
            f"{error:.1g}), and so in {self._count} evaluations in a row. What is learned is the reward's blind "
            "spots. "
        )
        if self._kept_step is not None:
            best = f"{self._kept_average:.4g} at update {self._kept_step}, is in {Path(args.output_dir, BEST_FOLDER)}"
            message += f"The trained model with the highest gold average, {best}. "
        if self.stop:
            weights = "those of the best checkpoint" if args.load_best_model_at_end else "these, the last ones"
            message += f"Training stops here; the weights in {args.output_dir} will be {weights}. "
        helps = ["a lower learning_rate", "a reward that sees what the gold functions see"]
        if not getattr(args, "beta", 1):
            helps.insert(0, "beta > 0")
        if getattr(args, "importance_ratio", None) == "standard":
            helps.insert(0, "GuardConfig")
        if getattr(args, "log_images", False):
            message += f"Look at the images in {Path(args.output_dir, 'images')}. "
        return f"{message}What helps: {', '.join(helps[:-1])}, or {helps[-1]}."


def better_kept(output_dir: str, step: int) -> dict[str, Any] | None:
    """The scores of the model in `best_gold`, if it is of another update than `step`."""
    path = Path(output_dir, BEST_FOLDER, SCORES_NAME)
    scores = read_json(path) if path.is_file() else {}
    return scores if scores.get("step", step) != step else None


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
