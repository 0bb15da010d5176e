"""The metric by which models are compared, or the learning rate is lowered: it must be one that evaluations have."""

import difflib
from collections.abc import Sequence
from typing import Any

from trl_flow.trainer.flow_rl_config import WATCHING_SCHEDULES, FlowRLConfig


def check_best_metric(args: FlowRLConfig, names: Sequence[str], gold_names: Sequence[str], eval_dataset: Any) -> None:
    """Raises `ValueError` if something watches a metric that no evaluation by reward functions of these names has."""
    watching = {
        "load_best_model_at_end": args.load_best_model_at_end,
        f"lr_scheduler_type={args.lr_scheduler_type.value!r}": args.lr_scheduler_type in WATCHING_SCHEDULES,
        "save_strategy='best'": args.save_strategy == "best",
    }
    used = [name for name, is_used in watching.items() if is_used]
    name = args.metric_for_best_model
    if not used or name is None or args.eval_strategy == "no":
        return
    metrics = ["reward", "reward_std", *(f"rewards/{each}/{kind}" for each in names for kind in ("mean", "std"))]
    if gold_names:
        metrics += [*(f"gold/{each}" for each in gold_names), "gold/average", "gold/average_std_err"]
    if args.num_generations_eval > 1:
        metrics.append("diversity")
    metrics += ["runtime", "samples_per_second"]
    sets = eval_dataset if isinstance(eval_dataset, dict) else [""]
    known = [f"{one}_{metric}".lstrip("_") for one in sets for metric in metrics]
    if name.removeprefix("eval_") not in known:
        near = difflib.get_close_matches(name.removeprefix("eval_"), known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        what = f"metric_for_best_model is {name!r}, which {used[0]} watches"
        raise ValueError(f"{what}, but evaluations have {', '.join(known)}.{hint}")
