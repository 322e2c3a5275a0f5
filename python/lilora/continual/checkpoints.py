"""The Trainer's checkpoints of one stage: which of them to go on from, found before anything of it is loaded.

    trainable.safetensors                 the tensors that train, and the method's own progress, each in full
    optimizer.pt, scheduler.pt, rng_*     the Trainer's, plain tensors and numbers alone; with ZeRO-2 DeepSpeed's own files
    trainer_state.json                    written after those
    checksums.json                        written last: the SHA-256 of each of them; earlier versions wrote none

All engines but DeepSpeed write the same files, so a run may go on with another one.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from lilora.bank.atomic import write_atomically
from lilora.errors import UserError

TENSORS, STATE, CHECKSUMS = "trainable.safetensors", "trainer_state.json", "checksums.json"
PROGRESS = "progress."  # before the names of tensors that no optimizer has


class _Damaged(Exception):
    """Why a checkpoint cannot be gone on from, in words."""


def latest_checkpoint(
    folder: Path, wanted: Mapping[str, Tensor], processes: int, deepspeed: bool, say: Callable[[str], None]
) -> str | None:
    """The newest checkpoint that is whole; those after it are told with `say`, and deleted.

    wanted: name -> tensor of the shape that training wants. Raises UserError for a file that the system does not let us read.
    """
    passed = 0
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        try:
            _require_whole(checkpoint, wanted, processes, deepspeed, say)
        except _Damaged as damage:
            say(f"{checkpoint} is passed over and deleted: {damage}")
            shutil.rmtree(checkpoint)
            passed += 1
        else:
            return str(checkpoint)
    if passed:
        say(f"{folder} has no checkpoint that is whole; the training of this task starts anew")
    return None


def sync(checkpoint: Path) -> None:
    """Let all files of a folder reach the disk: what is written later then says that they did."""
    for file in checkpoint.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDWR)  # Windows syncs no file that was opened for reading
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def seal(checkpoint: Path) -> None:
    """Write down the checksums of a checkpoint's files, so that damage to any of them is seen."""
    sums = {name: _sha256(file) for name, file in _files(checkpoint).items()}
    write_atomically(checkpoint / CHECKSUMS, json.dumps(sums, indent=1).encode())


def _files(checkpoint: Path) -> dict[str, Path]:
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file() and file.name != CHECKSUMS)
    return {file.relative_to(checkpoint).as_posix(): file for file in files}


def _sha256(file: Path) -> str:
    with open(_readable(file), "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _require_unaltered(checkpoint: Path) -> None:
    path = checkpoint / CHECKSUMS
    if not path.exists():  # of an earlier version, or killed before it was written
        return
    try:
        sums = dict(json.loads(_readable(path).read_bytes()))
    except (ValueError, TypeError, RecursionError):
        raise _Damaged(f"its {CHECKSUMS} is truncated or altered") from None
    files = _files(checkpoint)
    for name in sorted(sums.keys() | {STATE}):
        if name not in files:
            raise _Damaged(f"it lacks {name!r}")
        if _sha256(files[name]) != sums.get(name):
            raise _Damaged(f"its {name} is altered")


def _step(checkpoint: Path) -> int:
    number = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(number[1]) if number else -1


def _require_whole(
    checkpoint: Path, wanted: Mapping[str, Tensor], processes: int, deepspeed: bool, say: Callable[[str], None]
) -> None:
    path = _readable(checkpoint / STATE)
    _require_unaltered(checkpoint)
    try:
        state = TrainerState.load_from_json(str(path))
        complete = state.global_step == _step(checkpoint) and 0 < state.global_step <= state.max_steps
    except (ValueError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise _Damaged(f"its {STATE} is truncated or of another training")
    _require_tensors(_readable(checkpoint / TENSORS), wanted)
    files = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
    others = sorted(file.name for file in checkpoint.glob("rng_state*.pth"))
    if others and not set(files) <= set(others):
        say(f"{checkpoint} was written by another number of processes: dropout draws other numbers from here on")
        files = others
    for name in files:
        _entries(checkpoint / name, "python", "numpy", "cpu")
    if deepspeed:
        files = [
            path
            for pattern in ("mp_rank_*.pt", "*optim_states.pt")
            for path in checkpoint.glob(f"global_step*/{pattern}")
        ]
        if not files:
            raise _Damaged("it lacks the files of DeepSpeed")
        for path in files:  # DeepSpeed unpickles them in full: only what needs no more than this is left to it
            with torch.serialization.safe_globals(_deepspeed_globals()):
                _entries(path)
        return
    _entries(checkpoint / "scheduler.pt", "last_epoch", "base_lrs")
    _require_optimizer(_entries(checkpoint / "optimizer.pt", "state", "param_groups"), wanted)


def _readable(path: Path) -> Path:
    try:
        with open(path, "rb"):
            return path
    except FileNotFoundError:
        raise _Damaged(f"it lacks {path.name}") from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); mend its permissions, or delete the checkpoint"
        ) from error


def _require_tensors(path: Path, wanted: Mapping[str, Tensor]) -> None:
    try:
        with safe_open(path, framework="pt") as stored:
            shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise _Damaged(f"its {path.name} is truncated or no safetensors file") from error
    for name in sorted(shapes.keys() | wanted.keys()):
        got, want = shapes.get(name), list(wanted[name].shape) if name in wanted else None
        if got != want:
            raise _Damaged(f"its tensor {name} has the shape {got} and training wants {want}")


def _entries(path: Path, *keys: str) -> dict[str, Any]:
    """The dict that torch.save wrote, with these keys."""
    try:
        with safe_globals(), warnings.catch_warnings(action="ignore"):
            content = torch.load(_readable(path), map_location="cpu", weights_only=True)
    except (_Damaged, UserError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise _Damaged(f"its {path.name} is truncated, or holds more than plain tensors") from error
    if not isinstance(content, dict) or not content.keys() >= set(keys):
        raise _Damaged(f"its {path.name} has no {', '.join(keys)}")
    return content


def _deepspeed_globals() -> list[type]:
    """What DeepSpeed's checkpoints of ZeRO-2 hold beside tensors and numbers."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]


def _require_optimizer(content: dict[str, Any], wanted: Mapping[str, Tensor]) -> None:
    try:
        count = sum(len(group["params"]) for group in content["param_groups"])
        entries = [
            {tuple(t.shape) for t in entry.values() if isinstance(t, Tensor) and t.dim()}
            for entry in content["state"].values()
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise _Damaged("its optimizer.pt is of another optimizer") from error
    shapes = Counter(tuple(tensor.shape) for name, tensor in wanted.items() if not name.startswith(PROGRESS))
    if count != shapes.total() or not Counter(shape for entry in entries for shape in entry) <= shapes:
        raise _Damaged("its optimizer.pt has other shapes than what trains")
