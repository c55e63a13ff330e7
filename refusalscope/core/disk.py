"""Files on disk: written whole or not at all, in a folder that one process has for itself.

Knows bytes and folders, nothing of results.
"""

import fcntl
import os
import tempfile
from pathlib import Path

PARTIAL = ".partial"
"""How the name of a file ends that is being written."""


def write_atomically(file: Path, content: bytes) -> None:
    """Write beside the target, flush to disk, rename over it: a reader sees the old bytes or the new, never a part.

    Raises OSError naming the target, not the file beside it.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=PARTIAL)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(file)) from error


class Claim:
    """The sole use of a folder, from `take` to `release` or to the death of the process.

    The lock is on the folder itself, so that no file is left behind.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handle: int | None = None

    def take(self) -> None:
        """Take the folder, and clear it of what dead processes were writing; a folder that is not there is not taken.

        Raises ValueError when another process has it.
        """
        if self._handle is not None or not self.folder.is_dir():
            return
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if isinstance(error, BlockingIOError):
                raise ValueError(f"{self.folder} is in use by another process: wait until that has ended") from error
            return  # A file system without locks: keeping two processes apart is left to the user there.
        self._handle = handle
        for stray in self.folder.rglob(f".*{PARTIAL}"):
            stray.unlink()

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Let other processes have the folder."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
