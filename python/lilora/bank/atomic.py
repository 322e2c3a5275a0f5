"""Writing files and folders so that a reader finds the old one or the new one, never a part of either."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from lilora.errors import UserError

from .lock import LOCK, locked, own

NEW = "new"  # in the folder that `new_folder` makes beside its own
UNFINISHED = ".lilora"  # ends that one's name
_SECONDS_TO_LOCK = 60  # far more than a process takes from making the folder to locking it
TEMPORARY = ".tmp"  # appended to the name of a file that is still being written


def write_atomically(path: Path, data: bytes) -> None:
    """Make `path` a file that holds `data`, as one step that a crash or a power cut cannot halve.

    Missing parent folders are made. The bytes go to `path` + ".tmp", reach the disk, and only then take the name. A
    killed process can leave the temporary file behind; the next write to `path` replaces it. Processes that write the same
    file at once wait for each other.

    Raises:
        UserError: the system refused (disk full, no permission, name too long).
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with own(temporary) as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        _sync_folder(path.parent)  # the new name, too, must survive a power cut
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror or error}); free space or mend the permissions of "
            f"{path.parent} and run the same command again"
        ) from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` to write into; it takes the name `path` when the block ends, and goes if the block raises.

    A killed process leaves nothing at `path`, and the unfinished folder beside it, under a name that starts with a dot; the
    next call for any folder there deletes what no process holds.

    Raises:
        UserError: `path` is a file or a folder that holds anything, or the system refused.
    """
    path = path.absolute()
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} already exists; give a new or empty folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=UNFINISHED, dir=path.parent))
        folder = scratch / NEW  # made with the user's permissions, as mkdtemp's own is not
        try:
            with locked(scratch):
                try:
                    folder.mkdir()
                    yield folder
                    folder.replace(path)
                    _sync_folder(path.parent)
                finally:  # under the lock: what is left without one is empty
                    shutil.rmtree(folder, ignore_errors=True)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be written ({reason}); free space or give another folder") from error


def _sweep(parent: Path) -> None:
    """Delete the folders of `new_folder` whose processes were killed."""
    for left in parent.glob(f".*-????????{UNFINISHED}"):
        with suppress(UserError, OSError):
            held_by_a_pid = (left / LOCK).exists() and (left / LOCK).stat().st_size > 0
            young = time.time() - left.stat().st_mtime < _SECONDS_TO_LOCK
            if {entry.name for entry in left.iterdir()} <= {LOCK, NEW} and (held_by_a_pid or not young):
                with locked(left) as held:
                    if held:
                        shutil.rmtree(left / NEW, ignore_errors=True)
                left.rmdir()


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
