"""Muon (Jordan et al., 2024), for the matrices of a transformer's blocks."""

import torch


class Muon(torch.optim.Optimizer):
    """
    Momentum whose matrices are made orthogonal before they are added: all directions learn equally fast.

    `torch.optim.Muon` does that in bfloat16, which takes longer than the whole step on processors without such
    arithmetic. Here it is float32, and matrices of one shape go through it together.

    Args:
        parameters: matrices.
        lr (`float`): comparable to AdamW's: updates have the root mean square that AdamW's have.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            momentum, by_shape = group["momentum"], {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                for parameter in parameters:
                    if parameter not in self.state:
                        self.state[parameter]["momentum"] = torch.zeros_like(parameter)
                    self.state[parameter]["momentum"].lerp_(parameter.grad, 1 - momentum)
                ahead = [p.grad.lerp(self.state[p]["momentum"], momentum) for p in parameters]
                updates = orthogonal(torch.stack(ahead))
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-0.2 * max(shape) ** 0.5 * group["lr"])


def orthogonal(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """`(N, A, B)` with singular values of about 1, by the Newton-Schulz iteration with Muon's coefficients."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT, steps).mT
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x
