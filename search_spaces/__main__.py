"""List all spaces (`python -m search_spaces`), or show one (`python -m search_spaces NAME`)."""

import argparse
import sys

from rich import box
from rich.console import Console
from rich.table import Table

from search_spaces.parameters import PARAMETERS
from search_spaces.ranges import SpaceError, readable
from search_spaces.registry import SPACES, find_space
from search_spaces.space import Space

#: Width of the output in columns when it is not a terminal.
PIPE_WIDTH = 100


def main() -> int:
    """Print the spaces and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m search_spaces",
        description="List the search spaces: their arms and the ranges of their recipes.",
    )
    parser.add_argument(
        "space", nargs="?", metavar="NAME", help="show only this space; also package.module:NAME"
    )
    wanted = parser.parse_args().space
    try:
        spaces = [find_space(wanted)] if wanted else list(SPACES.values())
    except SpaceError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    for space in spaces:
        _show_space(space, console)
    _show_meanings(spaces, console)
    return 0


def _show_space(space: Space, console: Console) -> None:
    console.print(f"[bold]{space.name}[/bold]  {space.question}")
    table = _table("", "hyperparameter", "range")
    for kind, arms in (("arm", space.arms), ("setting", space.settings)):
        for arm in arms:
            for name, values in arm.factor.items():
                table.add_row(f"{kind} {arm.name}", name, str(values))
    for name, values in space.ranges(space.arms[0]).items():
        if name not in space.factor_names:
            table.add_row("recipe", name, str(values))
    console.print(table)
    if space.options:
        options = ", ".join(f"{name} {value}" for name, value in space.options.items())
        console.print(f"Option defaults set by this space: {options}\n")


def _show_meanings(spaces: list[Space], console: Console) -> None:
    used = {name for space in spaces for name in space.ranges(space.arms[0])}
    table = _table("hyperparameter", "default", "meaning")
    for name, parameter in PARAMETERS.items():
        if name in used:
            table.add_row(name, readable(parameter.default), parameter.meaning)
    console.print("[bold]Hyperparameters[/bold]")
    console.print(table)


def _table(*columns: str) -> Table:
    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)


if __name__ == "__main__":
    sys.exit(main())
