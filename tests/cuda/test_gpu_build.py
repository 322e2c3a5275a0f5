"""The GPU build from an sdist, as pip makes it: what it links, holds and says. Needs nvcc and no GPU.

LILORA_CUDA_REPORT names the file that takes compile times and sizes as JSON; default: one in pytest's temporary folder.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from tools import cuda_build

ROOT = Path(__file__).parents[2]
SDIST = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
CUDA_SHIM = "aoti_torch_get_current_cuda_stream"  # what a torch without CUDA lacks


def run(*command, cwd=None, **environment):
    full = {name: value for name, value in os.environ.items() if not name.startswith("LILORA_")} | environment
    result = subprocess.run(command, cwd=cwd, env=full, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def make_wheel(source, folder):
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    return run(*command, cwd=source, LILORA_CUDA="1", TORCH_CUDA_ARCH_LIST=os.environ["LILORA_CUDA_CHECK"])


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The sources as the sdist has them, the wheel built there, and the folder where it is installed."""
    folder = tmp_path_factory.mktemp("gpu build")
    clean = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("csrc", "lilora_kernels", "python", "tools"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=clean)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree")
    run(sys.executable, "-c", SDIST, str(folder), cwd=folder / "tree")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()

    start = time.perf_counter()
    make_wheel(source, folder)
    seconds = time.perf_counter() - start
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel))
    library = site / "lilora_kernels/lib/liblilora_cuda.so"
    return SimpleNamespace(source=source, wheel=wheel, site=site, library=library, seconds=seconds, folder=folder)


def python(built, code):
    """What code prints as JSON, with the built package installed."""
    return json.loads(run(sys.executable, "-c", code, cwd=built.folder, PYTHONPATH=str(built.site)))


def chosen():
    return cuda_build.architectures(os.environ["LILORA_CUDA_CHECK"], cuda_build.find_nvcc())


def test_the_wheel_is_tagged_for_this_python_and_platform(built):
    version = "cp{}{}".format(*sys.version_info)
    assert re.fullmatch(rf"lilora_kernels-[\d.]+-{version}-{version}-linux_\w+\.whl", built.wheel.name)


def test_the_library_needs_only_the_c_functions_of_torch_and_the_system_libraries(built):
    dynamic = run("readelf", "--dynamic", "--wide", str(built.library))
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", dynamic))
    system = {
        "libstdc++.so.6",
        "libgcc_s.so.1",
        "libm.so.6",
        "libc.so.6",
        "libdl.so.2",
        "libpthread.so.0",
        "librt.so.1",
    }
    assert "libtorch.so" in needed
    assert {name for name in needed if not name.startswith("ld-linux")} <= system | {"libtorch.so"}
    for line in run("nm", "-D", "--undefined-only", str(built.library)).splitlines():
        kind, name = line.split()
        of_system = re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$", name)
        assert of_system or kind == "w" or re.match(r"(aoti_)?torch_", name), name


def test_no_path_of_the_build_is_in_the_binaries(built):
    for path in built.site.rglob("*.so"):
        content = path.read_bytes()
        for folder in (built.folder, Path(torch.__file__).parent, Path(sys.prefix)):
            assert bytes(folder) not in content, (path, folder)


LOAD = """
import ctypes, json, sys
first = {first!r}
if first:
    ctypes.CDLL(first, mode=ctypes.RTLD_GLOBAL)
import torch, lilora_kernels
from lilora_kernels import cuda_library
error = cuda_library.load_error()
x, a, b0 = torch.randn(7, 24), torch.randn(4, 24), torch.randn(16, 4)
with lilora_kernels.backend("eager"):
    y = lilora_kernels.delta(x, a, b0, scaling=0.5)
operations = [name for name in {names} if hasattr(torch.ops.lilora_cuda, name)]
print(json.dumps([error, torch.allclose(y, 0.5 * (x @ a.T) @ b0.T, atol=1e-5), operations]))
"""


def called_operations():
    texts = (path.read_text() for path in (ROOT / "lilora_kernels").rglob("*.py"))
    return sorted({name for text in texts for name in re.findall(r"\blilora_cuda\.(\w+)", text)})


def registered():
    """The operations that Python calls; two of them are those of 9.0a."""
    names = called_operations()
    hopper = any(arch.number == "9.0a" for arch in chosen())
    return [name for name in names if hopper or name not in ("fused_linear_forward", "slot_bytes")]


def test_it_loads_or_keeps_the_cause_and_eager_runs_either_way(built):
    error, eager_is_right, operations = python(built, LOAD.format(first=None, names=called_operations()))
    assert eager_is_right
    if torch.version.cuda:
        assert error is None
        assert operations == registered()
    else:
        assert error.startswith(f"torch {torch.__version__} is built without CUDA (")
        assert f"{built.library}: undefined symbol: {CUDA_SHIM}" in error
        assert operations == []


def test_every_operation_that_python_calls_is_registered(built):
    """The function that a torch without CUDA lacks comes from a library that is loaded first."""
    source, library = built.folder / "shim.cpp", built.folder / "shim.so"
    source.write_text(f'extern "C" int {CUDA_SHIM}(int, void**) {{ return 1; }}\n')
    run(cuda_build.find_nvcc().path, "-shared", "-cudart=none", "-Xcompiler=-fPIC", str(source), "-o", str(library))
    error, _, operations = python(built, LOAD.format(first=str(library), names=called_operations()))
    assert error is None
    assert operations == registered()
    assert len(operations) > 2


def build_info(built):
    return python(
        built, "import json; from lilora_kernels.cuda_library import build_info; print(json.dumps(build_info()))"
    )


def test_build_info_is_what_was_built(built):
    facts = build_info(built)
    hopper = any(arch.number == "9.0a" for arch in chosen()) and any((ROOT / "csrc/hopper").rglob("*.cu"))
    assert facts["cuda"] == cuda_build.find_nvcc().version
    assert facts["torch"] == torch.__version__
    assert facts["architectures"] == [arch.name for arch in chosen()]
    assert facts["flags"] == cuda_build.FLAGS
    assert facts["hopper"] == hopper
    assert facts["reason"] is None
    devices = {arch.gencode()[0].rpartition("=")[2] for arch in chosen()}
    assert {row["architecture"] for row in facts["kernels"]} == devices
    for row in facts["kernels"]:
        assert (
            not row["kernel"].startswith("_Z") or "cutlass" in row["kernel"]
        )  # no demangler reads all of CUTLASS's names
        assert 0 < row["registers"] <= 255
        assert row["shared_bytes"] <= 48 * 1024
    assert all(row["architecture"] == "sm_90a" for row in facts["kernels"] if "hopper" in row["kernel"])


def test_no_kernel_spills_registers(built):
    facts = build_info(built)
    assert facts["kernels"]
    assert [row for row in facts["kernels"] if row["spill_bytes"]] == []


def test_no_wgmma_waits_for_the_one_before(built):
    logs = [path.read_text() for path in built.source.glob("build/cuda/**/*.log")]
    assert any("ptxas info" in log for log in logs)
    assert not any("wgmma.mma_async instructions are serialized" in log for log in logs)


@pytest.fixture(scope="session")
def code(built):
    """The instructions of every kernel of one architecture (9.0a if it is built) by mangled name, and that architecture."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"  # a toolkit may come without them
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    devices = [arch.gencode()[0].rpartition("=")[2] for arch in chosen()]
    device = "sm_90a" if "sm_90a" in devices else devices[0]
    text = run(str(tools / "cuobjdump"), "-sass", "-arch", device, str(built.library), PATH=path)
    return {part.split()[0]: part for part in text.split("Function : ")[1:]}, device


ALL = "n1"  # as a name has the phase of a kernel that runs all of them
BASE = "base"  # in place of a phase: the forward's last with the base product


def delta_kernels(kernels):
    """(direction, type, rows of a tile, phase or ALL or BASE) -> the instructions."""
    pattern = r"delta_(for|back)ward(?:_with_base)?I(\w+?)Li(\d+)E(?:Li(n?\d)E)?"
    parts = {name: re.search(pattern, name) for name in kernels}
    return {(*part.groups()[:3], part[4] or BASE): kernels[name] for name, part in parts.items() if part}


def test_products_are_made_by_tensor_cores(code):
    """mma in every kernel with products; on 9.0a wgmma where tiles have 128 rows and in the fused product, which loads by TMA."""
    kernels, device = code
    delta = delta_kernels(kernels)
    # Two types; in two sizes of tiles two phases of each direction, all of them and the base, one phase and three in one size.
    assert len(delta) == 2 * (2 * 2 * 3 + 2 + 1 + 3)
    assert sum(phase == BASE for *_, phase in delta) == 4
    for (direction, kind, rows, phase), text in delta.items():
        name = (direction, kind, rows, phase)
        backward = direction == "back"
        assert bool(re.search(r"\bHG?MMA\b", text)) == (phase != "4"), name
        # Sums over rows have tiles of 128 whatever the number of rows; partial sums are added in tiles of 16.
        wide = phase in ("1", "3", ALL) if backward else phase != "1" and rows == "128"
        assert ("HGMMA" in text) == (device == "sm_90a" and wide), name
    fused = {name: text for name, text in kernels.items() if "cutlass" in name}
    assert len(fused) == (4 if device == "sm_90a" else 0)  # two directions, two types
    for name, text in fused.items():
        assert "HGMMA" in text, name
        assert "UTMALDG" in text, name


INSTRUCTION = re.compile(r"/\*(\w{4,})\*/\s+(.*?);\s+/\* 0x\w+ \*/\s+/\* (0x\w+) \*/")  # address, text, second half


def test_the_base_weight_passes_from_memory_through_registers(code):
    """The loop with its loads has nothing of shared memory, no barrier and no spill, waits once for all loads and then has few
    cycles of its own; no call comes between the first loads and the loop, for it would wait for them.

    On sm_90a. Of an instruction's second half, bits 41 to 44 are the cycles that it stalls, 46 to 48 its scoreboard, 52 to 57
    those that it waits for.
    """
    kernels, device = code
    for (_, kind, rows, phase), text in delta_kernels(kernels).items():
        if phase != BASE or device != "sm_90a":
            continue
        code_of = [(int(at, 16), line, int(half, 16)) for at, line, half in INSTRUCTION.findall(text)]
        loads = {at for at, line, _ in code_of if re.search(r"LDG\.E\S*\.128", line)}
        jumps = [(int(to[1], 16), at) for at, line, _ in code_of if (to := re.search(r"BRA.* 0x(\w+)", line))]
        loops = [
            [each for each in code_of if first <= each[0] <= last]
            for first, last in jumps
            if first < last and any(first <= at <= last for at in loads)
        ]
        loop = min((each for each in loops if any("HMMA" in line for _, line, _ in each)), key=len)
        inside = [half for at, line, half in loop if at in loads]
        steps = len(inside) // (4 + int(rows) // 8)  # loads of 32 outputs, and of x
        assert steps == (3 if rows == "16" else 2)
        lines = [line for _, line, _ in loop]
        assert not [line for line in lines if re.search(r"\b(LDS|STS|LDSM|LDGSTS|BAR|LDL|STL|CALL)\b", line)], kind
        begun = [line for at, line, _ in code_of if min(loads) < at < loop[0][0]]
        assert not [line for line in begun if "CALL" in line], kind
        boards = sum(1 << board for board in {half >> 46 & 7 for half in inside})
        assert sum(half >> 52 & 0x3F & boards != 0 for _, _, half in loop) == 1, kind
        assert sum(half >> 41 & 0xF for _, _, half in loop) <= (180 if rows == "16" else 500) * steps, kind


def test_partial_sums_are_loaded_by_sixteen_bytes_eight_at_a_time(code):
    """Between two additions of partial sums: loads of sixteen bytes that nothing waits for."""
    delta = delta_kernels(code[0])
    adding = {("for", "128", "1"), ("back", "128", "2"), ("back", "128", "4")}
    for (direction, kind, rows, phase), text in delta.items():
        if phase != ALL and (direction, rows, phase) not in adding:
            continue
        waits = re.findall(r"\b(LDG?\.E\S*\.128|FADD)\b", text)  # of pointers in memory by LD
        runs = [len(list(run)) for load, run in itertools.groupby(waits, lambda word: word != "FADD") if load]
        assert max(runs, default=0) >= 8, (direction, kind, rows, phase)


def test_kernels_of_a_phase_leave_registers_for_more_blocks_of_a_processor(built):
    """Two, of 256 threads, share 65536 registers: in the forward's products, and wherever partial sums are added."""
    for row in build_info(built)["kernels"]:
        if found := re.search(r"delta_(for|back)ward<[^,]+, (\d+), (-?\d)\b", row["kernel"]):
            direction, rows, phase = found.groups()
            beside = row["architecture"] == "sm_90a" and rows != "64"
            several = {"0", "1"} | ({"2"} if beside else set()) if direction == "for" else {"0", "2", "4"}
            assert 65536 // (256 * -(-row["registers"] // 8) * 8) >= 1 + (phase in several), row
        if row["architecture"] == "sm_90a" and re.search(r"with_base<[^,]+, 16>", row["kernel"]):
            assert row["registers"] <= 128, row  # one of phase 0 beside it


def test_results_are_stored_by_sixteen_bytes(code):
    """Whatever a thread holds of a product: element by element only where rows do not begin at multiples of sixteen."""
    for name, text in delta_kernels(code[0]).items():
        assert "STG.E.128" in text, name
        assert text.count("STG.E.64") < 10, name  # h, q and gradients in 16 bits, by four


def test_lilora_info_shows_the_build(built):
    code = "import sys; from lilora.cli import main; sys.argv = ['lilora', 'info', '--json']; main()"
    facts = python(built, code)
    assert facts["cuda build"].startswith(f"CUDA {cuda_build.find_nvcc().version}, torch {torch.__version__}, for ")
    assert facts["build_info"]["cuda"] == cuda_build.find_nvcc().version


def test_a_second_build_recompiles_nothing_and_a_changed_header_what_includes_it(built):
    times = lambda: {path: path.stat().st_mtime_ns for path in built.source.glob("build/cuda/**/*.[os]*")}  # noqa: E731
    before = times()
    shutil.rmtree(built.folder / "again", ignore_errors=True)
    assert "no work to do" in make_wheel(built.source, built.folder / "again")
    assert times() == before
    os.utime(built.source / "csrc/build_info.cpp")
    command = [*cuda_build.find_ninja(), "-n", "-f", "build/cuda/build.ninja"]
    assert "nvcc csrc/build_info.cpp" in run(*command, cwd=built.source)
    assert ".cu" not in run(*command, cwd=built.source)
    os.utime(built.source / "csrc/delta.h")
    again = run(*command, cwd=built.source)
    assert "nvcc csrc/register.cpp" in again
    assert "link build/cuda/liblilora_cuda.so" in again


def test_report(built, capsys):
    """No bound is held here: times and sizes for the reader."""
    lines = (built.source / "build/cuda/.ninja_log").read_text().splitlines()[1:]
    spans = {target: (int(end) - int(start)) / 1000 for start, end, _, target, _ in map(str.split, lines)}
    report = {
        "architectures": [arch.name for arch in chosen()],
        "jobs": cuda_build.max_jobs(),
        "seconds": round(built.seconds, 1),
        "seconds_by_source": {
            str(Path(target).relative_to("build/cuda").with_suffix("")): round(seconds, 1)
            for target, seconds in spans.items()
            if target.endswith(".o")
        },
        "library_bytes": built.library.stat().st_size,
        "wheel_bytes": built.wheel.stat().st_size,
    }
    path = Path(os.environ.get("LILORA_CUDA_REPORT") or built.folder / "gpu_build.json")
    path.write_text(json.dumps(report, indent=1) + "\n")
    with capsys.disabled():
        print(f"\n{json.dumps(report, indent=1)}\nwritten to {path}")
