"""The CPU kernels in an installation: built, left out, or missing with the reason. Here the compiler is pretended."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from lilora_kernels import cpu_library
from tools import cpu_build

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent / "lib"
LIBRARY, WHY = "lilora_kernels/lib/liblilora_cpu.so", "lilora_kernels/lib/liblilora_cpu.txt"


@pytest.fixture
def compiler(tmp_path):
    """A command that leaves the last word of its own command line in the file after -o; fails if there is a file `broken`."""
    script = tmp_path / "compiler.py"
    script.write_text(
        "import pathlib, sys\n"
        f"if pathlib.Path({str(tmp_path / 'broken')!r}).exists():\n"
        "    sys.exit('In file: hm\\nlinear.cpp:1: error: it is broken')\n"
        "pathlib.Path(sys.argv[sys.argv.index('-o') + 1]).write_text(sys.argv[-1])\n"
    )
    return f"'{sys.executable}' '{script}'"


@pytest.fixture
def source(tmp_path):
    """A copy of what setup.py needs: setuptools leaves its build folder beside the sources."""
    files = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    for name in files:
        if name.startswith(("lilora_kernels/", "python/", "csrc/", "tools/")) or "/" not in name:
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "source" / name).write_bytes((ROOT / name).read_bytes())
    return tmp_path / "source"


def run(*arguments, cwd=None, **environment):
    given = {name: value for name, value in os.environ.items() if not name.startswith("LILORA_")} | environment
    result = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=given, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "state, tag", [("built", "py3-none-(?!any)"), ("broken", "py3-none-any"), ("left out", "py3-none-any")]
)
def test_a_wheel(state, tag, source, compiler, tmp_path):
    if state == "broken":
        (tmp_path / "broken").touch()
    environment = {"LILORA_CPU": "0"} if state == "left out" else {"CXX": compiler}
    run("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source, **environment)
    (wheel,) = tmp_path.glob("*.whl")
    assert re.search(tag, wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        found = {name: archive.read(name).decode() for name in archive.namelist() if "/lib/" in name}
    said = f"the CPU kernels were not built: {sys.executable}: linear.cpp:1: error: it is broken\n"
    assert found == {"built": {LIBRARY: "-lm"}, "broken": {WHY: said}, "left out": {}}[state]


def test_an_editable_installation_has_the_library_or_the_reason_but_not_both(source, compiler, tmp_path):
    command = ("setup.py", "build_ext", "--inplace", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp")
    for broken in (False, True, False):
        (tmp_path / "broken").touch() if broken else (tmp_path / "broken").unlink(missing_ok=True)
        run(*command, cwd=source, CXX=compiler)
        assert [path.name for path in (source / LIBRARY).parent.iterdir()] == [Path(WHY if broken else LIBRARY).name]


def test_why_nothing_was_built_is_one_line(tmp_path, monkeypatch):
    for name, reason in (
        ("/nowhere/g++", "No such file or directory: '/nowhere/g++'"),
        ("false", "false: exit status 1"),
    ):
        monkeypatch.setenv("CXX", name)
        assert cpu_build.build(tmp_path / "library.so").endswith(reason)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C++ compiler in PATH; install g++ and" in cpu_build.build(tmp_path / "library.so")


def test_lilora_cpu_is_0_or_1():
    command = [sys.executable, "setup.py", "--version"]
    environment = os.environ | {"LILORA_CPU": "no"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "lilora-kernels: LILORA_CPU is 'no'; it must be 1 for the CPU kernels, or 0\n"


def test_a_library_that_cannot_be_loaded_is_a_reason(tmp_path, monkeypatch):
    path = tmp_path / "liblilora_cpu.so"
    monkeypatch.setattr(cpu_library, "PATH", path)
    monkeypatch.setattr(cpu_library, "NOT_BUILT", path.with_suffix(".txt"))
    load = cpu_library.load.__wrapped__
    assert load() == cpu_library.NO_BUILD
    path.with_suffix(".txt").write_text("the compiler is old\n")
    assert load() == "the compiler is old"
    path.write_text("no library")
    assert load() == f"{path}: file too short"
    whole = (TORCH / "libtorch_global_deps.so").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert load() == f"{path} is truncated"
    path.unlink()
    path.write_bytes(whole)
    assert "undefined symbol: lilora_cpu_interface" in load()


@pytest.mark.skipif(os.environ.get("LILORA_CPU") == "0", reason="they were left out")
def test_the_installation_under_test_has_the_kernels():
    """Other tests of them are skipped where they are missing: here that fails. Without a compiler set LILORA_CPU=0."""
    assert not isinstance(cpu_library.load(), str), cpu_library.load()


@pytest.mark.skipif(isinstance(cpu_library.load(), str), reason=f"{cpu_library.load()}")
def test_a_library_of_another_version_is_a_reason(monkeypatch):
    monkeypatch.setattr(cpu_library, "INTERFACE", cpu_library.INTERFACE + 1)
    assert cpu_library.load.__wrapped__() == f"{cpu_library.PATH} is of another version; build it again"
