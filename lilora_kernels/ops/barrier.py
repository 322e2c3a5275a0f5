"""What the programs of a launch wait for each other by: the state of their grid barrier, and counters of arrivals."""

import threading

import torch
from torch import Tensor

SLOTS = 64  # streams per allocation
LINE = 4096  # int32 of a slot: streams share no cache line, and every slot is aligned like the first
COUNTERS = LINE - 2

_lock = threading.Lock()
_blocks: dict[torch.device, list[Tensor]] = {}
_states: dict[tuple[torch.device, int], Tensor] = {}  # by device and stream


def barrier_state(device: torch.device) -> Tensor:
    """int32 zeros of one launch, kept per stream, as launches of a stream follow one another and each leaves zeros behind: two
    of the barrier (the second, its generation, may be anything), then COUNTERS of arrivals.

    A graph under capture gets its own, zeroed in every replay: it may be replayed on any stream.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(LINE, dtype=torch.int32, device=device)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
    if (state := _states.get((device, stream))) is not None:
        return state
    with _lock:  # autograd runs backward in threads of its own
        if (device, stream) not in _states:
            blocks = _blocks.setdefault(device, [])
            used = sum(key[0] == device for key in _states)
            if used == SLOTS * len(blocks):
                # Allocated by another thread: torch.compile's CUDA graphs send this thread's allocations to a pool of
                # their own and refuse any that outlives the run.
                thread = threading.Thread(target=lambda: blocks.append(_zeros(device)))
                thread.start()
                thread.join()
            _states[device, stream] = blocks[used // SLOTS][used % SLOTS]
        return _states[device, stream]


def _zeros(device: torch.device) -> Tensor:
    block = torch.zeros(SLOTS, LINE, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # other streams may be the first to read it
    return block
