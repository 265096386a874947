"""What can be wrong with a run directory."""


def on_one_line(text: str) -> str:
    """Text as a terminal can show it in one line; what it cannot show is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class RunDirError(ValueError):
    """A run directory that is none, or that holds what cannot be read; the message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(on_one_line(message))
