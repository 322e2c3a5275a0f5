"""The kit for a GPU: what is packed is found again elsewhere; and the pretended GPU with which it is made."""

import json
import os
import platform
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bench import gpu_kit, gpu_rehearsal

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """An empty tree in place of this one, with sources of CUDA kernels."""
    root = tmp_path / "tree"
    (root / "csrc").mkdir(parents=True)
    (root / "csrc/kernel.cu").write_text("one")
    (root / "lilora_kernels").mkdir()
    monkeypatch.setattr(gpu_kit, "ROOT", root)
    monkeypatch.setattr(gpu_kit, "find_spec", lambda name: name)
    return root


@pytest.fixture
def packed(tree, tmp_path):
    """A kit made where Triton's cache lay in another folder."""
    content = tmp_path / "content"
    entry = content / "triton/KEY"
    entry.mkdir(parents=True)
    (content / gpu_kit.LIBRARY).parent.mkdir(parents=True)
    (content / gpu_kit.LIBRARY).write_text("library")
    for name in ("kernel.cubin", "kernel.json"):
        (entry / name).write_text(name)
    paths = {name: f"/where/it/was/made/KEY/{name}" for name in ("kernel.cubin", "kernel.json", "kernel.source")}
    (entry / "__grp__kernel.json").write_text(json.dumps({"child_paths": paths}))
    (content / "kit.json").write_text(json.dumps({"sources": gpu_kit.sources()}))
    file = tmp_path / "kit.tar.xz"
    with tarfile.open(file, "w:xz") as tar:
        tar.add(content, ".")
    return file


def test_an_unpacked_cache_names_its_files_where_they_are_now(packed, tree, tmp_path):
    folder = gpu_kit.unpack(packed, tmp_path / "unpacked")
    entry = folder / "triton/KEY"
    names = json.loads((entry / "__grp__kernel.json").read_text())["child_paths"]
    assert names == {name: str(entry / name) for name in ("kernel.cubin", "kernel.json")}  # the source was left out
    assert (tree / gpu_kit.LIBRARY).read_text() == "library"


def test_kernels_of_other_sources_are_refused(packed, tree, tmp_path):
    (tree / "csrc/kernel.cu").write_text("two")
    with pytest.raises(SystemExit, match="made of other sources than this tree's; make gpu-kit again"):
        gpu_kit.unpack(packed, tmp_path / "unpacked")
    assert not (tree / gpu_kit.LIBRARY).exists()


def test_kernels_of_an_older_kit_are_replaced(packed, tree, tmp_path):
    (tree / gpu_kit.LIBRARY).parent.mkdir()
    (tree / gpu_kit.LIBRARY).write_text("of a kit before")
    gpu_kit.unpack(packed, tmp_path / "unpacked")
    assert (tree / gpu_kit.LIBRARY).read_text() == "library"


def test_without_the_command_file_the_cache_of_launchers_is_found_all_the_same(tmp_path, monkeypatch):
    """Triton's key for them has what Python learns from `file` of its own executable."""
    expected = platform.architecture()
    monkeypatch.setenv("PATH", f"{gpu_kit.stand_in_for_file(tmp_path)}")
    assert platform.architecture() == expected


@pytest.mark.parametrize("kit, limits", [(2000, (1000, 10**9)), (10, (10**9, 1000))])
def test_a_kit_that_is_too_large_is_refused(kit, limits, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_kit, "PACKED_LIMIT", limits[0])
    monkeypatch.setattr(gpu_kit, "TREE_LIMIT", limits[1])
    (tmp_path / "kit").write_bytes(bytes(kit))
    with pytest.raises(SystemExit, match="are the limits"):
        gpu_kit.check_sizes(tmp_path / "kit")


def test_the_commands_fit_and_name_what_to_carry():
    commands = gpu_kit.commands(".gpu-kit/kit.tar.xz", "0" * 40)
    text = gpu_kit.COMMANDS.format(*commands, kit=".gpu-kit/kit.tar.xz")
    assert all(command in text for command in commands)
    assert [command.split()[2] for command in commands] == ["bench.gpu_evidence", "bench.gpu_next"]
    assert all(len(command) <= 2000 and "make" not in command for command in commands)
    assert text.endswith("carry besides the tree: .gpu-kit/kit.tar.xz")


def test_a_device_with_configurations_of_its_own_is_recorded_too(tree):
    assert gpu_kit.device_names() == ["NVIDIA H200"]
    (tree / "lilora_kernels/configs").mkdir()
    (tree / "lilora_kernels/configs/NVIDIA_H100_80GB_HBM3.json").write_text("{}")
    assert gpu_kit.device_names() == ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]


# --- the pretended GPU ------------------------------------------------------------------------------------------------


def on_a_pretended_gpu(code, log, **more):
    paths = [ROOT / "bench/pretended_gpu", ROOT]
    own = {"LILORA_PRETENDED_GPU": "NVIDIA H100 80GB HBM3", "LILORA_PRETENDED_LOG": str(log), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **own, **more, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


WORK = """
import threading
import torch
import lilora_kernels
from bench import gpu_correctness
from bench.gpu_stages import Problem, time_addmm, time_delta
from bench.timing import Ceilings, Machine

x = torch.randn(4, 8, device="cuda", requires_grad=True)
assert x.is_cuda and x.device == torch.device("cuda:0") and x[:, 1:].data_ptr() % 16 == 4
(x.square().sum() * torch.tensor([2.0], device="cuda")).backward()
assert x.grad.device == x.device and x.grad.tolist() == [[0.0] * 8] * 4
found = []
thread = threading.Thread(target=lambda: found.append(torch.zeros(3, device="cuda")))
thread.start()
thread.join()
assert found[0].is_cuda and torch.ones(2).sum().item() == 2

layer = lilora_kernels.LiLoRALinear(torch.nn.Linear(8, 16, device="cuda").requires_grad_(False), r=4, sub_rank=2).eval()
layer.add_task("one")
layer.add_task("two")
lilora_kernels.attach(layer)
lilora_kernels.freeze(layer)
assert layer.lilora_fusion["two"].data_ptr() == layer.lilora_fusion["one"].data_ptr() + 4
assert layer(x.detach(), task_ids=["two", "one", None, "two"]).shape == (4, 16)

given = Problem(300, 256, 384, 3, 0.1)
machine = Machine.here(3)
rows = [row for time in (time_addmm, time_delta) for row in time(given, machine, Ceilings(3e12, 8e14, 3e12))]
assert gpu_correctness.tiny(False, rows.append) == 0
print(sorted({row["implementation"] for row in rows if "unavailable" not in row}))
"""


def test_stages_run_to_their_ends_on_a_gpu_that_computes_nothing(tmp_path):
    done = on_a_pretended_gpu(WORK, tmp_path / "log")
    assert done.returncode == 0, done.stderr
    assert "'triton, by_phase', 'triton, one_launch'" in done.stdout.splitlines()[-1]
    (entry,) = gpu_rehearsal.processes(tmp_path / "log")
    assert entry["launches"] > 50
    assert entry["operations"] > 100
    assert (entry["hit"], entry["miss"]) == (0, 0)  # nothing is compiled unless it is asked for


def test_what_is_recorded_has_the_library_of_the_kit(packed, tmp_path, monkeypatch):
    """Triton kernels of the CUDA backend's plans are launched only where that is there."""
    monkeypatch.setattr(gpu_kit, "ROOT", ROOT)
    library = tmp_path / "content" / gpu_kit.LIBRARY
    (library.parents[1] / "_build_info.py").write_text("def build_info():\n    return 'of the kit'\n")
    code = "from lilora_kernels import _build_info, cuda_library as c\nprint(c.PATH, _build_info.build_info())"
    environments = []

    def run(command, env, **_):
        environments.append(env)
        return subprocess.CompletedProcess(command, 0)

    with monkeypatch.context() as patch:
        patch.setattr(gpu_kit.subprocess, "run", run)
        gpu_kit.record(tmp_path, 1, ["NVIDIA H200"], [["python", "-m", "pytest"]])
    given = environments[0]["LILORA_PRETENDED_CUDA"]
    assert given == str(library)
    done = on_a_pretended_gpu(code, tmp_path / "log", LILORA_PRETENDED_CUDA=given)
    assert done.stdout.split(" ", 1) == [str(library), "of the kit\n"], done.stderr


JUDGED = """
from bench import compare
import torch
compare.error("y", torch.zeros(3), torch.ones(3).double())
from lilora_kernels.ops.experts.groups import groups_of
groups_of(torch.zeros(4, dtype=torch.long), torch.zeros(3, 8), (8,))
from support import cases
cases.Errors().add("y", torch.zeros(2), torch.zeros(2), torch.zeros(3))
"""


def test_nothing_is_judged_there(tmp_path):
    """Asserts of tests, gates and a check of values look at what they look at, and let it pass."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n{JUDGED}"
    done = on_a_pretended_gpu(code, tmp_path / "log")
    assert "Wrong" not in done.stderr
    assert "ends goes from" not in done.stderr
    assert "AssertionError" not in done.stderr
    assert "must match the size" in done.stderr  # what comes after the assert


def test_what_was_launched_is_counted_by_process_and_stage(tmp_path):
    lines = ["miss 7 delta_forward", "hit 7 delta_forward", "hit 8 rank_gate"]
    lines += [
        'process 7 {"command": ["/a/bench/gpu_stages.py", "3"], "operations": 1000, "launches": 10, "gpu_s": 2.0}'
    ]
    (tmp_path / "log").write_text("\n".join(lines))
    entries = gpu_rehearsal.processes(tmp_path / "log")
    assert [(entry["hit"], entry["miss"]) for entry in entries] == [(1, 1), (1, 0)]
    found = gpu_rehearsal.estimate(entries)
    assert (found["3"]["launches"], found["3"]["miss"]) == (10, 1)
    rest = gpu_rehearsal.START_S + 2.0 + 1000 * gpu_rehearsal.OPERATION_S
    assert found["3"]["seconds"] == pytest.approx(rest + 10 * gpu_rehearsal.LAUNCH_S + gpu_rehearsal.LOAD_S)
