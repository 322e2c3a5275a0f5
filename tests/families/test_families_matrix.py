"""Every family can do what a user wants of it, or is refused with a sentence: docs/families.md has the outcome of these tests."""

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.families import (
    FAMILIES,
    TASKS,
    adapted,
    alone,
    base,
    batch,
    close,
    logits,
    rows_are_those_of_single_tasks,
)
from torch._dynamo.testing import CompileCounterWithBackend

from lilora.bank.export import export_lora
from lilora.errors import UserError
from lilora.families import target_modules
from lilora_kernels.layers.lilora import set_task

SEVERAL_NONE_ONE = [[0, 1], [], [2]]
AS_MANY_AS_SAMPLES = [[], [1, 0], [2]]
NAMES = ["count", "where", None]


def all_adapted(name):
    """The model with adapters wherever the preset of its family allows them."""
    return adapted(name, projector=(name, "projector") not in REFUSED)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


# --- what a family has to do ------------------------------------------------------------------------------------------


def train(name):
    """One task learns, with images in the batch; parameters of the others get no gradient."""
    model, inputs = copy.deepcopy(adapted(name, projector=False)).train(), batch(name, SEVERAL_NONE_ONE).inputs()
    model.set_adapter("read")
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    own = [n for n in found if n.rpartition(".")[2] == "read"]
    assert {n.split(".")[-2] for n in own} == {f"lilora_{part}" for part in ("A", "B", "U", "V", "fusion")}
    assert len(found) == len(trained) == len(own)
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in found.values())


def generate(name):
    """Tokens of a mixed batch are those of its samples with their task alone."""
    model, samples = all_adapted(name), batch(name, SEVERAL_NONE_ONE)
    options = {"max_new_tokens": 4, "do_sample": False}
    got = model.generate(**samples.inputs(), task_ids=NAMES, **options)
    start = samples.ids.shape[1]
    assert got.shape == (3, start + 4)
    for i, task in enumerate(NAMES):
        assert torch.equal(got[i], alone(model, samples, i, task, lambda inputs: model.generate(**inputs, **options)))
    assert not torch.equal(got, model.generate(**samples.inputs(), task_ids=NAMES[1:] + NAMES[:1], **options))


def mixed_batch(name):
    """Adapters in the language model; zero, one and several images per sample."""
    model = adapted(name, projector=False)
    rows_are_those_of_single_tasks(model, batch(name, SEVERAL_NONE_ONE), NAMES)
    rows_are_those_of_single_tasks(model, batch(name, [[], [], []]), NAMES)


def projector(name):
    """Adapters in projector and attention too: each image is projected with its sample's task; gradients add up."""
    model = adapted(name, projector=True)
    for images in (SEVERAL_NONE_ONE, AS_MANY_AS_SAMPLES):
        rows_are_those_of_single_tasks(model, batch(name, images), NAMES)
    samples, tasks = batch(name, SEVERAL_NONE_ONE), ["count", "where", "count"]
    set_task(model, *TASKS)
    try:
        model(**samples.inputs(), task_ids=tasks).logits.square().sum().backward()
        mixed = gradients(model)
        for i, task in enumerate(tasks):
            model(**samples.inputs(i), task_ids=[task]).logits.square().sum().backward()
        summed = gradients(model)
    finally:
        model.set_adapter(TASKS[0])
    assert mixed.keys() == summed.keys()
    learned = 0
    for parameter, gradient in mixed.items():
        if parameter.split(".")[-2] in ("lilora_A", "lilora_B") or not parameter.endswith(".read"):
            close(gradient, summed[parameter])
            learned += 1
        else:
            assert torch.count_nonzero(gradient) == 0, parameter
    assert learned > 0


def merge(name):
    """Merged into the base weights, a task computes what its adapters computed; unmerged, it is gone."""
    model, inputs = copy.deepcopy(all_adapted(name)), batch(name, SEVERAL_NONE_ONE).inputs()
    plain = logits(base(name), inputs)
    model.set_adapter("count")
    wanted = logits(model, inputs)
    assert (wanted - plain).abs().max() > 0.05 * plain.abs().max()
    model.merge_adapter()
    close(logits(model, inputs), wanted)
    model.unmerge_adapter()
    close(logits(model, inputs), wanted)
    merged = model.merge_and_unload()
    assert type(merged) is type(base(name))
    close(logits(merged, inputs), wanted)


def export(name):
    """Exported as a plain LoRA and read by PEFT, a task computes what it computed here."""
    model, inputs = all_adapted(name), batch(name, SEVERAL_NONE_ONE).inputs()
    model.set_adapter("count")
    wanted = logits(model, inputs)
    model.set_adapter(TASKS[0])
    with tempfile.TemporaryDirectory() as folder:
        export_lora(model, "count", Path(folder) / "lora")
        lora = PeftModel.from_pretrained(base(name), Path(folder) / "lora", autocast_adapter_dtype=False)
    assert lora.peft_config["default"].peft_type == "LORA"
    close(logits(lora, inputs), wanted)
    lora.disable_adapter_layers()
    assert (logits(lora, inputs) - wanted).abs().max() > 0.05 * wanted.abs().max()


def compile(name):
    """Forward and backward through one graph of the language model, without breaks, whatever the tasks."""
    torch.compiler.reset()
    model, inputs = copy.deepcopy(adapted(name, projector=False)), batch(name, SEVERAL_NONE_ONE).inputs()
    inner = model.base_model.model.model
    text = inner.text_model if hasattr(inner, "text_model") else inner.language_model
    text.layers = text.layers[:1]  # Dynamo takes seconds for every layer, and all are alike
    set_task(model, *TASKS)

    def outcomes():
        for mix in ([0, 1, 2], [2, 2, -1], [1, 0, 0], [-1, -1, 1]):
            y = model(**inputs, task_ids=mix).logits
            y.square().sum().backward()
            yield y.detach(), gradients(model)

    eager = list(outcomes())
    graphs = CompileCounterWithBackend("eager")
    text.compile(backend=graphs, fullgraph=True)
    for (y, found), (wanted, gradients_wanted) in zip(outcomes(), eager, strict=True):
        close(y, wanted)
        assert found.keys() == gradients_wanted.keys()
        for parameter, gradient in gradients_wanted.items():
            close(found[parameter], gradient)
    assert graphs.frame_count == 1


BEHAVIOURS = {
    b.__name__.replace("_", " "): b for b in (train, generate, mixed_batch, projector, merge, export, compile)
}
REFUSED = {("gemma3", "projector"): "its weight is a raw Parameter and no linear layer"}
CELLS = [(name, behaviour) for name in FAMILIES for behaviour in BEHAVIOURS]


@pytest.mark.parametrize("name, behaviour", CELLS, ids=[f"{name}-{behaviour}" for name, behaviour in CELLS])
def test_cell(name, behaviour, record_property):
    record_property("cell", (name, behaviour))
    reason = REFUSED.get((name, behaviour))
    if reason is None:
        BEHAVIOURS[behaviour](name)
        return
    with pytest.raises(UserError, match=reason) as refusal:
        target_modules(FAMILIES[name].config(), projector=behaviour == "projector")
    assert "\n" not in str(refusal.value)
    record_property("refused", str(refusal.value).partition(";")[0])
