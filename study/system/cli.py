"""Shared by all commands: parse arguments into a dataclass, and report user errors in one line."""

import contextlib
import difflib
import inspect
import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields, make_dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from analysis.rundir.errors import RunDirError
from study.errors import UserError
from study.system import signals

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Arguments = TypeVar("Arguments", bound="DataclassInstance")


def parse_arguments(
    kind: type[Arguments],
    prog: str,
    words: Sequence[str],
    groups: Mapping[str, type] | None = None,
) -> Arguments:
    """Parse a command line into a dataclass whose docstrings are the help text.

    Args:
        kind: The dataclass.
        prog: The command as typed.
        words: The arguments, as in `sys.argv[1:]`.
        groups: Base classes of `kind` by the heading under which `--help` lists their fields.

    Raises:
        UserError: An option is unknown, or a value is malformed.
        SystemExit: `--help` has been printed.
    """
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            if groups and {"-h", "--help"} & set(words):
                description = inspect.getdoc(kind)
                flat = (tyro.conf.OmitArgPrefixes,)
                tyro.cli(
                    _nested(groups), prog=prog, args=words, description=description, config=flat
                )
            # tyro parses the flat dataclass several times as fast.
            return tyro.cli(kind, prog=prog, args=words)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(stderr.getvalue(), kind, prog)) from None


def run_command(prog: str, body: Callable[[], int]) -> int:
    """Run a command's body and return its exit status.

    Args:
        prog: The command as typed.
        body: Returns the exit status. A user error yields 2, an interruption 128 plus the signal's
            number.
    """
    signals.install_handlers()
    try:
        return body()
    except (UserError, RunDirError) as error:
        sys.stderr.write(f"{prog}: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: interrupted.\n")
        return signals.exit_status()


def _nested(groups: Mapping[str, type]) -> Any:
    """Return a dataclass with a field per group; tyro lists each under its own heading."""
    parts = [(name, group, field(default_factory=group)) for name, group in groups.items()]
    return make_dataclass("Options", parts)


def _one_line(box: str, kind: type[Arguments], prog: str) -> str:
    """Return the first paragraph of tyro's boxed message as one line, with a hint."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip(" │╭╮╰╯") for line in box.splitlines()]
    body = [line for line in lines if line and not line.startswith("─ ")]
    rule = next((i for i, line in enumerate(body) if set(line) == {"─"}), len(body))
    message = " ".join(body[:rule]).rstrip(".")
    options = [f"--{f.name.replace('_', '-')}" for f in fields(kind)]
    close = difflib.get_close_matches(next(iter(re.findall(r"--[\w-]+", message)), ""), options, 1)
    misspelt = message.startswith("Unrecognized") and close
    return f"{message}; {f'did you mean {close[0]}?' if misspelt else f'see {prog} --help.'}"
