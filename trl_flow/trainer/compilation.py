"""`torch_compile`: the parts of a model are compiled in place, so that sampling and updates run one graph, and nothing
that is saved has another name."""

import contextlib
import logging as python_logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging


if TYPE_CHECKING:
    from trl_flow.trainer.flow_rl_config import FlowRLConfig

logger = logging.get_logger(__name__)

# Torch compiles code anew for other kinds of blocks, inputs with and without gradients, an adapter that is switched
# off, evaluation and other batch sizes. Behind its own limit, 8, it goes on uncompiled
RECOMPILE_LIMIT = 64
# By their CUDA graphs a block writes its output where its last one is, which an update still needs
_WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
MODES = ("default", "max-autotune-no-cudagraphs")


def check_compile_fields(args: "FlowRLConfig") -> None:
    """Raises `ValueError` for a mode or backend that does not exist, or cannot be used here."""
    import torch._dynamo

    backend, mode = args.torch_compile_backend, args.torch_compile_mode
    if backend not in (known := torch._dynamo.list_backends(exclude_tags=None)):
        raise ValueError(f"torch_compile_backend is {backend!r}, but must be one of {', '.join(known)}.")
    if mode in _WITH_CUDA_GRAPHS:
        raise ValueError(
            f"torch_compile_mode is {mode!r}, which records CUDA graphs: these overwrite the outputs of a block that "
            "is run again before the backward pass, as here. Use 'default' or 'max-autotune-no-cudagraphs'."
        )
    if mode not in (None, "default") and (mode not in MODES or backend != "inductor"):
        only = f"{' or '.join(map(repr, MODES))}, the latter with torch_compile_backend='inductor'"
        raise ValueError(f"torch_compile_mode is {mode!r}, but must be {only}.")


def check_compiler(args: "FlowRLConfig") -> None:
    """Compiles a line. Raises `ValueError` if there is no compiler, or none that works."""

    def line(x: torch.Tensor) -> torch.Tensor:
        return x.sin() + 1

    try:
        torch.compile(line, **_options(args))(torch.ones(8, device=args.device, requires_grad=True)).sum().backward()
    except Exception as error:  # each backend has its own
        inner = getattr(error, "inner_exception", error)  # torch puts some lines around it
        cause = (str(inner).strip() or type(inner).__name__).splitlines()[0].rstrip(".")
        needs = "Inductor needs a C++ compiler (g++) on a CPU, and Triton and a C compiler on a GPU"
        raise ValueError(
            f"torch_compile is on, but torch.compile with the backend {args.torch_compile_backend!r} fails on "
            f"{args.device}: {cause}. {needs}. Install what is missing, or set torch_compile=False."
        ) from error


def announcement(args: "FlowRLConfig", number: int) -> str:
    """What is said before a wait, with so many parts to compile."""
    kept = ""
    if args.torch_compile_backend == "inductor":
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        kept = f" Code is kept in {cache_dir()} (TORCHINDUCTOR_CACHE_DIR) for later runs, which wait less."
    parts = "part" if number == 1 else "parts"
    what = f"Compiling {number} {parts} of the model ({args.torch_compile_backend})"
    return f"{what}: the first samples and updates take longer.{kept}"


@contextlib.contextmanager
def compiled(
    parts: Sequence[torch.nn.Module], args: "FlowRLConfig", on_compile: Callable[[bool], None]
) -> Iterator[None]:
    """`parts` run compiled. Each is when it first runs; `on_compile` is told when torch begins, and when it ends."""
    import torch._dynamo
    from torch._dynamo.callback import callback_handler  # what is exported cannot be taken back

    def begins(_) -> None:
        on_compile(True)

    def ends(_) -> None:
        on_compile(False)

    limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    torch_logger, handler = python_logging.getLogger("torch._dynamo.convert_frame"), _LimitHandler()
    for part in parts:
        part.compile(**_options(args))
    callback_handler.register_start_callback(begins)
    callback_handler.register_end_callback(ends)
    torch_logger.addHandler(handler)
    try:
        with torch._dynamo.config.patch(recompile_limit=limit):
            yield
    finally:
        torch_logger.removeHandler(handler)
        callback_handler.remove_start_callback(begins)
        callback_handler.remove_end_callback(ends)
        for part in parts:
            part._compiled_call_impl = None  # there is no public way back


def _options(args: "FlowRLConfig") -> dict[str, str | None]:
    mode = None if args.torch_compile_mode == "default" else args.torch_compile_mode
    return {"backend": args.torch_compile_backend, "mode": mode}


class _LimitHandler(python_logging.Handler):
    """Says once what torch's message means for a run."""

    _has_warned = False

    def emit(self, record: python_logging.LogRecord) -> None:
        if "torch._dynamo hit config." in str(record.msg) and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "The model has met more variants of its inputs than torch.compile takes (recompile_limit): further "
                "ones run uncompiled, so that sampling and updates may differ, and the importance ratio may not be 1 "
                "before the first update. The message of torch says what has changed: shapes, as a rule. Keep them "
                "the same, raise torch._dynamo.config.recompile_limit, or set torch_compile=False."
            )
