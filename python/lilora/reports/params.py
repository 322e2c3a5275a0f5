"""Parameter accounting without weights: what each method stores for a sequence of tasks."""

import re
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from rich.table import Table
from torch import nn
from transformers import AutoConfig

from lilora.errors import UserError, shortened
from lilora.families import pattern_error, without_memory
from lilora.families import target_modules as found_targets
from lilora.methods import METHODS
from lilora.methods.lilora import LiLoRA
from lilora.peft.config import LiLoRAConfig
from lilora.peft.tuner import chosen_experts
from lilora.terminal import millions
from lilora_kernels.layers.base import is_conv1d, sizes_of
from lilora_kernels.layers.experts import ExpertWeight
from lilora_kernels.layers.lilora import RANK, default_sub_rank

_SHIPPED = Path(__file__).parents[1] / "model_configs"  # one folder with a config.json per model
_SHIPPED_ALIASES = {"llava-hf/llava-1.5-7b-hf": "llava-1.5-7b"}
_MIB_PER_BF16 = 2 / 2**20
LARGE = 0.01  # share of the model from which a task's own parameters are many


@dataclass(frozen=True)
class Accounting:
    """Number of parameters that methods add to one model; `r` and `sub_rank` are the ranks R and S."""

    model: str
    base: int  # parameters of the model itself
    linears: int  # adapted linear layers
    r: int
    sub_rank: int
    shared_a: int  # A of all layers: stored once for all tasks
    shared_b0: int  # B0 of all layers: stored once for all tasks
    per_task: int  # U, V and fusion of all layers: stored for each task
    lora_per_task: int  # A and B of a plain LoRA of rank r
    kept: dict[str, tuple[int, int]]  # by method, what inference keeps: for all tasks, and for each
    target_modules: str  # the regular expression that the names of the linear layers match
    experts: int = 0  # adapted linears of routed experts, all with factors of their own; counted in all of the above
    expert_r: int | None = None
    expert_sub_rank: int | None = None
    experts_per_task: int = 0  # their part of per_task

    @property
    def warning(self) -> str | None:
        """What to do where a task's own parameters are more than a hundredth of the model's because of its experts."""
        if not self.experts or self.per_task <= self.base * LARGE:
            return None
        return (
            f"a task takes {self.per_task / 1e9:.2f} billion parameters, {self.per_task / self.base:.1%} of the model's: each of "
            f"{self.experts:,} expert linears has factors of its own; lower expert_sub_rank, which is {self.expert_sub_rank}"
        )

    def total(self, method: str, tasks: int) -> int:
        """Parameters kept after `tasks` tasks by one of the methods in `kept`."""
        once, own = self.kept[method]
        return once + tasks * own

    def to_dict(self, tasks: int) -> dict[str, Any]:
        """JSON-able form with every count, and the totals for `tasks` tasks in parameters and in MiB at bf16."""
        totals = {method: self.total(method, tasks) for method in self.kept}
        return {
            **vars(self),
            "tasks": tasks,
            "per_task_share_of_lora": self.per_task / self.lora_per_task,
            "warning": self.warning,
            "total": totals,
            "mib_bf16": {
                "shared": mib(self.shared_a + self.shared_b0),
                "per_task": mib(self.per_task),
                "lora_per_task": mib(self.lora_per_task),
                "total": {method: mib(count) for method, count in totals.items()},
            },
        }

    def _of_experts(self) -> str:
        if not self.experts:
            return ""
        ranks = f"r {self.expert_r}, sub_rank {self.expert_sub_rank}"
        return f"\n{self.experts:,} adapted expert linears, {ranks}: {millions(self.experts_per_task)} a task"

    def table(self, tasks: int) -> Table:
        """The same for people: a rich table of parameters and MiB at bf16, for `tasks` tasks."""
        table = Table(
            title=f"{self.model}\n{self.base / 1e9:.2f} B parameters, {self.linears} adapted linears, "
            f"r {self.r}, sub_rank {self.sub_rank}" + self._of_experts(),
            caption="M: million parameters; MiB: at bf16\npclr: its pool at the cap, without keys",
        )
        table.add_column("method")
        for heading in ("shared", "per task", f"{tasks} tasks", "share of a\nLoRA per task"):
            table.add_column(heading, justify="right")
        for method, (once, own) in self.kept.items():
            total = self.total(method, tasks)
            sizes = [f"{millions(count)}\n{mib(count):,.1f} MiB" if count else "" for count in (once, own)]
            sizes.append(f"{millions(total)}\n{mib(total):,.1f} MiB" if total else "0")
            table.add_row(method, *sizes, f"{total / (tasks * self.lora_per_task):.1%}", end_section=True)
        return table


def mib(parameters: int) -> float:
    """Size of that many parameters in MiB at bf16."""
    return parameters * _MIB_PER_BF16


def count(
    model: nn.Module,
    target: str,
    r: int,
    sub_rank: int,
    name: str = "model",
    expert_ranks: tuple[int, int | None] | None = None,
) -> Accounting:
    """Count what adapting the linears of `model` whose names fully match the regular expression `target` adds.

    expert_ranks: (expert_r, expert_sub_rank) to adapt the routed experts too, which LiLoRA alone does: `kept` has no other
    method then. Reads shapes only, so a model on the meta device will do. UserError when no linear matches, or for no
    expression.
    """
    if reason := pattern_error(target):
        raise UserError(f"target_modules is {shortened(target)}, which is no regular expression ({reason}); mend it")
    for rank_name, rank in (("r", r), ("sub_rank", sub_rank)):
        if rank < 1:
            raise UserError(f"{rank_name} is {rank}; it must be at least 1")
    if sub_rank > r:
        raise UserError(f"sub_rank is {sub_rank} and r is {r}; give at most r")
    if expert_ranks is not None:
        return _with_experts(count(model, target, r, sub_rank, name), model, target, *expert_ranks)
    shapes = [
        sizes_of(module)[::-1]
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and re.fullmatch(target, path)
    ]
    if not shapes:
        raise UserError(
            f"target_modules {target!r} matches no linear layer of {name}; give a pattern on its module names"
        )
    shared_a = sum(r * k for _, k in shapes)
    shared_b0 = sum(n * r for n, _ in shapes)
    sizes = {"r": r, "sub_rank": sub_rank}
    kept = {}
    for method_name, method in METHODS.items():
        options = method.settings_type.options()
        given = {options[option]: size for option, size in sizes.items() if option in options}
        try:
            settings = method.read_settings({"target_modules": target, **given})
        except UserError:  # it cannot have these sizes
            continue
        counted = method.inference_parameters(settings, shapes)
        if counted is not None:
            kept[method_name] = counted
    return Accounting(
        model=name,
        base=sum(parameter.numel() for parameter in model.parameters()),
        linears=len(shapes),
        r=r,
        sub_rank=sub_rank,
        shared_a=shared_a,
        shared_b0=shared_b0,
        per_task=sum(n * sub_rank + sub_rank * r + 1 for n, _ in shapes),
        lora_per_task=shared_a + shared_b0,
        kept=kept,
        target_modules=target,
    )


def _with_experts(dense: Accounting, model: nn.Module, target: str, r: int, sub_rank: int | None) -> Accounting:
    config = LiLoRAConfig(target_modules=target, experts=True, expert_r=r, expert_sub_rank=sub_rank).of_experts()
    shapes = []
    for path in chosen_experts(model, config):
        module, _, name = path.rpartition(".")
        weight = ExpertWeight(model.get_submodule(module), name)
        shapes += [(weight.out_features, weight.in_features)] * weight.experts
    shared, own = LiLoRA.inference_parameters(config, shapes)
    a = sum(r * k for _, k in shapes)
    once, each = dense.kept["lilora"]
    return replace(
        dense,
        shared_a=dense.shared_a + a,
        shared_b0=dense.shared_b0 + shared - a,
        per_task=dense.per_task + own,
        lora_per_task=dense.lora_per_task + shared,
        kept={"lilora": (once + shared, each + own)},
        experts=len(shapes),
        expert_r=r,
        expert_sub_rank=config.sub_rank,
        experts_per_task=own,
    )


def account(
    model: str,
    *,
    r: int = RANK,
    sub_rank: int | None = None,
    target_modules: str | None = None,
    projector: bool | None = False,
    attention: bool = False,
    expert_ranks: tuple[int, int | None] | None = None,
) -> Accounting:
    """`count` for a model given by name: a shipped one (`llava-1.5-7b`), a folder with config.json, or a hub id.

    Only the configuration is read; the model is built on the meta device, without weights. `target_modules` replaces
    the preset of the model's family (`lilora.families.target_modules`), which `projector` and `attention` widen. sub_rank is
    r // 2 if not given. expert_ranks: as in `count`, with expert_r // 2 for None.
    """
    sub_rank = default_sub_rank(r) if sub_rank is None else sub_rank
    shipped = _SHIPPED / _SHIPPED_ALIASES.get(model, model)
    source = shipped if shipped.is_dir() else model
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        built = without_memory(config)
    except (OSError, ValueError, StrictDataclassError) as error:
        cause = textwrap.shorten(str(error), 200, placeholder=" ...").rstrip(".")
        shipped_names = ", ".join(sorted(path.name for path in _SHIPPED.iterdir()))
        raise UserError(
            f"model {model!r} cannot be built from its configuration ({cause}); "
            f"give a shipped name ({shipped_names}), a folder with a config.json, or a hub id"
        ) from error
    target = target_modules or found_targets(built, projector=projector, attention=attention)
    return count(built, target, r, sub_rank, model, expert_ranks)
