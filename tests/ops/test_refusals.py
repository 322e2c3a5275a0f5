"""What the environment lacks is a reason, never an error: the automatic choice goes on to the next backend."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

import lilora_kernels
from lilora_kernels import LiLoRALinear, backends, cuda_library
from lilora_kernels.ops import triton_runtime

pytest.importorskip("triton")

OLD_DRIVER = "CUDA driver version is insufficient for CUDA runtime version"
OPERATIONS = ("delta", "linear")


@pytest.fixture
def x():
    """A tensor on a GPU, as far as the choice of a backend looks at it."""
    with FakeTensorMode():
        return torch.empty(3, 64, dtype=torch.bfloat16, device="cuda:0")


@pytest.fixture
def gpu(monkeypatch):
    """An H100 with a CUDA build; set `missing` to what its library says of the code for it."""
    found = SimpleNamespace(missing="", asked=0)

    def missing_code(device):
        found.asked += 1
        return found.missing

    monkeypatch.setattr(cuda_library, "load_error", lambda: None)
    monkeypatch.setattr(cuda_library, "device_type", lambda: "cuda")
    monkeypatch.setattr(triton_runtime, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.ops.lilora_cuda, "missing_code", missing_code, raising=False)
    for cached in (triton_runtime.capability, triton_runtime.import_fault, cuda_library.missing_code):
        cached.cache_clear()
    yield found
    for cached in (triton_runtime.capability, triton_runtime.import_fault, cuda_library.missing_code):
        cached.cache_clear()


def chosen(op, x):
    implementation = backends.choose(op, x, 128, 64)
    return next(name for name, one in backends._table[op].items() if one is implementation)


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_driver_that_is_too_old_for_the_cuda_build_leaves_triton(op, gpu, x):
    gpu.missing = OLD_DRIVER
    for _ in range(2):  # the answer is kept, with its reason
        assert backends.unsupported_reasons(op, x, 128, 64)["cuda"] == f"it cannot run on sm_90: {OLD_DRIVER}"
        assert chosen(op, x) == "triton"
        with (
            lilora_kernels.backend("cuda"),
            pytest.raises(RuntimeError, match=f"'cuda' cannot run on cuda:0: .*{OLD_DRIVER}"),
        ):
            backends.choose(op, x, 128, 64)
    assert gpu.asked == 1


def test_a_build_with_code_for_the_gpu_is_chosen(gpu, x):
    assert chosen("delta", x) == "cuda"


@pytest.mark.parametrize("device, hip", [("cuda:0", "6.4"), ("xpu:0", None), ("mps:0", None)])
@pytest.mark.parametrize("op", OPERATIONS)
def test_other_accelerators_than_nvidia_gpus_are_left_to_eager(op, device, hip, gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    with FakeTensorMode():
        x = torch.empty(3, 64, dtype=torch.bfloat16, device=device)
    reasons = backends.unsupported_reasons(op, x, 128, 64)
    wanted = "it needs an NVIDIA GPU"
    assert reasons == {"cuda": wanted, "triton": wanted, "cpu": "it needs tensors on the CPU", "eager": None}
    assert chosen(op, x) == "eager"


def test_a_pair_of_adapters_is_left_to_triton(gpu, x):
    """Two calls of the CUDA kernels share nothing."""
    for forced in (nullcontext(), lilora_kernels.backend("cuda")):
        with forced:
            assert (
                backends.unsupported_reasons("delta_pair", x, 128, 64)["cuda"]
                == "this operation has no kernel of its own there"
            )
            assert chosen("delta_pair", x) == "triton"


def test_explain_says_it(gpu, x, monkeypatch):
    gpu.missing = OLD_DRIVER
    monkeypatch.setattr(LiLoRALinear, "example", lambda self: x)
    explained = lilora_kernels.explain(LiLoRALinear(torch.nn.Linear(64, 64).requires_grad_(False), r=16, sub_rank=8))
    assert f"[cuda: it cannot run on sm_90: {OLD_DRIVER}; cpu: it needs tensors on the CPU]" in explained
    plans = "one_launch up to 255 rows, composed for more of few tasks, by_phase for more of many tasks"
    assert f"triton ({plans})" in explained


def test_lilora_info_says_it(gpu, monkeypatch):
    pytest.importorskip("pydantic")
    from lilora_kernels.facts import cuda_build

    gpu.missing = OLD_DRIVER
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cuda_build()["cuda build"].endswith(f"it cannot run on sm_90: {OLD_DRIVER}")


@pytest.mark.parametrize(
    "error", [RuntimeError("no NVIDIA\ndriver"), AssertionError("Torch not compiled with CUDA enabled")]
)
def test_a_gpu_that_torch_cannot_speak_to_leaves_eager(error, gpu, x, monkeypatch):
    def broken(device):
        raise error

    monkeypatch.setattr(torch.cuda, "get_device_capability", broken)
    reason = " ".join(str(error).split())
    assert backends.unsupported_reasons("delta", x, 128, 64) == {
        "cuda": reason,
        "triton": reason,
        "cpu": "it needs tensors on the CPU",
        "eager": None,
    }
    assert chosen("delta", x) == "eager"


def test_a_triton_that_cannot_be_imported_leaves_eager(gpu, x, monkeypatch):
    gpu.missing = OLD_DRIVER
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(triton_runtime, "installed", lambda: True)
    assert backends.unsupported_reasons("delta", x, 128, 64)["triton"].startswith(
        "triton cannot be imported (ModuleNotFoundError"
    )
    assert chosen("delta", x) == "eager"


def test_a_stand_in_for_triton_is_no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", type(sys)("triton"))
    assert not triton_runtime.installed.__wrapped__()


@pytest.mark.parametrize(
    "triton, numpy, works",
    [("3.6.0", "2.3.5", True), ("3.6.0", "2.4.0", False), ("3.6.0+git1", "2.5.2", False), ("3.7.1", "2.5.2", True)],
)
def test_the_interpreter_says_which_numpy_it_needs(triton, numpy, works, gpu, no_cpu_kernels, monkeypatch):
    monkeypatch.setattr(triton_runtime, "INTERPRETED", True)
    monkeypatch.setattr(sys.modules["triton"], "__version__", triton)
    monkeypatch.setattr(sys.modules["numpy"], "__version__", numpy)
    monkeypatch.setattr(cuda_library, "load_error", lambda: "none")
    reason = triton_runtime.unsupported_reason(torch.randn(2, 4), 8, 4)
    if works:
        assert reason is None
        return
    assert reason == (
        f"the interpreter of triton {triton} needs numpy below 2.4, and numpy {numpy} is installed; "
        "install numpy<2.4 or triton>=3.7"
    )
    assert chosen("delta", torch.randn(2, 4)) == "eager"
    with lilora_kernels.backend("triton"), pytest.raises(RuntimeError, match="needs numpy below"):
        lilora_kernels.delta(torch.randn(2, 4), torch.randn(3, 4), torch.randn(5, 3))
