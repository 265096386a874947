"""Signals that end a study.

Each raises KeyboardInterrupt wherever it arrives. Third-party code may swallow the exception, so
the signal is also recorded, and long loops check for it.
"""

import signal
import sys
from collections.abc import Callable
from types import FrameType

#: Signals received so far.
received: list[int] = []


def install_handlers() -> None:
    """Handle SIGTERM and SIGHUP like Ctrl-C; signals that are ignored stay ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)
    sys.unraisablehook = _without_interrupts(sys.unraisablehook)


def raise_if_received() -> None:
    """End the study if a signal has been received.

    Raises:
        KeyboardInterrupt: A signal has been received.
    """
    if received:
        raise KeyboardInterrupt


def exit_status() -> int:
    """Return the exit status of an interrupted process: 128 plus the signal's number."""
    return 128 + (received[0] if received else signal.SIGINT)


def _interrupt(number: int, _: FrameType | None) -> None:
    received.append(number)
    raise KeyboardInterrupt


def _without_interrupts(
    report: Callable[["sys.UnraisableHookArgs"], object],
) -> Callable[["sys.UnraisableHookArgs"], None]:
    """Report unraisable exceptions, such as those in destructors, except our interrupts."""

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            report(unraisable)

    return hook
