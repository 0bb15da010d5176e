"""Sums over samples, per trained step, from which the ratio and clip metrics are made."""

import torch


class RatioStatistics:
    """
    Adds up what the metrics need, on the device and without synchronising, until they are logged.

    Args:
        num_steps (`int`): sampling steps `T`.
        device (`torch.device`): where to add.
    """

    # The columns; "above" and "below" count ratios outside the clip range whatever the advantage's sign (Guard's
    # supplement, Fig. 4), "high" and "low" those of them that the clipping acts on (TRL's clip_ratio)
    COLUMNS = ("count", "deviation", "deviation_squared", "above", "below", "high", "low", "kl", "loss")

    def __init__(self, num_steps: int, device: torch.device):
        # Apple's GPUs have no float64
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(num_steps, len(self.COLUMNS), dtype=self.dtype, device=device)

    @torch.no_grad()
    def add(
        self,
        step: int,
        log_ratio: torch.Tensor,
        advantages: torch.Tensor,
        epsilon_low: float,
        epsilon_high: float,
        kl: torch.Tensor | None,
        loss: torch.Tensor,
    ) -> None:
        """Adds one micro-batch of step `step`; all tensors `(B,)`."""
        deviation = torch.expm1(log_ratio.to(self.dtype))
        above, below = deviation > epsilon_high, deviation < -epsilon_low
        columns = [
            torch.ones_like(deviation),
            deviation,
            deviation.square(),
            above,
            below,
            above & (advantages > 0),
            below & (advantages < 0),
            torch.zeros_like(deviation) if kl is None else kl,
            loss,
        ]
        self.sums[step] += torch.stack([column.to(self.dtype) for column in columns]).sum(dim=1)

    def metrics(self, sums: torch.Tensor, with_kl: bool) -> dict[str, float]:
        """Metrics of `sums` `(T, columns)`, which may have been added up over processes."""
        metrics: dict[str, float] = {}

        def of(row: torch.Tensor) -> dict[str, float]:
            mean = dict(zip(self.COLUMNS, (row / row[0]).tolist(), strict=True))
            # Deviations from 1 are tiny: their spread is computed before 1 is added
            variance = max(mean["deviation_squared"] - mean["deviation"] ** 2, 0.0)
            return {**mean, "std": variance**0.5}

        if sums[:, 0].sum() == 0:
            return metrics
        total = of(sums.sum(dim=0))
        metrics["ratio/mean"] = 1 + total["deviation"]
        metrics["ratio/std"] = total["std"]
        metrics["clip_ratio/low_mean"] = total["low"]
        metrics["clip_ratio/high_mean"] = total["high"]
        metrics["clip_ratio/region_mean"] = total["low"] + total["high"]
        if with_kl:
            metrics["kl"] = total["kl"]
        for step in sums[:, 0].nonzero().flatten().tolist():
            row = of(sums[step])
            metrics[f"ratio/mean_step_{step}"] = 1 + row["deviation"]
            metrics[f"ratio/std_step_{step}"] = row["std"]
            metrics[f"clip_ratio/low_step_{step}"] = row["below"]
            metrics[f"clip_ratio/high_step_{step}"] = row["above"]
        return metrics
