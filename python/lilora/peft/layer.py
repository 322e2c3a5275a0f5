"""The PEFT tuner layer: LiLoRALinear with PEFT's names for the same things."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from lilora.errors import UserError
from lilora.module_names import unwrapped
from lilora_kernels import LiLoRAExperts, LiLoRALinear
from lilora_kernels.layers import experts
from lilora_kernels.routing.context import Tasks

from .config import LiLoRAConfig


class Linear(LiLoRALinear, BaseTunerLayer):
    """One adapter per task. A and B0 lie under every adapter's name, as one Parameter each."""

    adapter_layer_names = ("lilora_U", "lilora_V", "lilora_fusion")
    other_param_names = ("lilora_A", "lilora_B")
    cast_input_dtype_enabled = True  # for peft.helpers.disable_input_dtype_casting; we never cast the input

    def __init__(self, base_layer: nn.Module, config: LiLoRAConfig, tasks: Tasks, **quantization: Any) -> None:
        LiLoRALinear.__init__(
            self,
            base_layer,
            r=config.r,
            sub_rank=config.sub_rank,
            alpha=config.alpha,
            dropout=config.dropout,
            fusion=config.fusion,
            train_a=config.train_a,
            train_b0=config.train_b0,
            freeze_base=False,  # PEFT's own business, and undone with a task that cannot be added
        )
        self.model_tasks = tasks
        self.quantization_backend = resolve_quantization_backend(base_layer, **quantization)
        self._disable_adapters = False
        self._active_adapter: list[str] = []

    # --- PEFT's view of the state -----------------------------------------------------------------------------------

    @property
    def merged_adapters(self) -> list[str]:
        return [] if self.merged_task is None else [self.merged_task]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.set_task(*(name for name in names if name in self.lilora_U), train=not inference_mode)
        self._active_adapter = names

    def set_task(self, *names: str, train: bool = True) -> None:
        super().set_task(*names, train=train)
        self._active_adapter = list(names)

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.train_shared(enabled)
        self.model_tasks.disabled = not enabled

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self.train_shared(any(own.requires_grad for task in self.active for own in self._own(task)))

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Called after a load with low_cpu_mem_usage. PEFT's own would also round to the base weight's dtype."""
        device = device or self.empty(0).device
        if device.type == "meta":  # of a base that is still to be dispatched, its adapters with it
            return
        for kind in (*self.other_param_names, *self.adapter_layer_names):
            parameters = getattr(self, kind)
            if adapter_name in parameters and not parameters[adapter_name].is_meta:
                parameters[adapter_name].data = parameters[adapter_name].data.to(device)

    def make_room(self, adapter_name: str) -> None:
        """Let a load find memory where the parameters have none, as on a base that is still to be dispatched."""
        for kind in self._kinds:
            own = kind.get(adapter_name)
            if own is not None and own.is_meta:
                kind[adapter_name] = nn.Parameter(torch.empty_like(own, device="cpu"), requires_grad=own.requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name not in self.lilora_U:
            return
        was_active = adapter_name in self.active
        self.delete_task(adapter_name)
        if was_active and not self.active and self.tasks:
            warnings.warn(f"{adapter_name} was active; {self.tasks[0]} is active now", stacklevel=2)
            self.set_task(self.tasks[0], train=self.model_tasks.train)
        self._active_adapter = list(self.active)

    # --- forward and merging ----------------------------------------------------------------------------------------

    def _adapter(self, x: Tensor, task: Tensor | None = None) -> tuple | None:
        if self._disable_adapters:
            self.unmerge()
            return None
        return super()._adapter(x, task)

    def unfused_reason(self) -> str | None:
        if self.quantization_backend is not None:
            return f"the base is quantised ({self.quantization_backend.backend_name})"
        return super().unfused_reason()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: a task is a LoRA of rank r, so `peft.convert_to_lora(model, r, task)` is exact up to rounding."""
        return True

    def get_delta_weight(self, adapter: str) -> Tensor:
        return self.delta_weight(adapter)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active adapter, or the one named, to the base weight; safe_merge checks for NaN and inf before.

        A quantised weight is dequantised, added to and quantised again, and so it is by `unmerge`: each rounds it anew.
        Backends without a way back (GPTQ, AWQ, ...) raise.
        """
        name, merged = self.merged_weight(adapter_names, safe_merge)
        if name is None:
            return
        if self.quantization_backend is not None:
            again = self.quantization_backend.backend_name
            warnings.warn(f"merging rounds the base weight to {again} again, and unmerging too", stacklevel=2)
        self._write_base(merged)
        self.merged_task = name

    @torch.no_grad()
    def merged_weight(self, adapter_names: list[str] | None, safe_merge: bool) -> tuple[str | None, Tensor | None]:
        """(the adapter to merge, the base weight with it), as `merge` is asked for; (None, None) with nothing to do."""
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return None, None
        for name in names:
            self._require(name)
        if len(names) > 1 or self.merged_task is not None:
            raise UserError(f"cannot merge {names} together; a LiLoRA model holds one merged task at a time")
        if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
            raise UserError(
                f"a task cannot be merged into a base quantised by {self.quantization_backend.backend_name}; run it "
                "unmerged, or export it"
            )
        if self.quantization_backend is None:
            self.require_own_weight()
        weight = self.get_base_weight()
        merged = weight + self.delta_weight(names[0]).to(weight.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise UserError(f"NaNs detected in the merged weights; the adapter {names[0]} seems to be broken")
        return names[0], merged

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.merged_task is None:
            return
        weight = self.get_base_weight()
        self._write_base(weight - self.delta_weight(self.merged_task).to(weight.dtype))
        self.merged_task = None

    def _write_base(self, weight: Tensor) -> None:
        """As PEFT does, and autograd sees it: the backward of a forward before it raises."""
        self.set_base_weight(weight)
        own = self.get_base_layer().weight
        if not own.is_inference():
            torch.autograd.graph.increment_version(own)

    def __repr__(self) -> str:
        return "lilora." + super().__repr__()


class ExpertLinear(Linear, experts.ExpertLinear):
    """One linear of all routed experts of a module."""


class Experts(LiLoRAExperts):
    """Routed experts with an adapter per expert and task."""

    def __init__(self, base_layer: nn.Module, config: LiLoRAConfig, tasks: Tasks) -> None:
        super().__init__(base_layer, ExpertLinear, config=config.of_experts(), tasks=tasks)


def adapted_layers(model: nn.Module) -> dict[str, Linear]:
    """Adapted layers by their path in the base model, without the wrappers that PEFT puts around it."""
    return {
        unwrapped(name).removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, Linear)
    }
