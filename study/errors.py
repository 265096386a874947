"""The one exception that is meant for the person at the keyboard."""

from analysis.errors import on_one_line


class UserError(Exception):
    """A mistake that the user can mend, or a thing that only the user can provide.

    The message is complete in itself: what is wrong, where, and what to do. `run_study.py` prints
    it without a traceback and exits with status 2. It is one line, whatever the name of a file in
    it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(on_one_line(message))
