"""The PEFT tuner model: puts adapters into a model and carries task ids to them."""

import hashlib
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from types import FrameType
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from peft.functional import delete_adapter
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper, get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lilora.bank.index import bytes_of
from lilora.errors import UserError
from lilora.families import routed_experts, target_modules
from lilora.module_names import unwrapped
from lilora_kernels import LiLoRALinear, attach, check_task_name
from lilora_kernels.attach import detach
from lilora_kernels.layers.accelerated import AcceleratedLinear
from lilora_kernels.layers.base import is_conv1d, is_sharded, reads_weight
from lilora_kernels.layers.experts import expert_parameters
from lilora_kernels.routing.context import TEXT, BatchContext, Tasks, device_of
from lilora_kernels.routing.placement import places, sees_images
from lilora_kernels.routing.task_names import TaskIds

from .config import LiLoRAConfig
from .layer import ExpertLinear, Experts, Linear, adapted_layers
from .loading import OTHER_CHAIN, check_loadable
from .loss import tell_of_loss


class LiLoRAModel(BaseTuner):
    """Adapts the linear layers that the config names; made by `peft.get_peft_model(model, LiLoRAConfig(...))`.

    After it, `model(**batch, task_ids=[...])` and `model.generate(..., task_ids=[...])` take one task name or id per
    sample, in training and inference; PEFT's `adapter_names=[...]` means the same.
    """

    prefix = "lilora_"
    tuner_layer_cls = Linear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT reads it; models.py has the patterns

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        # Before PEFT writes the config into those of the model.
        if "lilora_tasks" not in model.__dict__ and any("lilora_tasks" in part.__dict__ for part in model.modules()):
            raise UserError(
                f"a part of this {type(model).__name__} is adapted already; call model.add_adapter(name, config) on the adapted "
                "model, not get_peft_model again"
            )
        super().__init__(model, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        tasks = model.__dict__.get("lilora_tasks") or Tasks()
        if adapter_name in tasks.known:
            raise UserError(f"task {adapter_name!r} exists already; delete it first or choose another name")
        reference = adapter_name == "ref" and "default" in tasks.known and _caller()[0].startswith("trl.")
        if reference:
            _require_fixed(model)
        model.lilora_tasks = tasks
        try:
            check_task_name(adapter_name)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._check_same_layers(model, adapter_name)
        except Exception:
            rollback(model, self.peft_config, adapter_name)
            raise
        self.peft_config[adapter_name].first_of_chain = None  # of the file, not of a task that this config makes next
        attach(model)
        tell_of_loss(model)
        if reference:  # TRL copies the parameters whose names hold `.default.`, and ours end with it
            for layer in adapted_layers(model).values():
                layer.overwrite_task(adapter_name, *layer._own("default"))
        saved = {path: m for path, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}
        placed, seeing = places(model, list(saved)), sees_images(model)
        within = set() if seeing is None else set(seeing.modules())
        for path in placed:
            if seeing is not None and saved[path] not in within:  # behind it, as a head is
                placed[path] = TEXT
        tasks.packed |= not set(placed.values()) <= {TEXT}
        for path, place in placed.items():
            if not saved[path]._forward_pre_hooks:
                saved[path].register_forward_pre_hook(partial(_route_module, tasks, path, place), with_kwargs=True)

    def _check_same_layers(self, model: nn.Module, adapter_name: str) -> None:
        tasks = list(model.lilora_tasks.known)
        for name, layer in adapted_layers(model).items():
            if layer.tasks != tasks:
                raise UserError(
                    f"{name} would have the tasks {layer.tasks}, not {tasks}; all tasks adapt the same layers: give "
                    f"{adapter_name} the target_modules, exclude_modules and layers_to_transform of the others"
                )

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make tasks active; of several, all train, also their copies of modules_to_save, of which PEFT knows one alone."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        resumed = (
            "transformers.trainer",
            "_load_from_checkpoint",
        )  # which makes the first of the active tasks the only one
        if len(self.active_adapters) > 1 and names == self.active_adapters[:1] and _caller() == resumed:
            names = list(self.active_adapters)
        if len(names) < 2:
            super().set_adapter(adapter_name, inference_mode)
            return
        if unknown := [name for name in names if name not in self.peft_config]:
            raise UserError(f"task {unknown[0]!r} is unknown; this model knows {list(self.peft_config)}")
        first, *others = names
        super().set_adapter(first, inference_mode)
        for layer in adapted_layers(self.model).values():
            layer.set_adapter(names, inference_mode)
        for module in self.model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                for copy in (module.modules_to_save[name] for name in others if name in module.modules_to_save):
                    copy.requires_grad_(not inference_mode)
        self.active_adapter = names

    def set_task(self, *names: str, train: bool = True) -> None:
        """What `lilora_kernels.set_task` does of this model."""
        self.set_adapter(list(names), inference_mode=not train)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        if safe_merge:
            self._check_merged_weights(adapter_names)
        super().merge_adapter(adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge and safe_merge:
            self._check_merged_weights(adapter_names)
        if merge:
            self._check_merge_allowed()
        for path, experts in list(self.model.named_modules()):  # PEFT unloads modules with a weight
            if isinstance(experts, Experts):
                for layer in experts.layers if merge else ():
                    layer.merge(adapter_names=adapter_names)
                replace_module(self.model, path, experts.base_layer)
        model = super()._unload_and_optionally_merge(merge, progressbar, adapter_names=adapter_names)
        detach(model)
        return model

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise UserError: a weighted sum of tasks is no LiLoRA task."""
        raise UserError(
            "a weighted sum of LiLoRA tasks is none, for each has its own share of B0; write the tasks with lilora.export_lora "
            "and add the LoRAs up"
        )

    def _check_merged_weights(self, adapter_names: list[str] | None) -> None:
        """Of all layers before the first is written: a safe merge that fails must not leave some layers merged."""
        for layer in adapted_layers(self.model).values():
            layer.merged_weight(adapter_names, safe_merge=True)

    def _check_merge_allowed(self) -> None:
        layers = adapted_layers(self.model).values()
        for layer in layers:
            if layer.quantization_backend is None:
                layer.require_own_weight()
        bases = {id(layer.base_layer): layer for layer in layers}
        holders: dict[int, dict[object, str]] = defaultdict(dict)
        for name, module in self.model.named_modules(remove_duplicate=False):  # one module may lie in several places
            # An adapted one may too: it is merged in all.
            own = bases.get(id(module)) if name.endswith(".base_layer") else None
            for parameter in module._parameters.values():
                holders[id(parameter)].setdefault(own or name, name.removesuffix(".base_layer"))
        for layer in layers:
            names = list(holders[id(layer.weight)].values())
            if len(names) > 1:
                raise UserError(
                    f"{names[0]} and {names[1]} share one weight, so a merge would change both; leave the task unmerged, or load "
                    "the base model with tie_word_embeddings=False if it is that of the embedding"
                )

    def _prepare_adapter_config(self, peft_config: LiLoRAConfig, model_config: dict) -> LiLoRAConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = target_modules(self.model)
        if peft_config.experts:  # no field: what PEFT asks before it calls _inject_parameters
            peft_config.target_parameters = chosen_experts(self.model, peft_config)
        return peft_config

    def _inject_parameters(
        self, peft_config: LiLoRAConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        for path in dict.fromkeys(name.rpartition(".")[0] for name in peft_config.target_parameters):
            module = model.get_submodule(path)
            if not isinstance(module, Experts):
                module = Experts(module, peft_config, model.lilora_tasks)
                replace_module(model, path, module)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                for layer in module.layers:
                    layer.add_task(adapter_name, first=peft_config.first_of_chain)
        return peft_config.target_parameters

    def _check_new_adapter_config(self, config: LiLoRAConfig) -> None:
        super()._check_new_adapter_config(config)
        others = [other for other in self.peft_config.values() if other is not config]
        if not others:
            return
        config.require_same_settings(others[0])
        if config.on_shared_mismatch == "replace":
            for other in others:
                other.shared_fingerprint = None
        elif config.shared_fingerprint is not None:
            current = shared_fingerprint(self.model)
            # A load may have rounded the factors to the model's dtype; the file that they came from tells then.
            loaded = {other.shared_fingerprint for other in others if other.inference_mode}
            if current is not None and config.shared_fingerprint not in {current, *loaded}:
                raise UserError(
                    f"the task was made with the shared factors {config.shared_fingerprint}, but this model has {current}; "
                    + OTHER_CHAIN
                )

    def _create_and_replace(
        self,
        config: LiLoRAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, Linear):
            if not isinstance(target, ExpertLinear):  # whose names a pattern may match, see _inject_parameters
                target.add_task(adapter_name, first=config.first_of_chain)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        quantized = resolve_quantization_backend(base, **self._quantization())
        if (
            not isinstance(base, nn.Linear)
            and not is_conv1d(base)
            and (quantized is None or quantized.layer_type != "linear")
        ):
            more = " and give experts=True" if expert_parameters(base) else ""
            raise UserError(
                f"{current_key} is a {type(base).__name__}; LiLoRA adapts linear layers: leave it out of target_modules{more}"
            )
        own = isinstance(base, nn.Linear) and type(base).forward not in (nn.Linear.forward, AcceleratedLinear.forward)
        if quantized is None and (own or isinstance(base, NonDynamicallyQuantizableLinear)):
            raise UserError(
                f"{current_key} is a {type(base).__name__}, not an nn.Linear: nothing says that its forward runs, and computes "
                "with its weight what a merge would; leave it out of target_modules (exclude_modules)"
            )
        if reads_weight(type(parent), target_name):  # type: ignore[arg-type]
            raise UserError(
                f"{current_key} is never run by {type(parent).__name__}, or not on every device: it reads the layer's weight, "
                "past an adapter; leave it out of target_modules (exclude_modules)"
            )
        layer = Linear(target, config, self.model.lilora_tasks, **self._quantization())
        self._replace_module(
            parent, target_name, layer, target
        )  # moves what it has to the weight's device: of offloaded, meta
        layer.add_task(adapter_name, first=config.first_of_chain)

    def _quantization(self) -> dict:
        return {k: v for k, v in get_quantization_kwargs(self).items() if k == "get_apply_tensor_subclass"}

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        trained = {name: p.requires_grad for name, p in self.model.named_parameters(remove_duplicate=False)}
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(trained[name])  # PEFT makes new Parameters, which require gradients

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: LiLoRAConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        layers = adapted_layers(model).values()
        if any(tensor.is_meta for tensor in state_dict.values()):
            for layer in layers:
                layer.onload()
            here = model.state_dict()
            state_dict = {name: here.get(name, tensor) for name, tensor in state_dict.items()}
        names = [name for name, _ in model.named_parameters(remove_duplicate=False) if ".lilora_" in name]
        if any(f".{other}." in name for other in unwanted_adapter_names for name in names):
            # PEFT has taken all below a module that is called as another task is ("0", "layers") for that task's.
            here = model.state_dict()
            own = [name for name in names if name.endswith(f".{adapter_name}")]
            if any(is_sharded(here[name]) for name in own if name not in state_dict):
                raise UserError(
                    f"a task is called as a module of the model is, and PEFT then loses the sharded tensors of task "
                    f"{adapter_name!r}; give it another name"
                )
            state_dict = {name: state_dict.get(name, here[name]) for name in own}
        first = all(layer.is_first(adapter_name) for layer in layers)
        config.taken_with = shared_fingerprint(model), first
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if away := [name for name, tensor in found.items() if tensor.is_meta]:
            raise UserError(
                f"{away[0]} is on the meta device, so task {adapter_name!r} cannot be saved; load it in full first"
            )
        return {unwrapped(name): tensor for name, tensor in found.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LiLoRAConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        own = [layer.lilora_U[adapter_name] for layer in adapted_layers(model).values()]
        # Made to be loaded, and still as it was made: nothing is lost when a load that fails takes it away again.
        fresh = config.shared_fingerprint is not None and all(u.is_meta or not u.any() for u in own)
        try:
            check_loadable(
                model, config, adapter_name, state_dict, fresh, _caller()[0].startswith("transformers.trainer")
            )
        except UserError:
            if fresh:
                base = model.get_base_model() if isinstance(model, PeftModel) else model
                rollback(base, model.peft_config, adapter_name)
            raise
        for layer in adapted_layers(model).values():
            layer.make_room(adapter_name)
        here = {unwrapped(name): name for name, _ in model.named_modules()}
        paths = ((name.rpartition("."), tensor) for name, tensor in state_dict.items())
        state_dict = {f"{here.get(path, path)}.{kind}": tensor for (path, _, kind), tensor in paths}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        refuse_both(kwargs.get("task_ids"), names)
        with self.task_ids([None if name == "__base__" else name for name in names]):
            yield

    @contextmanager
    def task_ids(self, task_ids: TaskIds) -> Iterator[None]:
        """Run the forward inside with these tasks, as with its argument `task_ids`."""
        tasks = self.model.lilora_tasks
        ids, known = tasks.ids(task_ids, None, device_of(self.model))
        with tasks.use(BatchContext(ids, ids=known)):
            yield


def refuse_both(task_ids: TaskIds | None, adapter_names: list[str] | None) -> None:
    """UserError where a forward is told the tasks of its samples in both ways."""
    if task_ids is not None and adapter_names is not None:
        raise UserError("task_ids and adapter_names both say which task each sample has; pass one of them")


def chosen_experts(model: nn.Module, config: LiLoRAConfig) -> list[str]:
    """The names of the Parameters of routed experts that a config with `experts` adapts; UserError for none."""
    found, chosen = routed_experts(model), copy(config)
    chosen.target_modules = list(found)
    kept = [path for path in found if check_target_module_exists(chosen, path) is True]  # as exclude_modules says
    if not kept:
        raise UserError(
            f"experts is true, but {type(model).__name__} has no routed experts to adapt of those that transformers runs through "
            "its experts interface; leave experts out"
        )
    return [f"{path}.{name}" for path in kept for name in found[path]]


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _require_fixed(model: nn.Module) -> None:
    """UserError where A and B0 train with the task `default`: TRL's reference, another task, would train with them."""
    for path, layer in adapted_layers(model).items():
        for shared in (layer.lilora_A, layer.lilora_B):
            if shared["default"].requires_grad:
                raise UserError(
                    f"TRL takes a second task as the reference of 'default', and {path} shares A and B0 with it, which train; "
                    "give the trainer the base model and peft_config=..., or ref_model=..., or train a later task of a chain"
                )


def _caller() -> tuple[str, str]:
    """(module, function) of the code that has called PEFT or this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("peft", "lilora"):
        frame = frame.f_back
    return ("", "") if frame is None else (frame.f_globals.get("__name__", ""), frame.f_code.co_name)


def rollback(model: nn.Module, configs: dict[str, LiLoRAConfig], adapter_name: str) -> None:
    """Remove a task that could not be added or loaded, as if it had never been there."""
    tasks = model.lilora_tasks
    tasks.remove(adapter_name, forget=True)
    delete_adapter(model, adapter_name, LiLoRAModel.prefix, Linear)
    for name, module in list(model.named_modules()):
        layer = module.layers[0] if isinstance(module, Experts) else module
        if isinstance(layer, Linear) and not isinstance(module, ExpertLinear) and not layer.lilora_U:
            replace_module(model, name, module.base_layer)
    configs.pop(adapter_name, None)
    if not tasks.known:
        detach(model)


def _route_module(
    tasks: Tasks, path: str, place: str | None, module: nn.Module, args: tuple, kwargs: dict
) -> tuple[tuple, dict] | None:
    """Let a module of modules_to_save run each sample of a routed batch by its own task's copy."""
    context = tasks.current
    if context is None or context.task is None:
        return None
    what = f"{path}, a module in modules_to_save,"
    if context.ids is None:
        raise UserError(
            f"{what} picks its copies on the host, which a compiled model cannot; compile none with task_ids"
            if torch.compiler.is_compiling()
            else f"{what} picks its copies on the host; pass task_ids as names, or as a tensor on the CPU"
        )
    if not args or not isinstance(args[0], Tensor) or args[0].dim() == 0:
        raise UserError(
            f"{what} gets no tensor as its first argument, so whose its rows are cannot be told; leave it out"
        )
    try:
        ids = context.ids_of(args[0], place, what.rstrip(","))
    except ValueError as error:
        raise UserError(str(error)) from None
    names = ["__base__" if i < 0 else tasks.names[i] for i in ids]
    for name in set(names) - {"__base__"}:
        copies = getattr(module, "modules_to_save", {})
        if name not in copies:
            raise UserError(f"{what} has no copy of task {name!r}; give all tasks the same modules_to_save")
        frozen = not any(p.requires_grad for p in copies[name].parameters())
        if frozen and module.training and torch.is_grad_enabled() and tasks.train and name in tasks.active:
            raise UserError(
                f"{what} does not train for task {name!r}, whose factors do; make tasks that train together active with "
                "model.set_adapter([...])"
            )
    return args, kwargs | {"adapter_names": names}


def task_tensors(layers: dict[str, LiLoRALinear], task: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the task's own tensors, the shared ones) of adapted layers by path, as a bank names them: the model's own memory."""
    own, shared = {}, {}
    for path, layer in layers.items():
        layer.onload()
        own[f"{path}.U"], own[f"{path}.V"] = layer.lilora_U[task], layer.lilora_V[task]
        if layer.fusion:
            own[f"{path}.fusion"] = layer.lilora_fusion[task]
        shared[f"{path}.A"], shared[f"{path}.B0"] = layer.lilora_A[task], layer.lilora_B[task]
    return own, shared


def shared_fingerprint(model: nn.Module) -> str | None:
    """`fingerprint` of every A and B0; None without any, or without their data (meta device)."""
    shared = {
        f"{name}.{key}": tensor
        for name, layer in adapted_layers(model).items()
        for key, tensors in (("A", layer.lilora_A), ("B0", layer.lilora_B))
        for tensor in list(tensors.values())[:1]
    }
    return fingerprint(shared) if shared and not any(tensor.is_meta for tensor in shared.values()) else None


@torch.no_grad()
def fingerprint(shared: dict[str, Tensor]) -> str:
    """16 hex digits over the values of shared factors (as fp32, so a cast that loses nothing keeps it)."""
    digest = hashlib.sha256()
    for name in sorted(shared, key=lambda name: name.rpartition(".")):
        digest.update(f"{name}{list(shared[name].shape)}".encode())
        digest.update(bytes_of(full_tensor(shared[name].detach()).float().cpu()))
    return digest.hexdigest()[:16]


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor in full, by a collective of all processes; any other as it is. Gradients pass."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor
