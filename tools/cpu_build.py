"""The CPU kernels of setup.py: two files and a C++ compiler. Where that fails, the distribution is built without them."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["csrc/cpu/decode.cpp", "csrc/cpu/training.cpp"]
LIBRARY = "lilora_kernels.lib.liblilora_cpu"
EXTENSION = Extension(LIBRARY, SOURCES, optional=True)
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-exceptions", "-fno-rtti", "-fPIC", "-fvisibility=hidden"]


def build(target: Path, *flags: str) -> str | None:
    """Compile the library; why that failed in one line, or None."""
    wanted = os.environ.get("CXX")
    names = shlex.split(wanted) if wanted else next(([c] for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if names is None:
        return "the CPU kernels were not built: no C++ compiler in PATH; install g++ and run pip install . again"
    try:
        command = [
            *names,
            *FLAGS,
            *flags,
            "-shared",
            *(str(ROOT / source) for source in SOURCES),
            "-o",
            str(target),
            "-lm",
        ]
        subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        return f"the CPU kernels were not built: {error}"
    except subprocess.CalledProcessError as error:
        said = next((line for line in error.stderr.splitlines() if "error" in line), f"exit status {error.returncode}")
        return f"the CPU kernels were not built: {names[0]}: {said.strip()}"
    return None


class BuildExt(build_ext):
    """`build_ext` for libraries without Python symbols, hence without a Python version in their names."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        why = target.with_suffix(".txt")
        why.unlink(missing_ok=True)
        if (reason := build(target)) is not None:
            why.write_text(reason + "\n")
            print(f"lilora-kernels: {reason}")

    def copy_extensions_to_source(self) -> None:
        built, source = (Path(folder, "lilora_kernels/lib") for folder in (self.build_lib, ROOT))
        source.mkdir(exist_ok=True)
        for name in ("liblilora_cpu.so", "liblilora_cpu.txt"):
            (source / name).unlink(missing_ok=True)
        super().copy_extensions_to_source()
        if (built / "liblilora_cpu.txt").exists():
            shutil.copy(built / "liblilora_cpu.txt", source)

    def get_ext_filename(self, fullname: str) -> str:
        # Also called with the last part of the name alone.
        library = fullname.rpartition(".")[2].startswith("liblilora_")
        return fullname.replace(".", "/") + ".so" if library else super().get_ext_filename(fullname)


class BdistWheel(bdist_wheel):
    """`bdist_wheel` for any Python 3 of this platform, or of any where the library is not there."""

    def get_tag(self) -> tuple[str, str, str]:
        built = Path(self.get_finalized_command("build_ext").get_ext_fullpath(LIBRARY)).exists()
        return "py3", "none", super().get_tag()[2] if built else "any"
