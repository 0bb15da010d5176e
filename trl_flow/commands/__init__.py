"""The commands `trl-flow train` and `trl-flow memory`; the others stand with what they are about."""


class UsageError(Exception):
    """Something that the user asked for cannot be done; the message says what to change. No traceback is shown."""
