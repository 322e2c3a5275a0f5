"""Which backend and plan every adapted layer of a model will run, and why not the others."""

import torch

from .backends import BACKENDS, PLANS, forced, plans, unsupported_reasons
from .layers.base import AdaptedLinear
from .layers.mlp import pairs


def explain(model: torch.nn.Module) -> str:
    """One line per adapted linear: the backend and plan that will run, and why the other backends will not.

    A layer is judged by its base weight's device and dtype: that of the activations it expects. Below them, the plans that
    each backend has for `linear` and `delta`.
    """
    lines, paired, wanted, plan = [], pairs(model), forced["backend"], forced["plan"]
    for path, layer in model.named_modules():
        if not isinstance(layer, AdaptedLinear):
            continue
        reason = layer.unfused_reason()
        partner, unfused = paired.get(layer, (None, None))
        op = "delta" if reason is not None else "delta_pair" if partner and unfused is None else layer.operation
        reasons = unsupported_reasons(op, layer.example(), layer.rank, layer.sub_rank)
        chosen = next((b for b, why in reasons.items() if why is None and wanted in (None, b)), None)
        taken = {plan: "as forced"} if plan else plans(op).get(chosen or "", {})
        runs = f"{chosen or wanted or 'NO BACKEND'} ({', '.join(map(' '.join, taken.items()))})"
        runs += " CANNOT RUN" if chosen is None else ""
        fused = "base and adapter in one operation" if reason is None else f"base_layer(x) + delta, because {reason}"
        if partner:
            fused += f", together with {partner}" if unfused is None else f", apart from {partner}, because {unfused}"
        others = "; ".join(f"{b}: {why}" for b, why in reasons.items() if why is not None)
        lines.append(f"{path or type(layer).__name__}: {runs}, {fused} [{others}]")
    if not lines:
        return "no adapted layer in this model"
    for name in ("plans", *BACKENDS):
        ops = [[op for op in ("linear", "delta") if plan in plans(op).get(name, [])] for plan in PLANS]
        cells = PLANS if name == "plans" else [", ".join(has) or "-" for has in ops]
        lines.append("  ".join(f"{cell:13}" for cell in (name, *cells)).rstrip())
    return "\n".join(lines)
