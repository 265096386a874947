"""The command that exports another model of a study that has ended.

    python -m study.export runs/NAME --arm no-dropout

Exit status 0: it is written; 2: something that the user can mend, in one line.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from study.errors import UserError
from study.screen import Screen
from study.storage.location import Location
from study.storage.lock import exclusive_access
from study.storage.object_store import is_uri
from study.study import Study, parse_config, resolve_study
from study.system.cli import parse_arguments, run_command

PROG = "python -m study.export"


@dataclass(frozen=True)
class ExportArguments:
    """Export a model of a study that has ended.

    Every study exports one at its end; this chooses another.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The study's run directory, such as runs/NAME, or its URI."""
    arm: str = "best"
    """What to export: best, an arm such as no-dropout, or ensemble."""
    to: Path | None = None
    """Folder to write to. Default: best_model/ in the run directory, in the place of what is
    there."""
    data: str | None = None
    """Where the images are now. Default: where they were."""


def main(words: Sequence[str] | None = None) -> int:
    """Export; `words` as in `sys.argv[1:]`."""

    def body() -> int:
        arguments = parse_arguments(ExportArguments, PROG, sys.argv[1:] if words is None else words)
        study = find_study(arguments)
        export_again(study, arguments.to, Screen())
        return 0

    return run_command(PROG, body)


def find_study(arguments: ExportArguments) -> Study:
    """The study that a run directory belongs to, with the model that is asked for.

    Raises:
        UserError: There is none there, or it has no such model.
        RunDirError: Its record cannot be read.
    """
    run = arguments.run.rstrip("/")
    if is_uri(run):
        storage, _, name = run.rpartition("/")
    else:
        path = Path(run).resolve()
        storage, name = str(path.parent), path.name
    if not name or Location(storage).read_study(name) is None:
        raise UserError(f"{run}: holds no study; give a run directory, such as runs/NAME.")
    if arguments.to is not None:
        check_place(arguments.to)
    config = parse_config(["--resume", "--storage", storage, "--name", name])
    # MLflow has the model that the study itself has ended with.
    config = replace(config, export=arguments.arm, data=arguments.data or config.data, mlflow=None)
    try:
        return resolve_study(config)
    except UserError as error:
        raise UserError(str(error).replace("--export ", "--arm ")) from None


def export_again(study: Study, to: Path | None, screen: Screen) -> None:
    """Export another model of a study that has ended.

    Args:
        study: With the wanted model as its `export`.
        to: The folder; None: best_model/ of the run directory.
        screen: Shows where the model is.

    Raises:
        UserError: There is no such model, or data or weights are not those of the study.
        RunDirError: A file of the run directory cannot be read.
    """
    # Only now: torch takes seconds to import, which a wrong argument need not wait for.
    from study.export.write import export_best_model, show_export
    from study.inputs import load_inputs
    from study.provenance import describe_inputs
    from study.resume import check_same_inputs, pinned_sources
    from study.search.champions import find_champions

    with exclusive_access(study.rundir, study.remote, screen.print) as rundir:
        study = replace(study, rundir=rundir)
        record = rundir.read_study()
        inputs, _ = load_inputs(study, pinned_sources(record), None)
        check_same_inputs(record, describe_inputs(inputs))
        champions = find_champions(rundir, study.space)
        exported = export_best_model(study, champions, inputs, to)
    show_export(study, exported, to, screen)


def check_place(folder: Path) -> None:
    """Make sure that writing to a folder replaces an exported model, or nothing.

    Raises:
        UserError: Something else stands there.
    """
    try:
        if not folder.exists() or (folder / "SHA256SUMS").exists():
            return
        is_free = folder.is_dir() and not any(folder.iterdir())
    except (OSError, ValueError) as error:
        raise UserError(f"--to {folder}: cannot be a folder ({error}).") from None
    if not is_free:
        raise UserError(
            f"--to {folder}: holds other files; give a folder that is new, empty, or an exported"
            " model."
        )
