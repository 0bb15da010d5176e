"""An estimate as a table, as JSON, and what to change when it does not fit."""

import contextlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from trl_flow.memory.estimate import Estimate, Plan


CARDS = (24, 40, 80)
"""Memory of common cards, in GiB."""
GIB = 2**30
"""Bytes in a GiB."""
ROOM = 0.9  # share of a card up to which a run fits: what the estimate does not know has to fit, too


def fits(estimate: Estimate, card: int) -> bool:
    """Whether a run fits on a card of so many GiB: what the estimate does not know has to fit, too.

    Example:

    ```pycon
    >>> from trl_flow.memory import CARDS, GIB, Estimate, fits
    >>> found = Estimate(
    ...     parameters={"transformer": 2 * 10**9}, trained_parameters=10**7, resident={"transformer weights": 4 * GIB},
    ...     phases={"sampling": 12 * GIB, "updating": 20 * GIB}, allowance=GIB,
    ... )
    >>> [fits(found, card) for card in CARDS]
    [False, True, True]
    ```
    """
    return estimate.total <= ROOM * card * GIB


def savings(plan: Plan, now: Estimate, again: Callable[[Plan], Estimate]) -> list[tuple[str, int]]:
    """What can be changed in a run that needs as much as `now`, and how many bytes each change alone would save, the
    most first; `again` estimates a changed plan.

    Example:

    ```pycon
    >>> from peft import LoraConfig
    >>> from trl_flow import GuardConfig
    >>> from trl_flow.memory import GIB, Estimate, Plan, savings
    >>> plan = Plan(GuardConfig("run", gradient_checkpointing=False, bf16=False, use_cpu=True), LoraConfig(r=32))
    >>> def again(plan):  # in place of estimate(model, plan)
    ...     size = 10 if plan.args.gradient_checkpointing else 30
    ...     return Estimate({}, 0, {"weights": GIB}, {"updating": size * GIB}, 0)
    ...
    >>> [(text, saved / GIB) for text, saved in savings(plan, again(plan), again)]
    [('gradient_checkpointing: true', 20.0)]
    ```
    """
    args, lora, batch = plan.args, plan.peft_config is not None, plan.args.per_device_train_batch_size
    sliced = {"enable_vae_slicing": True} if batch > 1 else {}
    tiling = "enable_vae_tiling: true" + (", with slicing" if batch > 1 else "")
    # Into as few parts as are equal: the images of a phase and of an update, and so the groups, stay as they are
    parts = next((n for n in range(2, batch + 1) if batch % n == 0), 1)
    times = "twice" if parts == 2 else f"{parts} times"
    smaller = f"per_device_train_batch_size: {batch // parts} (and {times} the steps_per_generation and accumulation)"
    more = {name: parts * getattr(args, name) for name in ("steps_per_generation", "gradient_accumulation_steps")}
    in_4bit = {"quantization_config": {"load_in_4bit": True}}
    quantized = {"model_init_kwargs": (args.model_init_kwargs or {}) | in_4bit}
    # Whether there is this choice, how it is written, and what it changes
    choices: list[tuple[bool, str, dict]] = [
        (not args.gradient_checkpointing, "gradient_checkpointing: true", {"gradient_checkpointing": True}),
        (not args.precompute_prompt_embeds, "precompute_prompt_embeds: true", {"precompute_prompt_embeds": True}),
        (lora and not plan.quantization and plan.sharding == "none", "load_in_4bit: true", quantized),
        (batch > 1, smaller, {"per_device_train_batch_size": batch // parts, **more}),
        (batch > 1 and not args.enable_vae_slicing, "enable_vae_slicing: true", sliced),
        (not args.enable_vae_tiling, tiling, {"enable_vae_tiling": True} | sliced),
        (args.use_ema, "use_ema: false", {"use_ema": False}),
        ("weights of the ratio's probe" in plan.kept_weights, "ratio_probe: 0", {"ratio_probe": 0}),
        (args.num_kept_latents > 3 * 2 and not args.sde_window_size, "sde_window_size: 2", {"sde_window_size": 2}),
        (args.beta > 0 and not lora, "beta: 0 (no reference model)", {"beta": 0.0}),
    ]
    found = {}
    for text, changes in ((text, changes) for there, text, changes in choices if there):
        with contextlib.suppress(ValueError):  # what the configuration or the model refuses is no advice
            found[text] = now.total - again(plan.changed(**changes)).total
    # Images no larger than a tile are not cut: what is saved then is the slicing's
    if found.get(tiling, 0) <= found.get("enable_vae_slicing: true", 0):
        found.pop(tiling, None)
    if not lora:  # what trained weights need besides themselves, and half of their own bytes
        of_training = (
            "gradients",
            "buckets of DDP",
            "moving average",
            "weights of the",
            "reference model",
            "optimizer",
        )
        weights = next(size for name, size in now.resident.items() if name.endswith("weights"))
        found["use_peft: true (an adapter in place of all weights)"] = weights // 2 + sum(
            size for name, size in now.resident.items() if name.startswith(of_training)
        )
    # Less than this is within what the estimate does not know
    return sorted(((text, saved) for text, saved in found.items() if saved > now.total // 100), key=lambda x: -x[1])


def as_json(estimate: Estimate, found: list[tuple[str, int]]) -> dict[str, Any]:
    """All numbers in bytes.

    Example:

    ```pycon
    >>> from trl_flow.memory import GIB, Estimate, as_json
    >>> found = Estimate(
    ...     parameters={"transformer": 2 * 10**9}, trained_parameters=10**7, resident={"transformer weights": 4 * GIB},
    ...     phases={"sampling": 12 * GIB, "updating": 20 * GIB}, allowance=GIB,
    ... )
    >>> as_json(found, [])["fits"]
    {'24': False, '40': True, '80': True}
    ```
    """
    return {
        "total": estimate.total,
        **asdict(estimate),
        "fits": {str(card): fits(estimate, card) for card in CARDS},
        "savings": [{"change": text, "saves": saved} for text, saved in found],
    }


def as_text(estimate: Estimate, plan: Plan, found: list[tuple[str, int]]) -> str:
    """A table for people.

    Example:

    ```pycon
    >>> from peft import LoraConfig
    >>> from trl_flow import GuardConfig
    >>> from trl_flow.memory import GIB, Estimate, Plan, as_text
    >>> found = Estimate({}, 10**7, {"transformer weights": 4 * GIB}, {"updating": 16 * GIB}, allowance=GIB)
    >>> plan = Plan(GuardConfig("run", bf16=False, use_cpu=True), LoraConfig(r=32))
    >>> [line.split() for line in as_text(found, plan, []).splitlines() if "total" in line]
    [['total', '21.00', 'GiB']]
    ```
    """
    processes, head = plan.args.world_size, "Memory of the device"
    if processes > 1:
        sharded = {"gradients": ", gradients and optimizer state sharded", "weights": ", all weights sharded"}
        head = f"Memory of each of {processes} devices{sharded.get(plan.sharding, '')}"
    largest = max(estimate.phases, key=estimate.phases.get)
    counts = {f"{part} weights": number for part, number in estimate.parameters.items()}
    counts["adapter weights"] = estimate.trained_parameters
    notes = {name: f"{number:,} parameters" for name, number in counts.items()} | {largest: "<- the largest"}

    def row(name: str, size: int) -> str:
        return f"  {name:<38}{size / GIB:>8.2f} GiB  {notes.get(name, '')}".rstrip()

    def verdict(card: int) -> str:
        share = estimate.total / (card * GIB)
        return "does not fit" if share > 1 else "fits" if fits(estimate, card) else f"tight, {share:.0%} of it"

    changes = [f"  {saved / GIB:>6.2f} GiB  {text}" for text, saved in found]
    lines = [
        *(head, "", "All the time"),
        *(row(name, size) for name, size in estimate.resident.items()),
        "For a time (the largest counts)",
        *(row(name, size) for name, size in estimate.phases.items()),
        row("allowance", estimate.allowance) + "  driver, fragmentation",
        *(f"  {'-' * 50}", row("total", estimate.total), ""),
        "  ".join(f"{card} GB: {verdict(card)}" for card in CARDS),
        *(["", "To need less, each change by itself:"] if found else []),
        *(*changes, ""),
        "Weights, gradients, optimizer state and samples are counted; the rest comes from running the modules",
        "without data, and leaves out work spaces of the GPU's kernels. Models that score the images come on top.",
    ]
    return "\n".join(lines)
