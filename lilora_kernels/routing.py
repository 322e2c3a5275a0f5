"""Which row belongs to which task: a route per forward, shared by all adapted layers of a model."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from .units import units_of_batch

SET_IN_BETWEEN = (
    "the active task was set between a forward and its backward; set it after the backward, or train several tasks "
    "together with set_task(*names) and task_ids"
)
TEXT = {"language_model", "text_model"}
VISION = {"vision_tower", "multi_modal_projector", "mm_projector"}
METHODS = ("forward", "generate", "gradient_checkpointing_enable")  # what attach() puts its own in front of
TaskIds = Tensor | Sequence[int] | Sequence[str]


@dataclass(eq=False)
class Route:
    """The task of every sample of one forward.

    task: [B] int32, -1 for samples without an adapter. length: tokens per sample where text layers see flattened
    [B * length, K] rows. units: image tokens of each sample (or tiles, see units.py), which explain the packed rows ahead of
    the language model; a tensor [B] inside a compiled graph, where the host does not see them.
    published: the layers' stacked banks were brought up to date for this route, so that a compiled graph may read them.
    """

    task: Tensor
    length: int | None = None
    units: list[int] | Tensor | None = None
    published: bool = False
    _rows: dict[tuple, Tensor] = field(default_factory=dict, repr=False)

    def text_rows(self, x: Tensor) -> Tensor:
        """Task of each row of x [B, L, K] (or [B, K], or flattened [B * length, K]) -> [M] int32."""
        samples = self.task.shape[0]
        if x.dim() >= 3 and x.shape[0] == samples:
            per_sample = x[0, ..., 0].numel() if samples else 0
        elif x.dim() == 2 and self.length is None and x.shape[0] == samples:
            per_sample = 1
        elif x.dim() == 2 and self.length is not None and x.shape[0] == samples * self.length:
            per_sample = self.length
        else:
            tokens = "" if self.length is None else f" of {self.length} tokens"
            raise ValueError(
                f"a layer sees {list(x.shape[:-1])} rows, but the route has {samples} samples{tokens}; "
                "pass one task id per sample of the batch"
            )
        return self.task.unsqueeze(1).expand(samples, per_sample).reshape(-1)

    def vision_rows(self, x: Tensor) -> Tensor:
        """Task of each row of x [images, patches, K] or [sum of patches, K], packed sample by sample -> [M] int32."""
        if self.units is None:
            raise ValueError(
                f"a layer ahead of the language model sees {list(x.shape[:-1])} rows, but the route does not know how many "
                "image tokens each sample has; pass input_ids with the images, or Route(..., units=...)"
            )
        if isinstance(self.units, Tensor):
            return self._vision_rows_in_graph(x)
        rows, total = x.shape[:-1].numel(), sum(self.units)
        if total and rows % total == 0:
            counts = [units * (rows // total) for units in self.units]
        elif total and x.dim() == 3 and total % x.shape[0] == 0 and self._whole_images(total // x.shape[0]):
            counts = [units // (total // x.shape[0]) * x.shape[1] for units in self.units]
        else:
            raise ValueError(
                f"a layer ahead of the language model sees {list(x.shape[:-1])} rows, which {self.units} image tokens "
                f"or tiles (in all {total}) in {len(self.units)} samples do not explain; check the images of the batch"
            )
        repeats = torch.tensor(counts, device=self.task.device)
        return self.task.repeat_interleave(repeats, output_size=rows)

    def _vision_rows_in_graph(self, x: Tensor) -> Tensor:
        rows, images, units = x.shape[:-1].numel(), x.shape[0], self.units.to(x.device)
        total = units.sum().clamp(min=1)  # no image tokens explain no rows: the last end is 0 then
        explained = rows % total == 0
        if x.dim() == 3:
            explained |= (total % images == 0) & (units % (total // images).clamp(min=1) == 0).all()
        ends = units.cumsum(0) * rows // total
        torch._assert_async(
            explained & (ends[-1] == rows),
            f"the image tokens of the batch do not explain the {rows} rows that a layer ahead of the language model sees; "
            "check the images of the batch",
        )
        sample = torch.bucketize(torch.arange(rows, device=x.device), ends, right=True)
        return self.task.to(x.device)[sample]

    def _whole_images(self, tokens_per_image: int) -> bool:
        return all(units % tokens_per_image == 0 for units in self.units)

    def rows(self, x: Tensor, vision: bool) -> Tensor:
        """Task of each row of x, [M] int32 on its device; ValueError with both counts when nothing explains them."""
        resolve = self.vision_rows if vision else self.text_rows
        if torch.compiler.is_compiling():
            return resolve(x).to(x.device)
        key = (vision, x.device, *x.shape[:-1])
        if key not in self._rows:
            self._rows[key] = resolve(x).to(x.device)
        return self._rows[key]


class Routes:
    """What all adapted layers of one model share: the tasks and their ids, and the route of the running forward.

    `tasks[i]` is the name of task i, None once deleted: ids are never used twice. One model runs one forward at a time.
    """

    def __init__(self) -> None:
        self.tasks: list[str | None] = []
        self.current: Route | None = None
        self.setting: tuple = ()  # active tasks and whether they learn; a recomputation must see what its forward saw
        self.seen: tuple = ()  # `setting` at the last forward without a route
        self.routed = False  # whether any forward that can be recomputed had a route
        self.restored = False  # whether a recomputation runs under the route of its forward
        self.unplaced: list[str] = []  # layers of which nothing tells whether they see packed images
        self.generating = False  # whether generate() runs: the banks were brought up to date when it began

    def id_of(self, name: str) -> int:
        if name not in self.tasks:
            known = [task for task in self.tasks if task is not None]
            raise ValueError(f"task {name!r} is unknown; this model knows {known}")
        return self.tasks.index(name)

    def ids(self, task_ids: TaskIds, samples: int | None, device: torch.device | None) -> Tensor:
        """Names or ids, one per sample -> [B] int32 on `device`. None as a name and -1 as an id stand for no adapter."""
        if not isinstance(task_ids, Tensor):
            if isinstance(task_ids, str):
                raise TypeError(f"task_ids is the string {task_ids!r}; pass one name or id per sample, in a list")
            named = [-1 if t is None else self.id_of(t) if isinstance(t, str) else t for t in task_ids]
            if not all(isinstance(t, int) and not isinstance(t, bool) for t in named):
                raise TypeError(f"task_ids is {list(task_ids)!r}; it must hold task names or integer ids")
            task_ids = torch.tensor(named, dtype=torch.int32)
        if task_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"task_ids is {task_ids.dtype}; it must be torch.int32 or torch.int64")
        if task_ids.dim() != 1 or (samples is not None and task_ids.shape[0] != samples):
            wanted = "one id per sample" if samples is None else f"[{samples}], one id per sample of the batch"
            raise ValueError(f"task_ids has the shape {list(task_ids.shape)}; it must be {wanted}")
        if task_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            # On an accelerator the values would have to be waited for; a row with a foreign id gives NaN there.
            for t in set(task_ids.tolist()):
                if t != -1 and not (0 <= t < len(self.tasks) and self.tasks[t] is not None):
                    known = {i: name for i, name in enumerate(self.tasks) if name is not None}
                    raise ValueError(f"task_ids holds {t}; known ids are {known}, and -1 for no adapter")
        return task_ids.to(device=device, dtype=torch.int32)

    @contextmanager
    def use(self, route: Route | None) -> Iterator[None]:
        before, self.current = self.current, route
        if route is not None and torch.is_grad_enabled():
            self.routed = True
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def generation(self, layers: list) -> Iterator[None]:
        """Bring every layer's bank up to date once, not once for every token.

        Not where parameters are there only while their layer runs, as with offloading or sharding.
        """
        from .adapted import is_sharded

        owned = [own for layer in layers for own in layer._all_own()]
        resident = all(not own.is_meta and own.numel() > 0 and not is_sharded(own) for own in owned)
        for layer in layers if resident else ():
            layer.publish()
        before, self.generating = self.generating, resident
        try:
            yield
        finally:
            self.generating = before

    def unchanged(self) -> Callable[[Tensor], None]:
        """A hook on an output: torch would drop the gradients of a task that stopped training before the backward."""
        setting = self.setting

        def check(_: Tensor) -> None:
            if setting != self.setting:
                raise RuntimeError(SET_IN_BETWEEN)

        return check

    def published(self) -> bool:
        return self.current is not None and self.current.published

    def checkpoint_context(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """`context_fn` for torch.utils.checkpoint.checkpoint(use_reentrant=False) called by hand."""
        return nullcontext(), Recomputation(self)

    def require_known(self) -> None:
        """Raise when a layer is recomputed in backward by a checkpoint that does not restore its forward's route."""
        if torch.compiler.is_compiling() or self.restored:
            return
        if torch._C._current_graph_task_id() == -1:
            self.seen = self.setting
        elif self.routed or self.seen != self.setting:
            raise RuntimeError(
                "a checkpointed layer is recomputed without the route of its forward; enable checkpointing through "
                "model.gradient_checkpointing_enable(), or pass context_fn=routes_of(model).checkpoint_context"
            )


class Recomputation(AbstractContextManager):
    """Remembers the route of the running forward; `with` it, a recomputation sees that route, as often as needed."""

    def __init__(self, routes: Routes) -> None:
        self.routes, self.route, self.setting = routes, routes.current, routes.setting

    def __enter__(self) -> None:
        routes = self.routes
        if self.setting != routes.setting:
            raise RuntimeError(SET_IN_BETWEEN)
        self.before = routes.current, routes.restored
        routes.current, routes.restored = self.route, True

    def __exit__(self, *exception) -> None:
        self.routes.current, self.routes.restored = self.before


def routes_of(model: nn.Module) -> Routes:
    """The Routes that the adapted layers of `model` share; RuntimeError before `attach(model)`."""
    for module in model.modules():
        routes = module.__dict__.get("lilora_routes")
        if routes is not None:
            return routes
    raise RuntimeError("this model has no task routing yet; call attach(model) once after adding LiLoRALinear layers")


@contextmanager
def route(
    model: nn.Module, task_ids: TaskIds, *, length: int | None = None, units: Sequence[int] | None = None
) -> Iterator[None]:
    """Run the forwards inside with these tasks: one name, id or -1 per sample.

    `units`, the image tokens (or tiles) of each sample, is needed only where adapted layers see packed images and the model gets
    no input_ids. Compiled forwards read parameters as they were at its beginning, or as `overwrite_task` made them. Raises
    ValueError or TypeError for ids that are unknown or of the wrong length or dtype.
    """
    routes = routes_of(model)
    device = next(model.parameters()).device
    ids = routes.ids(task_ids, None, device)
    published = False
    if not torch.compiler.is_compiling():
        layers = [layer for layer in layers_of(model) if layer.lilora_U]
        for layer in layers:
            layer.publish()
        published = all(layer._bank is not None for layer in layers)
    with routes.use(Route(ids, length, None if units is None else list(units), published)):
        yield


def layers_of(model: nn.Module) -> list:
    """The adapted layers of a model."""
    from .linear import LiLoRALinear

    return [module for module in model.modules() if isinstance(module, LiLoRALinear)]


def attach(model: nn.Module) -> Routes:
    """Connect the adapted layers of `model` to one route; call it again after replacing more layers.

    Afterwards `model(**batch, task_ids=...)` and `model.generate(..., task_ids=...)` work: names or ids, one per sample;
    beams and returned sequences repeat their sample's task. Layers ahead of the language model, told by the names of the
    model's parts, are taken to see packed images. Gradient checkpointing restores each forward's route.
    """
    from .linear import LiLoRALinear

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LiLoRALinear)]
    model.lilora_layers = [layer for _, layer in layers]
    parts = {part for name, _ in model.named_modules() for part in name.split(".")}
    has_text_part = bool(parts & TEXT)
    routes = model.__dict__.get("lilora_routes")
    if routes is None:
        routes = model.lilora_routes = layers[0][1].routes if layers else Routes()
    for name, layer in layers:
        if layer.routes is not routes and layer.routes.tasks != routes.tasks:
            raise ValueError(
                f"{name} has the tasks {layer.routes.tasks} but other layers have {routes.tasks}; add the same tasks, in the "
                "same order, to every layer"
            )
        layer.routes = routes
        layer.vision = sees_images(name, has_text_part)
    routes.unplaced = [] if parts & (TEXT | VISION) else outside_decoder(model, [name for name, _ in layers])
    if "lilora_replaced" not in model.__dict__:
        # accelerate's hooks (device_map over several devices) put a forward of their own on the instance
        model.lilora_replaced = {name: model.__dict__[name] for name in METHODS if name in model.__dict__}
        # partial, not MethodType: a bound method is pickled by its name in the class, and there it is the old one
        model.forward = partial(_forward, model)
        model.forward.__signature__ = _signature(model)
        model.forward.__doc__ = type(model).forward.__doc__
        if hasattr(model, "generate"):
            model.generate = partial(_generate, model)
        if hasattr(model, "gradient_checkpointing_enable"):
            model.gradient_checkpointing_enable = partial(gradient_checkpointing_enable, model)
            restore_routes(model)
    return routes


def detach(model: nn.Module) -> None:
    """Undo `attach` and `fuse_mlps`, after the adapted layers were taken out."""
    from .mlp import unfuse_mlps

    unfuse_mlps(model)
    replaced = model.__dict__.get("lilora_replaced")
    for name in ("lilora_layers", "lilora_routes", "lilora_replaced", *(METHODS if replaced is not None else ())):
        model.__dict__.pop(name, None)
    model.__dict__.update(replaced or {})
    for module in model.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if getattr(checkpoint, "func", None) is _checkpoint_with_route:
            module._gradient_checkpointing_func = checkpoint.args[1]


def sees_images(path: str, has_text_part: bool) -> bool:
    """Whether a layer runs ahead of the language model, by the names that model families give to their parts."""
    parts = set(path.split("."))
    return not parts & (TEXT | {"lm_head"}) and (has_text_part or bool(parts & VISION))


def outside_decoder(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of a model's layers that are not among the layers of its decoder, by transformers' get_decoder()."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    at = next((name for name, module in model.named_modules() if module is decoder), None)
    inside = None if at is None else f"{at}.layers.".lstrip(".")
    return [name for name in names if inside is None or not name.startswith((inside, "lm_head"))]


def _forward(self, *args, task_ids=None, **kwargs):
    forward = self.lilora_replaced.get("forward") or partial(type(self).forward, self)
    if task_ids is None:
        return forward(*args, **kwargs)
    routes = self.lilora_routes
    batch = route_of_batch(self, task_ids, args, kwargs)
    batch.published = routes.generating
    with routes.use(batch):
        return forward(*args, **kwargs)


def _signature(model: nn.Module) -> inspect.Signature:
    """That of the model's forward with task_ids, without annotations: they need not be picklable."""
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(type(model).forward).parameters.values()][1:]
    at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    parameters.insert(at, inspect.Parameter("task_ids", inspect.Parameter.KEYWORD_ONLY, default=None))
    return inspect.Signature(parameters)


def route_of_batch(model: nn.Module, task_ids: TaskIds, args: tuple, kwargs: dict) -> Route:
    input_ids = kwargs.get("input_ids")
    if input_ids is None and args and isinstance(args[0], Tensor):
        input_ids = args[0]
    tokens = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
    samples = length = None
    if tokens is not None:
        samples = tokens.shape[0]
        length = tokens.shape[1] if tokens.dim() > 1 + tokens.is_floating_point() else None
    device = next(model.parameters()).device
    unplaced = model.lilora_routes.unplaced
    if unplaced and any(name.startswith("pixel_values") and value is not None for name, value in kwargs.items()):
        raise ValueError(
            f"{type(model).__name__} names its parts in its own way, so it is unknown whether {unplaced[0]} sees images or text, "
            "and the batch has images; adapt layers of its decoder only, or pass batches of one task without task_ids"
        )
    packed = any(layer.vision for layer in model.lilora_layers)
    units = units_of_batch(model, input_ids, kwargs) if packed and input_ids is not None else None
    return Route(model.lilora_routes.ids(task_ids, samples, device), length, units)


def _generate(self, *args, task_ids=None, **kwargs):
    routes = self.lilora_routes
    if task_ids is None and routes.current is not None:
        task_ids = routes.current.task
    if task_ids is None:
        return type(self).generate(self, *args, **kwargs)
    prompt = (kwargs["inputs"],) if "inputs" in kwargs else args
    batch = route_of_batch(self, task_ids, prompt, kwargs)
    # The images are encoded once, under this route; the ids travel with the model's inputs to its forwards, so that beams
    # and returned sequences repeat them.
    with routes.use(batch), routes.generation(self.lilora_layers):
        return type(self).generate(self, *args, task_ids=batch.task, **kwargs)


def gradient_checkpointing_enable(self, *args, **kwargs):
    type(self).gradient_checkpointing_enable(self, *args, **kwargs)
    restore_routes(self)


def restore_routes(model: nn.Module) -> None:
    """Wrap each module's checkpoint function so that a recomputation sees the route of its forward."""
    routes = model.lilora_routes
    for module in model.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and getattr(checkpoint, "func", None) is not _checkpoint_with_route:
            module._gradient_checkpointing_func = partial(_checkpoint_with_route, routes, checkpoint)


def _checkpoint_with_route(routes: Routes, checkpoint: Callable, function: Callable, *args, **kwargs):
    recomputation = Recomputation(routes)

    def recomputable(*inner_args, **inner_kwargs):
        with recomputation:
            return function(*inner_args, **inner_kwargs)

    return checkpoint(recomputable, *args, **kwargs)
