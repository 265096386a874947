"""`--storage`: where run directories are kept, a folder or a URI."""

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
    """Where run directories are kept.

    Those in a folder are worked on where they lie; those at a URI in a working copy of this
    machine's, whose files are uploaded.
    """

    storage: str
    """As `--storage` gives it."""

    @property
    def remote(self) -> Remote | None:
        """The place as a folder in a store; None for a folder on a disk."""
        return Remote(self.storage) if is_uri(self.storage) else None

    def of(self, name: str) -> str:
        """Where a study is kept, for people."""
        return self.remote.child(name).uri if self.remote else str(Path(self.storage) / name)

    def rundir(self, name: str) -> RunDir:
        """The run directory to work in."""
        folder = working_copy(self.storage, name) if self.remote else Path(self.storage) / name
        return RunDir(folder)

    def check(self) -> None:
        """Make sure that it can hold folders.

        Raises:
            UserError: It cannot, or the URI makes no sense.
        """
        if self.remote:
            check_uri(self.storage)
            return
        folder = Path(self.storage)
        try:
            is_file = folder.exists() and not folder.is_dir()
        except (OSError, ValueError) as error:
            raise UserError(f"--storage {folder}: cannot be a folder ({error}).") from None
        if is_file:
            raise UserError(f"--storage {folder}: is a file; give a folder.")

    def holds(self, name: str) -> bool:
        """Whether there is something of that name."""
        if self.remote:
            return self.remote.child(name).exists("study.json")
        return (Path(self.storage) / name).exists()

    def read_study(self, name: str) -> dict[str, Any] | None:
        """The study.json of a study; None where there is none.

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
        """The name of the study that was written to last.

        Raises:
            UserError: There is none.
        """
        if self.remote:
            found = {name: self.remote.find(f"{name}/study.json") for name in self.remote.folders()}
            written = {name: entry.mtime for name, entry in found.items() if entry}
        else:
            files = Path(self.storage).glob("*/study.json")
            written = {file.parent.name: file.stat().st_mtime for file in files}
        if not written:
            raise UserError(f"--resume: there is no study in {self.storage}; leave --resume out.")
        return max(written, key=lambda name: written[name])


def working_copy(storage: str, name: str) -> Path:
    """Where this machine keeps its copy of a study.

    Args:
        storage: URI of the folder that holds the run directories.
        name: Of the run directory.

    Raises:
        UserError: The cache directory cannot be made.
    """
    short = hashlib.sha256(storage.rstrip("/").encode()).hexdigest()[:12]
    return cache_dir() / "studies" / short / name
