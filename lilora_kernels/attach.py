"""Connecting the adapted layers of a model: one context per forward, task_ids as an argument, checkpointing."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .layers.base import AdaptedLinear, check_loads, reads_weight
from .layers.mlp import unfuse_mlps
from .layers.unattached import forget, refuse_task_ids
from .routing.context import GATHERED, TEXT, BatchContext, Recomputation, Tasks, device_of, tasks_of
from .routing.placement import places, reordered
from .routing.task_names import TaskIds

# What attach() puts its own in front of.
METHODS = "forward", "generate", "generate_batch", "gradient_checkpointing_enable"
MISSPELT = "task_id", "tasks", "task", "adapter_name"  # would be taken without a word, as any keyword is


@contextmanager
def route(model: nn.Module, task_ids: TaskIds, *, vision_tokens: Sequence[int] | None = None) -> Iterator[None]:
    """Run the forwards inside with these tasks: one name, id or -1 per sample.

    It holds in the thread or asyncio task that entered it; a forward of another one without task ids raises meanwhile.
    (Compiled code can tell threads apart, not asyncio tasks: pass it task_ids.) Ids are read when it is entered; what is
    written into their tensor afterwards is not seen. `vision_tokens`, the image tokens (or tiles) of
    each sample, is needed only where adapted layers see packed images and the model gets no input_ids. Raises ValueError
    or TypeError for ids that are unknown or of the wrong length or dtype.
    """
    tasks = tasks_of(model)
    task, ids = tasks.ids(task_ids, None, device_of(model))
    tasks.opened += 1
    try:
        with tasks.use(BatchContext(task, None, None if vision_tokens is None else list(vision_tokens), ids)):
            yield
    finally:
        tasks.opened -= 1


def attach(model: nn.Module, tasks: Tasks | None = None) -> Tasks:
    """Connect the adapted layers of `model`; call it again after replacing more layers.

    Afterwards `model(**batch, task_ids=...)` and `model.generate(..., task_ids=...)` work: names or ids, one per sample;
    beams and returned sequences repeat their sample's task. Where a layer lies is told by the model's structure (`places`).
    Gradient checkpointing restores each forward's context. `tasks`: what the layers shall share; by default what the model or
    its first layer has.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]
    placed = places(model, [name for name, _ in layers])
    if tasks is None:
        tasks = model.__dict__.get("lilora_tasks") or (layers[0][1].model_tasks if layers else Tasks())
    for name, layer in layers:  # all of them before anything is changed
        parent, _, own = name.rpartition(".")
        if own and reads_weight(type(model.get_submodule(parent)), own):  # type: ignore[arg-type]
            raise ValueError(
                f"{name} cannot be adapted: {type(model.get_submodule(parent)).__name__} reads its weight and may never run it; "
                "leave it out"
            )
        if layer.model_tasks is not tasks and layer.model_tasks.names != tasks.names:
            raise ValueError(
                f"{name} has the tasks {layer.model_tasks.names} but other layers have {tasks.names}; add the same tasks, in "
                "the same order, to every layer"
            )
        if layer.model_tasks is not tasks and layer.model_tasks.activation != tasks.activation:
            raise ValueError(
                f"{name} has {list(layer.model_tasks.active)} active but other layers {list(tasks.active)}; call "
                "set_task(model, ...) first"
            )
    model.lilora_tasks = tasks
    forget(model, refuse_task_ids)
    forget(model, _refuse_in_part)
    for name, layer in layers:
        layer.model_tasks, layer.path, layer.place = tasks, name, placed[name]
    tasks.arguments = tuple(inspect.signature(type(model).forward).parameters)[1:]
    tasks.main = getattr(model, "main_input_name", None) or next(iter(tasks.arguments), "input_ids")
    takes_all = hasattr(model, "main_input_name")  # as transformers' models do
    tasks.misspelt = tuple(name for name in MISSPELT if takes_all and name not in tasks.arguments)
    tasks.reordered = reordered(model)
    tasks.packed |= not set(placed.values()) <= {TEXT, GATHERED}
    for part in model.modules():
        if part is model:
            continue
        if hasattr(part, "main_input_name") and "task_ids" not in inspect.signature(part.forward).parameters:
            part.register_forward_pre_hook(_refuse_in_part, with_kwargs=True)
        if hasattr(part, "generate"):  # a model's may call it: it has forwards that the model's does not see
            part.__dict__.setdefault(
                "lilora_replaced", {k: part.__dict__[k] for k in ("forward",) if k in part.__dict__}
            )
            part.forward = partial(_part_forward, part, tasks)
    if "lilora_replaced" not in model.__dict__:
        # accelerate's hooks (device_map over several devices) put a forward of their own on the instance
        model.lilora_replaced = {name: model.__dict__[name] for name in METHODS if name in model.__dict__}
        model.register_load_state_dict_pre_hook(check_loads)  # of all layers before the first is written
        # partial, not MethodType: a bound method is pickled by its name in the class, and there it is the old one
        model.forward = partial(_forward, model)
        model.forward.__signature__ = _signature(model)
        model.forward.__doc__ = type(model).forward.__doc__
        if hasattr(model, "generate"):
            model.generate = partial(_generate, model)
        if hasattr(model, "generate_batch"):
            model.generate_batch = partial(_generate_batch, model)
        if hasattr(model, "gradient_checkpointing_enable"):
            model.gradient_checkpointing_enable = partial(_gradient_checkpointing_enable, model)
            restore_contexts(model)
    return tasks


def detach(model: nn.Module) -> None:
    """Undo `attach` and `fuse_mlps`, after the adapted layers were taken out."""
    unfuse_mlps(model)
    replaced = model.__dict__.get("lilora_replaced")
    for name in ("lilora_tasks", "lilora_replaced", *(METHODS if replaced is not None else ())):
        model.__dict__.pop(name, None)
    model.__dict__.update(replaced or {})
    forget(model, _refuse_in_part)
    for part in model.modules():
        if getattr(part.__dict__.get("forward"), "func", None) is _part_forward:
            del part.forward
            part.__dict__.update(part.__dict__.pop("lilora_replaced"))
    for key, hook in list(model._load_state_dict_pre_hooks.items()):
        if hook.hook is check_loads:
            del model._load_state_dict_pre_hooks[key]
    for module in model.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if getattr(checkpoint, "func", None) is _checkpoint_with_context:
            module._gradient_checkpointing_func = checkpoint.args[1]


def _refuse_in_part(part: nn.Module, args: tuple, kwargs: dict) -> None:
    """transformers' models take any keyword, and the rows would be of the active task."""
    if kwargs.get("task_ids") is not None:
        raise TypeError(
            f"{type(part).__name__} is a part of an adapted model and does not know task_ids; give them to the model, or call "
            "the part inside `with lilora_kernels.route(model, task_ids):`"
        )


def _forward(self: nn.Module, *args: Any, task_ids: TaskIds | None = None, **kwargs: Any) -> Any:
    tasks = self.lilora_tasks
    for name in tasks.misspelt:
        if kwargs.get(name) is not None:
            raise TypeError(f"{type(self).__name__} takes no {name}; the tasks of a batch are given as task_ids")
    with tasks.use(tasks.context_of(self, task_ids, args, kwargs)):
        output = (self.lilora_replaced.get("forward") or partial(type(self).forward, self))(*args, **kwargs)
    if not torch.compiler.is_compiling() and tasks.reached and not tasks.looked:
        tasks.looked = True
        name_idle_layers(self)
    return output


def _part_forward(self: nn.Module, tasks: Tasks, *args: Any, **kwargs: Any) -> Any:
    """Of a part that generates: with beams and cached steps it has other samples and lengths than its model's batch."""
    with tasks.use(tasks.context_of(self, None, args, kwargs)):
        return (self.lilora_replaced.get("forward") or partial(type(self).forward, self))(*args, **kwargs)


def name_idle_layers(model: nn.Module) -> None:
    """Warn of adapted layers that the first forward did not reach.

    Of a model with a decoder those below it: towers run with images only, experts as a router will.
    """
    modules = list(model.modules())
    layers = [module for module in modules if isinstance(module, AdaptedLinear) and module.place != GATHERED]
    layers = [layer for layer in layers if layer.place == TEXT] or layers
    idle = [layer.path for layer in layers if not layer.ran]
    if idle and not any(module._compiled_call_impl is not None or hasattr(module, "_orig_mod") for module in modules):
        names = ", ".join(idle[:3]) + ", ..." * (len(idle) > 3)
        warnings.warn(
            f"the first forward did not run {len(idle)} of the adapted layers ({names}); unless other inputs reach them they "
            "are never trained, but change what a merged model computes: leave them out",
            stacklevel=3,
        )


def _signature(model: nn.Module) -> inspect.Signature:
    """That of the model's forward with task_ids, without annotations: they need not be picklable."""
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(type(model).forward).parameters.values()][1:]
    at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    parameters.insert(at, inspect.Parameter("task_ids", inspect.Parameter.KEYWORD_ONLY, default=None))
    return inspect.Signature(parameters)


def _generate(self: nn.Module, *args: Any, task_ids: TaskIds | None = None, **kwargs: Any) -> Any:
    tasks = self.lilora_tasks
    prompt = (kwargs["inputs"],) if "inputs" in kwargs else args
    context = tasks.context_of(self, task_ids, prompt, kwargs)
    # Beams and returned sequences repeat their sample's task; see BatchContext.of_batch.
    if context.task is not None and context.task.dim() == 2:
        raise ValueError(
            f"task_ids has the shape {list(context.task.shape)}; generate takes one id for each sample, for its new tokens too"
        )
    context.generating, context.stacks = context.task is not None, {}
    context.repeats = _repeats_of_guidance(self, args, kwargs)
    with tasks.use(context):
        return type(self).generate(self, *args, **kwargs)


def _repeats_of_guidance(model: nn.Module, args: tuple, kwargs: dict) -> int | None:
    """How often a generation with guidance repeats each sample for beams and returned sequences; None without guidance.

    Some models guide by a second half of the batch, [samples; the same without prompts], others by a second forward.
    """
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    own = getattr(model, "generation_config", None)  # of what is not given

    def setting(name: str) -> Any:
        if name in kwargs:
            return kwargs[name] or 1
        return getattr(given, name, None) or getattr(own, name, None) or 1

    guided = setting("guidance_scale") != 1
    return max(setting("num_beams"), setting("num_return_sequences")) if guided else None


def _generate_batch(self: nn.Module, *args: Any, task_ids: TaskIds | None = None, **kwargs: Any) -> Any:
    if task_ids is not None:
        raise TypeError(
            "generate_batch schedules its requests by itself, and nothing tells whose the rows of a step are; pass task_ids to "
            "generate, or call generate_batch for each task with set_task"
        )
    return type(self).generate_batch(self, *args, **kwargs)


def _gradient_checkpointing_enable(self: nn.Module, *args: Any, **kwargs: Any) -> None:
    type(self).gradient_checkpointing_enable(self, *args, **kwargs)
    restore_contexts(self)


def restore_contexts(model: nn.Module) -> None:
    """Wrap each module's checkpoint function so that a recomputation sees the context of its forward."""
    for module in model.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and getattr(checkpoint, "func", None) is not _checkpoint_with_context:
            module._gradient_checkpointing_func = partial(_checkpoint_with_context, model.lilora_tasks, checkpoint)


def _checkpoint_with_context(tasks: Tasks, checkpoint: Callable, function: Callable, *args: Any, **kwargs: Any) -> Any:
    recomputation = Recomputation(tasks)

    def recomputable(*inner_args: Any, **inner_kwargs: Any) -> Any:
        with recomputation:
            return function(*inner_args, **inner_kwargs)

    return checkpoint(recomputable, *args, **kwargs)
