"""Triton's side of a pretended GPU: its own compiler, cache and launcher, over a driver whose launches do nothing.

With LILORA_PRETENDED_LOG every kernel that is loaded is written there, "hit" when it came from Triton's cache and "miss"
when it had to be compiled; and at the end of the process what it launched and what a GPU would have taken for it.
"""

import atexit
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .device import Tensor, ledger, nbytes

COMPILED = "compile"  # LILORA_PRETENDED_KERNELS: compile what is not in the cache, load and launch; else launch nothing


def install() -> None:
    from triton import knobs
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def run(self, *args, **kwargs):
        tensors = {id(t): t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)}
        ledger.add(sum(map(nbytes, tensors.values())), kind="launches")
        if compiled:
            launch(self, *args, **kwargs)  # without its result, which is what later launches would go to past this

    compiled = os.environ.get("LILORA_PRETENDED_KERNELS") == COMPILED
    JITFunction.run = run
    if compiled:
        take_the_place_of_libcuda()
        knobs.compilation.listener = lambda *, src, cache_hit, **_: note("hit" if cache_hit else "miss", src.name)
    atexit.register(lambda: note("process", json.dumps({"command": sys.argv, **ledger.summary()})))


def take_the_place_of_libcuda() -> None:
    """Compile libcuda.c and load it, for this process and as what Triton's launchers are linked with."""
    folder = Path(os.environ.get("LILORA_PRETENDED_LIBCUDA") or tempfile.mkdtemp(prefix="libcuda-"))
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libcuda.so.1"
    if not library.exists():
        part = folder / f"part-{os.getpid()}"
        source = Path(__file__).with_name("libcuda.c")
        command = ["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", str(part), str(source)]
        subprocess.run(command, check=True)
        part.replace(library)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def note(kind: str, what: str) -> None:
    path = os.environ.get("LILORA_PRETENDED_LOG")
    if path:
        with open(path, "a") as log:  # one write of one line: lines of other processes do not mix with it
            log.write(f"{kind} {os.getpid()} {what}\n")
