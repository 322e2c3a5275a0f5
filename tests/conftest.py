import gc
import os
import re
import sys
import threading
from pathlib import Path

import pytest
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))  # bench and tools; behind the packages that are installed

# Its own lock is a semaphore that forked processes share: one that a test kills while it has the lock would keep it for ever.
tqdm.set_lock(threading.RLock())


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """What is there when a file's tests start is no garbage: accelerate collects twice per training, over all objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """OpenMP's threads do not come along into a forked child, which waits for them for ever: this process has one."""
    import torch  # the process that hands out the tests needs none of its seconds

    here, set_num_threads = os.getpid(), torch.set_num_threads

    def guarded(count):
        assert count == 1 or os.getpid() != here, (
            "more threads than one only in a child: support.forked.passes_in_child"
        )
        set_num_threads(count)

    torch.set_num_threads = guarded
    guarded(1)


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.manual_seed(0)


@pytest.fixture
def no_cpu_kernels(monkeypatch):
    """As in an installation without them: eager is the first backend on a CPU."""
    from lilora_kernels import cpu_library

    monkeypatch.setattr(cpu_library, "load", lambda: cpu_library.NO_BUILD)


@pytest.fixture
def lilora(monkeypatch, capsys):
    """Run the command in this process: (exit code, standard output, standard error).

    Without what it says of options that are given twice: those of a test come behind shared ones, and count.
    """
    from lilora import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lilora", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, out, re.sub(r"^lilora: --\S+ is given \d times; .*\n", "", err, flags=re.M)

    return run
