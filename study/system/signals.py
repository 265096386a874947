"""The signals that end a study.

Each raises KeyboardInterrupt where it strikes. An exception may get lost in code that is not ours,
so the signal is remembered too, and the long loops look whether there was one.
"""

import signal
import sys
from collections.abc import Callable
from types import FrameType

#: Those that have come so far.
received: list[int] = []


def install_handlers() -> None:
    """Take SIGTERM and SIGHUP as Ctrl-C is taken; one that is to be ignored is left alone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)
    sys.unraisablehook = _without_interrupts(sys.unraisablehook)


def raise_if_received() -> None:
    """End the study if a signal has come.

    Raises:
        KeyboardInterrupt: It has.
    """
    if received:
        raise KeyboardInterrupt


def exit_status() -> int:
    """The exit status of a process that was interrupted: 128 and the signal's number."""
    return 128 + (received[0] if received else signal.SIGINT)


def _interrupt(number: int, _: FrameType | None) -> None:
    received.append(number)
    raise KeyboardInterrupt


def _without_interrupts(
    tell: Callable[["sys.UnraisableHookArgs"], object],
) -> Callable[["sys.UnraisableHookArgs"], None]:
    """Tell of exceptions that Python cannot raise, such as in a destructor, but for our own."""

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            tell(unraisable)

    return hook
