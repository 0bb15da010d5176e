"""The commands `trl-flow train` and `trl-flow memory`; the others stand with what they are about."""

import os
import sys


class UsageError(Exception):
    """Something that the user asked for cannot be done; the message says what to change. No traceback is shown."""


def show(text: str) -> None:
    """Prints `text`, also into a pipe whose reader has seen enough, such as `head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # at the end Python flushes once more
