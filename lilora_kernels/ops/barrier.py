"""The state of the grid barrier in which the programs of a one-launch kernel meet."""

import threading

import torch
from torch import Tensor

SLOTS = 64  # streams per allocation
LINE = 32  # int32 of a slot: 128 bytes, so that streams share no cache line and every slot is aligned like the first

_lock = threading.Lock()
_blocks: dict[torch.device, list[Tensor]] = {}
_states: dict[tuple[torch.device, int], Tensor] = {}  # by device and stream


def barrier_state(device: torch.device) -> Tensor:
    """Two int32 zeros for the barrier of one launch: kept per stream, as launches of a stream follow one another.

    A graph under capture gets its own, zeroed in every replay: it may be replayed on any stream.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(2, dtype=torch.int32, device=device)
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
            _states[device, stream] = blocks[used // SLOTS][used % SLOTS, :2]
        return _states[device, stream]


def _zeros(device: torch.device) -> Tensor:
    block = torch.zeros(SLOTS, LINE, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # other streams may be the first to read it
    return block
