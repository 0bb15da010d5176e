"""[`OptimizerModes`]: optimizers that train other weights than they recommend."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


class OptimizerModes:
    """Switches an optimizer that has `train()` and `eval()`, such as a schedule-free one: in the first mode the model
    has the weights that gradients are computed at, which sampling phases are drawn with, in the second those to
    evaluate and to save. Others are left alone."""

    def __init__(self, optimizer: Callable[[], Any]):
        self._optimizer, self._trains = optimizer, False

    def train(self) -> None:
        self._switch("train")

    def eval(self) -> None:
        """Until the next `train`."""
        if self._trains:
            self._switch("eval")

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        trains = self._trains
        self.eval()
        try:
            yield
        finally:
            if trains:
                self.train()

    def _switch(self, mode: str) -> None:
        self._trains = mode == "train"
        if callable(method := getattr(self._optimizer(), mode, None)):
            method()
