"""Builds the distribution: two import packages, `lilora_kernels` (torch only) and `lilora` (transformers and peft).

The CPU kernels of csrc/cpu are compiled where there is a C++ compiler, unless LILORA_CPU=0. LILORA_CUDA=1 adds the CUDA kernels.
"""

import os
import re
import sys
from pathlib import Path

from setuptools import __version__ as setuptools_version
from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "lilora_kernels/version.py").read_text()).group(1)

# With --no-build-isolation pip does not look at pyproject.toml's requirement, and a new environment of Python 3.11 has 65.
if int(setuptools_version.split(".")[0]) < 77:
    raise SystemExit(
        f"lilora-kernels: setuptools is {setuptools_version}; 77 or newer is needed: pip install -U setuptools"
    )


def wanted(variable: str, default: str, meaning: str) -> bool:
    value = os.environ.get(variable) or default
    if value not in ("0", "1"):
        raise SystemExit(f"lilora-kernels: {variable} is {value!r}; it must be 1 for {meaning}, or 0")
    return value == "1"


sys.path.insert(0, str(ROOT))
native = {"ext_modules": [], "cmdclass": {}}
if wanted("LILORA_CPU", "1", "the CPU kernels"):
    from tools import cpu_build

    native = {
        "ext_modules": [cpu_build.EXTENSION],
        "cmdclass": {"build_ext": cpu_build.BuildExt, "bdist_wheel": cpu_build.BdistWheel},
    }
if wanted("LILORA_CUDA", "0", "a GPU build"):
    from tools import cuda_build

    native = {
        "ext_modules": [*native["ext_modules"], *cuda_build.EXTENSIONS],
        "cmdclass": {"build_ext": cuda_build.BuildExt},
    }

setup(
    version=VERSION,
    packages=find_packages(include=["lilora_kernels*"]) + find_packages("python"),
    package_data={"lilora_kernels": ["py.typed", "configs/*.json"], "lilora": ["py.typed", "**/*.html", "**/*.json"]},
    **native,
)
