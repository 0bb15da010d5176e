"""Two hints of libraries below that say nothing about anybody's run, and stand before everything else."""

import logging


# The logger, and how the hint is written there
HINTS = {
    # On importing pipelines that are not used, of a package that is not needed
    "transformers.utils.import_utils": "requires torchvision (not installed); falling back to",
    # On loading an adapter of the transformer alone, as all are here; it asks for an issue to be opened
    "diffusers.loaders.lora_base": "No LoRA keys associated to",
}


def leave_out_hints() -> None:
    """From now on these are not logged; all else is."""
    for name, hint in HINTS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Without) for each in logger.filters):
            logger.addFilter(_Without(hint))


class _Without(logging.Filter):
    def __init__(self, hint: str):
        super().__init__()
        self.hint = hint

    def filter(self, record: logging.LogRecord) -> bool:
        return self.hint not in record.getMessage()
