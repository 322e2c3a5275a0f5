"""Writing files so that a reader finds the old file or the new one, never a part of either."""

import os
from pathlib import Path

from lilora.errors import UserError

TEMPORARY = ".tmp"  # appended to the name of a file that is still being written


def write_atomically(path: Path, data: bytes) -> None:
    """Make `path` a file that holds `data`, as one step that a crash or a power cut cannot halve.

    Missing parent folders are made. The bytes go to `path` + ".tmp", reach the disk, and only then take the name. A
    killed process can leave the temporary file behind; the next write to `path` replaces it.

    Raises:
        UserError: the system refused (disk full, no permission, name too long).
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
