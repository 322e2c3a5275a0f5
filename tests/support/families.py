"""Tiny models of every family with adapters, batches for them, and what a mixed batch has to compute."""

import gc
from dataclasses import dataclass
from functools import cache

import torch
from peft import get_peft_model
from torch import Tensor

import lilora
from lilora.families import target_modules
from lilora_kernels import LiLoRALinear
from lilora_kernels.layers.lilora import set_task

from .family_configs import CLASSIFIERS, FAMILIES, IMAGE, Family
from .packings import Packing

TASKS = ["read", "count", "where"]


def base(name: str) -> torch.nn.Module:
    """The tiny base model of a family in fp64, with weights large enough that every part shows in the logits."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    model = family.auto.from_config(family.config()).double().eval()
    if model.can_generate():
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    for module in model.modules():  # torch has no grouped product of fp64
        if hasattr(module, "config"):
            module.config._experts_implementation = "batched_mm"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif not parameter.isfinite().all():
                parameter.normal_(std=0.1)
            elif parameter.numel() == 1 and not parameter.any():  # a gate that is closed at first
                parameter.fill_(1.0)
    return model


@cache
def adapted(name: str, where: str = "mlp") -> torch.nn.Module:
    """The tiny model with an adapter for every task, randomised.

    where: "mlp", the language model's; "attention" or "projector", that too (all that the family offers); "towers",
    every linear layer.
    """
    model, pattern = base(name), "all-linear"
    if where != "towers":
        pattern = target_modules(model, projector=where == "projector", attention=where != "mlp")
    model = with_tasks(model, pattern)
    gc.collect()
    gc.freeze()  # it stays: no garbage that accelerate has to look for, twice per training
    return model


def with_tasks(model: torch.nn.Module, target: str | list[str]) -> torch.nn.Module:
    config = lilora.LiLoRAConfig(r=4, sub_rank=2, alpha=8, dropout=0.0, target_modules=target)
    model = get_peft_model(model, config, adapter_name=TASKS[0], autocast_adapter_dtype=False)
    for task in TASKS[1:]:
        model.add_adapter(task, config)
    randomise(model)
    return model.eval()


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, LiLoRALinear):
            for dictionary in (layer.lilora_A, layer.lilora_B, layer.lilora_U, layer.lilora_V, layer.lilora_fusion):
                for parameter in dictionary.values():
                    parameter.normal_(std=0.4)


# --- batches ------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Samples of text and pictures; `inputs()` of all, `inputs(i)` of sample i alone."""

    family: Family
    ids: Tensor
    pictures: list[list[dict]]
    packing: Packing

    def inputs(self, i: int | None = None) -> dict[str, Tensor]:
        rows = slice(None) if i is None else slice(i, i + 1)
        _, inputs = self.packing.pack(self.pictures[rows])
        ids = self.ids[rows]
        inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        if not self.family.text:
            return inputs
        return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | self.family.beside(ids)

    def labels(self) -> Tensor:
        """Of all samples: a class of each, or the answer, which is the last two tokens."""
        inputs = self.inputs()
        if self.family.auto in CLASSIFIERS:
            return torch.arange(len(self.ids)) % 3
        labels = inputs.get("decoder_input_ids", inputs["input_ids"]).clone()
        labels[:, :-2] = -100
        return labels


def batch(name: str, images: list[list[int]], packing: Packing | None = None, token: int = IMAGE) -> Batch:
    """A batch with pictures of these kinds in each sample, a text token between two pictures; the same at every call."""
    torch.manual_seed(1)
    family = FAMILIES[name]
    packing = packing or family.packing
    pictures = [[packing.draw(kind) for kind in sample] for sample in images]
    tokens, _ = packing.pack(pictures)
    length = 6 + max(sum(sample) + len(sample) for sample in tokens)
    ids = torch.randint(3, 33, (len(images), length))
    for row, sample in zip(ids, tokens, strict=True):
        at = 1
        for count in sample:
            row[at : at + count] = token
            at += count + 1
    return Batch(family, ids, pictures, packing)


def logits(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def activate(model, name):
    """Without task_ids, let the model run with one task, or as the base model."""
    model.base_model.enable_adapter_layers() if name else model.base_model.disable_adapter_layers()
    if name:
        model.set_adapter(name)


def alone(model, samples, i, name, call):
    """`call` with sample i in a batch of its own, its task the active one: no route is involved."""
    activate(model, name)
    try:
        return call(samples.inputs(i))[0]
    finally:
        activate(model, TASKS[0])


def close(got, wanted, precision=1e-7):
    assert got.shape == wanted.shape
    worst, scale = (got - wanted).abs().max(), wanted.abs().max()
    assert worst <= precision * scale, f"{worst:.1e} where the full scale is {scale:.1e}"


def rows_are_those_of_single_tasks(model, samples, names):
    wanted = torch.stack(
        [alone(model, samples, i, name, lambda inputs: logits(model, inputs)) for i, name in enumerate(names)]
    )
    close(logits(model, samples.inputs(), task_ids=names), wanted, samples.family.precision)
    changed = (logits(model, samples.inputs(), task_ids=names[1:] + names[:1]) - wanted).abs().flatten(1).amax(1)
    assert (changed > 0.02 * wanted.abs().max()).all(), "a comparison that tasks do not change shows nothing"


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def gradients_are_the_sum_of_those_of_samples(model, samples, names):
    """Of all tasks, which train together; those of a task that is absent, `read`, are zeros."""
    set_task(model, *TASKS)
    try:
        model(**samples.inputs(), task_ids=names).logits.square().sum().backward()
        mixed = gradients(model)
        for i, task in enumerate(names):
            model(**samples.inputs(i), task_ids=[task]).logits.square().sum().backward()
        summed = gradients(model)
    finally:
        model.set_adapter(TASKS[0])
    assert mixed.keys() == summed.keys()
    trained = 0
    for parameter, gradient in mixed.items():
        if parameter.split(".")[-2] in ("lilora_A", "lilora_B") or not parameter.endswith(".read"):
            close(gradient, summed[parameter], samples.family.precision)
            trained += 1
        else:
            assert torch.count_nonzero(gradient) == 0, parameter
    assert trained > 0
