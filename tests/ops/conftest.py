"""The CPU kernels as compiled for a test, in every instruction set that this processor has."""

import os
import shlex

import pytest
import torch

from lilora_kernels import cpu_library
from tools import cpu_build


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """LILORA_CPU_FLAGS adds flags of the compiler: `make cpu-check` has sanitizers."""
    path = tmp_path_factory.mktemp("cpu") / "liblilora_cpu.so"
    flags = ["-Wall", "-Wextra", "-Werror", *shlex.split(os.environ.get("LILORA_CPU_FLAGS", ""))]
    if (reason := cpu_build.build(path, *flags)) is not None:
        assert "no C++ compiler" in reason, reason
        pytest.skip(reason)
    return path


@pytest.fixture
def kernels(library, monkeypatch):
    """In place of the installed ones; results begin as NaN."""
    kernels = cpu_library.Kernels(library)
    monkeypatch.setattr(cpu_library, "load", lambda: kernels)
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *args: new_empty(self, *args).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda like, **more: empty_like(like, **more).fill_(torch.nan))
    return kernels


@pytest.fixture(params=range(len(cpu_library.INSTRUCTIONS)), ids=cpu_library.INSTRUCTIONS)
def instructions(request, kernels):
    if request.param >= kernels.instructions:
        pytest.skip("this processor does not have them")
    kernels.instructions = request.param + 1
