"""torch's side of a pretended GPU: what asks for CUDA gets tensors without data, and every wait returns at once."""

import os
import threading
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
import torch._dynamo  # reads torch.cuda as it is: before anything is replaced
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

CUDA, META = torch.device("cuda:0"), torch.device("meta")
# What the model of time takes for granted: an H100's rates that other programs have reached, by the bytes of an element.
BYTES_PER_US = 2.7e6
FLOPS_PER_US = {8: 45e6, 4: 40e6, 2: 600e6}
MEMORY = int(os.environ.get("LILORA_PRETENDED_MIB", "81559")) << 20
KERNEL_US = 3.0  # of the shortest kernel

CREATE = {"empty", "zeros", "ones", "full", "rand", "randn", "randint", "randperm", "arange", "eye", "tensor"}


class Ledger:
    """What was asked of the pretended GPU by this process, and how long a GPU would take for it."""

    def __init__(self) -> None:
        self.gpu_us = 0.0
        self.counts: Counter[str] = Counter()
        self.started = time.perf_counter()

    def summary(self) -> dict:
        seconds = {
            "gpu_s": self.gpu_us / 1e6,
            "here_s": time.perf_counter() - self.started,
        }
        return {**self.counts, **{name: round(value, 3) for name, value in seconds.items()}}

    def add(self, bytes_: float, flops: float = 0.0, element: int = 2, kind: str = "operations") -> None:
        self.counts[kind] += 1
        self.gpu_us += KERNEL_US + max(bytes_ / BYTES_PER_US, flops / FLOPS_PER_US.get(element, 40e6))


ledger = Ledger()


class PretendedGPU(TorchDispatchMode):
    """Tensors on the GPU are meta tensors that say they are on cuda:0; values read from them are 0 or True.

    Operations of this package run their own Python, down to the launches. Results mean nothing: what this shows is that
    every line runs, and what it launches.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(off_cuda, (args, kwargs or {}))
        name = func._schema.name
        if func.namespace == "lilora":
            with self, frankly(False):
                return OPDEFS[name]._init_fn(*args, **kwargs)
        if func.namespace == "lilora_cuda":
            with frankly():
                return of_the_library(func, args, kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_gpu = any(is_meta(t) for t in given)
        if on_gpu:
            if name == "aten::_local_scalar_dense":
                return True if given[0].dtype == torch.bool else torch.zeros((), dtype=given[0].dtype).item()
            if name == "aten::equal":
                return True
            if name == "aten::copy_" and not is_meta(args[0]):
                return args[0]
            if name == "aten::_to_copy" and (kwargs.get("device") or META).type == "cpu":
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if name == "aten::nonzero":
                return args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.int64)
        if on_gpu or (kwargs.get("device") or torch.device("cpu")).type == "meta":
            kwargs |= {"generator": None} if "generator" in kwargs else {}
        if func is torch.ops.aten.bmm.dtype_out:  # torch 2.11 has no version of it for tensors without data
            result = kwargs["out"]
        else:
            with frankly():
                result = func(*args, **kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if any(is_meta(t) for t in made) and not func.is_view:
            flops = 0
            if func.overloadpacket in flop_registry:
                operands = (
                    args[:2] if name == "aten::bmm" else args
                )  # its formula takes the dtype of the result for a shape
                flops = flop_registry[func.overloadpacket](*operands, **kwargs, out_val=result)
            element = min((t.element_size() for t in given if t.is_floating_point()), default=4)
            ledger.add(sum(nbytes(t) for t in {id(t): t for t in (*given, *made)}.values()), flops, element)
        return result


_frank = False


@contextmanager
def frankly(wanted: bool = True):
    """torch's own Python for tensors without data has to see what they are."""
    global _frank
    before, _frank = _frank, wanted
    try:
        yield
    finally:
        _frank = before


def pretends(tensor: Tensor) -> bool:
    return is_meta(tensor) and not _frank


def nbytes(tensor: Tensor) -> int:
    """Of what lies in memory: an expanded dimension counts once."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else min(length, 1)
    return size


def off_cuda(value):
    return META if isinstance(value, torch.device) and value.type == "cuda" else value


def to_meta(value):
    """As `off_cuda`, of what `Tensor.to` takes: names of devices too."""
    return META if isinstance(value, str | torch.device) and torch.device(value).type == "cuda" else value


def of_the_library(func, args, kwargs):
    """Outputs of the operations of the CUDA library, which cannot take tensors without data."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    kind = func._schema.name.partition("::")[2]
    if kind == "missing_code":
        return ""
    if kind == "slot_bytes":
        return func(*args, **kwargs)
    ledger.add(sum(nbytes(t) for t in given.values() if isinstance(t, Tensor)), kind="launches")
    a, b0 = given["a"], given["b0"]
    if kind == "delta_backward":
        dy = given["dy"]
        names = ("x", "a", "b0", "u", "v", "fusion", "gate")
        wanted = [name for bit, name in enumerate(names) if given["needs"] >> bit & 1]
        return [dy.new_empty(len(dy), a.shape[1]) if n == "x" else torch.empty_like(given[n]) for n in wanted]
    x = given["x"]
    return x.new_empty(len(x), len(b0)), x.new_empty(len(x), len(a))


# --- torch.cuda -------------------------------------------------------------------------------------------------------


class Event:
    """Times are those of the ledger's model."""

    def __init__(self, *_, **__) -> None:
        self.at = 0.0

    def record(self, *_) -> None:
        self.at = ledger.gpu_us

    def elapsed_time(self, other: "Event") -> float:
        return max(other.at - self.at, 1e-3) / 1e3

    def synchronize(self) -> None: ...

    def wait(self, *_) -> None: ...

    def query(self) -> bool:
        return True


class Stream:
    count = 0

    def __init__(self, *_, **__) -> None:
        Stream.count += 1
        self.cuda_stream, self.device = Stream.count, CUDA

    def wait_stream(self, _) -> None: ...

    def wait_event(self, _) -> None: ...

    def record_event(self, event=None) -> Event:
        return event or Event()

    def synchronize(self) -> None: ...


class Graph:
    def replay(self) -> None:
        ledger.add(0)

    def reset(self) -> None: ...


_streams = [Stream()]
_streams[0].cuda_stream = 0
_capturing = [False]


@contextmanager
def on_stream(stream):
    _streams.append(stream or _streams[-1])
    try:
        yield
    finally:
        _streams.pop()


@contextmanager
def capture(*_, **__):
    _capturing[0] = True
    try:
        yield
    finally:
        _capturing[0] = False


def sleep(cycles: int) -> None:
    """A GPU is held back until the host has enqueued a run: on a machine that is not this one, for less time."""
    ledger.gpu_us += min(cycles / 2000, 600)


class CUDADevice(nullcontext):
    """torch.cuda.device and device_of."""


def patch_torch_cuda(name: str) -> None:
    properties = SimpleNamespace(
        name=name, major=9, minor=0, multi_processor_count=132, total_memory=MEMORY, warp_size=32,
        shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472, L2_cache_size=50 << 20,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, gcnArchName="", uuid="pretended",
    )  # fmt: skip
    zero = lambda *_, **__: 0  # noqa: E731
    nothing = lambda *_, **__: None  # noqa: E731
    replaced = {
        "is_available": lambda: True, "is_initialized": lambda: True, "_lazy_init": nothing, "init": nothing,
        "device_count": lambda: 1, "current_device": zero, "set_device": nothing, "_exchange_device": zero,
        "_maybe_exchange_device": zero, "get_device_capability": lambda *_: (9, 0), "get_device_name": lambda *_: name,
        "get_device_properties": lambda *_: properties, "synchronize": nothing, "empty_cache": nothing,
        "memory_allocated": zero, "max_memory_allocated": zero, "memory_reserved": zero, "max_memory_reserved": zero,
        "reset_peak_memory_stats": nothing, "mem_get_info": lambda *_: (78 << 30, 80 << 30), "memory_stats": lambda *_: {},
        "Event": Event, "Stream": Stream, "stream": on_stream, "current_stream": lambda *_: _streams[-1],
        "default_stream": lambda *_: _streams[0], "set_stream": nothing, "CUDAGraph": Graph, "graph": capture,
        "is_current_stream_capturing": lambda: _capturing[0], "set_sync_debug_mode": nothing, "_sleep": sleep,
        "device": CUDADevice, "device_of": CUDADevice, "is_bf16_supported": lambda *_, **__: True,
        "manual_seed": nothing, "manual_seed_all": nothing, "seed": nothing, "initial_seed": zero, "ipc_collect": nothing,
        "get_rng_state": lambda *_: torch.empty(16, dtype=torch.uint8), "set_rng_state": nothing,
    }  # fmt: skip
    for attribute, value in replaced.items():
        setattr(torch.cuda, attribute, value)
    torch.cuda.memory.empty_cache = nothing
    torch._C._cuda_getCurrentRawStream = lambda device: _streams[-1].cuda_stream
    torch.version.cuda = torch.version.cuda or "13.0"
    torch.compile = lambda function=None, **_: function if function is not None else (lambda f: f)


def patch_tensors() -> None:
    base = torch._C.TensorBase
    own = {name: getattr(base, name) for name in ("device", "is_cuda", "is_meta", "is_cpu", "data_ptr", "tolist")}
    global is_meta
    is_meta = own["is_meta"].__get__
    torch.Tensor.device = property(lambda t: CUDA if pretends(t) else own["device"].__get__(t))
    torch.Tensor.is_cuda = property(pretends)
    torch.Tensor.is_meta = property(lambda t: is_meta(t) and _frank)
    # Every allocation begins at a multiple of 512 bytes, as those of torch's allocator do.
    torch.Tensor.data_ptr = lambda t: address(t) if is_meta(t) else own["data_ptr"](t)
    torch.Tensor.get_device = lambda t: 0 if is_meta(t) else -1
    torch.Tensor.tolist = lambda t: torch.zeros(t.shape, dtype=t.dtype).tolist() if is_meta(t) else own["tolist"](t)
    move = base.to
    torch.Tensor.to = lambda t, *args, **kwargs: move(
        t, *map(to_meta, args), **{k: to_meta(v) for k, v in kwargs.items()}
    )
    torch.Tensor.cuda = lambda t, *_, **__: move(t, META)
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, made_on_the_host(getattr(torch, name)))
    generator = torch.Generator

    class Generator(generator):
        def __new__(cls, device="cpu"):
            return generator.__new__(generator)

    torch.Generator = Generator


def made_on_the_host(function):
    """torch.tensor and the like go to the device in C++."""

    def make(*args, device=None, **kwargs):
        on_gpu = device is not None and torch.device(device).type == "cuda"
        made = function(*args, **kwargs) if on_gpu else function(*args, device=device, **kwargs)
        return made.to(META) if on_gpu else made

    return make


def address(tensor: Tensor) -> int:
    start = getattr(tensor.untyped_storage(), "start", 0)
    return 512 + start + tensor.storage_offset() * tensor.element_size()


def patch_storages() -> None:
    """A part of a storage without data is one of that size; `start` says where in the other it lies."""
    take = torch.UntypedStorage.__getitem__

    def part(storage, at):
        if storage.device.type != "meta" or not isinstance(at, slice):
            return take(storage, at)
        start, stop, _ = at.indices(storage.nbytes())
        made = torch.UntypedStorage(stop - start, device="meta")
        made.start = getattr(storage, "start", 0) + start
        return made

    torch.UntypedStorage.__getitem__ = part


def install(name: str) -> PretendedGPU:
    """From here on torch in this process takes itself to have one GPU of that name."""
    patch_tensors()
    patch_storages()
    patch_torch_cuda(name)
    run = threading.Thread.run

    def run_with_gpu(thread: threading.Thread) -> None:
        with PretendedGPU():
            run(thread)

    threading.Thread.run = run_with_gpu
    mode = PretendedGPU()
    mode.__enter__()
    return mode
