"""`--storage`: the folder or URI that holds the run directories."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.rundir import RunDir, check_format
from analysis.rundir.codec import from_json
from study.errors import UserError
from study.storage.object_store import Remote, check_uri, is_uri
from study.system.cache import cache_dir


@dataclass(frozen=True)
class Location:
    """The folder or URI that holds the run directories.

    A run directory in a folder is used in place; one at a URI has a working copy on this machine,
    whose files are uploaded.
    """

    storage: str
    """The value of `--storage`."""

    @property
    def remote(self) -> Remote | None:
        """The folder in the object store; None for a folder on disk."""
        return Remote(self.storage) if is_uri(self.storage) else None

    def of(self, name: str) -> str:
        """Return where a study is stored, for display."""
        return self.remote.child(name).uri if self.remote else str(Path(self.storage) / name)

    def rundir(self, name: str) -> RunDir:
        """Return the run directory to work in."""
        folder = working_copy(self.storage, name) if self.remote else Path(self.storage) / name
        return RunDir(folder)

    def check(self) -> None:
        """Check that it can hold run directories.

        Raises:
            UserError: The path is not a folder, or the URI is invalid.
        """
        if self.remote:
            check_uri(self.storage)
            return
        folder = Path(self.storage)
        try:
            is_file = folder.exists() and not folder.is_dir()
        except (OSError, ValueError) as error:
            raise UserError(f"--storage {folder}: invalid path ({error}); give a folder.") from None
        if is_file:
            raise UserError(f"--storage {folder}: this is a file; give a folder.")

    def holds(self, name: str) -> bool:
        """Return whether a name is taken."""
        if self.remote:
            return self.remote.child(name).exists("study.json")
        return (Path(self.storage) / name).exists()

    def read_study(self, name: str) -> dict[str, Any] | None:
        """Return the content of a study's study.json; None if it does not exist.

        Raises:
            RunDirError: It cannot be read.
        """
        if not self.remote:
            rundir = self.rundir(name)
            return rundir.read_study() if rundir.study_json.exists() else None
        content = self.remote.child(name).read("study.json")
        if content is None:
            return None
        where = self.remote.child(name).child("study.json").uri
        return check_format(from_json(content, where), where)

    def latest_study(self) -> str:
        """Return the name of the study whose study.json was written last.

        Raises:
            UserError: There are no studies.
        """
        if self.remote:
            found = {name: self.remote.find(f"{name}/study.json") for name in self.remote.folders()}
            written = {name: entry.mtime for name, entry in found.items() if entry}
        else:
            files = Path(self.storage).glob("*/study.json")
            written = {file.parent.name: file.stat().st_mtime for file in files}
        if not written:
            raise UserError(f"--resume: there is no study in {self.storage}; omit --resume.")
        return max(written, key=lambda name: written[name])


def working_copy(storage: str, name: str) -> Path:
    """Return the path of this machine's working copy of a study.

    Args:
        storage: URI of the folder that holds the run directories.
        name: Name of the run directory.

    Raises:
        UserError: The cache directory cannot be created.
    """
    short = hashlib.sha256(storage.rstrip("/").encode()).hexdigest()[:12]
    return cache_dir() / "studies" / short / name
