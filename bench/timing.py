"""Timing of competing implementations in alternation: CUDA events and cold inputs on a GPU, wall time on a CPU."""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

COLD_BYTES = (
    256 << 20
)  # several times a GPU's L2 cache: inputs that add up to this are cold when their turn comes again
COLD_BYTES_CPU = 128 << 20  # of an L3 cache
CYCLES_PER_US = 2000  # about, of a GPU's clock
LONGEST_HOLD_US = 30_000
FEWEST_ROUNDS = 5

Candidate = Callable[[int, Callable[[], None]], object]
"""run(turn, mark): one run on the inputs of this turn, with mark() after each segment."""
Times = dict[str, dict[str, list[float]]]
"""Microseconds by candidate, by segment, in every round."""


@dataclass(frozen=True)
class Machine:
    """Where and how often to measure. tiny: the smallest shapes, to try every path rather than to time it."""

    device: torch.device
    rounds: int
    tiny: bool = False

    @classmethod
    def here(cls, rounds: int, tiny: bool = False) -> "Machine":
        """This machine's GPU if it has one; a tiny run always takes the CPU."""
        if tiny:
            return cls(torch.device("cpu"), 2, True)
        return cls(torch.device("cuda" if torch.cuda.is_available() else "cpu"), rounds)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def now(self) -> torch.cuda.Event | float:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def microseconds(self, start, end) -> float:
        return 1e3 * start.elapsed_time(end) if self.on_gpu else 1e6 * (end - start)

    def copies(self, bytes_each: int) -> int:
        """How many sets of inputs to rotate."""
        cold, most = (COLD_BYTES, 16) if self.on_gpu else (COLD_BYTES_CPU, 2 if self.tiny else 6)
        return max(2, min(most, -(-cold // bytes_each)))


@dataclass(frozen=True)
class Ceilings:
    """The most that this machine reaches: bytes per second of a large copy, operations of a large product, bytes only read."""

    bytes_per_second: float
    flops_per_second: float
    read_per_second: float

    def floor_us(self, bytes_: float, flops: float) -> float:
        return 1e6 * max(bytes_ / self.bytes_per_second, flops / self.flops_per_second)

    def rates(self, us: float, bytes_: int, flops: int) -> dict:
        """Rates that a time means for the bytes and operations that have to be, and the least time they take."""
        floor = self.floor_us(bytes_, flops)
        return {
            "bytes": bytes_,
            "flops": flops,
            "gb_per_s": round(bytes_ / us / 1e3, 1),
            "percent_of_read": round(1e8 * bytes_ / us / self.read_per_second, 1),
            "tflop_per_s": round(flops / us / 1e6, 3),
            "floor_us": round(floor, 2),
            "percent_of_floor": round(100 * floor / us, 1),
        }


def ceilings(machine: Machine, dtype: torch.dtype, rounds: int = 5) -> Ceilings:
    """Measured here and now: the floor of every figure of the same process is taken against these."""
    elements, edge = (1 << 30, 8192) if machine.on_gpu else (1 << 16, 64) if machine.tiny else (1 << 25, 1024)
    source = torch.empty(elements, dtype=dtype, device=machine.device).normal_()
    target = torch.empty_like(source)
    left, right = (torch.randn(edge, edge, dtype=dtype, device=machine.device) for _ in range(2))
    words = source.view(torch.float32)  # bf16 sums are bound by their conversion
    candidates = {
        "copy": marked(lambda _: target.copy_(source)),
        "product": marked(lambda _: left @ right.T),
        "read": marked(lambda _: words.sum()),
    }
    times = measure(machine, candidates, ["all"], rounds)
    seconds = {name: 1e-6 * min(found["all"]) for name, found in times.items()}
    bytes_ = source.nbytes
    return Ceilings(2 * bytes_ / seconds["copy"], 2 * edge**3 / seconds["product"], bytes_ / seconds["read"])


def marked(function: Callable[[int], object]) -> Candidate:
    """A candidate of one segment."""

    def run(turn: int, mark: Callable[[], None]) -> None:
        function(turn)
        mark()

    return run


def measure(
    machine: Machine,
    candidates: dict[str, Candidate],
    segments: list[str],
    rounds: int = 0,
    calls: int = 1,
    seconds: float | None = None,
) -> Times:
    """Microseconds of every candidate, by segment, in every round; of one of the `calls` that a run makes.

    A round runs every candidate once, every other round in reverse order: whatever else the machine does hits all alike,
    so the ratio within a round means more than the times themselves. After `seconds`, rounds beyond the fifth are left
    out. A GPU is kept busy until the host has enqueued the whole run, so the host's own time, "host", is not part of the
    others; where a run waits for the GPU itself, as generation does for every token, it is.
    """
    rounds = rounds or machine.rounds
    times: Times = {name: {segment: [] for segment in (*segments, "host")} for name in candidates}
    hold_us = dict.fromkeys(candidates, 0.0)
    warmup = 3 if machine.on_gpu else 0 if machine.tiny else 1
    start_of_all = time.perf_counter()
    for turn in range(-warmup, rounds):
        if seconds is not None and turn >= FEWEST_ROUNDS and time.perf_counter() - start_of_all > seconds:
            break
        for name in sorted(candidates, reverse=bool(turn % 2)):
            if machine.on_gpu:
                torch.cuda._sleep(int(CYCLES_PER_US * min(hold_us[name], LONGEST_HOLD_US)))
            marks = []
            start = time.perf_counter()
            marks.append(machine.now())
            candidates[name](turn + warmup, lambda: marks.append(machine.now()))  # noqa: B023
            host_us = 1e6 * (time.perf_counter() - start)
            machine.synchronize()
            hold_us[name] = 1.5 * host_us + 100
            if turn >= 0:
                for segment, first, last in zip(segments, marks[:-1], marks[1:], strict=True):
                    times[name][segment].append(machine.microseconds(first, last) / calls)
                times[name]["host"].append(host_us / calls)
    return times


def spread(values: Iterable[float], digits: int) -> dict[str, float]:
    """Median with the 20th and 80th percentiles."""
    values = list(values)
    p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")
    named = {"median": statistics.median(values), "p20": p20, "p80": p80}
    return {name: round(value, digits) for name, value in named.items()}


def ratio(times: list[float], over: list[float]) -> dict[str, float]:
    """Ratio to another candidate's time, round by round."""
    return spread((a / b for a, b in zip(times, over, strict=True)), 4)


def figures(times: list[float], over: list[float] | None = None) -> dict:
    """Microseconds, and the ratio to another candidate's times of the same rounds."""
    return {"us": spread(times, 2)} | ({} if over is None else {"ratio_to_base": ratio(times, over)})


def nbytes(tensors: object) -> int:
    """Bytes of all tensors among the values."""
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor))
