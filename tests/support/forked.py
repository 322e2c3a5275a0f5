"""Forked processes, which are spared the imports that this one has made."""

import os
import runpy
import sys
import time
import traceback
from collections.abc import Callable
from subprocess import TimeoutExpired


def passes_in_child(check: Callable[[], object]) -> bool:
    """Whether `check()` ends without an exception in a child, which prints it. What it starts, threads as well, ends with it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            check()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


class Forked:
    """As much of subprocess.Popen as a stage needs: of [sys.executable, "-m", module, *arguments], in a session of its own."""

    def __init__(self, command, cwd, env, stdout, stderr=None, start_new_session=True):
        self.command, self.code = command, None
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self.run(cwd, env, stdout.fileno()))

    def run(self, cwd, env, output):
        os.setsid()
        for stream in (1, 2):
            os.dup2(output, stream)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        _, _, module, *arguments = self.command
        sys.argv = [module, *arguments]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return end.code or 0
        except BaseException:
            traceback.print_exc()
            return 1
        return 0

    def wait(self, timeout=float("inf")):
        until = time.monotonic() + timeout
        while self.code is None:
            if (ended := os.waitpid(self.pid, os.WNOHANG)) != (0, 0):
                self.code = os.waitstatus_to_exitcode(ended[1])
            elif time.monotonic() > until:
                raise TimeoutExpired(self.command, timeout)
            else:
                time.sleep(0.02)
        return self.code
