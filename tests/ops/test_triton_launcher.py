"""Launches that go past JITFunction.run, compared with those that it makes, over a driver without a GPU."""

import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import create_function_from_signature

from lilora_kernels.ops import triton_launcher, triton_runtime
from lilora_kernels.ops.delta import triton_jobs
from lilora_kernels.ops.delta.composed_kernels import compose, sum_gradients, u_gradient, v_gradient_partials
from lilora_kernels.ops.delta.triton_backward import (
    BackwardSizes,
    Gradients,
    Lower,
    PartialSums,
    RowSums,
    Thinned,
    Upper,
    UpperSums,
    add_partials,
    delta_backward,
    from_x,
)
from lilora_kernels.ops.delta.triton_forward import Expanded, ForwardSizes, Shrunk, delta_forward, expand, shrink
from lilora_kernels.ops.delta.triton_parts import constants_of
from lilora_kernels.ops.rank_gate.triton_kernels import rank_gate
from lilora_kernels.ops.triton_launcher import Launch, launch

FORWARD = ForwardSizes(R=16, S=8, BLOCK_R=16, BLOCK_S=16, BLOCK_M=16, BLOCK_K=16, SPLIT_K=2, BLOCK_N=16, TILES_N=1)
BACKWARD = BackwardSizes(R=16, S=8, BLOCK_R=16, BLOCK_S=16, BLOCK_M=16, BLOCK_N=16, SPLIT_N=2, BLOCK_K=16)
KERNELS = {  # their groups, and how many tensors follow
    shrink: ((Shrunk, Shrunk), 8, {"c": FORWARD, "num_warps": 4}),
    expand: ((Expanded,), 4, {"c": FORWARD, "num_warps": 4}),
    delta_forward: ((Shrunk, Expanded), 7, {"c": FORWARD, "num_warps": 4}),
    from_x: ((Lower, Lower, RowSums), 6, {"c": BACKWARD, "num_warps": 8}),
    add_partials: ((PartialSums, Gradients), 1, {"c": BACKWARD, "num_warps": 8}),
    delta_backward: (
        (Upper, Thinned, UpperSums, Lower, RowSums, PartialSums, Gradients),
        9,
        {"c": BACKWARD, "num_warps": 4},
    ),
    rank_gate: ((), 3, {"BLOCK": 64, "num_warps": 8}),
}
for composed, tensors in ((compose, 6), (u_gradient, 5), (v_gradient_partials, 7), (sum_gradients, 8)):
    KERNELS[composed] = (), tensors, constants_of(composed, 16, 8, torch.float16)
FLOATS = ("scaling", "scale")
INTEGERS = (0, 1, 2, 15, 16, 17, 48, 4096, 2**31 - 16, 2**31, 2**31 + 1, 2**40)
MEMORY = {dtype: torch.empty(64, dtype=dtype) for dtype in (torch.float16, torch.float32, torch.bfloat16, torch.int32)}
MISALIGNED = {dtype: [memory[i:] for i in range(1, 9)] for dtype, memory in MEMORY.items()}
by_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)


def any_tensor(draw, first):
    dtype = draw.choice(list(MEMORY))
    tensor = draw.choice([MEMORY[dtype], *MISALIGNED[dtype]])
    return tensor if first or draw.random() < 0.7 else None


def any_number(draw, name):
    return draw.choice([0.5, 1.0, 16.0]) if name in FLOATS else draw.choice(INTEGERS)


def slots(kernel):
    """What each argument is, those of groups one by one: a tensor, or the name of a number."""
    groups, count, constants = KERNELS[kernel]
    names = [name for name in kernel.arg_names if name not in constants]
    tensors = sum(len(group._fields) for group in groups) + count
    return [None] * tensors + names[len(groups) + count :]


def arguments(kernel, given):
    """(tensors, numbers, groups) of a launch, from the values of its slots."""
    groups, count, _ = KERNELS[kernel]
    left = iter(given)
    made = tuple(group(*(next(left) for _ in group._fields)) for group in groups)
    rest = tuple(left)
    return rest[:count], rest[count:], made


def any_of(draw, name, first):
    return any_tensor(draw, first) if name is None else any_number(draw, name)


def neighbours(kernel, draw):
    """Arguments, and each time the same but for one of them."""
    found = slots(kernel)
    given = [any_of(draw, name, first=at == 0) for at, name in enumerate(found)]
    for _ in range(60):
        at = draw.randrange(len(given))
        given[at] = any_of(draw, found[at], first=at == 0)
        yield arguments(kernel, given)


def one_apart(kernel):
    """Aligned tensors and multiples of 16; then the same but for one argument."""
    found = slots(kernel)
    base = [MEMORY[torch.float32] if name is None else 0.5 if name in FLOATS else 48 for name in found]
    tensors = [None, *(t for dtype in MEMORY for t in (MEMORY[dtype], MISALIGNED[dtype][0]))]
    for at, name in enumerate(found):
        for other in tensors[at == 0 :] if name is None else (2.0,) if name in FLOATS else INTEGERS:
            yield arguments(kernel, [*base[:at], other, *base[at + 1 :]])


def key_of(made, tensors, numbers, groups):
    flat = [t for group in groups for t in group] + list(tensors)
    return made.specialisation(flat, [0 if t is None else t.data_ptr() for t in flat], numbers)


@by_kernel
@pytest.mark.parametrize("draws", ["one argument apart", *map(str, range(8))])
def test_what_triton_tells_apart_has_different_keys(kernel, draws):
    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    constants, found = KERNELS[kernel][2], {}
    made = Launch(kernel, constants)
    drawn = neighbours(kernel, random.Random(int(draws))) if draws.isdigit() else one_apart(kernel)
    for tensors, numbers, groups in drawn:
        key = key_of(made, tensors, numbers, groups)
        specialised = tuple(binder(*groups, *tensors, *numbers, **constants)[1])
        assert found.setdefault(key, specialised) == specialised
    assert len(found) > 10


@by_kernel
def test_numbers_of_rows_and_tasks_share_a_key(kernel):
    """Every key takes JITFunction.run once."""
    made, keys = Launch(kernel, KERNELS[kernel][2]), set()
    free = {"M", "T", "G", "CHUNK", "threshold", "low_rank", "high_rank", "shares", "n", "r", "row_stride", "stride"}
    for n in range(40):
        given = [
            MEMORY[torch.float32] if name is None else 0.5 if name in FLOATS else n if name in free else 64
            for name in slots(kernel)
        ]
        keys.add(key_of(made, *arguments(kernel, given)))
    assert len(keys) == 1


# --- launches ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """(compiled kernel, what it was called with) of every launch; nothing is compiled."""
    calls = []

    class Driver:
        get_current_device = staticmethod(lambda: -1)  # that of CPU tensors
        get_current_stream = staticmethod(lambda device: 7)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    class Compiled(CompiledKernel):
        def __init__(self, src, options):
            self.src, self.name, self.module, self.function, self.packed_metadata = src, "", True, object(), object()
            self.cooperative = options["launch_cooperative_grid"]
            self._run = lambda *given: calls.append((self, given))

    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    for kernel in KERNELS:
        kernel.device_caches.clear()
        kernel.device_caches[-1]  # sets `compile`
        monkeypatch.setattr(kernel, "compile", lambda src, target, options: Compiled(src, options))
    yield calls
    for kernel in KERNELS:
        kernel.device_caches.clear()


@pytest.fixture
def by_triton(monkeypatch):
    """by_triton(kernel): counts the calls of JITFunction.run from here on."""

    def count(kernel):
        runs, own = [], kernel.run
        monkeypatch.setattr(kernel, "run", lambda *args, **more: runs.append(1) or own(*args, **more))
        return runs

    return count


def plain(call):
    """Of a launch, but for its hooks: what C reads from the arguments. None is compiled in."""
    compiled, given = call

    def read(value):
        if isinstance(value, tuple):
            return tuple(map(read, value))
        return value.data_ptr() if isinstance(value, torch.Tensor) else value or 0

    return compiled, given[:6], read(tuple(given[9:]))


@by_kernel
@pytest.mark.parametrize("seed", range(4))
def test_a_second_launch_is_what_triton_would_launch(kernel, seed, launched, by_triton, monkeypatch):
    made = Launch(kernel, KERNELS[kernel][2], programs=int(kernel is not rank_gate))
    runs = by_triton(kernel)
    for given in neighbours(kernel, random.Random(seed)):
        launch(made, (5, 2, 1), *given)
        runs.clear()
        launch(made, (5, 2, 1), *given)
        assert not runs
        with monkeypatch.context() as patch:
            patch.setattr(triton_launcher, "BOUND", False)
            launch(made, (5, 2, 1), *given)
        assert runs == [1]
        bound, wanted = map(plain, launched[-2:])
        assert bound == wanted
        assert bound[0].cooperative == (kernel is not rank_gate)


def test_a_launch_of_more_programs_than_fit_is_made_with_fewer_and_remembered(monkeypatch):
    """As CUDA refuses it where the ranks take more registers than those that the configuration was made for."""
    made, tried = Launch(delta_forward, KERNELS[delta_forward][2], programs=3), []

    def refusing(made, grid, *_):
        tried.append(grid[0])
        if grid[0] > 264:
            raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")

    monkeypatch.setattr(triton_jobs, "launch", refusing)
    monkeypatch.setattr(triton_jobs, "current", lambda device: nullcontext())
    monkeypatch.setattr(triton_runtime, "processors", lambda device: 132)
    for _ in range(2):
        triton_jobs.run(made, None, torch.device("cpu"), (), (), (), waits=True)
    assert tried == [396, 264, 264]
    monkeypatch.setattr(triton_runtime, "processors", lambda device: 300)
    with pytest.raises(RuntimeError, match="cooperative"):
        triton_jobs.run(made, None, torch.device("cpu"), (), (), (), waits=True)


def test_two_threads_that_meet_the_same_limit_lower_it_once(monkeypatch):
    """Layers on two GPUs of one kind share a launch, and a backward has a thread for each GPU."""
    made = Launch(delta_forward, KERNELS[delta_forward][2], programs=3)

    def refusing(made, grid, *_):
        if grid[0] > 264:
            made.programs = 2  # as another thread has found meanwhile
            raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")

    monkeypatch.setattr(triton_jobs, "launch", refusing)
    monkeypatch.setattr(triton_jobs, "current", lambda device: nullcontext())
    monkeypatch.setattr(triton_runtime, "processors", lambda device: 132)
    triton_jobs.run(made, None, torch.device("cpu"), (), (), (), waits=True)
    assert made.programs == 2


@pytest.mark.parametrize("stride, copied", [((1 << 24) - 1, False), (1 << 24, True)])
def test_rows_too_far_apart_for_32_bits_are_copied(stride, copied):
    """A tile's last row would lie 2**31 elements behind its first."""
    x = torch.empty(1, device="meta").as_strided((16, 8), (stride, 1))
    assert triton_jobs.rows_of(x).is_contiguous() == copied


@pytest.mark.parametrize("shared, refused", [(99, True), (163, False)])
def test_ranks_that_shared_memory_cannot_hold_are_refused(shared, refused, monkeypatch):
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    monkeypatch.setattr(triton_runtime, "old_gpu", lambda device: None)
    monkeypatch.setattr(triton_runtime, "shared_memory", lambda device: shared * 1024)
    assert triton_runtime.unsupported_reason(x, 256, 64) is None
    assert ("takes more shared memory" in (triton_runtime.unsupported_reason(x, 256, 128) or "")) == refused


def test_hooks_and_other_versions_go_through_triton(launched, by_triton, monkeypatch):
    _, count, constants = KERNELS[rank_gate]
    made, given = Launch(rank_gate, constants), ((MEMORY[torch.float32],) * count, (64, 16, 64, 1))
    runs = by_triton(rank_gate)

    def goes_through_triton():
        runs.clear()
        launch(made, (1, 1, 1), *given)
        return bool(runs)

    assert [goes_through_triton(), goes_through_triton()] == [True, False]
    for name in ("launch_enter_hook", "launch_exit_hook"):
        chain, hook = getattr(knobs.runtime, name), lambda metadata: None
        chain.add(hook)
        assert goes_through_triton()
        assert chain in launched[-1][1]
        chain.remove(hook)
        assert not goes_through_triton()
        with monkeypatch.context() as patch:
            patch.setattr(knobs.runtime, name, hook)
            assert goes_through_triton()
        with monkeypatch.context() as patch:
            patch.setattr(knobs.runtime, name, None)
            assert not goes_through_triton()
    for holder, name, value in (
        (knobs.runtime, "debug", True),
        (knobs.compilation, "instrumentation_mode", "iir"),
        (rank_gate, "pre_run_hooks", [lambda *_, **__: None]),
        (triton_launcher, "BOUND", False),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, value)
            assert goes_through_triton(), name
        assert not goes_through_triton()
