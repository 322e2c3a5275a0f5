"""Instructions of a call, counted by valgrind: not as noisy as times, and what C++ does shows as what Python does."""

import ctypes
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

FOLDER = "LILORA_CALLGRIND"  # set under valgrind: where the counts go
REQUESTS = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_ZERO_STATS; CALLGRIND_START_INSTRUMENTATION; }
void stop(const char* name) { CALLGRIND_STOP_INSTRUMENTATION; CALLGRIND_DUMP_STATS_AT(name); }
"""


def again(module: str) -> int:
    """Run this process's command once more, under valgrind; its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "requests.c"
        source.write_text(REQUESTS)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", f"{folder}/requests.so", str(source)], check=True)
        command = ["valgrind", "-q", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/counts"]
        command += [sys.executable, "-W", "ignore", "-m", module, *sys.argv[1:]]
        return subprocess.run(command, env=os.environ | {FOLDER: folder}, check=False).returncode


def instructions(runs: dict[tuple[str, str], Callable[[], object]], calls: int = 10) -> dict[tuple[str, str], float]:
    """Thousands of instructions for a call of each; works under valgrind alone."""
    folder = Path(os.environ[FOLDER])
    requests = ctypes.CDLL(str(folder / "requests.so"))
    names = dict(enumerate(runs))
    for at, name in names.items():
        for _ in range(3):
            runs[name]()
        requests.start()
        for _ in range(calls):
            runs[name]()
        requests.stop(str(at).encode())
    found = {}
    for path in folder.glob("counts.*"):
        text = path.read_text()
        if at := re.search(r"^desc: Trigger: Client Request: (\d+)$", text, re.M):
            total = re.search(r"^totals: (\d+)$", text, re.M)
            found[names[int(at[1])]] = int(total[1]) / calls / 1e3 if total else 0.0
    return {name: found[name] for name in runs}
