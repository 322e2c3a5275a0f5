"""What a machine with a GPU would spend its first minutes on, made on one without: python -m bench.gpu_kit FOLDER

`make gpu-kit` calls it in an environment with the versions of bench/gpu_kit.txt. FOLDER/kit.tar.xz gets
- the CUDA kernels for compute capability 9.0a, and what they were built with;
- a Triton cache with every kernel that the GPU tests and stages 1 to 8 of `bench.gpu_evidence` launch. They run here over a GPU
  that is pretended (bench/pretended_gpu), so that no list of kernels is kept by hand;
- wheels of packages that stage 7 needs and that machine may lack.

A cache is hit where the Python packages, the sources and the kind of GPU are the same, whatever the paths.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from .environment import commit, installed

ROOT = Path(__file__).parent.parent
PRETENDED = ROOT / "bench/pretended_gpu"
DEVICES = {"NVIDIA H100 80GB HBM3": 81559, "NVIDIA H200": 143771}  # MiB, on which stage 7's batch depends
STAGES = ("7", "2", "1", "3", "4", "5", "6")
PACKED_LIMIT, TREE_LIMIT = 45 << 20, 60 << 20  # bytes: of the kit, of kit and tree
LIBRARY = "lilora_kernels/lib/liblilora_cuda.so"
BUILD = {"LILORA_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0a", "NVCC_APPEND_FLAGS": "-lineinfo"}  # lines for stage 8
WHEELS = {  # what is imported -> the package
    "pydantic": "pydantic", "pydantic_core": "pydantic-core", "annotated_types": "annotated-types",
    "typing_inspection": "typing-inspection", "rich": "rich", "markdown_it": "markdown-it-py", "mdurl": "mdurl",
    "typer": "typer", "shellingham": "shellingham",
}  # fmt: skip
COMMANDS = """\
Command 1 (480 s):
{}

Command 2 (200 s, or what is left less 15), at once on the same machine; on another one with the first results in the tree:
{}

To carry besides the tree: {kit}"""


# --- making it --------------------------------------------------------------------------------------------------------


def make(folder: Path, jobs: int) -> Path:
    """The packed kit; SystemExit with a sentence where a part of it cannot be made."""
    content = folder / "content"
    shutil.rmtree(content, ignore_errors=True)
    content.mkdir(parents=True)
    said("the CUDA kernels for 9.0a (minutes)")
    build_library(content, folder)
    said("wheels")
    download_wheels(content / "wheels")
    install_wheels(content / "wheels", list(WHEELS.values()), folder / "site")
    said("what tests and stages launch (minutes)")
    counts = record(folder, jobs, device_names(), recordings())
    pruned(folder / "triton", content / "triton")
    about = {
        "commit": commit(),
        "sources": sources(),
        "kernels": counts,
        **{name: installed(name) for name in ("torch", "triton", "numpy")},
    }
    (content / "kit.json").write_text(json.dumps(about, indent=1) + "\n")
    packed = folder / "kit.tar.xz"
    with tarfile.open(packed, "w:xz", preset=6) as tar:
        tar.add(content, ".")
    check_sizes(packed)
    return packed


def commands(kit: str, commit: str) -> tuple[str, str]:
    """What to run on a machine with a GPU, in the root of the tree. The first leaves its results for the second."""
    given = f"--out $OUT --kit {kit} --commit {commit}"
    first = f"python3 -m bench.gpu_evidence {given} --stages 2,0,1,3,5,4 --minutes 7.7 --no-warm"
    return (
        f"{first}; code=$?; cp $OUT/results.json /tmp/first.json; exit $code",
        f"python3 -m bench.gpu_next /tmp/first.json {given} --minutes 3.1",
    )


def said(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


def build_library(content: Path, folder: Path) -> None:
    env = {**os.environ, **BUILD}
    built = folder / "built"
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(built),
        "--build-temp",
        str(folder / "temp"),
    ]
    if subprocess.run(command, cwd=ROOT, env=env, check=False).returncode:
        raise SystemExit("gpu_kit: the CUDA kernels were not built; the lines above say why")
    (content / LIBRARY).parent.mkdir(parents=True)
    for file in [built / LIBRARY, *(built / "lilora_kernels").glob("_build_info*.so")]:
        shutil.copyfile(file, content / file.relative_to(built))


def pretended(device: str, folder: Path, log: Path) -> dict[str, str]:
    """The environment in which Python has a GPU of that name that computes nothing, and compiles into folder/triton."""
    own = {
        "LILORA_PRETENDED_GPU": device,
        "LILORA_PRETENDED_MIB": str(DEVICES.get(device, 81559)),
        "LILORA_PRETENDED_KERNELS": "compile",
        "LILORA_PRETENDED_LIBCUDA": str(folder / "libcuda"),
        "LILORA_PRETENDED_LOG": str(log),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TRITON_STORE_BINARY_ONLY": "1",
        "PYTHONPATH": os.pathsep.join([str(PRETENDED), str(ROOT), str(ROOT / "python"), str(folder / "site")]),
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **own}


def recordings(stages: tuple[str, ...] | None = None) -> list[list[str]]:
    """The commands whose kernels the kit holds, the longest first; or those of some stages alone."""
    python = [sys.executable, "-m"]
    if stages is not None:
        return [[*python, "bench.gpu_stages", stage] for stage in stages]
    from .gpu_correctness import test_files

    pytest = [*python, "pytest", "-q", "--assert=plain", "-p", "no:cacheprovider", "--tb=short"]
    found = [[*pytest, str(path)] for path in test_files()]
    found += [
        [*python, "bench.gpu_stages", stage, *(["--seconds", "3600"] if stage == "6" else [])] for stage in STAGES
    ]
    found.append([*python, "bench.gpu_correctness", "tiny"])
    return [*found, *([*python, "bench.gpu_stages", "call", "--problem", *sizes] for sizes in profiled_sizes())]


def profiled_sizes() -> list[list[str]]:
    from .gpu_stages import STAGES as cases

    return [
        [str(getattr(case.run.args[0], name)) for name in ("rows", "columns", "outputs", "tasks")]
        for case in cases[8](False)
    ]


def device_names() -> list[str]:
    """One is enough unless a device has launch configurations of its own, and that with more memory runs more."""
    own = [name for name in DEVICES if (ROOT / f"lilora_kernels/configs/{name.replace(' ', '_')}.json").is_file()]
    return own + [name for name in DEVICES if name not in own][-1:]


def record(folder: Path, jobs: int, devices: list[str], commands: list[list[str]]) -> dict[str, int]:
    """Run what launches kernels over a pretended GPU; how many kernels each recording compiled first."""
    counts: dict[str, int] = {}
    failed = []

    def run(device: str, at: int, command: list[str]) -> None:
        log, output = folder / f"recording-{at}.log", folder / f"recording-{at}.txt"
        log.unlink(missing_ok=True)
        with output.open("wb") as stream:
            # The CUDA backend's plans launch Triton kernels too.
            env = pretended(device, folder, log) | {"LILORA_PRETENDED_CUDA": str(folder / "content" / LIBRARY)}
            code = subprocess.run(command, cwd=ROOT, env=env, stdout=stream, stderr=stream, check=False).returncode
        kinds = Counter(line.split(" ", 1)[0] for line in log.read_text().splitlines()) if log.exists() else Counter()
        name = " ".join([*command[2:3], *(Path(word).name for word in command[3:] if not word.startswith("-"))])
        counts[name] = kinds["miss"]
        said(f"  {name}: {kinds['miss']} kernels compiled, {kinds['hit']} there already")
        if code:
            failed.append(f"{name} ended with {code}: {output}")

    with ThreadPoolExecutor(jobs) as pool:
        for device in devices:
            list(pool.map(lambda job, device=device: run(device, *job), enumerate(commands)))
    if failed:
        raise SystemExit("gpu_kit: the kit would lack kernels, for " + "; ".join(failed))
    return counts


def pruned(cache: Path, target: Path) -> None:
    """The cache without the sources of its kernels: they are for people."""
    ignore = shutil.ignore_patterns("*.source", "*.ttir", "*.ttgir", "*.llir", "*.ptx", "lock", "tmp.*")
    shutil.copytree(cache, target, ignore=ignore)


def download_wheels(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    if subprocess.run([*command, *WHEELS.values()], check=False).returncode:
        raise SystemExit("gpu_kit: wheels could not be downloaded; the lines above say why")


def install_wheels(wheels: Path, packages: list[str], target: Path) -> None:
    flags = ["-q", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--find-links", str(wheels)]
    command = [sys.executable, "-m", "pip", "install", *flags, "--target", str(target), *packages]
    subprocess.run(command, check=False)


def check_sizes(packed: Path) -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tree = sum((ROOT / name).stat().st_size for name in tracked.split("\0") if name and (ROOT / name).is_file())
    size = packed.stat().st_size
    said(f"{packed}: {size / 2**20:.1f} MiB packed, with the tree {(size + tree) / 2**20:.1f} MiB")
    if size > PACKED_LIMIT or size + tree > TREE_LIMIT:
        raise SystemExit(
            f"gpu_kit: kit and tree have {size / 2**20:.1f} and {tree / 2**20:.1f} MiB; "
            f"{PACKED_LIMIT >> 20} for the kit and {TREE_LIMIT >> 20} for both are the limits"
        )


# --- using it ---------------------------------------------------------------------------------------------------------


def unpack(packed: Path, folder: Path, packages: bool = False) -> Path:
    """Lay the kit into `folder` and the CUDA kernels into the tree, with `packages` also those missing; returns the folder.

    SystemExit when the kernels were made of other sources than the tree's.
    """
    with tarfile.open(packed) as tar:
        tar.extractall(folder, filter="data")
    for group in (folder / "triton").glob("*/__grp__*.json"):  # Triton names the files of a kernel by absolute paths
        names = json.loads(group.read_text())["child_paths"]
        own = {name: str(group.parent / name) for name in names if (group.parent / name).is_file()}
        group.write_text(json.dumps({"child_paths": own}))
    if facts(folder)["sources"] != sources():
        raise SystemExit(
            f"the CUDA kernels of {packed} were made of other sources than this tree's; make gpu-kit again"
        )
    for file in (folder / "lilora_kernels").rglob("*.so"):
        target = ROOT / file.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    if not packages:
        return folder
    missing = [package for name, package in WHEELS.items() if find_spec(name) is None]
    if missing:
        install_wheels(folder / "wheels", missing, folder / "site")  # stage 7 alone would miss them, and say so
    return folder


def stand_in_for_file(folder: Path) -> Path:
    """A folder with a `file` that says of Python what it says where the kit was made."""
    script = folder / "bin/file"
    script.parent.mkdir(exist_ok=True)
    script.write_text("#!/bin/sh\necho ELF 64-bit LSB pie executable, x86-64\n")
    script.chmod(0o755)
    return script.parent


def sources() -> str:
    """What the CUDA kernels were compiled from, in short."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".cu", ".cuh", ".cpp", ".h", ".py"):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def facts(folder: Path) -> dict:
    return json.loads((folder / "kit.json").read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="recordings at a time")
    parser.add_argument(
        "--compile-for", metavar="GPU", help="compile into FOLDER/triton what --stages launch, and pack nothing"
    )
    parser.add_argument("--stages", default="3,4,5")
    options = parser.parse_args()
    if options.compile_for is not None:
        record(
            options.folder.resolve(), options.jobs, [options.compile_for], recordings(tuple(options.stages.split(",")))
        )
        return 0
    packed = make(options.folder.resolve(), options.jobs)
    kit = os.path.relpath(packed, ROOT)
    print(COMMANDS.format(*commands(kit, commit()), kit=kit))
    return 0


if __name__ == "__main__":
    sys.exit(main())
