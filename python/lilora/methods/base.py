"""What a continual-learning method is to the trainer, the evaluation and the bank."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lilora.bank.bank import Bank
from lilora.bank.export import PlainLoRA
from lilora.bank.index import bytes_of
from lilora.errors import UserError
from lilora.registry import Registry
from lilora_kernels.layers.experts import ExpertWeight

from .settings import MethodSettings

Tensors = dict[str, Tensor]
Inputs = dict[str, Tensor]  # one batch, as the model takes it


def digest(tensors: Tensors) -> str:
    """64 hex digits over names and bytes."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hashed.update(name.encode())
        hashed.update(bytes_of(tensor.detach().cpu()))
    return hashed.hexdigest()


class Batches(Protocol):
    """Training batches of the stage's task: at most `samples` in all, `size` in each (None: as many as in training)."""

    def __call__(self, samples: int, size: int | None = None) -> Iterator[Inputs]: ...


@dataclass(frozen=True)
class Stage:
    """One training on the samples of `task`; `learning_rate` and `epochs` are shares of the run's.

    replayed: the share of every step's samples that are of earlier tasks, out of `memory` training samples of each.
    """

    name: str
    task: str
    learning_rate: float = 1.0
    epochs: float = 1.0
    replayed: float = 0.0
    memory: int = 0


class Method(ABC):
    """Trains tasks one after another on one frozen base model. The first sentence says it to users of the command.

    `settings` is the JSON-able description from which the same method is built again; it goes into the bank.
    """

    name: str
    mixed_batches = False  # whether one batch may hold samples of several tasks
    trains_on: Literal["task", "earlier", "all", "nothing"] = (
        "task"  # whose samples: also earlier tasks', all of the run's
    )
    sees_tasks = False  # whether `loss` gets the number of each sample's task, inputs["task_ids"] [B], and takes it out
    needs_task = True  # whether inference must be given the task
    one_state = False  # whether the newest tensors serve all tasks, so that a bank need not keep the older ones
    one_process_reason: str | None = None  # why several processes cannot train a task together; None if they can
    sharded_parameters = False  # whether training reads parameters in the forward alone, so that they may be sharded
    answers_only = False  # whether the loss is made of the tokens of answers, so that images cannot be classified
    one_basis: bool | None = None  # of tasks that the bank holds as A and B0: whether these are one basis that moves on
    peft_adapters = False  # whether a task is an adapter of PEFT's type LILORA, too
    no_lora = ""  # why a task is no plain LoRA, if it is none
    settings_type: type[MethodSettings]
    presets: dict[str, dict[str, Any]] = {}  # noqa: RUF012 - settings by preset name; the first is the default
    train_defaults: dict[str, float] = {}  # noqa: RUF012 - of TrainSettings, where the method wants them otherwise
    train_presets: dict[str, dict[str, float]] = {}  # noqa: RUF012 - the same by preset name, where a preset does

    seed = 0  # of the run that trains it: for what is drawn once for all tasks

    def __init__(self, base: nn.Module, settings: dict[str, Any]) -> None:
        self.base = base
        self.settings = settings
        self.model: nn.Module | None = None
        self.tasks: list[str] = []

    @classmethod
    def read_settings(cls, settings: dict[str, Any]) -> Any:
        """The settings with their types; UserError in one sentence for the first that is unknown, missing or out of range."""
        return cls.settings_type.read(cls.name, settings)

    @abstractmethod
    def add(self, task: str) -> None:
        """Make room for a task: new parameters, initialised from torch's generator."""

    @abstractmethod
    def activate(self, task: str, train: bool) -> None:
        """Let the model's forward without task ids be that of the task; with `train` its parameters require gradients."""

    @abstractmethod
    def tensors(self, task: str) -> tuple[Tensors, Tensors]:
        """(the task's own tensors, the shared ones), named as the bank names them: the model's own memory."""

    @abstractmethod
    def ranks(self) -> int:
        """Ranks that inference keeps for each linear, beside the base model, for the tasks so far."""

    @classmethod
    def inference_parameters(cls, settings: Any, linears: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
        """(parameters that inference keeps for all tasks, and for each) for adapted linears [N, K]; None if that is no constant.

        settings: as `read_settings` returns them.
        """
        return None

    def parameters(self) -> int:
        """Parameters that inference keeps beside the base model for the tasks so far."""
        stored: dict[int, Tensor] = {}
        for task in self.tasks:
            for tensors in self.tensors(task):
                stored |= {id(tensor): tensor for tensor in tensors.values()}
        return sum(tensor.numel() for tensor in stored.values())

    # --- training ---------------------------------------------------------------------------------------------------

    def stages(self, task: str) -> list[Stage]:
        """What is trained, in order, for a new task; none: the task is added as it is."""
        return [Stage("learn", task)]

    def begin(self, stage: Stage, batches: Batches) -> None:
        """Make the model ready for a stage; nothing random but from torch's generator."""
        self.add(stage.task)
        self.activate(stage.task, train=True)

    def loss(self, inputs: Inputs, cross_entropy: Callable[[], tuple[Tensor, Any]], grad_accum_weight: float) -> Tensor:
        """The loss of one batch of the stage.

        cross_entropy() runs the model: (its loss, normalised over the batches of a step, and its outputs). A term that is
        a mean over this batch alone counts `grad_accum_weight`, 1 / batches per step.
        """
        return cross_entropy()[0]

    def after_step(self, step: int, steps: int, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027 - as `end`
        """After the optimizer's step number `step` of `steps` in the stage, without autograd; gradients are still there.

        A method that changes parameters here gives a `one_process_reason`. What it keeps from step to step is `progress`.
        """

    def end(self, stage: Stage, batches: Batches) -> None:  # noqa: B027 - most methods have nothing to do
        """After a stage's last step."""

    def progress(self) -> Tensors:
        """What a stage changes besides the parameters that require gradients: the very tensors, for checkpoints."""
        return {}

    # --- the bank ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def restore(self, tasks: dict[str, tuple[Tensors, Tensors]]) -> None:
        """Add the tasks of a bank, in their order, with the values stored there; the last one's shared values win.

        UserError for other names or shapes than the settings and the base model make.
        """
        for task, stored in tasks.items():
            self.add(task)
            for own, values in zip(self.tensors(task), stored, strict=True):
                for name in sorted(own.keys() | values.keys()):
                    got, want = (list(t[name].shape) if name in t else "missing" for t in (values, own))
                    if got != want:
                        raise UserError(
                            f"tensor {name} of task {task!r} is {got} in the bank and {want} in the model; give the settings "
                            "and the base model that it was trained with"
                        )
                for name, value in values.items():
                    own[name].copy_(value)

    @classmethod
    def as_lora(cls, bank: Bank, task: str) -> PlainLoRA:
        """What `restore` makes of a task, as a plain LoRA on the base model; UserError if the method's tasks are none."""
        raise UserError(f"a task of {cls.name} is no plain LoRA: {cls.no_lora}")

    @classmethod
    @torch.no_grad()
    def merge(cls, base: nn.Module, bank: Bank, task: str) -> None:
        """Make the base model what `restore` makes of a task, by its weights alone; UserError if that is not possible."""
        lora = cls.as_lora(bank, task)
        for path, (a, b) in lora.factors.items():
            if a.dim() == 2:
                add_to_weight(base.get_submodule(path), a, b, lora.scaling)
                continue
            experts, _, name = path.rpartition(".")
            weight = ExpertWeight(base.get_submodule(experts), name)
            for e in range(weight.experts):
                add_to_matrix(weight.matrices[e], a[e], b[e], lora.scaling)

    def fingerprints(self, tasks: list[str]) -> dict[str, str]:
        """16 hex digits per task that identify its function: equal digits, equal outputs for the same batch."""
        known: dict[tuple[int, ...], str] = {}  # tasks that share tensors have them hashed once

        def digest_once(tensors: Tensors) -> str:
            key = tuple(tensor.data_ptr() for tensor in tensors.values())
            if key not in known:
                known[key] = digest(tensors)
            return known[key]

        settings = json.dumps(self.settings, sort_keys=True)
        parts = {task: (settings, *map(digest_once, self.tensors(task))) for task in tasks}
        return {task: hashlib.sha256("".join(part).encode()).hexdigest()[:16] for task, part in parts.items()}


def lora_parameters(r: int, linears: Sequence[tuple[int, int]]) -> int:
    """Of A [r, K] and B [N, r] of linears [N, K]."""
    return sum(r * (n + k) for n, k in linears)


METHODS: Registry[type[Method]] = Registry("method", "lilora.methods")


def register_method(method: type[Method]) -> type[Method]:
    """Class decorator: the command, banks and reports know the method by its `name` from then on.

    A package of its own names the module that does so in the entry-point group `lilora.methods`, under the method's name.

    Raises:
        UserError: another method has the name.
    """
    return METHODS.register(method.name, method)


def add_to_weight(linear: nn.Module, a: Tensor, b: Tensor, scale: float) -> None:
    """W += scale * b a for a [n, K] and b [N, n], in fp32 at least and rounded once; only for a plain nn.Linear."""
    if type(linear) is not nn.Linear:
        raise UserError(
            f"merging wants a plain nn.Linear base, not a {type(linear).__name__}; load the model unquantised"
        )
    add_to_matrix(linear.weight, a, b, scale)


@torch.no_grad()
def add_to_matrix(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = (factor.to(weight.device, wide) for factor in (a, b))
    weight.copy_(torch.addmm(weight.to(wide), b, a, alpha=scale))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards the model is in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def next_labels(inputs: Inputs) -> Tensor:
    """The token that each logit of a training batch predicts, -100 for none of an answer: [B, L], or [B, K] if it asks for K."""
    if "shift_labels" in inputs:
        return inputs["shift_labels"]
    return nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)


def answer_positions(inputs: Inputs) -> Tensor:
    """Where the logits of a training batch predict a token of an answer: [B, L] bool, or [B, K] if it asks for K of them."""
    return next_labels(inputs) != -100


def without_labels(inputs: Inputs) -> Inputs:
    """The batch for a forward without a loss, with the same logits."""
    return {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
