"""What can be wrong with a run directory."""


class RunDirError(ValueError):
    """A run directory that is none, or that holds what cannot be read; the message is one line."""
