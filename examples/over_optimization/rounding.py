"""The rounding of half precision at the speed of float32, for processors that have no such arithmetic."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class _Round(torch.autograd.Function):
    """To the nearest number of a dtype; gradients pass unchanged."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return tensor.to(dtype).to(tensor.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class Rounding(TorchFunctionMode):
    """
    What autocast rounds: inputs and outputs of products, and the sums and products of tokens between them.

    Sums within a product are float32's, as in hardware. What a transformer does with its time step, which is no token
    (two dimensions), keeps its precision but in products, as in autocast.
    """

    PRODUCTS = (F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul)
    ELEMENTWISE = ("add", "__add__", "__radd__", "__iadd__", "mul", "__mul__", "__rmul__", "layer_norm", "gelu")

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        is_product = func in self.PRODUCTS
        if is_product:
            args = [self.rounded(value) for value in args]
        result = func(*args, **(kwargs or {}))
        tokens = getattr(func, "__name__", "") in self.ELEMENTWISE and result.ndim > 2
        return self.rounded(result) if is_product or tokens else result

    def rounded(self, value: Any) -> Any:
        is_float = isinstance(value, torch.Tensor) and value.dtype == torch.float32
        return _Round.apply(value, self.dtype) if is_float else value


def rounded(function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """`function`, computed with the rounding of `dtype`."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with Rounding(dtype):
            return function(*args, **kwargs)

    return call
