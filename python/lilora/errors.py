"""A user's mistakes, and how the command tells them."""

import os
import sys
from datetime import timedelta


class UserError(ValueError):
    """A mistake the user can mend: one sentence that says what came, what is wanted and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class Diverged(UserError):
    """A training whose loss or parameters are not finite; with another learning rate it may be."""


def shortened(value: object) -> str:
    """A value in print, at most 80 characters of it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def missing_extra(missing: ModuleNotFoundError) -> str:
    """The sentence for a module that only `lilora` needs, not `lilora_kernels`."""
    package = str(missing.name).partition(".")[0]
    sentence = (
        f'lilora needs {package}, which is not installed; run pip install ".[hf]" in a checkout of lilora-kernels'
    )
    instead = "; python -m lilora_kernels prints what info does, with torch alone"
    return sentence + (instead if sys.argv[1:2] == ["info"] else "")


def print_error(message: str) -> None:
    """Print one sentence on standard error; of several processes of a run only the first that has one to print does."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or _first():
        print(f"lilora: {message}", file=sys.stderr, flush=True)


def print_note(message: str) -> None:
    """Print one sentence on standard error and go on; for what one process alone finds."""
    print(f"lilora: {message}", file=sys.stderr, flush=True)


def lost_process(error: Exception) -> bool:
    """Whether a collective failed, which is what the others see of a process that has ended."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return False
    from torch.distributed import DistError

    return isinstance(error, DistError) or "/gloo/" in str(error)  # gloo's errors have no type of their own


def _first() -> bool:
    from torch.distributed import DistError, TCPStore

    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=5))
        return store.add("lilora/told", 1) == 1
    except (DistError, KeyError):  # who kept the store is gone, or there never was one
        return True
