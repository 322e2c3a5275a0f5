"""A bank: the folder that holds every task a model has learned.

    bank.json                           index: tasks in training order, config, base model, scores, checksums
    shared-<fingerprint>.safetensors    one set of shared tensors, used by one task or by many
    tasks/<name>.safetensors            the tensors of one task
    tasks/<name>.router-<fingerprint>.safetensors    what a router has learned of the task, if any
    README.md                           model card for the hub, which the commands write and nothing reads

`bank.json` is written last and decides what belongs to the bank, so a process killed at any moment leaves the bank as
it was or as it was to be. Files that the index does not name are leftovers; the next successful write deletes them.
One process writes to a bank at a time, a second one is refused (see io/lock.py); any number may read, without a lock, and
each read gives one state of the bank.
"""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator
from safetensors import SafetensorError
from torch import Tensor, nn

from lilora.errors import UserError
from lilora.io.atomic import TEMPORARY, write_atomically
from lilora.io.lock import LOCK, locked
from lilora.layer import unwrapped

FORMAT = 1
INDEX = "bank.json"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DtypeName = Literal["bfloat16", "float16", "float32"]
Size = Annotated[int, Field(ge=0)]
Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
TASK_KINDS = ("U", "V", "fusion")
SHARED_KINDS = ("A", "B0")

Result = TypeVar("Result")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseModelId(_Record):
    """Which frozen model the tasks of a bank were trained on.

    `id` is what the user called it (a hub id or a path) and only serves messages; `fingerprint` decides.
    """

    id: str
    fingerprint: Fingerprint

    @classmethod
    def of(cls, model: nn.Module, id: str) -> Self:
        """Fingerprint the weights of `model`, wrapped in PEFT or not, merged adapters apart.

        Hashes the sorted names, dtypes and shapes of all parameters that are no adapter's, and the first and last 64
        elements of each: cheap at any size, and any fine-tuning of the base shows. The dtype counts: the same
        checkpoint loaded in another dtype is another base.

        Raises:
            UserError: a parameter has no data (meta device or offloaded).
        """
        parameters = {
            unwrapped(name).removeprefix("base_model.model.").replace(".base_layer.", "."): parameter.detach()
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if not any(part.startswith(("lilora_", "lora_")) for part in name.split("."))
        }
        digest = hashlib.sha256()
        for name, parameter in sorted(parameters.items()):
            if parameter.is_meta:
                raise UserError(f"base model {id}: parameter {name} has no data (meta device); load the weights first")
            flat = parameter.reshape(-1)
            sample = torch.cat([flat[:64], flat[-64:]]).cpu()
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
            digest.update(_bytes(sample))
        return cls(id=id, fingerprint=digest.hexdigest()[:16])


class _TensorRecord(_Record):
    dtype: DtypeName
    shape: tuple[Size, ...]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @field_validator("shape")
    @classmethod
    def _possible(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        if math.prod(shape) >= 2**60:
            raise ValueError("more elements than any memory holds")
        return shape

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        digest = hashlib.sha256(_bytes(tensor)).hexdigest()
        return cls(dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape), sha256=digest)


_Tensors = dict[str, _TensorRecord]
_Shaped = Mapping[str, Tensor | _TensorRecord]


class _TaskRecord(_Record):
    name: str
    id: Annotated[int, Field(ge=0)]
    fingerprint: Fingerprint
    shared: Fingerprint  # of the shared set
    info: dict[str, JsonValue]
    tensors: _Tensors
    # Left out where there is none, as in the banks, and their checksums, of earlier versions.
    router: _Tensors = Field({}, exclude_if=lambda router: not router)


class _Index(_Record):
    """The content of bank.json, apart from its format number and checksum."""

    base_model: BaseModelId
    config: dict[str, JsonValue]
    scores: dict[str, JsonValue] = {}
    next_id: Annotated[int, Field(ge=0)] = 0
    tasks: list[_TaskRecord] = []
    shared: dict[Fingerprint, _Tensors] = {}

    @classmethod
    def read(cls, folder: Path) -> Self:
        path = folder / INDEX
        try:
            data = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UserError(
                f"{folder} is not a bank: it has no {INDEX}; pass the folder a training run wrote"
            ) from None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); mend the path or its permissions") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is truncated or altered ({error}); restore it from a copy") from error
        if not isinstance(data, dict) or not isinstance(data.get("format"), int):
            raise UserError(f"{path} is not the index of a bank: it has no format number; pass a bank's folder")
        if data["format"] > FORMAT:
            raise UserError(
                f"{path} has format {data['format']} and this version reads up to {FORMAT}; upgrade lilora-kernels"
            )
        try:
            document = _Document.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise UserError(f"{path} is altered: {place}: {first['msg']}; restore it from a copy") from error
        if document.checksum != document.index.checksum():
            raise UserError(f"{path} is altered: its checksum does not match; restore it from a copy")
        try:
            document.index.check()
        except UserError as error:
            raise UserError(f"{path} is no index that lilora has written: {error}") from error
        return document.index

    def check(self) -> None:
        """UserError unless names, ids, fingerprints and tensors are by the rules of writing: the checksum is everybody's."""
        names: list[str] = []
        for task in self.tasks:
            _check_name(task.name, names)
            names.append(task.name)
            if task.shared not in self.shared:
                raise UserError(f"task {task.name!r} names the shared set {task.shared}, which is missing")
            if task.fingerprint != _fingerprint(task.tensors):
                raise UserError(f"the fingerprint of task {task.name!r} is not that of its tensors")
            _check_tensors(task.name, task.tensors, self.shared[task.shared])
        for key, records in self.shared.items():
            if key != _fingerprint(records):
                raise UserError(f"the fingerprint of the shared set {key} is not that of its tensors")
        ids = [task.id for task in self.tasks]
        if len(set(ids)) < len(ids) or max(ids, default=-1) >= self.next_id:
            raise UserError(f"the tasks' ids are {ids} and the next is {self.next_id}; each is given out once")
        if not self.base_model.id.isprintable():
            raise UserError(f"the base model's id {self.base_model.id!r} holds characters that cannot be printed")

    def write(self, folder: Path) -> None:
        self.check()
        document = _Document(format=FORMAT, checksum=self.checksum(), index=self)
        write_atomically(folder / INDEX, json.dumps(document.model_dump(mode="json"), indent=1).encode())

    def checksum(self) -> str:
        return hashlib.sha256(json.dumps(self.model_dump(mode="json")).encode()).hexdigest()


class _Document(_Record):
    format: Literal[1]
    checksum: str
    index: _Index


class Bank:
    """A bank folder, opened. Every change is on disk when the method returns; see the module for the files.

    The object shows the bank as of its own last read or write; each change starts from what is on disk by then.
    """

    def __init__(self, path: Path, index: _Index):
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
        index = _Index(base_model=base_model, config=_json_object("config", config))
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
        return cls(path, _Index.read(path))

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
        """The tasks that a router has learned, in training order."""
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
        """Add a learned task at the end of the training order.

        task: for every adapted linear at module path p, `p.U` [N, S], `p.V` [S, R] and `p.fusion` [1]; layers without
            fusion leave the last out everywhere, and a plain LoRA, which is its A and B0 alone, has no tensors here.
        shared: `p.A` [R, K] and `p.B0` [N, R] of the same linears; a set the bank already has is not stored again.
            Tensors named `state.*` are a method's own, of any shape.
        Tensors are bfloat16, float16 or float32, on any device; they are stored as they are. info: any JSON object.
        replaces: from now on `shared` serves the earlier tasks too, and the sets that they were added with go.

        Raises:
            UserError: a bad or taken name, a missing or unknown tensor, a wrong shape or dtype, or a refused write;
                the bank is as before.
        """
        info = _json_object("info", info or {})
        with self.writing() as index:
            _check_name(name, [other.name for other in index.tasks])
            _check_dtypes(name, "task", task)
            _check_dtypes(name, "shared", shared)
            _check_tensors(name, task, shared)
            task, shared = _on_cpu(task), _on_cpu(shared)
            task_records, shared_records = _records(task), _records(shared)
            record = _TaskRecord(
                name=name,
                id=index.next_id,
                fingerprint=_fingerprint(task_records),
                shared=_fingerprint(shared_records),
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
        """Store what a router has learned of a task, in place of what is stored; it goes with the task.

        tensors: of any names and shapes, bfloat16, float16 or float32.

        Raises:
            UserError: an unknown task, no tensors, a wrong dtype, or a refused write; the bank is as before.
        """
        with self.writing() as index:
            self._task(name)
            if not tensors:
                raise UserError(f"router of task {name!r} has no tensors; pass what TaskRouter.learn gives")
            _check_dtypes(name, "router", tensors)
            tensors = _on_cpu(tensors)
            records = _records(tensors)
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
                    **_size(task.tensors),
                }
                for task in index.tasks
            ],
            "shared": [{"fingerprint": key, **_size(tensors)} for key, tensors in index.shared.items()],
            "scores": self.scores,
        }

    def _task(self, name: str) -> _TaskRecord:
        for task in self._index.tasks:
            if task.name == name:
                return task
        raise UserError(f"{self.path} has no task {name!r}; it has {', '.join(self.tasks) or 'none'}")

    def _task_file(self, name: str) -> Path:
        return self.path / "tasks" / f"{name}.safetensors"

    def _router_file(self, name: str, records: _Tensors) -> Path:
        # A name can hold no dot, so this is no other task's file.
        return self.path / "tasks" / f"{name}.router-{_fingerprint(records)}.safetensors"

    def _shared_file(self, fingerprint: str) -> Path:
        return self.path / f"shared-{fingerprint}.safetensors"

    @contextmanager
    def writing(self) -> Iterator[_Index]:
        """Be the only process that changes the bank until the block ends; the object shows what is on disk by then.

        Raises:
            UserError: another process writes to the bank; names its pid.
        """
        with locked(self.path):
            self._index = _Index.read(self.path)
            yield self._index

    def _of_one_state(self, load: Callable[[], Result]) -> Result:
        """What `load` reads; anew, of the newest state, when the bank was changed while it read."""
        while True:
            try:
                return load()
            except UserError:
                before, self._index = self._index, _Index.read(self.path)
                if self._index == before:
                    raise

    def _commit(self, index: _Index, **changes: Any) -> None:
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


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory with each other or with a model that trains on."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in sorted(tensors.items())
    }


def _records(tensors: dict[str, Tensor]) -> _Tensors:
    return {name: _TensorRecord.of(tensor) for name, tensor in tensors.items()}


def _fingerprint(records: _Tensors) -> str:
    rows = [[name, record.dtype, record.shape, record.sha256] for name, record in sorted(records.items())]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _size(records: _Tensors) -> dict[str, int]:
    sizes = [(math.prod(record.shape), getattr(torch, record.dtype).itemsize) for record in records.values()]
    return {"parameters": sum(count for count, _ in sizes), "bytes": sum(count * width for count, width in sizes)}


def read_tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in memory of their own: what happens to the file later changes none of them.

    Raises:
        UserError: the file is missing, truncated or something else; ends with `remedy`.
    """
    try:
        return safetensors.torch.load(path.read_bytes())
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:  # the last two: dtypes that this torch lacks
        raise UserError(f"{path} is missing, truncated or no safetensors file ({error}); {remedy}") from error


def _load(path: Path, records: _Tensors) -> dict[str, Tensor]:
    """The tensors of `path`, exactly those that `records` describes."""
    remedy = "restore the file from a copy or remove the task and train it again"
    tensors = read_tensors(path, remedy)
    for name in sorted(records.keys() | tensors.keys()):
        if name not in tensors:
            raise UserError(f"{path} lacks the tensor {name}; {remedy}")
        if name not in records:
            raise UserError(f"{path} holds the tensor {name}, which the bank never wrote there; {remedy}")
        got, want = _TensorRecord.of(tensors[name]), records[name]
        if (got.dtype, got.shape) != (want.dtype, want.shape):
            raise UserError(
                f"{path}: tensor {name} is {got.dtype} {list(got.shape)} and the bank wrote {want.dtype} "
                f"{list(want.shape)}; {remedy}"
            )
        if got.sha256 != want.sha256:
            raise UserError(f"{path}: tensor {name} is altered, its checksum does not match; {remedy}")
    return {name: tensors[name] for name in records}


def _intact(path: Path, records: _Tensors) -> bool:
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


def _check_name(name: str, taken: Iterable[str]) -> None:
    from lilora_kernels.linear import check_task_name

    try:
        check_task_name(name)
    except ValueError as error:
        raise UserError(str(error)) from error
    for other in taken:
        if other.casefold() == name.casefold():  # one file on macOS and Windows
            raise UserError(f"task name {name!r} is taken by {other!r} (case is ignored); choose another or remove it")


def _check_dtypes(task_name: str, argument: str, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"{argument} of task {task_name!r}: tensor {name} is {tensor.dtype}; cast it to one of "
                f"{', '.join(str(dtype) for dtype in DTYPES)}"
            )


def _check_tensors(task_name: str, task: _Shaped, shared: _Shaped) -> None:
    shared = {name: tensor for name, tensor in shared.items() if not name.startswith("state.")}
    modules = {name.rpartition(".")[0] for name in shared}
    if not modules:
        raise UserError(f"task {task_name!r} has no shared tensors; pass `<module path>.A` and `.B0` of every linear")
    fused = any(name.endswith(".fusion") for name in task)
    task_kinds = (TASK_KINDS if fused else TASK_KINDS[:-1]) if task else ()
    for argument, tensors, kinds in (("task", task, task_kinds), ("shared", shared, SHARED_KINDS)):
        wanted = {f"{module}.{kind}" for module in modules for kind in kinds}
        for name in sorted(wanted ^ tensors.keys()):
            problem = "lacks the tensor" if name in wanted else "holds the unknown tensor"
            raise UserError(
                f"{argument} of task {task_name!r} {problem} {name}; pass exactly {', '.join(kinds)} for every linear"
            )
        for name, tensor in tensors.items():
            ndim = 1 if name.endswith(".fusion") else 2
            if len(tensor.shape) != ndim:
                raise UserError(
                    f"{argument} of task {task_name!r}: tensor {name} has shape {list(tensor.shape)}; "
                    f"it wants {ndim} dimension(s)"
                )
    for module in modules:
        (n, r), k = shared[f"{module}.B0"].shape, shared[f"{module}.A"].shape[1]
        wanted = {"A": (r, k)}
        if task:
            sub_rank = task[f"{module}.V"].shape[0]
            wanted |= {"U": (n, sub_rank), "V": (sub_rank, r)} | ({"fusion": (1,)} if fused else {})
        for kind, shape in wanted.items():
            got = tuple((shared if kind in SHARED_KINDS else task)[f"{module}.{kind}"].shape)
            if got != shape:
                raise UserError(
                    f"task {task_name!r}: tensor {module}.{kind} has shape {list(got)} and B0 {[n, r]} "
                    f"wants {list(shape)}; pass the tensors of one layer"
                )
