"""Builds the distribution: two import packages, `lilora_kernels` (torch only) and `lilora` (transformers and peft).

LILORA_CUDA=1 adds the CUDA kernels of csrc; without it nothing is compiled.
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

cuda = {}
wanted = os.environ.get("LILORA_CUDA") or "0"
if wanted not in ("0", "1"):
    raise SystemExit(f"lilora-kernels: LILORA_CUDA is {wanted!r}; it must be 1 for a GPU build, or 0")
if wanted == "1":
    sys.path.insert(0, str(ROOT / "csrc"))
    import cuda_build

    cuda = {"ext_modules": cuda_build.EXTENSIONS, "cmdclass": {"build_ext": cuda_build.BuildExt}}

setup(
    version=VERSION,
    packages=find_packages(include=["lilora_kernels*"]) + find_packages("python"),
    package_data={"lilora_kernels": ["configs/*.json"], "lilora": ["**/*.html", "**/*.json"]},
    **cuda,
)
