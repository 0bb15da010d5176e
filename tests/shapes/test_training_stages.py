"""Pre-training in steps: what it does does not depend on breaks."""

import sys
from pathlib import Path

import torch


FOLDER = Path(__file__).parents[2] / "examples" / "bundled_model"
sys.path.insert(0, str(FOLDER))

from muon import Muon, orthogonal  # noqa: E402
from stage import Stage, adamw, generator  # noqa: E402


def run(folder: Path, *stops: int) -> dict[str, torch.Tensor]:
    """Weights after training to each of the stops, as many runs."""
    for stop in stops:
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 6))
        weights, biases = ([p for p in module.parameters() if p.ndim == ndim] for ndim in (2, 1))
        optimizers = [Muon(weights, 0.01), adamw(biases, 0.01)]
        stage = Stage(folder, "small", {"module": module}, optimizers, lambda step: 1 - step / 8)

        def loss_of(step: int, module=module) -> torch.Tensor:
            x = torch.randn(16, 6, generator=generator(3, step))
            return (module(x) - x.roll(1, dims=1)).square().mean()

        stage.run(stop, loss_of)
    return module.state_dict()


def test_a_stage_goes_on_where_it_was_broken_off(tmp_path):
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole, broken = run(tmp_path / "whole", 6), run(tmp_path / "broken", 2, 4, 6)
    for name, weights in whole.items():
        torch.testing.assert_close(broken[name], weights, rtol=0, atol=0)
    assert (whole["0.weight"] - run(tmp_path / "whole", 7)["0.weight"]).abs().max() > 1e-4


def test_muons_updates_are_nearly_orthogonal():
    matrices = torch.randn(3, 24, 8, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.5 and values.max() < 1.3
    # The directions stay: the nearest orthogonal matrix is that of the polar decomposition
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    nearest = u @ v
    cosine = (orthogonal(matrices) * nearest).sum() / (orthogonal(matrices).norm() * nearest.norm())
    assert cosine > 0.97


def test_muons_first_step_by_hand():
    """A momentum of m makes (1 - m) g of the first gradient g, and looks ahead: a multiple of g, which is orthogonal
    already."""
    matrix = torch.nn.Parameter(torch.zeros(4, 4))
    matrix.grad = 5 * torch.eye(4)
    Muon([matrix], lr=0.1, weight_decay=0.0).step()
    first = orthogonal(torch.eye(4)[None])[0]
    torch.testing.assert_close(matrix.detach(), -0.1 * 0.2 * 4**0.5 * first)
