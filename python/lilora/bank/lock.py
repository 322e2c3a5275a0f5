"""Who may write into a folder: one process at a time. Reading needs no lock."""

import errno
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lilora.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two writers apart there
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"  # in the folder while a process writes there; holds its pid
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_held: dict[Path, tuple[int, int]] = {}  # folder -> the lock's descriptor, and the thread that holds it


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Be the only one that writes into `folder`, which is made if it is missing, until the block ends.

    The lock ends with its process, however that ends; a thread that holds it may take it again. The block gets True; or False,
    and no lock, on systems without fcntl (Windows) and, with a warning, on file systems without locks.

    Raises:
        UserError: another process, or thread, holds the lock; names its pid. Or the system refused.
    """
    folder = Path(os.path.realpath(folder))
    if folder in _held and _held[folder][1] == threading.get_ident():
        yield True
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = None if fcntl is None else _taken(folder / LOCK)
    except OSError as error:
        _remove_empty(made)
        raise UserError(
            f"{folder} cannot be written ({error.strerror or error}); free space or mend the path or its permissions"
        ) from error
    if descriptor is not None:
        _held[folder] = descriptor, threading.get_ident()
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None and _held.pop(folder, None) is not None:  # it is gone in a forked child
            with suppress(OSError):
                os.unlink(folder / LOCK)
            os.close(descriptor)
        _remove_empty(made)


def own(path: Path) -> BinaryIO:
    """The file `path`, made or emptied, open for writing by one process at a time: others wait until it is closed."""
    while True:
        file = open(path, "ab")  # noqa: SIM115 - the caller closes it
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        if fcntl is None or _is_at(file.fileno(), path):
            file.truncate(0)
            return file
        file.close()  # who had it has given it another name meanwhile


def _is_at(descriptor: int, path: Path) -> bool:
    return os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path))


def _taken(path: Path) -> int | None:
    """The descriptor of the file `path`, locked; None where no lock is possible."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 20, 0).decode(errors="replace")
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise UserError(
                    f"{path.parent} is being written by process {holder or 'of unknown number'}; run the same command again "
                    "when that has ended"
                ) from error
            if error.errno not in _UNSUPPORTED:
                raise
            warnings.warn(
                f"{path.parent} lies where no lock is possible; let one process alone write there", stacklevel=4
            )
            os.unlink(path)
            return None
        try:
            if _is_at(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has removed it meanwhile


def _remove_empty(folders: Sequence[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _let_go() -> None:
    """In a forked child: the lock is the parent's, and ends with it alone."""
    for descriptor, _ in _held.values():
        os.close(descriptor)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go)
