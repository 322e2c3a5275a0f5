"""The index of a bank, bank.json: what it may hold, checked by the same rules on reading and on writing."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator
from torch import Tensor, nn

from lilora.errors import UserError
from lilora.module_names import unwrapped
from lilora.validation import first_problem
from lilora_kernels import check_task_name

from .atomic import write_atomically

FORMAT: Literal[1] = 1
INDEX = "bank.json"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DtypeName = Literal["bfloat16", "float16", "float32"]
Size = Annotated[int, Field(ge=0)]
Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
TASK_KINDS = ("U", "V", "fusion")
SHARED_KINDS = ("A", "B0")


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseModelId(Record):
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
            digest.update(bytes_of(sample))
        return cls(id=id, fingerprint=digest.hexdigest()[:16])


class TensorRecord(Record):
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
        digest = hashlib.sha256(bytes_of(tensor)).hexdigest()
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls.model_validate({"dtype": dtype, "shape": tuple(tensor.shape), "sha256": digest})


TensorRecords = dict[str, TensorRecord]
Shaped = Mapping[str, Tensor | TensorRecord]


class TaskRecord(Record):
    name: str
    id: Annotated[int, Field(ge=0)]
    fingerprint: Fingerprint
    shared: Fingerprint  # of the shared set
    info: dict[str, JsonValue]
    tensors: TensorRecords
    # Left out where there is none, as in the banks, and their checksums, of earlier versions.
    router: TensorRecords = Field(default={}, exclude_if=lambda router: not router)


class Index(Record):
    """The content of bank.json, apart from its format number and checksum."""

    base_model: BaseModelId
    config: dict[str, JsonValue]
    scores: dict[str, JsonValue] = {}
    next_id: Annotated[int, Field(ge=0)] = 0
    tasks: list[TaskRecord] = []
    shared: dict[Fingerprint, TensorRecords] = {}

    @classmethod
    def read(cls, folder: Path) -> "Index":
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
            document = Document.model_validate(data)
        except ValidationError as error:
            raise UserError(f"{path} is altered: {first_problem(error)}; restore it from a copy") from error
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
            check_name(task.name, names)
            names.append(task.name)
            if task.shared not in self.shared:
                raise UserError(f"task {task.name!r} names the shared set {task.shared}, which is missing")
            if task.fingerprint != fingerprint_of(task.tensors):
                raise UserError(f"the fingerprint of task {task.name!r} is not that of its tensors")
            check_tensors(task.name, task.tensors, self.shared[task.shared])
        for key, records in self.shared.items():
            if key != fingerprint_of(records):
                raise UserError(f"the fingerprint of the shared set {key} is not that of its tensors")
        ids = [task.id for task in self.tasks]
        if len(set(ids)) < len(ids) or max(ids, default=-1) >= self.next_id:
            raise UserError(f"the tasks' ids are {ids} and the next is {self.next_id}; each is given out once")
        if not self.base_model.id.isprintable():
            raise UserError(f"the base model's id {self.base_model.id!r} holds characters that cannot be printed")

    def write(self, folder: Path) -> None:
        self.check()
        document = Document(format=FORMAT, checksum=self.checksum(), index=self)
        write_atomically(folder / INDEX, json.dumps(document.model_dump(mode="json"), indent=1).encode())

    def checksum(self) -> str:
        return hashlib.sha256(json.dumps(self.model_dump(mode="json")).encode()).hexdigest()


class Document(Record):
    format: Literal[1]
    checksum: str
    index: Index


def bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def records_of(tensors: dict[str, Tensor]) -> TensorRecords:
    return {name: TensorRecord.of(tensor) for name, tensor in tensors.items()}


def fingerprint_of(records: TensorRecords) -> str:
    rows = [[name, record.dtype, record.shape, record.sha256] for name, record in sorted(records.items())]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def size_of(records: TensorRecords) -> dict[str, int]:
    sizes = [(math.prod(record.shape), getattr(torch, record.dtype).itemsize) for record in records.values()]
    return {"parameters": sum(count for count, _ in sizes), "bytes": sum(count * width for count, width in sizes)}


def check_name(name: str, taken: Iterable[str]) -> None:
    try:
        check_task_name(name)
    except ValueError as error:
        raise UserError(str(error)) from error
    for other in taken:
        if other.casefold() == name.casefold():  # one file on macOS and Windows
            raise UserError(f"task name {name!r} is taken by {other!r} (case is ignored); choose another or remove it")


def check_tensors(task_name: str, task: Shaped, shared: Shaped) -> None:
    given = task.keys() | shared.keys()
    task, shared = ({n: t for n, t in tensors.items() if not n.startswith("state.")} for tensors in (task, shared))
    modules = {name.rpartition(".")[0] for name in shared}
    if given and not task and not shared:
        return
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
            ndim = (1,) if name.endswith(".fusion") else (2, 3)  # 3: a matrix for each routed expert
            if len(tensor.shape) not in ndim:
                raise UserError(
                    f"{argument} of task {task_name!r}: tensor {name} has shape {list(tensor.shape)}; "
                    f"it wants {' or '.join(map(str, ndim))} dimension(s)"
                )
    for module in modules:
        b0 = tuple(shared[f"{module}.B0"].shape)
        (*experts, n, r), k = b0, shared[f"{module}.A"].shape[-1]
        shapes: dict[str, tuple[int, ...]] = {"A": (r, k)}
        if task:
            sub_rank = task[f"{module}.V"].shape[-2]
            shapes |= {"U": (n, sub_rank), "V": (sub_rank, r)} | ({"fusion": () if experts else (1,)} if fused else {})
        for kind, last in shapes.items():
            got = tuple((shared if kind in SHARED_KINDS else task)[f"{module}.{kind}"].shape)
            if got != (shape := (*experts, *last)):
                raise UserError(
                    f"task {task_name!r}: tensor {module}.{kind} has shape {list(got)} and B0 {list(b0)} "
                    f"wants {list(shape)}; pass the tensors of one layer"
                )
