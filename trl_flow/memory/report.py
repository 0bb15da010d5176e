"""An estimate as a table, as JSON, and what to change when it does not fit."""

from collections.abc import Callable
from typing import Any

from trl_flow.memory.estimate import Estimate, Plan


# Memory of common cards, GiB
CARDS = (24, 40, 80)
GIB = 2**30


def savings(plan: Plan, now: Estimate, again: Callable[[Plan], Estimate]) -> list[tuple[str, int]]:
    """
    What can be changed to need less, and how many bytes each change alone would save, the most first.

    Args:
        plan ([`Plan`]), now ([`Estimate`]): the run and its estimate.
        again (`Callable`): estimates a changed plan.
    """
    lora, several = plan.peft_config is not None, plan.batch_size > 1
    sliced = {"enable_vae_slicing": True} if several else {}
    tiling = "enable_vae_tiling: true" + (", with slicing" if several else "")
    halved = (
        f"per_device_train_batch_size: {plan.batch_size // 2} (and twice the steps_per_generation and accumulation)"
    )
    # Whether there is this choice, how it is written, and what it changes
    choices: list[tuple[bool, str, dict]] = [
        (not plan.gradient_checkpointing, "gradient_checkpointing: true", {"gradient_checkpointing": True}),
        (not plan.precompute_prompt_embeds, "precompute_prompt_embeds: true", {"precompute_prompt_embeds": True}),
        (lora and not plan.quantization and plan.sharding == "none", "load_in_4bit: true", {"load_in_4bit": True}),
        (several, halved, {"batch_divisor": 2}),
        (several and not plan.enable_vae_slicing, "enable_vae_slicing: true", {"enable_vae_slicing": True}),
        (not plan.enable_vae_tiling, tiling, {"enable_vae_tiling": True} | sliced),
        (plan.use_ema, "use_ema: false", {"use_ema": False}),
        (plan.trained_steps > 2 and plan.sde_window_size is None, "sde_window_size: 2", {"sde_window_size": 2}),
        (plan.beta > 0 and not lora, "beta: 0 (no reference model)", {"beta": 0.0}),
    ]
    found = [(text, now.total - again(plan.changed(**changes)).total) for there, text, changes in choices if there]
    # Images no larger than a tile are not cut: what is saved then is the slicing's
    by_slicing = dict(found).get("enable_vae_slicing: true", 0)
    found = [(text, saved) for text, saved in found if text != tiling or saved > by_slicing]
    if not lora:
        found.append(("use_peft: true (an adapter in place of all weights)", _all_but_frozen(now)))
    # Less than this is within what the estimate does not know
    return sorted(((text, saved) for text, saved in found if saved > now.total // 100), key=lambda item: -item[1])


def _all_but_frozen(now: Estimate) -> int:
    """What trained weights need beside themselves, and half of their own bytes."""
    names = ("gradients", "buckets of DDP", "moving average", "reference model")
    weights = next(size for name, size in now.resident.items() if name.endswith("weights"))
    beside = sum(size for name, size in now.resident.items() if name in names or name.startswith("optimizer"))
    return beside + weights // 2


def as_json(estimate: Estimate, found: list[tuple[str, int]]) -> dict[str, Any]:
    """All numbers in bytes."""
    return {
        "total": estimate.total,
        "resident": estimate.resident,
        "phases": estimate.phases,
        "allowance": estimate.allowance,
        "parameters": estimate.parameters,
        "trained_parameters": estimate.trained_parameters,
        "fits": {str(card): estimate.total <= card * GIB for card in CARDS},
        "savings": [{"change": text, "saves": saved} for text, saved in found],
    }


def as_text(estimate: Estimate, plan: Plan, found: list[tuple[str, int]]) -> str:
    """A table for people."""
    processes = plan.args.world_size
    sharded = {"none": "", "gradients": ", gradients and optimizer state sharded", "weights": ", all weights sharded"}
    largest = max(estimate.phases, key=estimate.phases.get)
    counts = {f"{part} weights": number for part, number in estimate.parameters.items()}
    counts["adapter weights"] = estimate.trained_parameters

    def row(name: str, size: int, note: str = "") -> str:
        return f"  {name:<38}{size / GIB:>8.2f} GiB  {note}".rstrip()

    lines = [
        f"Memory of each of {processes} devices{sharded[plan.sharding]}" if processes > 1 else "Memory of the device",
        "",
        "All the time",
        *(
            row(name, size, f"{counts[name]:,} parameters" if name in counts else "")
            for name, size in estimate.resident.items()
        ),
        "For a time (the largest counts)",
        *(row(name, size, "<- the largest" if name == largest else "") for name, size in estimate.phases.items()),
        row("allowance", estimate.allowance, "driver, fragmentation"),
        f"  {'-' * 50}",
        row("total", estimate.total),
        "",
        "  ".join(f"{card} GB: {'fits' if estimate.total <= card * GIB else 'does not fit'}" for card in CARDS),
        "",
    ]
    if found:
        changes = [f"  {saved / GIB:>6.2f} GiB  {text}" for text, saved in found]
        lines += ["To need less, each change by itself:", *changes, ""]
    lines += [
        "Weights, gradients, optimizer state and samples are counted; the rest comes from running the modules",
        "without data, and leaves out work spaces of the GPU's kernels. Models that score the images come on top.",
    ]
    return "\n".join(lines)
