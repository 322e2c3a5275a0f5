"""The GPU build without a toolkit: what the environment asks for, what is missing, and a library that is not there or broken."""

import inspect
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.utils.cpp_extension

from lilora_kernels import cuda_library
from tools import cuda_build

ROOT = Path(__file__).parents[2]
KNOWN = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def nvcc(*known, path="nvcc"):
    return cuda_build.Nvcc(path, "13.0", frozenset(known or KNOWN))


def names(wanted, *known):
    return [arch.name for arch in cuda_build.architectures(wanted, nvcc(*known))]


# --- TORCH_CUDA_ARCH_LIST and MAX_JOBS ----------------------------------------------------------------------------------


@pytest.mark.parametrize("unset", [None, "", " "])
def test_the_default_architectures_are_those_the_toolkit_knows_and_the_newest_has_ptx(unset):
    assert names(unset) == ["8.0", "8.9", "9.0a", "10.0+PTX"]
    assert names(unset, "7.5", "8.0", "8.9", "9.0") == ["8.0", "8.9", "9.0a+PTX"]
    with pytest.raises(SystemExit, match=r"nvcc 13\.0 knows none of 8\.0, 8\.9, 9\.0a, 10\.0"):
        names(unset, "7.5")


def test_a_list_is_taken_as_it_stands():
    for _ in range(50):
        wanted = random.sample(["8.0", "8.6", "8.9+PTX", "9.0a", "10.0a+PTX", "12.0f"], random.randint(1, 6))
        separators = random.choices([";", " ", "; ", "  "], k=len(wanted))
        text = "".join(number + separator for number, separator in zip(wanted, separators, strict=True))
        assert names(text) == wanted
    assert names("8.0;8.6;8.0+PTX") == ["8.0+PTX", "8.6"]


def test_9_0_is_9_0a_which_has_wgmma():
    assert names("9.0") == ["9.0a"]
    assert names("9.0+PTX") == ["9.0a+PTX"]
    assert names("9.0;8.0;9.0a+PTX") == ["9.0a+PTX", "8.0"]


@pytest.mark.parametrize(
    "wanted, numbers",
    [
        ("Hopper", ["9.0a+PTX"]),
        ("Ada;8.0", ["8.9+PTX", "8.0"]),
        ("Ampere 9.0", ["8.0", "8.6+PTX", "9.0a"]),
        ("Ampere;8.0+PTX", ["8.0+PTX", "8.6+PTX"]),
        ("Blackwell", ["10.0", "10.3", "12.0", "12.1+PTX"]),
    ],
)
def test_architectures_have_the_names_that_torch_takes(wanted, numbers):
    assert names(wanted, *KNOWN, "10.3", "12.1") == numbers


def test_every_name_that_torch_takes_is_known():
    source = inspect.getsource(torch.utils.cpp_extension._get_cuda_arch_flags)
    assert dict(re.findall(r"\('([A-Z][\w+]+)', '([\d.;]+(?:\+PTX)?)'\)", source)) == cuda_build.NAMES


def test_what_is_older_than_the_kernels_is_left_out_with_a_note(capsys):
    assert names("7.0;7.5+PTX;8.0") == ["8.0"]
    notes = [
        f"TORCH_CUDA_ARCH_LIST has {n}, which is left out: the kernels need 8.0 or newer" for n in ("7.0", "7.5+PTX")
    ]
    assert capsys.readouterr().err == "".join(f"lilora-kernels: {line}\n" for line in notes)
    with pytest.raises(
        SystemExit, match=r"is 'Volta 7\.5', but the kernels need 8\.0 or newer; add such an architecture$"
    ):
        names("Volta 7.5")


def test_ptx_is_of_an_architecture_that_newer_devices_can_run():
    (arch,) = cuda_build.architectures("9.0a+PTX", nvcc())
    assert arch.gencode() == ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_90,code=compute_90"]
    (arch,) = cuda_build.architectures("10.0", nvcc())
    assert arch.gencode() == ["-gencode=arch=compute_100,code=sm_100"]


@pytest.mark.parametrize(
    "wanted, sentence",
    [
        ("Hoper", r"has 'Hoper'; write numbers such as 8\.0;9\.0a\+PTX, or names such as Hopper$"),
        ("native", "has 'native'; write numbers"),
        ("8.0,9.0", r"has '8\.0,9\.0'; write numbers"),
        ("8.0;9", r"has '9'; write numbers"),
        ("9.0a+ptx", r"has '9\.0a\+ptx'; write numbers"),
        ("Blackwell", r"has 10\.3, which nvcc 13\.0 does not know"),
        ("11.5a", r"has 11\.5a, which nvcc 13\.0 does not know; it knows 7\.5, 8\.0, 8\.6, 8\.9, 9\.0, 10\.0, 12\.0$"),
    ],
)
def test_a_list_that_cannot_be_built_is_one_sentence(wanted, sentence):
    with pytest.raises(SystemExit, match="^lilora-kernels: TORCH_CUDA_ARCH_LIST " + sentence):
        names(wanted)


def test_max_jobs(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "37")
    assert cuda_build.max_jobs() == 37
    for wrong in ("0", "-2", "two", "1.5"):
        monkeypatch.setenv("MAX_JOBS", wrong)
        with pytest.raises(SystemExit, match=f"MAX_JOBS is '{wrong}'; it must be a positive number"):
            cuda_build.max_jobs()
    monkeypatch.setenv("MAX_JOBS", "")
    monkeypatch.setattr(cuda_build, "BYTES_PER_JOB", 1)
    assert cuda_build.max_jobs() == len(os.sched_getaffinity(0))
    monkeypatch.setattr(cuda_build, "BYTES_PER_JOB", 1 << 60)
    assert cuda_build.max_jobs() == 1


@pytest.mark.parametrize("value, code", [("yes", 1), ("0", 0), ("", 0)])
def test_lilora_cuda_is_0_or_1(value, code):
    command = [sys.executable, "setup.py", "--version"]
    environment = os.environ | {"LILORA_CUDA": value}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == code
    assert ("LILORA_CUDA is 'yes'; it must be 1 for a GPU build, or 0" in result.stderr) == bool(code)
    assert "Traceback" not in result.stderr


# --- what is missing ----------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine on which everything is there: a script for nvcc, folders for the packages, sources for 9.0a."""
    for name in ("bin/nvcc", "bin/ninja"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\necho release 13.0, V13.0.88\necho sm_80\necho sm_90\n")
        path.chmod(0o755)
    (tmp_path / "csrc/hopper").mkdir(parents=True)
    for name in ("hopper/gemm.cu", "one.cu", "other.cu", "register.cpp"):
        (tmp_path / "csrc" / name).touch()
    missing = set()
    spec = lambda name: None if name in missing | {"ninja"} else SimpleNamespace(origin=f"/site/{name}/__init__.py")  # noqa: E731
    monkeypatch.setattr(cuda_build, "find_spec", spec)
    monkeypatch.setattr(cuda_build, "ROOT", tmp_path)
    monkeypatch.setattr(cuda_build, "TOOLKIT", tmp_path / "toolkit")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CUDA_HOME", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return SimpleNamespace(path=tmp_path, missing=missing)


@pytest.mark.parametrize(
    "module, sentence",
    [
        ("torch", r"needs torch's headers \(a CPU build will do\), but .* has no package torch; install it and build"),
        ("pybind11", "needs pybind11's headers, but .* has no package pybind11; install it and build"),
        (
            "cutlass_library",
            "needs CUTLASS's headers for 9.0a, but .* has no package nvidia-cutlass; install it and build",
        ),
    ],
)
def test_a_missing_package_is_one_sentence(machine, module, sentence):
    machine.missing.add(module)
    with pytest.raises(SystemExit, match=f"^lilora-kernels: LILORA_CUDA=1 {sentence} with --no-build-isolation$"):
        cuda_build.build()


def test_a_missing_ninja_is_one_sentence(machine):
    (machine.path / "bin/ninja").unlink()
    with pytest.raises(
        SystemExit,
        match=r"^lilora-kernels: LILORA_CUDA=1 needs ninja, found neither as a Python package nor in PATH; install",
    ):
        cuda_build.build()


def test_an_old_torch_is_one_sentence(machine, monkeypatch):
    monkeypatch.setattr(cuda_build.metadata, "version", lambda package: "2.9.1+cpu")
    with pytest.raises(
        SystemExit, match=r"torch is 2\.9\.1\+cpu, but the GPU build needs the headers of 2\.10 or newer"
    ):
        cuda_build.build()


def test_nvcc_is_that_of_cuda_home_then_of_path_then_of_the_usual_folder(machine, monkeypatch):
    assert cuda_build.find_nvcc() == nvcc("8.0", "9.0", path=str(machine.path / "bin/nvcc"))
    shutil.copytree(machine.path / "bin", machine.path / "toolkit/bin")
    monkeypatch.setenv("CUDA_HOME", str(machine.path / "toolkit"))
    assert cuda_build.find_nvcc().path == str(machine.path / "toolkit/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(SystemExit, match="CUDA_HOME is /nowhere, which has no bin/nvcc; set it to"):
        cuda_build.find_nvcc()
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", "")
    assert cuda_build.find_nvcc().path == str(machine.path / "toolkit/bin/nvcc")
    shutil.rmtree(machine.path / "toolkit")
    with pytest.raises(
        SystemExit, match=r"LILORA_CUDA=1 needs nvcc, found neither in PATH nor in .*; install the CUDA"
    ):
        cuda_build.find_nvcc()
    broken = machine.path / "bin/nvcc"
    broken.write_text("#!/bin/sh\nexit 3\n")
    monkeypatch.setenv("PATH", str(broken.parent))
    with pytest.raises(SystemExit, match=r"nvcc does not run \(.* exit status 3"):
        cuda_build.find_nvcc()


def test_setup_py_ends_with_the_sentence_alone(tmp_path):
    environment = os.environ | {"LILORA_CUDA": "1", "CUDA_HOME": "/nowhere"}
    command = [sys.executable, str(ROOT / "setup.py"), "build_ext", "--build-lib", str(tmp_path / "lib")]
    command += ["--build-temp", str(tmp_path / "temp")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("lilora-kernels: CUDA_HOME is /nowhere, which has no bin/nvcc;")
    assert "Traceback" not in result.stderr


# --- what is compiled ---------------------------------------------------------------------------------------------------


def plan(machine, wanted):
    known = nvcc("8.0", "9.0", path=str(machine.path / "bin/nvcc"))
    chosen = cuda_build.architectures(wanted, known)
    hopper = cuda_build.sources("csrc/hopper") if "9.0a" in wanted else []
    return cuda_build.Plan(
        known, chosen, Path("/site/torch"), Path("/site/pybind11"), hopper, Path("/site/cutlass_library")
    )


def test_hopper_sources_are_compiled_for_9_0a_alone(machine):
    flags = {str(source): flags for source, flags in plan(machine, "8.0;9.0a").sources().items()}
    assert list(flags) == ["csrc/hopper/gemm.cu", "csrc/one.cu", "csrc/other.cu", "csrc/register.cpp"]
    for source in ("csrc/one.cu", "csrc/other.cu"):
        assert [flag.rpartition("=")[2] for flag in flags[source]] == ["sm_80", "sm_90a"]
    assert [flag for flag in flags["csrc/hopper/gemm.cu"] if "gencode" in flag] == [
        "-gencode=arch=compute_90a,code=sm_90a"
    ]
    assert "-DLILORA_HOPPER" in flags["csrc/register.cpp"]


@pytest.mark.parametrize("wanted", ["8.0", "8.0+PTX"])
def test_without_9_0a_there_are_no_hopper_sources(machine, wanted):
    flags = {str(source): flags for source, flags in plan(machine, wanted).sources().items()}
    assert list(flags) == ["csrc/one.cu", "csrc/other.cu", "csrc/register.cpp"]
    assert "-DLILORA_HOPPER" not in flags["csrc/register.cpp"]


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3onePf' for 'sm_80'
ptxas info    : Function properties for _Z3onePf
    8 bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, {shared} bytes smem, 380 bytes cmem[0]
ptxas info    : Compile time = 21.712 ms
ptxas info    : Compiling entry function '_Z5otherPf' for 'sm_90a'
ptxas info    : Function properties for _Z5otherPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
"""


def test_registers_spills_and_shared_memory_come_from_ptxas():
    taken = {name: random.randint(1, 999) for name in ("stores", "loads", "registers", "shared")}
    one, other = cuda_build.resources(PTXAS.format(**taken))
    assert one == {
        "kernel": "_Z3onePf",
        "architecture": "sm_80",
        "registers": taken["registers"],
        "spill_bytes": taken["stores"] + taken["loads"],
        "shared_bytes": taken["shared"],
    }
    assert other == {
        "kernel": "_Z5otherPf",
        "architecture": "sm_90a",
        "registers": 10,
        "spill_bytes": 0,
        "shared_bytes": 0,
    }


# --- an installation without the library, or with a broken one ----------------------------------------------------------


@pytest.fixture
def installation(tmp_path):
    """run(code) -> what it prints, in a copy of the installed package without anything compiled."""
    import lilora_kernels

    compiled = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(lilora_kernels.__file__).parent, tmp_path / "lilora_kernels", ignore=compiled)
    (tmp_path / "lilora_kernels/lib").mkdir(exist_ok=True)

    def run(code):
        result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return SimpleNamespace(run=run, library=tmp_path / "lilora_kernels/lib/liblilora_cuda.so")


FACTS = """
import json, torch, lilora_kernels
from lilora_kernels import cuda_library
error, facts = cuda_library.load_error(), cuda_library.build_info()
x, a, b0 = torch.randn(7, 24), torch.randn(4, 24), torch.randn(16, 4)
with lilora_kernels.backend("eager"):
    y = lilora_kernels.delta(x, a, b0, scaling=0.5)
print(json.dumps([error, facts, torch.allclose(y, 0.5 * (x @ a.T) @ b0.T, atol=1e-5)]))
"""
NO_BUILD = "this installation has no CUDA build; LILORA_CUDA=1 pip install --no-build-isolation . makes one"


def test_a_pure_installation_says_how_to_get_a_cuda_build(installation):
    error, facts, eager_is_right = installation.run(FACTS)
    assert eager_is_right
    assert error == NO_BUILD
    assert facts == {
        "cuda": None,
        "torch": None,
        "architectures": [],
        "flags": [],
        "hopper": False,
        "kernels": [],
        "reason": NO_BUILD,
    }


def whole_library() -> bytes:
    return (Path(torch.__file__).parent / "lib/libtorch_global_deps.so").read_bytes()


@pytest.mark.parametrize(
    "content, cause",
    [
        (lambda: b"", "file too short"),
        (lambda: b"not a library " * 50, "invalid ELF header"),
        (lambda: whole_library()[: random.randrange(64, len(whole_library()))], "is truncated"),
    ],
    ids=["empty", "text", "truncated"],
)
def test_a_library_that_cannot_be_loaded_keeps_its_cause_and_breaks_nothing(installation, content, cause):
    installation.library.write_bytes(content())
    error, facts, eager_is_right = installation.run(FACTS)
    assert eager_is_right
    assert str(installation.library) in error
    assert cause in error
    assert "\n" not in error
    assert "_build_info" in facts["reason"]


def test_a_library_without_our_operations_is_of_another_version(installation):
    """As one that was built from older sources: it loads, but nothing could be called."""
    installation.library.write_bytes(whole_library())
    error, _, eager_is_right = installation.run(FACTS)
    assert eager_is_right
    assert error == (
        f"{installation.library} is of another version: it lacks delta_forward, delta_backward, missing_code; build it again"
    )


def test_a_folder_that_may_not_be_read_is_a_cause(monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied", "liblilora_cuda.so")

    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr(Path, "stat", refused)
    assert "Permission denied" in cuda_library.load_error.__wrapped__()
