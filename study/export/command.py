"""Command line that exports another model of a finished study.

    python -m study.export runs/NAME --arm no-dropout

Exit status 0: the model is written; 2: an error the user can fix, reported in one line.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from study.config import option
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
    """Export a model of a finished study.

    Every study exports one model at its end; this command exports another.
    """

    run: Annotated[str, tyro.conf.Positional, option("RUN")]
    """The study's run directory, such as runs/NAME, or its URI."""
    arm: Annotated[str, option("best|ARM|ensemble")] = "best"
    """Model to export: the best run, the best run of an arm, or the heads of all seeds together."""
    to: Annotated[Path | None, option("FOLDER", "best_model/ in the run directory")] = None
    """Folder to write to; a model already there is replaced."""
    data: Annotated[str | None, option("PATH", "where the study found them")] = None
    """Where the images are now, if they have moved."""


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; `words` as in `sys.argv[1:]`."""

    def body() -> int:
        arguments = parse_arguments(ExportArguments, PROG, sys.argv[1:] if words is None else words)
        try:
            export_again(find_study(arguments), arguments.to, Screen())
        except UserError as error:
            # In a study's own command, the model is chosen by --export.
            text = str(error).replace("--export ", "--arm ")
            raise type(error)(text).with_traceback(error.__traceback__) from error.__cause__
        return 0

    return run_command(PROG, body)


def find_study(arguments: ExportArguments) -> Study:
    """Return the study of a run directory, with the requested model as its `export` option.

    Raises:
        UserError: There is no study, it has no such model, or `--to` is not usable.
        RunDirError: The study's record cannot be read.
    """
    run = arguments.run.rstrip("/")
    if is_uri(run):
        storage, _, name = run.rpartition("/")
    else:
        path = Path(run).resolve()
        storage, name = str(path.parent), path.name
    if not name or Location(storage).read_study(name) is None:
        raise UserError(f"{run}: no study here; give a run directory, such as runs/NAME.")
    if arguments.to is not None:
        check_place(arguments.to)
    config = parse_config(["--resume", "--storage", storage, "--name", name])
    # MLflow keeps the model that the study itself exported.
    config = replace(config, export=arguments.arm, data=arguments.data or config.data, mlflow=None)
    return resolve_study(config)


def export_again(study: Study, to: Path | None, screen: Screen) -> None:
    """Export another model of a finished study.

    Args:
        study: The study, with the requested model as its `export` option.
        to: Folder to write to; None: best_model/ in the run directory.
        screen: Where to print the result.

    Raises:
        UserError: There is no such model, or data or weights differ from those of the study.
        RunDirError: A file of the run directory cannot be read.
    """
    # Imported late: torch takes seconds, and argument errors should not wait for it.
    from study.export.write import export_best_model, show_export
    from study.inputs import load_inputs
    from study.provenance import inputs_as_record
    from study.resume import check_same_inputs, pinned_sources
    from study.search.champions import find_champions

    with exclusive_access(study.rundir, study.remote, screen.print) as rundir:
        study = replace(study, rundir=rundir)
        record = rundir.read_study()
        inputs, _ = load_inputs(study, pinned_sources(record), None)
        check_same_inputs(record, inputs_as_record(inputs))
        champions = find_champions(rundir, study.space)
        exported = export_best_model(study, champions, inputs, to)
    show_export(study, exported, to, screen)


def check_place(folder: Path) -> None:
    """Check that a folder is new, empty, or an exported model.

    Raises:
        UserError: It holds other files, or is not usable as a folder.
    """
    try:
        if not folder.exists() or (folder / "SHA256SUMS").exists():
            return
        is_free = folder.is_dir() and not any(folder.iterdir())
    except (OSError, ValueError) as error:
        raise UserError(f"--to {folder}: not usable ({error}); give another folder.") from None
    if not is_free:
        raise UserError(
            f"--to {folder}: contains other files; give a new or empty folder, or one that holds an"
            " exported model."
        )
