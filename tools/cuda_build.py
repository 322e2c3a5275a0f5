"""The GPU build of setup.py: nvcc driven by ninja, in build/cuda. Looks at no GPU and loads nothing from the network."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from setuptools import Extension

from tools import cpu_build

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path("build/cuda")
DEFAULT_ARCHITECTURES = ("8.0", "8.9", "9.0a", "10.0")
OLDEST_ARCHITECTURE, OLDEST_TORCH = (8, 0), (2, 10)
# Names that torch takes in TORCH_CUDA_ARCH_LIST, as torch.utils.cpp_extension has them.
NAMES = {
    "Kepler+Tesla": "3.7",
    "Kepler": "3.5+PTX",
    "Maxwell+Tegra": "5.3",
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
TORCH_TARGET_VERSION = f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"
BYTES_PER_JOB = 4 << 30
TOOLKIT = Path("/usr/local/cuda")

LIBRARY, BUILD_INFO = "lilora_kernels.lib.liblilora_cuda", "lilora_kernels._build_info"
EXTENSIONS = [Extension(LIBRARY, ["csrc/register.cpp"]), Extension(BUILD_INFO, ["csrc/build_info.cpp"])]
# The host compiler does not know `#pragma unroll` in functions for both sides.
WARNINGS = ["-Werror", "all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror,-Wno-unknown-pragmas"]
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden", *WARNINGS]
TORCH_DEFINES = ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]


class BuildExt(cpu_build.BuildExt):
    """`build_ext` that makes both files with ninja and puts them where setuptools wants them."""

    def build_extensions(self) -> None:
        files = build()
        for extension in self.extensions:
            if extension.name not in files:
                self.build_extension(extension)
                continue
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files[extension.name], target)


def build() -> dict[str, Path]:
    """Compile what is not up to date; returns the file of each extension."""
    if sys.platform != "linux":
        stop("LILORA_CUDA=1 builds on Linux only; unset it for the build without CUDA kernels")
    jobs = max_jobs()
    nvcc = find_nvcc()
    chosen = architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"), nvcc)
    torch = package_folder("torch", "torch's headers (a CPU build will do)")
    pybind11 = package_folder("pybind11", "pybind11's headers")
    hopper = sources("csrc/hopper") if "9.0a" in [arch.number for arch in chosen] else []
    cutlass = package_folder("cutlass_library", "CUTLASS's headers for 9.0a", "nvidia-cutlass") if hopper else None
    ninja = find_ninja()
    torch_version = metadata.version("torch")
    if tuple(int(part) for part in re.findall(r"\d+", torch_version)[:2]) < OLDEST_TORCH:
        stop(f"torch is {torch_version}, but the GPU build needs the headers of 2.10 or newer; upgrade torch")

    plan = Plan(nvcc, chosen, torch, pybind11, hopper, cutlass)
    (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
    write_if_changed(ROOT / BUILD / "build.ninja", plan.ninja_file())
    run = [*ninja, "-f", str(BUILD / "build.ninja"), "-j", str(jobs)]
    compile_targets(run, plan.library)
    facts = {
        "cuda": nvcc.version,
        "torch": torch_version,
        "architectures": [arch.name for arch in chosen],
        "flags": FLAGS,
        "hopper": bool(hopper),
        "kernels": [row for log in plan.logs() for row in resources((ROOT / log).read_text())],
    }
    write_if_changed(
        ROOT / BUILD / "build_facts.h", f'constexpr const char* kFacts = R"json({json.dumps(facts)})json";\n'
    )
    compile_targets(run, plan.build_info)
    return {LIBRARY: ROOT / plan.library, BUILD_INFO: ROOT / plan.build_info}


def stop(sentence: str) -> NoReturn:
    raise SystemExit(f"lilora-kernels: {sentence}")


def note(sentence: str) -> None:
    print(f"lilora-kernels: {sentence}", file=sys.stderr)


# --- what is asked for --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """`number` as in 9.0a, with or without PTX for newer ones."""

    number: str
    ptx: bool = False

    @property
    def name(self) -> str:
        return self.number + "+PTX" * self.ptx

    def gencode(self) -> list[str]:
        code = self.number.replace(".", "")
        flags = [f"-gencode=arch=compute_{code},code=sm_{code}"]
        if self.ptx:  # without the letter: PTX of 9.0a would run on 9.0 alone
            code = code.rstrip("af")
            flags.append(f"-gencode=arch=compute_{code},code=compute_{code}")
        return flags


def architectures(wanted: str | None, nvcc: "Nvcc") -> list[Architecture]:
    """Those of TORCH_CUDA_ARCH_LIST, written as torch has it; else the default ones that this nvcc knows, the newest with PTX.

    9.0 is read as 9.0a, which has wgmma. What is older than the kernels is left out with a note.
    """
    if not (wanted or "").strip():
        known = [number for number in DEFAULT_ARCHITECTURES if number.rstrip("af") in nvcc.architectures]
        if not known:
            stop(f"nvcc {nvcc.version} knows none of {', '.join(DEFAULT_ARCHITECTURES)}; install a newer CUDA toolkit")
        return [Architecture(number, number == known[-1]) for number in known]
    given = re.split(r"[;\s]+", wanted.strip("; \t\n"))
    chosen: dict[str, bool] = {}
    for entry in ";".join(NAMES.get(entry, entry) for entry in given).split(";"):
        match = re.fullmatch(r"((\d+)\.(\d)[af]?)(\+PTX)?", entry)
        if not match:
            stop(f"TORCH_CUDA_ARCH_LIST has {entry!r}; write numbers such as 8.0;9.0a+PTX, or names such as Hopper")
        number, major, minor, ptx = match.groups()
        if (int(major), int(minor)) < OLDEST_ARCHITECTURE:
            note(f"TORCH_CUDA_ARCH_LIST has {entry}, which is left out: the kernels need 8.0 or newer")
            continue
        if number.rstrip("af") not in nvcc.architectures:
            known = ", ".join(sorted(nvcc.architectures, key=float))
            stop(f"TORCH_CUDA_ARCH_LIST has {entry}, which nvcc {nvcc.version} does not know; it knows {known}")
        number = "9.0a" if number == "9.0" else number
        chosen[number] = chosen.get(number, False) or ptx is not None
    if not chosen:
        stop(f"TORCH_CUDA_ARCH_LIST is {wanted!r}, but the kernels need 8.0 or newer; add such an architecture")
    return [Architecture(number, ptx) for number, ptx in chosen.items()]


def max_jobs() -> int:
    """MAX_JOBS, or as many as there are cores and 4 GB of free memory for each."""
    wanted = os.environ.get("MAX_JOBS")
    if wanted:
        if not (wanted.isdecimal() and int(wanted)):
            stop(f"MAX_JOBS is {wanted!r}; it must be a positive number")
        return int(wanted)
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return max(1, min(len(os.sched_getaffinity(0)), int(available[1]) * 1024 // BYTES_PER_JOB))


# --- what is there ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nvcc:
    path: str
    version: str
    architectures: frozenset[str]  # such as 9.0, without a letter


def find_nvcc() -> Nvcc:
    home = os.environ.get("CUDA_HOME")
    if home:
        path = shutil.which("nvcc", path=f"{home}/bin") or stop(
            f"CUDA_HOME is {home}, which has no bin/nvcc; set it to the folder of a CUDA toolkit, or unset it"
        )
    else:
        path = (
            shutil.which("nvcc")
            or shutil.which(str(TOOLKIT / "bin/nvcc"))
            or stop(
                f"LILORA_CUDA=1 needs nvcc, found neither in PATH nor in {TOOLKIT}; install the CUDA toolkit or set CUDA_HOME"
            )
        )
    try:
        version, codes = (
            subprocess.run([path, option], capture_output=True, text=True, check=True).stdout
            for option in ("--version", "--list-gpu-code")
        )
    except (OSError, subprocess.CalledProcessError) as error:
        stop(f"{path} does not run ({error}); set CUDA_HOME to the folder of a working CUDA toolkit")
    numbers = frozenset(f"{major}.{minor}" for major, minor in re.findall(r"sm_(\d+)(\d)", codes))
    return Nvcc(path, re.search(r"release ([\d.]+)", version)[1], numbers)


def package_folder(module: str, what: str, package: str | None = None) -> Path:
    """Where a Python package lies, without importing it."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        stop(
            f"LILORA_CUDA=1 needs {what}, but the Python of this build has no package {package or module}; "
            "install it and build with --no-build-isolation"
        )
    return Path(spec.origin).parent


def find_ninja() -> list[str]:
    if find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    path = shutil.which("ninja") or stop(
        "LILORA_CUDA=1 needs ninja, found neither as a Python package nor in PATH; "
        "install it and build with --no-build-isolation"
    )
    return [path]


# --- the build ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What build.ninja says. Paths of sources and results are relative to ROOT, in which ninja runs."""

    nvcc: Nvcc
    architectures: list[Architecture]
    torch: Path
    pybind11: Path
    hopper: list[Path]
    cutlass: Path | None

    library = BUILD / "liblilora_cuda.so"

    @property
    def build_info(self) -> Path:
        return BUILD / ("_build_info" + sysconfig.get_config_var("EXT_SUFFIX"))

    def sources(self) -> dict[Path, list[str]]:
        """Every source of the library, those that take longest first, with its flags."""
        every = [flag for arch in self.architectures for flag in arch.gencode()]
        hopper = [*Architecture("9.0a").gencode(), "--expt-relaxed-constexpr"]
        if self.hopper:
            hopper += system_include(self.cutlass / "source/include", "cutlass")
        headers = self.torch / "include"
        torch = system_include(headers, "torch") + system_include(headers / "torch/csrc/api/include", "torch")
        as_cuda = ["-x=cu", self.architectures[0].gencode()[0]]  # csrc/platform.h is meant for nvcc's own language
        others = [path for path in sources("csrc") if "hopper" not in path.parts]
        return {
            **dict.fromkeys(self.hopper, hopper),
            **dict.fromkeys(others, every),
            Path("csrc/register.cpp"): [*as_cuda, *TORCH_DEFINES, *torch, *["-DLILORA_HOPPER"] * bool(self.hopper)],
        }

    def logs(self) -> list[Path]:
        return [Path(f"{self.object(source)}.log") for source in self.sources() if source.suffix == ".cu"]

    def object(self, source: Path) -> Path:
        return BUILD / source.with_name(source.name + ".o")

    def ninja_file(self) -> str:
        # What ptxas says of registers is kept in a log; the rest of the log is shown when nvcc fails.
        show_log = "{ grep -v -e 'ptxas info' -e 'bytes stack frame' $out.log; exit 1; }"
        rules = f"""\
builddir = {BUILD}
nvcc = {command([self.nvcc.path])}

rule compile
  command = $nvcc {command(FLAGS)} -Icsrc $flags -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || {show_log}
  depfile = $out.d
  deps = gcc
  description = nvcc $in

rule link
  command = $nvcc -shared -nodlink -Xlinker -s $flags $in $libraries -o $out
  description = link $out
"""
        edges = []
        for source, flags in self.sources().items():
            flags = [*flags, "-Xptxas=-v"] if source.suffix == ".cu" else flags
            edges.append(f"build {self.object(source)}: compile {source}\n  flags = {command(flags)}\n")
        # libtorch.so is empty: naming it is what makes the loader look for torch's C functions in the torch that is loaded.
        flags = ["-cudart=static", "-Xlinker=--exclude-libs,ALL,--no-as-needed", f"-L{self.torch / 'lib'}"]
        objects = " ".join(str(self.object(source)) for source in self.sources())
        edges.append(f"build {self.library}: link {objects}\n  flags = {command(flags)}\n  libraries = -ltorch\n")

        source = Path("csrc/build_info.cpp")
        flags = [f"-I{BUILD}", *system_include(Path(sysconfig.get_path("include")), "python")]
        flags += system_include(self.pybind11 / "include", "pybind11")
        edges.append(f"build {self.object(source)}: compile {source}\n  flags = {command(flags)}\n")
        edges.append(f"build {self.build_info}: link {self.object(source)}\n  flags = -cudart=none\n")
        return "\n".join([rules, *edges])


def sources(folder: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.cu"))


def system_include(folder: Path, name: str) -> list[str]:
    """Search `folder` with its warnings off; a header's path in the binary begins with `name`, wherever it lay."""
    return ["-isystem", str(folder), f"-Xcompiler=-ffile-prefix-map={folder}={name}"]


def command(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def compile_targets(run: list[str], target: Path) -> None:
    if subprocess.run([*run, str(target)], cwd=ROOT, check=False).returncode:
        stop("nvcc failed on the sources of the GPU build; its message stands above")


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def resources(log: str) -> list[dict]:
    """What `ptxas -v` says of each kernel for each architecture: registers per thread, bytes spilled, static shared memory."""
    rows = []
    for part in log.split("Compiling entry function ")[1:]:
        kernel, architecture = re.match(r"'(.+)' for '(.+)'", part).groups()
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", part)
        shared = re.search(r"(\d+) bytes smem", part)
        rows.append(
            {
                "kernel": kernel,
                "architecture": architecture,
                "registers": int(re.search(r"Used (\d+) registers", part)[1]),
                "spill_bytes": sum(map(int, spills)),
                "shared_bytes": int(shared[1]) if shared else 0,
            }
        )
    return rows
