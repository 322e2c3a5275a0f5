"""One problem, every peer: the gate, then times in alternation, memory, and a row for each peer and direction."""

import random
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from .bases import BASES
from .external import EXTERNAL
from .peers import PEERS, Built, Unavailable
from .problems import Operands, Problem, operand_sets
from .timing import Candidate, Ceilings, Machine, Times, figures, measure, ratio, spread

REGISTRY = PEERS | BASES | EXTERNAL  # those named base... have no adapter
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # of the largest value


# --- the gate ---------------------------------------------------------------------------------------------------------


class Wrong(AssertionError):
    """A peer's result is wrong: it gets no figure."""


def gate(name: str, built: Built, sets: list[Operands], training: bool) -> float:
    """Compare y and every gradient of set 0 with fp64; returns the largest error as a share of the largest value.

    With dropout the mask is read from the peer's own result: with a base weight of zero, exactly the dropped elements of
    x have a gradient of zero. The same random state gives the same mask again.
    """
    s = sets[0]
    problem = s.problem
    if not training:
        with torch.no_grad():
            y = built.forward(0)
            exact = s.product + built.adapter(s.x.double(), [p.double() for p in built.leaves[0][1:]])
        return error(f"y of {name}", y, exact)
    if not problem.p or name == "base":
        return gate_training(name, built, s, None)
    weight = s.weight.clone()
    s.weight.zero_()
    try:
        seed()
        keep = torch.autograd.grad(built.forward(0), s.x, s.dy)[0] != 0
    finally:
        s.weight.copy_(weight)
    check_share(name, keep, problem.p)
    seed()  # the same mask again, with the base's weight
    return gate_training(name, built, s, keep)


@contextmanager
def poisoned(device: torch.device) -> Iterator[None]:
    """Torch fills what it allocates with NaN and huge integers: an old right answer cannot stand in for one not written."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # filling hangs on it; use_deterministic_algorithms loads the compiler
    try:
        if not torch.empty(8, device=device).isnan().all():
            raise RuntimeError("torch does not fill the memory that it allocates, so a gate could pass on old results")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.set_deterministic_debug_mode(before)


def seed() -> None:
    """Torch's random state and Python's: some peers draw their seeds there."""
    torch.manual_seed(1)
    random.seed(1)


def gate_training(name: str, built: Built, s: Operands, keep: Tensor | None) -> float:
    leaves = built.leaves[0]
    y = built.forward(0)
    # dy = y, as from |y|^2 / 2: with a random dy the gradient of fusion, one sum over everything, all but cancels.
    dy = y.detach()
    got = torch.autograd.grad(y, leaves, dy)
    x, *parameters = (leaf.detach().double().requires_grad_() for leaf in leaves)
    dropped = x if keep is None else x * keep / (1 - s.problem.p)
    exact = x @ s.weight.double().T + built.adapter(dropped, parameters)
    want = torch.autograd.grad(exact, [x, *parameters], dy.double(), materialize_grads=True)
    errors = [error(f"y of {name}", y, exact)]
    errors += [error(f"gradient {i} of {name}", g, w) for i, (g, w) in enumerate(zip(got, want, strict=True))]
    return max(errors)


def check_share(name: str, keep: Tensor, p: float) -> None:
    deviation = (p * (1 - p) / keep.numel()) ** 0.5
    share = 1 - keep.double().mean().item()
    if not abs(share - p) <= 6 * deviation + 2**-16:  # ours draws 16 bits
        raise Wrong(f"{name} drops {share:.4f} of x instead of {p}; no figure is taken")


def error(what: str, got: Tensor, want: Tensor) -> float:
    largest = want.detach().abs().max().item()
    found = (got.detach().double() - want.detach()).abs().max().item() / largest if largest else got.abs().max().item()
    if not found <= TOLERANCE[got.dtype]:
        raise Wrong(f"{what} is wrong by {found:.1e} of its largest value; no figure is taken")
    return found


# --- memory -----------------------------------------------------------------------------------------------------------


def saved_bytes(forward: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Memory that autograd holds between forward and backward, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()  # alive until the sum is taken, so that no two storages share an address
    return sum(storages.values()) if y.requires_grad else 0


def peak_bytes(machine: Machine, function: Callable[[], object]) -> int:
    """The most memory that a call takes beyond what was there before it."""
    if machine.on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        result = function()
    del result
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


# --- the comparison ---------------------------------------------------------------------------------------------------


@dataclass
class Field:
    """The peers of one problem that can run and were right, and a row for each that could not or was not."""

    about: dict
    sets: list[Operands]
    training: bool
    built: dict[str, Built]
    errors: dict[str, float]
    absent: list[dict]

    def mode(self) -> AbstractContextManager:
        return nullcontext() if self.training else torch.no_grad()


def gated(case: str, problem: Problem, peers: Iterable[str], machine: Machine, training: bool) -> Field:
    """Build every peer and hold it against fp64."""
    about = {"case": case, **problem.describe(), "training": training}
    field = Field(about, operand_sets(problem, machine), training, {}, {}, [])
    for name in peers:
        try:
            with field.mode():
                built = REGISTRY[name].build(field.sets, training)
            with built.ordered(), poisoned(machine.device):
                field.errors[name] = gate(name, built, field.sets, training)
            field.built[name] = built
        except Unavailable as reason:
            field.absent.append({**about, "implementation": name, "unavailable": str(reason)})
        except Exception as failure:  # a wrong or broken peer takes nothing from the others
            traceback.print_exc()
            message = f"{type(failure).__name__}: {failure}"[:500]
            field.absent.append({**about, "implementation": name, "error": message})
    return field


def compare(
    case: str,
    problem: Problem,
    peers: Iterable[str],
    machine: Machine,
    ceiling: Ceilings,
    training: bool,
    seconds: float | None = None,
) -> Iterator[dict]:
    """A row for every peer and direction, or one that says why there is no figure."""
    field = gated(case, problem, peers, machine, training)
    yield from field.absent
    segments = ["forward", "backward"] if training else ["forward"]
    turns = cycle(range(len(field.sets)))  # for all peers together: none finds the inputs that another has just read
    runs = {name: candidate(built, field.sets, turns, training) for name, built in field.built.items()}
    with field.mode():
        for built in field.built.values():  # banks are gathered and caches filled before the first round
            with built.ordered():
                for at in range(len(field.sets)):
                    built.forward(at)
        times = measure(machine, runs, segments, seconds=seconds)
    if training:
        for found in times.values():
            found["both"] = [sum(pair) for pair in zip(found["forward"], found["backward"], strict=True)]
    for name, built in field.built.items():
        with field.mode(), built.ordered():
            memory = memory_of(machine, built, field.sets[0].weight, training)
        for direction in [*segments, "both"] if training else segments:
            whole = direction == "both" or not training
            yield row(field, problem, times, name, direction, ceiling) | (memory if whole else {})


def row(field: Field, problem: Problem, times: Times, name: str, direction: str, ceiling: Ceilings) -> dict:
    """All figures of one peer in one direction."""
    found = figures(times[name][direction], times["base"][direction])
    bytes_, flops = problem.least(direction, adapted=not name.startswith(("base", "merged")))
    return {
        **field.about,
        "implementation": name,
        "direction": direction,
        **found,
        **removed(times, name, direction, problem.tasks),
        **ceiling.rates(found["us"]["median"], bytes_, flops),
        "host_us": spread(times[name]["host"], 1)["median"],
        "rounds": len(times[name]["host"]),
        "times_us": times[name][direction],
        "largest_error": float(f"{field.errors[name]:.2e}"),
    }


def candidate(built: Built, sets: list[Operands], turns: Iterator[int], training: bool) -> Candidate:
    def run(_: int, mark: Callable[[], None]) -> None:
        at = next(turns)
        with built.ordered():
            y = built.forward(at)
            mark()
            if training:
                torch.autograd.grad(y, built.leaves[at], sets[at].dy)
                mark()

    return run


def removed(times: Times, name: str, direction: str, tasks: int) -> dict:
    """Ratio to PEFT, and the share of PEFT's overhead over the base that is gone: (PEFT - ours) / (PEFT - base).

    `ours` also has its ratio to each peer.
    For several tasks against adapter_names where it could run, else against one adapter for all rows. The share is taken
    of the median ratios to the base, and only where PEFT has an overhead to speak of.
    """
    peer = next((peer for peer in ("peft_names", "peft")[tasks == 1 :] if peer in times), None)
    each = {}
    if name == "ours":
        peers = [n for n in times if n != "base" and not n.startswith("ours")]
        each["ratio_to_peers"] = {n: ratio(times[name][direction], times[n][direction]) for n in peers}
    if peer is None or name == peer or name.startswith("base"):
        return each
    base, theirs, mine = (times[n][direction] for n in ("base", peer, name))
    overhead = ratio(theirs, base)["median"] - 1
    gone = ratio(theirs, base)["median"] - ratio(mine, base)["median"]
    return each | {
        "against": peer,
        "ratio_to_peft": ratio(mine, theirs),
        "overhead_removed": round(gone / overhead, 3) if overhead > 0.05 else None,
    }


def memory_of(machine: Machine, built: Built, weight: Tensor, training: bool) -> dict[str, int]:
    if not training:
        return {"peak_bytes": peak_bytes(machine, lambda: built.forward(0))}

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad((y := built.forward(0)), built.leaves[0], torch.ones_like(y))

    return {
        "saved_bytes": saved_bytes(lambda: built.forward(0), [weight, *built.leaves[0][1:]]),
        "peak_bytes": peak_bytes(machine, step),
    }
