"""[`Metrics`]: everything that is measured between two logs, in one flat dictionary."""

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from accelerate import Accelerator

from trl_flow.algorithms import Algorithm, StepSums


class Metrics:
    """Adds up what is measured until it is logged."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        # Apple's GPUs have no float64
        self._dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
        self._values: dict[str, list[float]] = defaultdict(list)
        self._sums: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        self._counts: dict[str, torch.Tensor] = {}

    def append(self, values: Mapping[str, float]) -> None:
        """Values that are equal on all processes, or of which the main process's count; a log has their means."""
        for name, value in values.items():
            self._values[name].append(float(value))

    def clear(self) -> None:
        """Forgets all values: those of a training that failed are not the next one's."""
        self._values.clear()
        self._sums.clear()
        self._counts.clear()

    @torch.no_grad()
    def add(self, unit: int, stats: Mapping[str, torch.Tensor]) -> None:
        """Samples' statistics `(B,)` and counts `(B, K)` of one unit, summed up on the device, without waiting for
        it."""
        for name, values in stats.items():
            values = values.to(self._dtype)
            if values.ndim == 2:
                key = f"{name}_step_{unit}"
                self._counts[key] = values.sum(dim=0) + self._counts.get(key, 0)
                continue
            sums = torch.stack([torch.ones_like(values), values, values.square()]).sum(dim=1)
            before = self._sums[unit].get(name)
            self._sums[unit][name] = sums if before is None else before + sums

    def counts(self) -> dict[str, list[int]]:
        """What was counted since the last log, of all processes, by names with units. [`flush`] forgets it."""
        return {
            key: list(map(round, self.accelerator.reduce(counts, "sum").tolist()))
            for key, counts in sorted(self._counts.items())
        }

    def flush(self, algorithm: Algorithm) -> dict[str, float | None]:
        """All metrics since the last log, of all processes, by their names; `None` for a mean over nothing."""
        metrics: dict[str, float | None] = {}
        for name, values in self._values.items():
            present = [value for value in values if not math.isnan(value)]
            metrics[name] = sum(present) / len(present) if present else None
        keys = [(unit, name) for unit in sorted(self._sums) for name in self._sums[unit]]
        if keys:
            # Every process has trained on the same units, so that the keys are in the same order
            stacked = torch.stack([self._sums[unit][name] for unit, name in keys])
            sums: dict[int, dict[str, tuple[float, float, float]]] = defaultdict(dict)
            for (unit, name), row in zip(keys, self.accelerator.reduce(stacked, "sum").tolist(), strict=True):
                sums[unit][name] = tuple(row)
            metrics |= algorithm.summarize(StepSums(sums))
        self.clear()
        return metrics
