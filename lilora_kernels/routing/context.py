"""The context of a running forward: which task each sample of its batch belongs to.

What holds at all times:
- The layers of a model share one `Tasks`; an id belongs to one name until that is deleted, and then to none, but in a
  frozen model whose ids are all given.
- Every forward of an attached model runs in a `BatchContext`. Contexts belong to the thread or asyncio task that entered
  them; a layer sees the innermost one of its own model.
- Factors are read when a layer runs, so no write to a parameter is missed. Only a generation keeps the stacks that its
  first step made, and a frozen model has one copy, of which its parameters are windows.
- A backward that would recompute a layer without the context of its forward raises.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import local

import torch
from torch import Tensor, nn

from ..offloading import offloading
from .task_names import TaskIds, TaskNames
from .vision_tokens import VisionTokens, contents, of_equal_size, vision_tokens_of_batch

SET_IN_BETWEEN = (
    "the active task was set between a forward and its backward, or adapters were disabled; do it after the backward, or "
    "train several tasks together with set_task(*names) and task_ids"
)
# Where a layer lies: below the decoder, ahead of it, or among experts that see rows which a router gathered.
TEXT, AHEAD, GATHERED = "text", "ahead", "gathered"


@dataclass(eq=False)
class BatchContext:
    """What one forward's batch says to the adapted layers.

    task: [B] int32, -1 for samples without an adapter, or [B, L], one for each token; None for the active task. ids: its
    values, one behind the other, where the host knows them. length: tokens per sample where text layers see flattened [B
    * length, K] rows. vision_tokens: what explains the rows ahead of the language model, see vision_tokens.py: image
    tokens of each sample (or tiles) of images of one size, as a tensor [B] inside a compiled graph, where the host does
    not see them; unknown: why not. plain: every input has one row for each sample; others: the names of those that are no
    text. of_rows: the ids were given to a layer, with its x. generating: the context is that of a whole generation;
    repeats: how often it may repeat each sample, None for any number.
    """

    task: Tensor | None
    length: int | None = None
    vision_tokens: VisionTokens | list[int] | Tensor | None = None
    ids: list[int] | None = None
    generating: bool = False
    repeats: int | None = None
    of_rows: bool = False
    plain: bool = False
    others: str = "inputs that are not known"
    unknown: str | None = None
    tasks: "Tasks | None" = field(default=None, repr=False)
    stacks: dict = field(default_factory=dict, repr=False)  # of a generation: what each layer's tasks were stacked to
    _rows: dict[tuple, Tensor] = field(default_factory=dict, repr=False)
    _chosen: dict[tuple, tuple] = field(default_factory=dict, repr=False)
    _repeated: dict[int, "BatchContext"] = field(default_factory=dict, repr=False)
    _ran: set[str] | None = field(default=None, repr=False)  # of one forward: the layers ahead that ran in it

    @property
    def samples(self) -> int:
        return self.task.shape[0]

    # --- which task a row belongs to --------------------------------------------------------------------------------

    def rows(
        self, x: Tensor, place: str | None, whose: tuple[bool, ...] | None = None, path: str = "a layer"
    ) -> Tensor:
        """The task of each row of x, [M] int32 on its device, or its position by `chosen(*whose)`.

        place: as `placement.places` says. path: the layer's, for the error. ValueError when nothing explains the rows.
        """
        if torch.compiler.is_compiling():
            of = self.task if whose is None else self.chosen(*whose)[1]
            return self._resolve(x, place, of, path).to(x.device).contiguous()
        if place == AHEAD:
            self._expect_once(path)
        # Tensors made in inference mode could not be saved for a later backward.
        changes = None if whose is None else self.tasks.changes
        key = torch.is_inference_mode_enabled(), whose, changes, place, x.device, x.shape[:-1]
        if (rows := self._rows.get(key)) is None:
            of = self.task if whose is None else self.chosen(*whose)[1]
            rows = self._resolve(x, place, of, path).to(x.device).contiguous()  # of one sample it is an expanded view
            on_host = of if of.is_cpu else getattr(of, "on_host", None)
            if on_host is not None:  # plans made of library products want to know where which task's rows lie
                rows.layouts = []
                if not rows.is_cpu:
                    rows.on_host = self._resolve(x, place, on_host, path)
            self._rows[key] = rows
        return rows

    def ids_of(self, x: Tensor, place: str | None, path: str) -> list[int]:
        """The id of each x[i], for a context whose ids the host knows; ValueError where rows of x[i] are of several tasks."""
        if self.one_task:
            return [self.ids[0]] * len(x)
        if place == AHEAD:
            self._expect_once(path)
        of = torch.tensor(self.ids, dtype=torch.int32, device="cpu").view(self.task.shape)
        rows = self._resolve(x, place, of, path).view(len(x), -1)
        if not torch.equal(rows, rows[:, :1].expand_as(rows)):
            raise ValueError(f"{path} sees rows of several tasks together; pass batches of one task")
        return rows[:, 0].tolist()

    def _resolve(self, x: Tensor, place: str | None, of: Tensor, path: str) -> Tensor:
        if self.one_task:
            return of.flatten()[:1].expand(x.shape[:-1].numel())
        if not self.of_rows and self.tasks is not None and self.tasks.reordered is not None:
            raise ValueError(
                f"{path} sees {list(x.shape[:-1])} rows, and nothing tells whose they are: {self.tasks.reordered}; pass batches "
                "of one task"
            )
        if of.dim() == 2:
            return self.token_rows(x, place, of, path)
        if place == GATHERED:
            raise ValueError(
                f"{path} sees {list(x.shape[:-1])} rows that a router gathered, and nothing tells whose they are; adapt dense "
                "layers, shared experts or attention, or pass batches of one task"
            )
        if place is None and not self.plain:
            raise ValueError(
                f"{path} is not below the model's decoder, and nothing tells whose the {list(x.shape[:-1])} rows are that it "
                f"sees of {self.others}; adapt layers of the decoder only, or pass batches of one task"
            )
        if place == AHEAD and not self.plain:
            return self.vision_rows(x, of, path)
        return self.text_rows(x, of, path)

    @property
    def one_task(self) -> bool:
        return is_one_task(self.task, self.ids)

    def _expect_once(self, path: str) -> None:
        """ValueError for a layer that sees the images of a batch one by one: whose each is cannot be told."""
        if self._ran is None or self.one_task or self.plain or torch._C._current_graph_task_id() != -1:
            return
        if path in self._ran:
            raise ValueError(
                f"{path} runs more than once in a forward, so each time it sees a part of the batch's images, and nothing "
                "tells whose; adapt layers of the decoder only, or pass batches of one task"
            )
        self._ran.add(path)

    def token_rows(self, x: Tensor, place: str | None, of: Tensor, path: str) -> Tensor:
        """For each row of x [B, L, K] or [B * L, K] the one of its token -> [M]."""
        shape = x.shape[:-1]
        if not (place == TEXT or (place is None and self.plain)) or shape not in (of.shape, (of.numel(),)):
            raise ValueError(
                f"{path} sees {list(shape)} rows, and task_ids are given for {list(of.shape)} tokens; adapt layers that see each "
                "token once, or pass one id for each sample"
            )
        return of.reshape(-1)

    def text_rows(self, x: Tensor, of: Tensor, path: str) -> Tensor:
        """For each row of x [B, L, K] (or [B, K], or flattened [B * length, K]) -> [M]."""
        samples = of.shape[0]
        if x.dim() >= 2 and x.shape[0] == samples:  # of pooled samples, and in a step of a generation, one row each
            per_sample = x.shape[1:-1].numel()
        elif x.dim() == 2 and self.length is not None and x.shape[0] == samples * self.length:
            per_sample = self.length
        else:
            tokens = "" if self.length is None else f" of {self.length} tokens"
            raise ValueError(
                f"{path} sees {list(x.shape[:-1])} rows, but the route has {samples} samples{tokens}; "
                "pass one task id per sample of the batch"
            )
        return of.unsqueeze(1).expand(samples, per_sample).reshape(-1)

    def vision_rows(self, x: Tensor, of: Tensor, path: str) -> Tensor:
        """For each row of x [images, patches, K] or [sum of patches, K], packed sample by sample -> [M]."""
        shape, tokens = list(x.shape[:-1]), self.vision_tokens
        if tokens is None:
            why = self.unknown or (
                "the route does not know how many image tokens each sample has; pass input_ids with the images, or "
                "route(..., vision_tokens=...)"
            )
            raise ValueError(f"{path}, ahead of the language model, sees {shape} rows, but {why}")
        if isinstance(tokens, Tensor):
            return self._vision_rows_in_graph(x, of)
        counts = tokens.of(shape) if isinstance(tokens, VisionTokens) else of_equal_size(tokens, shape)
        if counts is None:
            known = tokens if isinstance(tokens, list) else tokens.packed if tokens.images is None else tokens.images
            by_images = isinstance(tokens, VisionTokens) and known is tokens.images
            what = "images or tiles" if by_images else "image tokens or tiles"
            raise ValueError(
                f"{path}, ahead of the language model, sees {shape} rows, which {known} {what} (in all {sum(known)}) in "
                f"{len(known)} samples do not explain; check the images of the batch, adapt layers of the decoder only, or "
                "pass batches of one task"
            )
        repeats = torch.tensor(counts, device=of.device)
        return of.repeat_interleave(repeats, output_size=x.shape[:-1].numel())

    def _vision_rows_in_graph(self, x: Tensor, of: Tensor) -> Tensor:
        """As `vision_tokens.of_equal_size`, where an error has to wait for the device."""
        rows, images, tokens = x.shape[:-1].numel(), x.shape[0], self.vision_tokens.to(x.device)
        total = tokens.sum().clamp(min=1)  # no image tokens explain no rows: the last end is 0 then
        explained = rows % total == 0
        if x.dim() > 2 and images > 1:
            explained = (total % images == 0) & (tokens % (total // images).clamp(min=1) == 0).all()
        ends = tokens.cumsum(0) * rows // total
        torch._assert_async(
            explained & (ends[-1] == rows),
            f"the image tokens of the batch do not explain the {rows} rows that a layer ahead of the language model sees; "
            "check the images of the batch",
        )
        sample = torch.bucketize(torch.arange(rows, device=x.device), ends, right=True)
        return of.to(x.device)[sample]

    # --- whose factors a layer needs --------------------------------------------------------------------------------

    def chosen(self, trains: bool, training: bool, frozen: bool) -> tuple[tuple[str, ...], Tensor]:
        """(tasks whose factors a layer stacks, position [B] int32 of each sample's task among them, -1 for none).

        These are the tasks of the batch, as far as the host knows them, and, where the active ones want gradients (`trains`),
        these too: one that is absent gets zeros. Layers in training mode then take no others: ValueError for their ids.
        `frozen`: a layer has the stacks of all tasks, in which a position is the id.
        """
        if torch.compiler.is_compiling():
            return self._choose(trains, training, frozen, None)  # a graph must not depend on the values of ids
        key = torch.is_inference_mode_enabled(), trains, training, frozen, self.tasks.changes
        if key not in self._chosen:
            self.require_known()
            self._chosen[key] = self._choose(trains, training, frozen, self.ids)
        return self._chosen[key]

    def require_known(self) -> None:
        """ValueError if a task of the batch was deleted since its first layer ran, its id perhaps given to another."""
        names = tuple(None if i < 0 else self.tasks.names[i] for i in self.ids or ())
        first = self._chosen.setdefault(("names",), names)
        for i, name, before in zip(self.ids or (), names, first, strict=True):
            if i >= 0 and (name is None or name != before):
                raise ValueError(
                    f"the task with the id {i} was deleted, but a sample of the running batch belongs to it"
                )

    def _choose(
        self, trains: bool, training: bool, frozen: bool, ids: list[int] | None
    ) -> tuple[tuple[str, ...], Tensor]:
        tasks = self.tasks
        if ids is None:
            if frozen:  # a graph must not depend on the names either
                return (), tasks.slots(self.task)
            return tasks.active if trains and training else tasks.known, tasks.positions(self.task, trains and training)
        if frozen:
            names = ()
        elif trains and training:
            tasks.require_active(ids)
            names = tasks.active
        else:  # In the order of the batch: factors of its runs of rows then lie side by side.
            names = tuple(dict.fromkeys([tasks.names[i] for i in ids if i >= 0] + list(tasks.active if trains else ())))
        position = {tasks.id_of(name): at for at, name in enumerate(names)}
        on_host = torch.tensor(ids if frozen else [position.get(i, -1) for i in ids], dtype=torch.int32, device="cpu")
        on_host = on_host.view(self.task.shape)
        # A graph under capture can copy nothing from the host; ids that the host knows of a device were copied there before.
        positions = self.task.view_as(self.task) if frozen and not self.task.is_cpu else on_host.to(self.task.device)
        if positions is not on_host:
            positions.on_host = on_host
        return names, positions

    def of_batch(self, samples: int | None, length: int | None, inputs: dict) -> "BatchContext":
        """The context of a forward inside this one, whose batch has so many samples (more in a generation with beams).

        inputs: what `Tasks.explained` says of it; nothing where all samples are of one task.
        """
        base = self
        if torch.compiler.is_compiling():  # a graph must not depend on values that the host knows of this batch alone
            repeats = 1 if samples is None or not self.generating else samples // self.samples
            task = self.task.repeat_interleave(repeats, 0)
            return BatchContext(task, self.length if length is None else length, **inputs, tasks=self.tasks)
        if self.generating and samples not in (None, self.samples):
            base = self._repeated.get(samples) or self._repeat(samples)
            self._repeated[samples] = base
        if inputs.get("vision_tokens") is None and inputs.get("unknown") is None:
            inputs = inputs | {"vision_tokens": base.vision_tokens, "unknown": base.unknown}
        return BatchContext(
            base.task, self.length if length is None else length, **inputs, ids=base.ids, generating=self.generating,
            tasks=self.tasks, stacks=self.stacks if self.generating else {}, _chosen=base._chosen, _ran=set(),
        )  # fmt: skip

    def require_samples(self, samples: int) -> None:
        """ValueError unless the batch of a forward inside this one has so many samples, or in a generation a multiple."""
        if self.task.dim() == 2 and (samples != self.samples or self.generating):
            raise ValueError(
                f"task_ids has the shape {list(self.task.shape)}, one id for each token, and this batch has {samples} samples"
                + (" of a generation, whose tokens are not there yet" if self.generating else "")
                + "; give one id for each sample"
            )
        if samples != self.samples and not (self.generating and self.samples and samples % self.samples == 0):
            raise ValueError(
                f"task_ids has the shape [{self.samples}]; it must be [{samples}], one id per sample of the batch"
            )

    def _repeat(self, samples: int) -> "BatchContext":
        """Of beams or returned sequences: every sample of the prompt several times, one behind the other."""
        if self.repeats is not None and samples != self.samples * self.repeats and not self.one_task:
            raise ValueError(
                f"a step of this generation, which has a guidance_scale, has {samples} samples, and nothing tells whose they are "
                f"beside the {self.samples} of its task_ids; pass batches of one task"
            )
        times = samples // self.samples

        def each(values):
            return [value for value in values for _ in range(times)] if isinstance(values, list) else values

        tokens = self.vision_tokens
        tokens = VisionTokens(*map(each, tokens)) if isinstance(tokens, VisionTokens) else each(tokens)
        return BatchContext(
            self.task.repeat_interleave(times), self.length, tokens, each(self.ids), plain=self.plain,
            others=self.others, unknown=self.unknown, tasks=self.tasks,
        )  # fmt: skip


# The contexts entered and not left, the innermost last: of a thread or an asyncio task, and, as far as a thread alone can
# tell, for compiled code, which cannot read the first.
_entered: ContextVar[tuple[BatchContext, ...]] = ContextVar("lilora_contexts", default=())


class _Compiled(local):
    def __init__(self) -> None:  # in every thread
        self.contexts: tuple[BatchContext, ...] = ()


_compiled = _Compiled()


def without(entered: tuple[BatchContext, ...], context: BatchContext) -> tuple[BatchContext, ...]:
    """The contexts but for the last entry of this one."""
    at = next((i for i in reversed(range(len(entered))) if entered[i] is context), len(entered))
    return entered[:at] + entered[at + 1 :]


class Tasks(TaskNames):
    """What all adapted layers of one model share: the names of its tasks, and the context of its running forward."""

    def __init__(self) -> None:
        super().__init__()
        self.reordered: str | None = None  # why nothing tells whose a layer's rows are: see `placement.reordered`
        self.packed = False  # whether a layer is not below the decoder, so that inputs other than tokens matter
        self.reached = self.looked = False  # whether a layer ran; whether it was looked for layers that did not
        self.arguments: tuple[str, ...] = ()  # of the model's forward
        self.main = "input_ids"  # the one of them that has a row for each sample
        self.misspelt: tuple[str, ...] = ()  # what is none of them, but nearly task_ids
        self.opened = 0  # `route` blocks that are open, in whatever thread
        self.seen: tuple = ()  # `activation` at the last forward without task ids
        self.routed = False  # whether any forward that can be recomputed had task ids

    def __getstate__(self) -> dict:
        return self.__dict__ | {"opened": 0}  # no route is open on a copy

    def example(self, x: Tensor, teacher: bool = False) -> BatchContext:
        """The context of a forward of which a layer sees x [samples, rows, K]."""
        return BatchContext(None)

    # --- the running forward ----------------------------------------------------------------------------------------

    def context_of(self, model: nn.Module, task_ids: TaskIds | None, args: tuple, kwargs: dict) -> BatchContext:
        """The context of a forward or generation of `model` with these arguments: by its task ids, or those around it."""
        outer = self.current
        if task_ids is None and outer is None:
            if self.opened:
                raise RuntimeError(
                    "route(model, ...) is open in another thread or asyncio task, and this one has none; pass task_ids, or "
                    "open a route here"
                )
            return BatchContext(None)
        if task_ids is None and outer.task is None:
            return outer
        input_ids, tokens = tokens_of(args, kwargs)
        samples = length = None
        if tokens is not None:
            samples = tokens.shape[0]
            if task_ids is None and input_ids is not None and not tokens.is_floating_point():
                outer.require_samples(samples)
            length = tokens.shape[1] if tokens.dim() == 2 + tokens.is_floating_point() else None
        if task_ids is None:
            inputs = {} if outer.one_task else self.explained(model, input_ids, args, kwargs)
            return outer.of_batch(samples, length, inputs)
        task, ids = self.ids(task_ids, samples, device_of(model))
        if task.dim() == 2 and length is not None and task.shape[1] != length:
            raise ValueError(
                f"task_ids has the shape {list(task.shape)}; it must be [{samples}, {length}], one id for each token, or "
                f"[{samples}], one for each sample"
            )
        inputs = {} if is_one_task(task, ids) else self.explained(model, input_ids, args, kwargs)
        return BatchContext(task, length, **inputs, ids=ids, _ran=set())

    def explained(self, model: nn.Module, input_ids: Tensor | None, args: tuple, kwargs: dict) -> dict:
        """`vision_tokens`, `plain` and `unknown` of the context of a forward with these arguments."""
        found = {"vision_tokens": None, "plain": False, "others": "", "unknown": None}
        if not self.packed:
            return found
        if len(args) > 1:
            kwargs = dict(zip(self.arguments, args)) | kwargs  # noqa: B905 - a model may take *args
        others = contents(kwargs)
        found["plain"] = not others or (others == {self.main} and kwargs.get("input_ids") is None)
        if not found["plain"]:
            found["others"] = ", ".join(sorted(others))
            try:
                found["vision_tokens"] = None if input_ids is None else vision_tokens_of_batch(model, input_ids, kwargs)
            except ValueError as error:  # said by the layer that sees these rows
                found["unknown"] = str(error)
        return found

    @property
    def current(self) -> BatchContext | None:
        """The context of this model's running forward, in this thread or asyncio task."""
        entered = _compiled.contexts if torch.compiler.is_compiling() else _entered.get()
        for context in reversed(entered):
            if context.tasks is self:
                return context
        return None

    @contextmanager
    def use(self, context: BatchContext) -> Iterator[None]:
        """Run the forwards inside in this context."""
        context.tasks = self
        if torch.is_grad_enabled():
            if context.task is not None:
                self.routed = True
            elif not torch.compiler.is_compiling():
                self.seen = self.activation
        before = _compiled.contexts
        _compiled.contexts = (*before, context)
        if torch.compiler.is_compiling():
            try:
                yield
            finally:
                _compiled.contexts = before
            return
        _entered.set((*_entered.get(), context))
        try:
            yield
        finally:  # not to what was before: generators and asyncio tasks may leave in another order
            _entered.set(without(_entered.get(), context))
            _compiled.contexts = without(_compiled.contexts, context)

    # --- backward ---------------------------------------------------------------------------------------------------

    def require(self, activation: tuple) -> None:
        """Before a backward: torch would drop the gradients of a task that stopped training in between."""
        if activation != self.activation:
            raise RuntimeError(SET_IN_BETWEEN)

    def checkpoint_context(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """`context_fn` for torch.utils.checkpoint.checkpoint(use_reentrant=False) called by hand."""
        return nullcontext(), Recomputation(self)

    def require_context(self) -> None:
        """Raise when a layer is recomputed in backward by a checkpoint that does not restore its forward's context."""
        if torch._C._current_graph_task_id() == -1:
            self.seen = self.activation
        elif self.routed or self.seen != self.activation:
            raise RuntimeError(
                "a checkpointed layer is recomputed without the route of its forward; enable checkpointing through "
                "model.gradient_checkpointing_enable(), or pass context_fn=tasks_of(model).checkpoint_context"
            )


class Recomputation(AbstractContextManager):
    """Remembers the context of the running forward; `with` it, a recomputation sees that one, as often as needed."""

    def __init__(self, tasks: Tasks) -> None:
        self.tasks, self.context, self.activation = tasks, tasks.current or BatchContext(None), tasks.activation
        self._open: list = []

    def __enter__(self) -> None:
        self.tasks.require(self.activation)
        used = self.tasks.use(self.context)
        used.__enter__()
        self._open.append(used)

    def __exit__(self, *exception) -> None:
        self._open.pop().__exit__(*exception)


def is_one_task(task: Tensor, ids: list[int] | None) -> bool:
    """Whether all samples are known to be of one task: then every row is."""
    return task.shape == (1,) or (not torch.compiler.is_compiling() and bool(ids) and len(set(ids)) == 1)


def tokens_of(args: tuple, kwargs: dict) -> tuple[Tensor | None, Tensor | None]:
    """(input_ids, what tells the batch's samples and lengths) of a model's arguments."""
    input_ids = kwargs.get("input_ids")
    if input_ids is None and args and isinstance(args[0], Tensor):
        input_ids = args[0]
    names = ("inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
    found = (tokens for name in names if (tokens := kwargs.get(name)) is not None)
    tokens = next(found, None) if input_ids is None else input_ids
    return (input_ids, tokens) if tokens is None or tokens.dim() > 0 else (None, None)


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes: offloaded parameters lie on the meta device meanwhile."""
    here = next((p.device for p in model.parameters() if not p.is_meta), None)
    hooks = (hook for module in model.modules() for hook in offloading(module)) if here is None else ()
    return here or next((torch.device(hook.execution_device) for hook in hooks), torch.device("meta"))


def tasks_of(model: nn.Module) -> Tasks:
    """The Tasks that the adapted layers of `model` share; RuntimeError before `attach(model)`."""
    for module in model.modules():
        tasks = module.__dict__.get("lilora_tasks")
        if tasks is not None:
            return tasks
    raise RuntimeError("this model has no task routing yet; call attach(model) once after adding LiLoRALinear layers")
