"""A bank: the folder that holds every task that a model was trained on.

    bank.json                           index: tasks in training order, config, base model, scores, checksums
    shared-<fingerprint>.safetensors    one set of shared tensors, used by one task or by many
    tasks/<name>.safetensors            the tensors of one task
    tasks/<name>.router-<fingerprint>.safetensors    what a router knows of the task, if anything
    README.md                           model card for the hub, which the commands write and nothing reads

`bank.json` is written last and decides what belongs to the bank, so a process killed at any moment leaves the bank as
it was or as it was to be. Files that the index does not name are leftovers; the next successful write deletes them.
One process writes to a bank at a time, a second one is refused (see lock.py); any number may read, without a lock, and
each read gives one state of the bank.
"""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lilora.errors import UserError

from .atomic import TEMPORARY, write_atomically
from .index import (
    DTYPES,
    FORMAT,
    INDEX,
    BaseModelId,
    Index,
    TaskRecord,
    TensorRecord,
    TensorRecords,
    check_name,
    check_tensors,
    fingerprint_of,
    records_of,
    size_of,
)
from .lock import LOCK, locked

Result = TypeVar("Result")


class Bank:
    """A bank folder, opened. Every change is on disk when the method returns; see the module for the files.

    The object shows the bank as of its own last read or write; each change starts from what is on disk by then.
    """

    def __init__(self, path: Path, index: Index):
        self.path = path
        self._index = index

    @classmethod
    def create(cls, path: str | Path, *, config: dict, base_model: BaseModelId) -> Self:
        """Make an empty bank in the new or empty folder `path`.

        config: any JSON object, given back as `config`; it should say what a model needs to host the tasks.

        Raises:
            UserError: the folder holds anything at all or cannot be written, or config is not JSON.
        """
        path = Path(path)
        index = Index(base_model=base_model, config=_json_object("config", config))
        with locked(path):
            # All but what a create leaves that was killed half-way.
            found = sorted({entry.name for entry in path.iterdir()} - {LOCK, INDEX + TEMPORARY})
            if found:
                what = "a bank" if INDEX in found else f"other files ({found[0]})"
                raise UserError(f"{path} already holds {what}; a new bank wants a new or empty folder")
            index.write(path)
        return cls(path, index)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open an existing bank, in its own folder or in that of its run; reads bank.json only.

        Raises:
            UserError: no bank there, its index is truncated or altered, or a newer version wrote it.
        """
        path = Path(path)
        path = path / "bank" if (path / "bank" / INDEX).exists() else path
        return cls(path, Index.read(path))

    @property
    def tasks(self) -> list[str]:
        """Task names in training order."""
        return [task.name for task in self._index.tasks]

    @property
    def ids(self) -> dict[str, int]:
        """Task name -> id; the id of a removed task is never given out again."""
        return {task.name: task.id for task in self._index.tasks}

    @property
    def routed(self) -> list[str]:
        """The tasks that a router has statistics of, in training order."""
        return [task.name for task in self._index.tasks if task.router]

    @property
    def config(self) -> dict[str, Any]:
        return copy.deepcopy(self._index.config)

    @property
    def base_model(self) -> BaseModelId:
        return self._index.base_model

    @property
    def scores(self) -> dict[str, Any]:
        return copy.deepcopy(self._index.scores)

    def task_fingerprint(self, name: str) -> str:
        """16 hex digits that change with any name, dtype, shape or byte of the task's own tensors."""
        return self._task(name).fingerprint

    def shared_fingerprint(self, name: str) -> str:
        """The same of the shared tensors that the task was added with."""
        return self._task(name).shared

    def add_task(
        self,
        name: str,
        task: dict[str, Tensor],
        shared: dict[str, Tensor],
        *,
        info: dict | None = None,
        replaces: bool = False,
    ) -> None:
        """Add a trained task at the end of the training order.

        task: for every adapted linear at module path p, `p.U` [N, S], `p.V` [S, R] and `p.fusion` [1]; layers without
            fusion leave the last out everywhere, and a plain LoRA, which is its A and B0 alone, has no tensors here.
        shared: `p.A` [R, K] and `p.B0` [N, R] of the same linears; a set the bank already has is not stored again.
        Tensors named `state.*`, in both, are a method's own, of any shape; they may be all that there is.
        Tensors are bfloat16, float16 or float32, on any device; they are stored as they are. info: any JSON object.
        replaces: from now on `shared` serves the earlier tasks too, and the sets that they were added with go.

        Raises:
            UserError: a bad or taken name, a missing or unknown tensor, a wrong shape or dtype, or a refused write;
                the bank is as before.
        """
        info = _json_object("info", info or {})
        with self.writing() as index:
            check_name(name, [other.name for other in index.tasks])
            _check_dtypes(name, "task", task)
            _check_dtypes(name, "shared", shared)
            check_tensors(name, task, shared)
            task, shared = _on_cpu(task), _on_cpu(shared)
            task_records, shared_records = records_of(task), records_of(shared)
            record = TaskRecord(
                name=name,
                id=index.next_id,
                fingerprint=fingerprint_of(task_records),
                shared=fingerprint_of(shared_records),
                info=info,
                tensors=task_records,
            )
            if not _intact(self._shared_file(record.shared), shared_records):
                write_atomically(self._shared_file(record.shared), safetensors.torch.save(shared))
            write_atomically(self._task_file(name), safetensors.torch.save(task))
            tasks, sets = [*index.tasks, record], {**index.shared, record.shared: shared_records}
            if replaces:
                tasks = [task.model_copy(update={"shared": record.shared}) for task in tasks]
                sets = {record.shared: shared_records}
            self._commit(index, next_id=index.next_id + 1, tasks=tasks, shared=sets)

    def set_config(self, config: dict, base_model: BaseModelId | None = None) -> None:
        """Replace `config`, and of a bank without tasks the base model too.

        Raises:
            UserError: config is not JSON, tasks of another base model are there, or a refused write.
        """
        with self.writing() as index:
            if base_model is not None and index.tasks:
                self.check_base_model(base_model)
            self._commit(index, config=_json_object("config", config), base_model=base_model or index.base_model)

    def load_task(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The task's tensors and the shared tensors it was added with, as given to `add_task`, on the CPU, in their own memory.

        All of them are checked before any is returned.

        Raises:
            UserError: an unknown task, or a file that is missing, truncated, altered or foreign; names file and tensor.
        """

        def load() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            record = self._task(name)
            task = _load(self._task_file(name), record.tensors)
            return task, _load(self._shared_file(record.shared), self._index.shared[record.shared])

        return self._of_one_state(load)

    def load_tasks(self) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """`load_task` of all tasks, in training order; tasks with the same shared tensors get the same objects."""

        def load() -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
            shared: dict[str, dict[str, Tensor]] = {}
            loaded = {}
            for record in self._index.tasks:
                if record.shared not in shared:
                    shared[record.shared] = _load(self._shared_file(record.shared), self._index.shared[record.shared])
                loaded[record.name] = _load(self._task_file(record.name), record.tensors), shared[record.shared]
            return loaded

        return self._of_one_state(load)

    def set_router(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Store a router's statistics of a task, in place of what is stored; it goes with the task.

        tensors: of any names and shapes, bfloat16, float16 or float32.

        Raises:
            UserError: an unknown task, no tensors, a wrong dtype, or a refused write; the bank is as before.
        """
        with self.writing() as index:
            self._task(name)
            if not tensors:
                raise UserError(f"router of task {name!r} has no tensors; pass what TaskRouter.fit returns")
            _check_dtypes(name, "router", tensors)
            tensors = _on_cpu(tensors)
            records = records_of(tensors)
            tasks = [task.model_copy(update={"router": records}) if task.name == name else task for task in index.tasks]
            write_atomically(self._router_file(name, records), safetensors.torch.save(tensors))
            self._commit(index, tasks=tasks)

    def load_routers(self) -> dict[str, dict[str, Tensor]]:
        """What `set_router` stored, of all tasks in `routed`, on the CPU.

        Raises:
            UserError: a file that is missing, truncated, altered or foreign; names file and tensor.
        """

        def load() -> dict[str, dict[str, Tensor]]:
            stored = [task for task in self._index.tasks if task.router]
            return {task.name: _load(self._router_file(task.name, task.router), task.router) for task in stored}

        return self._of_one_state(load)

    def remove_task(self, name: str) -> None:
        """Forget a task and delete the files that only it used; the other tasks keep their ids.

        Raises:
            UserError: an unknown task, or a refused write; the bank is as before.
        """
        with self.writing() as index:
            self._task(name)
            tasks = [task for task in index.tasks if task.name != name]
            used = {task.shared for task in tasks}
            self._commit(index, tasks=tasks, shared={key: value for key, value in index.shared.items() if key in used})

    def set_scores(self, scores: dict) -> None:
        """Replace the stored scores, any JSON object (write a missing cell as null, not NaN).

        Raises:
            UserError: scores is not JSON, or a refused write; the bank is as before.
        """
        scores = _json_object("scores", scores)
        with self.writing() as index:
            self._commit(index, scores=scores)

    def check_base_model(self, base_model: BaseModelId) -> None:
        """Raise UserError unless `base_model` has the weights that the tasks were trained on."""
        if base_model.fingerprint != self.base_model.fingerprint:
            raise UserError(
                f"{self.path} belongs to base model {self.base_model.id} ({self.base_model.fingerprint}) and "
                f"{base_model.id} ({base_model.fingerprint}) has other weights or another dtype; load the former as it "
                "was loaded for training"
            )

    def describe(self) -> dict[str, Any]:
        """What `lilora bank ls` prints, as JSON: tasks and shared sets with their sizes (bytes of tensor data)."""
        index = self._index
        return {
            "path": str(self.path),
            "format": FORMAT,
            "base_model": index.base_model.model_dump(),
            "config": self.config,
            "tasks": [
                {
                    "name": task.name,
                    "id": task.id,
                    "fingerprint": task.fingerprint,
                    "shared": task.shared,
                    "info": copy.deepcopy(task.info),
                    **size_of(task.tensors),
                }
                for task in index.tasks
            ],
            "shared": [{"fingerprint": key, **size_of(tensors)} for key, tensors in index.shared.items()],
            "scores": self.scores,
        }

    def _task(self, name: str) -> TaskRecord:
        for task in self._index.tasks:
            if task.name == name:
                return task
        raise UserError(f"{self.path} has no task {name!r}; it has {', '.join(self.tasks) or 'none'}")

    def _task_file(self, name: str) -> Path:
        return self.path / "tasks" / f"{name}.safetensors"

    def _router_file(self, name: str, records: TensorRecords) -> Path:
        # A name can hold no dot, so this is no other task's file.
        return self.path / "tasks" / f"{name}.router-{fingerprint_of(records)}.safetensors"

    def _shared_file(self, fingerprint: str) -> Path:
        return self.path / f"shared-{fingerprint}.safetensors"

    @contextmanager
    def writing(self) -> Iterator[Index]:
        """Be the only process that changes the bank until the block ends; the object shows what is on disk by then.

        Raises:
            UserError: another process writes to the bank; names its pid.
        """
        with locked(self.path):
            self._index = Index.read(self.path)
            yield self._index

    def _of_one_state(self, load: Callable[[], Result]) -> Result:
        """What `load` reads; anew, of the newest state, when the bank was changed while it read."""
        while True:
            try:
                return load()
            except UserError:
                before, self._index = self._index, Index.read(self.path)
                if self._index == before:
                    raise

    def _commit(self, index: Index, **changes: Any) -> None:
        index = index.model_copy(update=changes)
        index.write(self.path)
        self._index = index
        self._sweep()

    def _sweep(self) -> None:
        """Under the lock: delete the files of tasks and shared sets that the index does not name, finished or not."""
        used = {self._task_file(task.name) for task in self._index.tasks}
        used |= {self._router_file(task.name, task.router) for task in self._index.tasks if task.router}
        used |= {self._shared_file(fingerprint) for fingerprint in self._index.shared}
        for pattern in ("tasks/*.safetensors", f"shared-{'[0-9a-f]' * 16}.safetensors"):
            for file in [*self.path.glob(pattern), *self.path.glob(pattern + TEMPORARY)]:
                if file not in used:
                    with suppress(OSError):  # the change itself is done; the next write tries again
                        file.unlink()


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory with each other or with a model that trains on."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in sorted(tensors.items())
    }


def read_tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in memory of their own: what happens to the file later changes none of them.

    Raises:
        UserError: the file is missing, truncated or something else; ends with `remedy`.
    """
    try:
        return safetensors.torch.load(path.read_bytes())
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:  # the last two: dtypes that this torch lacks
        raise UserError(f"{path} is missing, truncated or no safetensors file ({error}); {remedy}") from error


def _load(path: Path, records: TensorRecords) -> dict[str, Tensor]:
    """The tensors of `path`, exactly those that `records` describes."""
    remedy = "restore the file from a copy or remove the task and train it again"
    tensors = read_tensors(path, remedy)
    for name in sorted(records.keys() | tensors.keys()):
        if name not in tensors:
            raise UserError(f"{path} lacks the tensor {name}; {remedy}")
        if name not in records:
            raise UserError(f"{path} holds the tensor {name}, which the bank never wrote there; {remedy}")
        got, want = TensorRecord.of(tensors[name]), records[name]
        if (got.dtype, got.shape) != (want.dtype, want.shape):
            raise UserError(
                f"{path}: tensor {name} is {got.dtype} {list(got.shape)} and the bank wrote {want.dtype} "
                f"{list(want.shape)}; {remedy}"
            )
        if got.sha256 != want.sha256:
            raise UserError(f"{path}: tensor {name} is altered, its checksum does not match; {remedy}")
    return {name: tensors[name] for name in records}


def _intact(path: Path, records: TensorRecords) -> bool:
    try:
        _load(path, records)
    except UserError:
        return False
    return True


def _json_object(argument: str, value: dict) -> dict[str, Any]:
    """`value` as it will be read back."""
    try:
        value = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(f"{argument} cannot be stored as JSON ({error}); pass plain numbers, strings, lists") from error
    if not isinstance(value, dict):
        raise UserError(f"{argument} must be a dict, not {type(value).__name__}; pass a dict with string keys")
    return value


def _check_dtypes(task_name: str, argument: str, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"{argument} of task {task_name!r}: tensor {name} is {tensor.dtype}; cast it to one of "
                f"{', '.join(str(dtype) for dtype in DTYPES)}"
            )
