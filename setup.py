"""Builds the distribution: two import packages, `lilora_kernels` (torch only) and `lilora` (transformers and peft)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(r'__version__ = "(.+)"', Path("lilora_kernels/version.py").read_text()).group(1)

setup(
    version=VERSION,
    packages=find_packages(include=["lilora_kernels*"]) + find_packages("python"),
    package_data={"lilora_kernels": ["configs/*.json"], "lilora": ["**/*.html", "**/*.json"]},
)
