"""What libraries below print that says nothing about anybody's run."""

import logging
import sys


# The logger, and how the hint is written there
HINTS = {
    # On importing pipelines that are not used, of a package that is not needed
    "transformers.utils.import_utils": "requires torchvision (not installed); falling back to",
    # On loading an adapter of the transformer alone, as all are here; it asks for an issue to be opened
    "diffusers.loaders.lora_base": "No LoRA keys associated to",
}


def leave_out_hints() -> None:
    """From now on `HINTS`, which stand before everything else, are not logged; all else is."""
    for name, hint in HINTS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Without) for each in logger.filters):
            logger.addFilter(_Without(hint))


def leave_out_bars() -> None:
    """Of loading a model, where nobody sees them pass. For a command, whose process is its own."""
    if not shows_bars():
        import datasets
        import diffusers
        import transformers

        for library in (datasets, diffusers.utils.logging, transformers.utils.logging):
            library.disable_progress_bar()


def shows_bars() -> bool:
    """Whether bars belong into the output: in a terminal and in a notebook they pass, in a file all of them stay."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class _Without(logging.Filter):
    def __init__(self, hint: str):
        super().__init__()
        self.hint = hint

    def filter(self, record: logging.LogRecord) -> bool:
        return self.hint not in record.getMessage()
