"""The PEFT tuner model: puts adapters into a model and carries task ids to them."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from peft.functional import delete_adapter
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn

from lilora_kernels import attach, check_task_name
from lilora_kernels.adapted import is_sharded
from lilora_kernels.routing import Routes, detach, route_of_batch

from .config import LiLoRAConfig
from .errors import UserError
from .layer import Linear
from .models import target_modules

SAME_FOR_ALL_TASKS = (
    "r",
    "sub_rank",
    "alpha",
    "dropout",
    "fusion",
    "train_a",
    "train_b0",
    "stability",
)


class LiLoRAModel(BaseTuner):
    """Adapts the linear layers that the config names; made by `peft.get_peft_model(model, LiLoRAConfig(...))`.

    After it, `model(**batch, task_ids=[...])` and `model.generate(..., task_ids=[...])` take one task name or id per
    sample, in training and inference; PEFT's `adapter_names=[...]` means the same.
    """

    prefix = "lilora_"
    tuner_layer_cls = Linear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT reads it; models.py has the patterns

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        routes = model.__dict__.get("lilora_routes") or Routes()
        if adapter_name in routes.tasks:
            raise UserError(f"task {adapter_name!r} exists already; delete it first or choose another name")
        before = list(routes.tasks)
        model.lilora_routes = routes
        try:
            check_task_name(adapter_name)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._check_same_layers(model, adapter_name)
        except Exception:
            self._take_back(model, adapter_name)
            routes.tasks[:] = before
            if not before:
                del model.lilora_routes
            raise
        attach(model)
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper) and not module._forward_pre_hooks:
                module.register_forward_pre_hook(partial(_refuse_route, routes))

    def _check_same_layers(self, model: nn.Module, adapter_name: str) -> None:
        tasks = [task for task in model.lilora_routes.tasks if task is not None]
        for name, layer in adapted_layers(model).items():
            if layer.tasks != tasks:
                raise UserError(
                    f"{name} would have the tasks {layer.tasks}, not {tasks}; all tasks adapt the same layers: give "
                    f"{adapter_name} the target_modules, exclude_modules and layers_to_transform of the others"
                )

    def _take_back(self, model: nn.Module, adapter_name: str) -> None:
        """Remove what an injection that failed half way has added."""
        delete_adapter(model, adapter_name, self.prefix, Linear)
        for name, module in list(model.named_modules()):
            if isinstance(module, Linear) and not module.lilora_U:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.base_layer)
        self.peft_config.pop(adapter_name, None)

    def _unload_and_optionally_merge(self, *args, **kwargs) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        detach(model)
        return model

    def _prepare_adapter_config(self, peft_config: LiLoRAConfig, model_config: dict) -> LiLoRAConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = target_modules(model_config["model_type"])
        return peft_config

    def _check_new_adapter_config(self, config: LiLoRAConfig) -> None:
        super()._check_new_adapter_config(config)
        others = [other for other in self.peft_config.values() if other is not config]
        for name in SAME_FOR_ALL_TASKS if others else ():
            new, old = getattr(config, name), getattr(others[0], name)
            if new != old:
                raise UserError(f"{name} is {new!r}, but the model's other tasks have {old!r}; all tasks share it")
        if others and config.shared_fingerprint is not None and config.on_shared_mismatch == "error":
            current = shared_fingerprint(self.model)
            if current is not None and current != config.shared_fingerprint:
                raise UserError(
                    f"the task was made with the shared factors {config.shared_fingerprint}, but this model has {current}; "
                    "load tasks of one chain together, or set on_shared_mismatch='replace' in its config"
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
            target.add_task(adapter_name)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        quantized = resolve_quantization_backend(base, **self._quantization())
        if not isinstance(base, nn.Linear) and (quantized is None or quantized.layer_type != "linear"):
            raise UserError(
                f"{current_key} is a {type(base).__name__}; LiLoRA adapts linear layers: leave it out of target_modules"
            )
        layer = Linear(target, config, self.model.lilora_routes, **self._quantization())
        layer.add_task(adapter_name)
        self._replace_module(parent, target_name, layer, target)

    def _quantization(self) -> dict:
        return {k: v for k, v in get_quantization_kwargs(self).items() if k == "get_apply_tensor_subclass"}

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for module in self.model.modules():
            if isinstance(module, Linear):
                module.retie()

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        config.shared_fingerprint = shared_fingerprint(model)  # PEFT writes the config after the weights
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        tasks = [None if name == "__base__" else name for name in names]
        with self.model.lilora_routes.use(route_of_batch(self.model, tasks, args, kwargs)):
            yield


def _refuse_route(routes: Routes, module: nn.Module, args: tuple) -> None:
    if routes.current is not None:
        raise UserError(
            "a module in modules_to_save follows the active adapter only; call set_adapter and leave out task_ids, or adapt "
            "without modules_to_save"
        )


def adapted_layers(model: nn.Module) -> dict[str, Linear]:
    """Adapted layers by their path in the base model, without the wrappers that PEFT puts around it."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, Linear)
    }


@torch.no_grad()
def shared_fingerprint(model: nn.Module) -> str | None:
    """16 hex digits over the values of every A and B0 (as fp32, so a cast that loses nothing keeps it); None without."""
    digest = hashlib.sha256()
    layers = adapted_layers(model)
    for name in sorted(layers):
        for key, shared in (("A", layers[name].lilora_A), ("B0", layers[name].lilora_B)):
            for tensor in list(shared.values())[:1]:
                if tensor.is_meta:
                    return None
                digest.update(f"{name}.{key}{list(tensor.shape)}".encode())
                digest.update(fp32_bytes(tensor))
    return digest.hexdigest()[:16] if layers else None


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor in full, by a collective of all processes; any other as it is. Gradients pass."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def fp32_bytes(tensor: Tensor) -> memoryview:
    return (
        whole(tensor.detach()).to(device="cpu", dtype=torch.float32).contiguous().numpy().reshape(-1).view("uint8").data
    )
