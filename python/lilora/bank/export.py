"""A task as a plain LoRA, in the folder format that PEFT writes and that vLLM, SGLang and LoRAX read too."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from lilora.errors import UserError
from lilora.families import pattern_of
from lilora.module_names import unwrapped
from lilora.peft.tuner import task_tensors
from lilora_kernels import LiLoRALinear
from lilora_kernels.layers.experts import ExpertLinear
from lilora_kernels.ops.delta.reference import up_projections

from .atomic import new_folder
from .hub import write_card

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # of every name of a tensor in PEFT's files
LIKE_EXPERTS = {
    "gate",
    "gate_proj",
    "up_proj",
    "down_proj",
    "w1",
    "w2",
    "w3",
}  # names of parts of routed experts to PEFT


@dataclass(frozen=True)
class PlainLoRA:
    """y += scaling * D(x) A^T B^T; factors: path of each linear -> A [r, K], B [N, r], which may be wider than A.

    Of routed experts: path of a Parameter -> A [E, r, K], B [E, N, r], of another r.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    scaling: float
    dropout: float


def up_projection(path: str, own: dict[str, Tensor], b0: Tensor) -> Tensor:
    """B [N, r] of one linear in b0's dtype: f B0 + (1 - f) U V with the task's own U, V and f; B0 [N, r] if it has none.

    Of routed experts [E, N, r].
    """
    if not own:
        return b0
    fusion = own.get(f"{path}.fusion")
    fusion = None if fusion is None else fusion.to(b0.dtype)
    u, v = (own[f"{path}.{kind}"].to(b0.dtype) for kind in ("U", "V"))
    if b0.dim() == 2:
        return up_projections(b0, u.unsqueeze(0), v.unsqueeze(0), fusion)[0]
    fusions = [None] * len(b0) if fusion is None else fusion.unsqueeze(1)
    parts = zip(b0, u.unsqueeze(1), v.unsqueeze(1), fusions, strict=True)
    return torch.cat([up_projections(*part) for part in parts])


@torch.no_grad()
def plain_lora(
    own: dict[str, Tensor],
    shared: dict[str, Tensor],
    r: int,
    alpha: float,
    dropout: float,
    expert_r: int | None = None,
) -> PlainLoRA:
    """The LoRA that a task is, from its tensors as a bank has them; B is computed, and left, in fp32 at least.

    Raises UserError for an A of other than r ranks (expert_r in routed experts): the scale would be another.
    """
    factors = {}
    for path in [n.removesuffix(".A") for n in shared if n.endswith(".A") and not n.startswith("state.")]:
        b0 = shared[f"{path}.B0"]
        wanted = r if b0.dim() == 2 else expert_r
        if b0.shape[-1] != wanted:
            raise UserError(
                f"tensor {path}.B0 has {b0.shape[-1]} ranks and the settings say {wanted}; restore the bank from a copy"
            )
        wide = b0.to(torch.promote_types(b0.dtype, torch.float32))
        factors[path] = shared[f"{path}.A"], up_projection(path, own, wide)
    return PlainLoRA(factors, alpha / r, dropout)


def write_lora(
    folder: Path,
    lora: PlainLoRA,
    base_model: str | None,
    experts: bool = False,
    saved: dict[str, Tensor] | None = None,
) -> None:
    """PEFT's two files of a LoRA into an existing folder: adapter_config.json and adapter_model.safetensors, in A's dtype.

    Routed experts become PEFT's target_parameters, which it adapts without dropout. experts: whether the model has some,
    adapted or not; names of shared ones say it too. PEFT takes a target module there for a routed expert of transformers 4 by
    the end of its name, so that linears beside the experts are named by their weights. saved: tensors by name of modules that
    take the places of the model's, PEFT's modules_to_save.
    """
    ranks = {path: a.shape[-2] for path, (a, _) in lora.factors.items()}
    routed = [path for path, (a, _) in lora.factors.items() if a.dim() == 3]
    linears = [path for path in lora.factors if path not in routed]
    experts = experts or any("expert" in path for path in lora.factors)
    weights = [path for path in linears if experts and path.split(".")[-1] in LIKE_EXPERTS]
    parameters = routed + [f"{path}.weight" for path in weights]
    modules = [path for path in linears if path not in weights]
    r = ranks[(routed or linears)[0]]
    config = LoraConfig(
        r=r,
        lora_alpha=whole(lora.scaling * r),
        lora_dropout=0.0 if parameters else lora.dropout,
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    # Lists: PEFT would make sets of them, with another order in every process.
    config.target_modules = sorted(modules)
    config.target_parameters = sorted(parameters) or None
    if linears and ranks[linears[0]] != r:  # of modules: PEFT warns of a pattern that Parameters alone match
        pattern = pattern_of([*modules, *(f"{path}.weight" for path in weights)])
        config.rank_pattern = {pattern: ranks[linears[0]]}
        config.alpha_pattern = {pattern: whole(lora.scaling * ranks[linears[0]])}
    config.modules_to_save = sorted({name.rpartition(".")[0] for name in saved or {}}) or None
    config.save_pretrained(str(folder))
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in (saved or {}).items()}
    for path, (a, b) in lora.factors.items():
        place = path
        if a.dim() == 3:
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
            place, _, name = path.rpartition(".")
            place += "" if name == "down_proj" else ".base_layer"  # of two wrappers around one module the inner one
        tensors[f"{PREFIX}{place}.lora_A.weight"], tensors[f"{PREFIX}{place}.lora_B.weight"] = a, b.to(a.dtype)
    write_tensors(folder, tensors)


def whole(number: float) -> float | int:
    return int(number) if number == int(number) else number


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})


def export_lora(model: nn.Module, task: str, folder: str | Path) -> None:
    """Write one LiLoRA task of a model as a plain LoRA into the new or empty `folder`; the model stays as it is.

    model: adapted through PEFT or by hand; compiled or parallel, in whole or in part, or not.
    `PeftModel.from_pretrained(base, folder)` has the logits of the task. Tensors keep the adapter's dtype;
    B = f B0 + (1 - f) U V is computed in fp32 at least. Routed experts become PEFT's target_parameters.

    Raises:
        UserError: no LiLoRA layers, an unknown task, a task that has trained more than its adapters, or a folder in use.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    layers = {
        unwrapped(name).removeprefix(PREFIX): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LiLoRALinear)
    }
    if not layers:
        raise UserError(f"model is a {type(model).__name__} without LiLoRA layers; give one with a trained task")
    experts = [layer for layer in layers.values() if isinstance(layer, ExpertLinear)]
    linears = [layer for layer in layers.values() if not isinstance(layer, ExpertLinear)]
    first = (linears or experts)[0]
    if task not in first.tasks:
        raise UserError(f"task {task!r} is unknown; the model has {', '.join(first.tasks) or 'none'}")
    config = getattr(model, "peft_config", {}).get(task)
    if config is not None and (config.bias != "none" or config.modules_to_save):
        raise UserError(
            f"task {task!r} has trained biases or modules_to_save too, which a plain LoRA for every server cannot hold; "
            "merge it with merge_and_unload and save that model"
        )
    base_model = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    expert_r = experts[0].rank if experts else None
    with new_folder(Path(folder)) as new:
        lora = plain_lora(*task_tensors(layers, task), first.rank, first.alpha, first.dropout, expert_r)
        write_lora(new, lora, base_model, experts=any(".experts." in name for name, _ in model.named_parameters()))
        write_card(
            new,
            task,
            base_model=base_model,
            library="peft",
            tags=["lora", "lilora"],
            sections={"About": f"Task `{task}` of a LiLoRA model, as a plain LoRA.", "Use": lora_use(base_model)},
        )


def lora_use(
    base_model: str | None, loader: str = "AutoModelForImageTextToText", *first: str, options: str = ""
) -> str:
    lines = [
        *first,
        "from peft import PeftModel",
        f"from transformers import {loader}",
        "",
        f'model = {loader}.from_pretrained("{base_model or "BASE"}"{options})',
        'model = PeftModel.from_pretrained(model, "FOLDER-OR-REPOSITORY")',
    ]
    return "\n".join(["```python", *lines, "```"])
