"""Which backend and plan every adapted layer of a model will run, and why not the others."""

import re

import torch

from .backends import BACKENDS, PLANS, forced, plans, unsupported_reasons
from .layers.base import AdaptedLinear
from .layers.mlp import pairs


def explain(model: torch.nn.Module) -> str:
    """The backend and plan that adapted linears will run, and why the other backends will not: a line for all that are alike.

    A layer is judged by its base weight's device and dtype: that of the activations it expects. Below them, the plans that
    each backend has for `linear` and `delta`.
    """
    alike: dict[str, list[str]] = {}
    paired, wanted, plan = pairs(model), forced["backend"], forced["plan"]
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
        alike.setdefault(f"{runs}, {fused} [{others}]", []).append(path or type(layer).__name__)
    if not alike:
        return "no adapted layer in this model"
    lines = [f"{together(paths)}: {text}" for text, paths in alike.items()]
    for name in ("plans", *BACKENDS):
        ops = [[op for op in ("linear", "delta") if plan in plans(op).get(name, [])] for plan in PLANS]
        cells = PLANS if name == "plans" else [", ".join(has) or "-" for has in ops]
        lines.append("  ".join(f"{cell:13}" for cell in (name, *cells)).rstrip())
    return "\n".join(lines)


def together(paths: list[str]) -> str:
    """Names of layers, those that differ in one number as one: layers.0-3.up_proj, layers.5.down_proj."""
    of_form: dict[tuple[str, ...], list[list[str]]] = {}
    for path in paths:
        *words, last = re.split(r"(?<![^.])(\d+)(?![^.])", path)
        of_form.setdefault((*words[::2], last), []).append(words[1::2])
    return ", ".join(_joined(form, numbers) for form, numbers in of_form.items())


def _joined(form: tuple[str, ...], numbers: list[list[str]]) -> str:
    columns = [list(dict.fromkeys(column)) for column in zip(*numbers, strict=True)]
    if sum(len(column) > 1 for column in columns) > 1:  # as of experts in layers
        return f"{'*'.join(form)} ({len(numbers)})"
    between = [_ranges(sorted(map(int, column))) for column in columns]
    return "".join(word + number for word, number in zip(form, [*between, ""], strict=True))


def _ranges(numbers: list[int]) -> str:
    ends: list[list[int]] = []
    for number in numbers:
        if ends and number == ends[-1][1] + 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)
