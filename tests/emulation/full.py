"""What takes too long for every run, `make emulation-full`: faults planted in a copy of the sources, and the largest cases."""

import os
import shutil
import subprocess
import sys

import emulator
import pytest
import torch
from mutants import MUTANTS, planted
from support.cases import NAMES, Errors, add_errors, make

HERE = [mutant for mutant in MUTANTS if emulator.NAME in mutant.devices]


def run_cases(library):
    command = [sys.executable, str(emulator.HERE / "mutants.py"), str(library)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_the_cases_pass_without_a_fault():
    result = run_cases(emulator.LIBRARY)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("mutant", HERE, ids=lambda mutant: mutant.name)
def test_a_planted_fault_is_seen(mutant, tmp_path):
    csrc = tmp_path / "csrc"
    shutil.copytree(emulator.ROOT / "csrc", csrc)
    planted(mutant, csrc)
    changed, library = tmp_path / "changed.o", tmp_path / "library.so"
    emulator.compile_source(csrc / mutant.kernel, changed, csrc)
    others = [source for source in emulator.SOURCES if source != emulator.ROOT / "csrc" / mutant.kernel]
    emulator.link(
        [changed, *map(emulator.object_of, others)], library
    )  # of functions in several objects the first counts
    result = run_cases(library)
    print(*result.stderr.strip().splitlines()[-1:])
    assert "emulated device" in result.stdout, result.stderr  # the library was loaded
    assert result.returncode != 0


@pytest.mark.parametrize("copies", emulator.COPIES)
@pytest.mark.parametrize("order", range(1, 9))
@pytest.mark.parametrize("rows, op", [(33, "linear"), (200, "delta")])
def test_any_order_and_any_time_of_copies(rows, op, order, copies, device):
    device(order=order, copies=copies)
    errors = Errors()
    i = make(rows, 136, 200, 24, 8, gate=True, dtype=torch.bfloat16, seed=order)
    add_errors(errors, i, op, NAMES, 0.1, torch.tensor([order]))
    errors.check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, op", [(64, "linear"), (700, "delta"), (2100, "linear")])
def test_a_whole_device(rows, op, dtype, device):
    """Columns, ranks and processors of LLaVA on an H200; more rows than a chunk has."""
    device(processors=132)
    errors = Errors()
    add_errors(errors, make(rows, 2048, 264, 128, 64, 4, gate=True, dtype=dtype), op, NAMES, 0.05, torch.tensor([1]))
    errors.check()
