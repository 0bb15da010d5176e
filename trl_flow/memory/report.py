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
    options: list[tuple[str, Plan]] = []
    if not plan.gradient_checkpointing:
        options.append(("gradient_checkpointing: true", plan.changed(gradient_checkpointing=True)))
    if not plan.precompute_prompt_embeds:
        options.append(("precompute_prompt_embeds: true", plan.changed(precompute_prompt_embeds=True)))
    if plan.peft_config is not None and not plan.quantization and plan.sharding == "none":
        options.append(("load_in_4bit: true", plan.changed(load_in_4bit=True)))
    if plan.batch_size > 1:
        half = plan.batch_size // 2
        text = f"per_device_train_batch_size: {half} (and twice the steps_per_generation and accumulation)"
        options.append((text, plan.changed(batch_divisor=2)))
    if not plan.enable_vae_slicing and plan.batch_size > 1:
        options.append(("enable_vae_slicing: true", plan.changed(enable_vae_slicing=True)))
    if not plan.enable_vae_tiling:
        sliced = {"enable_vae_slicing": True} if plan.batch_size > 1 else {}
        text = "enable_vae_tiling: true" + (", with slicing" if sliced else "")
        options.append((text, plan.changed(enable_vae_tiling=True, **sliced)))
    if not plan.backward_per_timestep:
        options.append(("backward_per_timestep: true", plan.changed(backward_per_timestep=True)))
    if plan.use_ema:
        options.append(("use_ema: false", plan.changed(use_ema=False)))
    if plan.trained_steps > 2 and plan.sde_window_size is None:
        options.append(("sde_window_size: 2", plan.changed(sde_window_size=2)))
    if plan.beta > 0 and plan.peft_config is None:
        options.append(("beta: 0 (no reference model)", plan.changed(beta=0.0)))
    found = [(text, now.total - again(other).total) for text, other in options]
    # Images no larger than a tile are not cut: what is saved then is the slicing's
    sliced = dict(found).get("enable_vae_slicing: true", 0)
    found = [(text, saved) for text, saved in found if not text.startswith("enable_vae_tiling") or saved > sliced]
    if plan.peft_config is None:
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
    lines = []

    def row(name: str, size: int, note: str = "") -> None:
        lines.append(f"  {name:<38}{size / GIB:>8.2f} GiB  {note}".rstrip())

    processes = plan.args.world_size
    sharded = {"none": "", "gradients": ", gradients and optimizer state sharded", "weights": ", all weights sharded"}
    lines.append(
        f"Memory of each of {processes} devices{sharded[plan.sharding]}" if processes > 1 else "Memory of the device"
    )
    lines.append("")
    lines.append("All the time")
    for name, size in estimate.resident.items():
        part = name.removesuffix(" weights")
        note = f"{estimate.parameters[part]:,} parameters" if part in estimate.parameters else ""
        if name == "adapter weights":
            note = f"{estimate.trained_parameters:,} parameters"
        row(name, size, note)
    lines.append("For a time (the largest counts)")
    largest = max(estimate.phases, key=estimate.phases.get)
    for name, size in estimate.phases.items():
        row(name, size, "<- the largest" if name == largest else "")
    row("allowance", estimate.allowance, "driver, fragmentation")
    lines.append(f"  {'-' * 50}")
    row("total", estimate.total)
    lines.append("")
    lines.append(
        "  ".join(f"{card} GB: {'fits' if estimate.total <= card * GIB else 'does not fit'}" for card in CARDS)
    )
    if found:
        lines.append("")
        lines.append("To need less, each change by itself:")
        lines += [f"  {saved / GIB:>6.2f} GiB  {text}" for text, saved in found]
    lines.append("")
    lines.append(
        "Weights, gradients, optimizer state and samples are counted; the rest comes from running the modules\n"
        "without data, and leaves out work spaces of the GPU's kernels. Models that score the images come on top."
    )
    return "\n".join(lines)
