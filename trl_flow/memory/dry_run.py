"""
Running meta modules, whose tensors have shapes and dtypes and no data, and counting the storages that are alive. What
a GPU does otherwise is imitated in two places: autocast, which does not know the meta device, and fused attention,
which does not keep the matrix of attention weights. Work spaces of the kernels are not seen.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that came into being under it and are still alive, and the most there were."""

    def __init__(self, existing: Iterable[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self._seen = WeakIdKeyDictionary({tensor.untyped_storage(): None for tensor in existing})

    def _add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and (storage := value.untyped_storage()) not in self._seen:
                self._seen[storage] = None
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result


class _FusedAttention(torch.autograd.Function):
    """The shapes of a fused attention: kept for the backward pass are its inputs, its output and the row sums."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        row_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, row_sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class GPUKernels(TorchFunctionMode):
    """Autocast to `half` as on a GPU (`None`: no autocast), and fused attention. Matrix products run in `half`, norms
    and softmax in float32. Casts of trained weights are kept, as autocast does, until `forget` is called."""

    LOWER = frozenset(
        {F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, torch.matmul, torch.Tensor.matmul}
        | {torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm, torch.baddbmm, torch.addmm, torch.mm}
    )
    UPPER = frozenset({F.layer_norm, F.group_norm, F.softmax, torch.softmax, torch.Tensor.softmax})

    def __init__(self, half: torch.dtype | None):
        super().__init__()
        self.half = half
        self._casts: dict[int, torch.Tensor] = {}

    def forget(self) -> None:
        """As on leaving autocast's context."""
        self._casts.clear()

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self._casts:
            self._casts[id(value)] = value.to(dtype)
        return self._casts[id(value)]

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        attends = func is F.scaled_dot_product_attention
        if self.half is not None and (attends or func in self.LOWER or func in self.UPPER):
            dtype = torch.float32 if func in self.UPPER else self.half
            args, kwargs = tree_map(lambda value: self._cast(value, dtype), (args, kwargs))
        if attends:
            rest = [kwargs[name] for name in ("query", "key", "value")[len(args) :]]
            return _FusedAttention.apply(*args[:3], *rest)
        return func(*args, **kwargs)


def checkpoint(module: torch.nn.Module, *args: Any, half: torch.dtype | None) -> Any:
    """What diffusers' models call for gradient checkpointing; the backward pass, too, recomputes by [`GPUKernels`]."""
    return torch.utils.checkpoint.checkpoint(
        module, *args, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), GPUKernels(half))
    )


def peak_bytes(run: Callable[[GPUKernels], None], modules: Iterable[torch.nn.Module], half: torch.dtype | None) -> int:
    """The most that `run`, forward and backward passes of `modules`, has in memory at once besides their parameters,
    buffers and gradients, in bytes. It gets the mode that it runs under, with autocast to `half`."""
    existing = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    existing += [tensor.grad for tensor in existing if tensor.grad is not None]
    kernels = GPUKernels(half)
    with _LiveBytes(existing) as memory, kernels:
        run(kernels)
        kernels.forget()
    return memory.peak
