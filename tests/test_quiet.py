"""What is not logged is known word for word; all else of the same loggers is."""

import logging

import pytest

from trl_flow.quiet import HINTS, leave_out_hints


@pytest.mark.parametrize("name", HINTS)
def test_only_the_hint_is_left_out(name):
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        leave_out_hints()
        leave_out_hints()  # once is enough
        logger.error("%s", f"`X` {HINTS[name]} `Y`")
        logger.error("An adapter has keys that do not fit.")
    finally:
        logger.removeHandler(handler)
    assert seen == ["An adapter has keys that do not fit."]
    assert sum(type(each).__name__ == "_Without" for each in logger.filters) == 1
