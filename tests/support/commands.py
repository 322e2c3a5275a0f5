"""The command in forked children, which share this process's imports."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from lilora import cli

KILLS = int(os.environ.get("LILORA_KILLS", 4))  # at random moments, of each command; `make soak` wants more


def spawn(arguments, before: Callable[[], None] = lambda: None, output: str | os.PathLike = os.devnull) -> int:
    """The pid of a child that runs `lilora ARGUMENTS`, after `before()`; what it prints goes to a file."""
    child = os.fork()
    if child:
        return child
    try:
        sys.argv = ["lilora", *map(str, arguments)]
        written = os.open(output, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(written, 1)
        os.dup2(written, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        before()
        cli.main()
        os._exit(0)
    except SystemExit as end:
        os._exit(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def code_of(child: int) -> int:
    """The exit code of a child when it ends, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def said_by(arguments, before: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """(exit code, what `lilora ARGUMENTS` prints) of a child, through a pipe: no file is written for it."""
    reader, writer = os.pipe()
    child = spawn(arguments, before, f"/dev/fd/{writer}")
    os.close(writer)
    with os.fdopen(reader, errors="replace") as output:
        text = output.read()
    return code_of(child), text


def killed_after(seconds: float, arguments) -> bool:
    """Whether `lilora ARGUMENTS` still ran after so long, and was killed; else it ended as it should."""
    child = spawn(arguments)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert os.waitstatus_to_exitcode(status) == 0
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return code_of(child) == -signal.SIGKILL
