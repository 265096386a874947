"""Errors about run directories."""


def on_one_line(text: str) -> str:
    """Return text that prints on one line, with unprintable characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class RunDirError(ValueError):
    """Not a run directory, or unreadable; the message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(on_one_line(message))
