"""Every family can do what a user wants of it, or is refused with a sentence: the tables of families are the outcome.

`make families` runs all cells; without `--record` training, mixed batches, projectors and towers of every family run, and the
rest of a few that stand for others.
"""

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.families import (
    TASKS,
    adapted,
    alone,
    base,
    batch,
    close,
    gradients,
    gradients_are_the_sum_of_those_of_samples,
    logits,
    rows_are_those_of_single_tasks,
)
from support.family_configs import CLASSIFIERS, FAMILIES, NO_IMAGES, SEVERAL_NONE_ONE, VOCABULARY
from torch import nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend

from lilora.bank.export import export_lora
from lilora.errors import UserError
from lilora.families import target_modules, vision_tower
from lilora.methods import make_method
from lilora.methods.pclr.queries import CLASS_TOKENS
from lilora_kernels.layers.lilora import set_task
from lilora_kernels.routing.placement import decoder_of

NAMES = ["count", "where", None]


def all_adapted(name):
    """The model with adapters in projector and attention too, as far as the family has them."""
    if name in CROSS_ATTENTION:
        return adapted(name)
    return adapted(
        name, "projector" if applies(name, "projector") and (name, "projector") not in REFUSED else "attention"
    )


# --- what a family has to do ------------------------------------------------------------------------------------------


def train(name):
    """One task trains, with images in the batch; parameters of the others get no gradient."""
    samples = batch(name, FAMILIES[name].batches[0])
    model, inputs, labels = copy.deepcopy(adapted(name)).train(), samples.inputs(), samples.labels()
    model.set_adapter("read")
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
    model, samples = all_adapted(name), batch(name, FAMILIES[name].batches[0])
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": list(range(33, VOCABULARY))}

    def generated(inputs, **route):
        found = model.generate(**inputs, **route, **options)
        assert found.shape[1] >= 4
        return found[:, -4:]

    got = generated(samples.inputs(), task_ids=NAMES)
    for i, task in enumerate(NAMES):
        assert torch.equal(got[i], alone(model, samples, i, task, generated))
    assert not torch.equal(got, generated(samples.inputs(), task_ids=NAMES[1:] + NAMES[:1]))


def mixed_batch(name):
    """Adapters in the language model; zero, one and several images per sample; gradients add up.

    Attention is adapted too, where no projector has a cell in which it is.
    """
    model, family = adapted(name, "mlp" if applies(name, "projector") else "attention"), FAMILIES[name]
    samples = batch(name, family.batches[0])
    rows_are_those_of_single_tasks(model, samples, NAMES)
    if family.batches[0] == SEVERAL_NONE_ONE:
        rows_are_those_of_single_tasks(model, batch(name, NO_IMAGES), NAMES)
    gradients_are_the_sum_of_those_of_samples(model, samples, ["count", "where", "count"])


def projector(name):
    """Adapters in projector and attention too: each image is projected with its sample's task; gradients add up."""
    model = adapted(name, "projector")
    for images in FAMILIES[name].batches:
        rows_are_those_of_single_tasks(model, batch(name, images), NAMES)
    gradients_are_the_sum_of_those_of_samples(
        model, batch(name, FAMILIES[name].batches[0]), ["count", "where", "count"]
    )


def towers(name):
    """Adapters in every linear layer, ahead of the language model too: rows are those of single tasks."""
    for images in FAMILIES[name].batches:
        rows_are_those_of_single_tasks(adapted(name, "towers"), batch(name, images), NAMES)


def merge(name):
    """Merged into the base weights, a task computes what its adapters computed; unmerged, it is gone."""
    family = FAMILIES[name]
    model, inputs = copy.deepcopy(all_adapted(name)), batch(name, family.batches[0]).inputs()
    plain = logits(base(name), inputs)
    model.set_adapter("count")
    wanted = logits(model, inputs)
    assert (wanted - plain).abs().max() > 0.05 * plain.abs().max()
    model.merge_adapter()
    close(logits(model, inputs), wanted, family.precision)
    model.unmerge_adapter()
    close(logits(model, inputs), wanted, family.precision)
    merged = model.merge_and_unload()
    assert type(merged) is type(base(name))
    close(logits(merged, inputs), wanted, family.precision)


def export(name):
    """Exported as a plain LoRA and read by PEFT, a task computes what it computed here."""
    family = FAMILIES[name]
    model, inputs = all_adapted(name), batch(name, family.batches[0]).inputs()
    model.set_adapter("count")
    wanted = logits(model, inputs)
    model.set_adapter(TASKS[0])
    with tempfile.TemporaryDirectory() as folder:
        export_lora(model, "count", Path(folder) / "lora")
        lora = PeftModel.from_pretrained(base(name), Path(folder) / "lora", autocast_adapter_dtype=False)
    assert lora.peft_config["default"].peft_type == "LORA"
    close(logits(lora, inputs), wanted, family.precision)
    lora.disable_adapter_layers()
    assert (logits(lora, inputs) - wanted).abs().max() > 0.05 * wanted.abs().max()


def compile(name):
    """Forward and backward through one graph of the language model, without breaks, whatever the tasks."""
    torch.compiler.reset()
    family = FAMILIES[name]
    model, inputs = copy.deepcopy(adapted(name)), batch(name, family.batches[0]).inputs()
    text = decoder_of(model.get_base_model())
    blocks, layers = next((n, m) for n, m in text.named_modules() if isinstance(m, nn.ModuleList))
    text.set_submodule(blocks, layers[:1])  # Dynamo takes seconds for every layer
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
        close(y, wanted, family.precision)
        assert found.keys() == gradients_wanted.keys()
        for parameter, gradient in gradients_wanted.items():
            close(found[parameter], gradient, family.precision)
    assert graphs.frame_count == 1


def pclr(name):
    """A pool of ranks chooses for each sample of a batch by its own words and images, in a forward and in a generation."""
    model, family, projector = base(name), FAMILIES[name], (name, "projector") not in REFUSED
    settings = {"target_modules": target_modules(model, projector=projector), "r": 3, "cap": 8, "shared": 2}
    method = make_method("pclr", model, settings)
    data = [batch(name, family.batches[0]).inputs() | {"labels": batch(name, family.batches[0]).labels()}]
    for task in ("one", "two"):
        (stage,) = method.stages(task)
        method.begin(stage, lambda samples: iter(data))
        method.end(stage, lambda samples: iter(data))
    with torch.no_grad():
        for layer in method.layers.values():
            for b in layer.lora_B.values():
                b.normal_(std=0.4)
    vision = method.pool_tasks.source.vision
    if vision.feature == "class":
        class_token_comes_first(method, vision, data[0])
    generates = family.auto not in CLASSIFIERS
    options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": list(range(33, VOCABULARY))}
    for images in family.batches:
        samples = batch(name, images)
        together = method.pool_tasks.queries(model, samples.inputs())
        seen, plain = logits(model, samples.inputs()), logits(base(name), samples.inputs())
        tokens = model.generate(**samples.inputs(), **options)[:, -3:] if generates else None
        pictured = [bool(sample) for sample in images]
        assert together.vision.norm(dim=1).round(decimals=3).tolist() == [float(has) for has in pictured]
        assert (together.text @ together.text.T).fill_diagonal_(0).max() < 1 - 1e-4
        assert (together.vision @ together.vision.T).fill_diagonal_(0).max() < 1 - 1e-6
        assert (seen - plain).abs().flatten(1).amax(1).min() > 0.02 * plain.abs().max()
        for i in range(len(images)):
            one = method.pool_tasks.queries(model, samples.inputs(i))
            close(torch.cat([one.text[0], one.vision[0]]), torch.cat([together.text[i], together.vision[i]]), 1e-5)
            close(logits(model, samples.inputs(i))[0], seen[i], max(family.precision, 1e-5))
            if generates:
                assert torch.equal(model.generate(**samples.inputs(i), **options)[0, -3:], tokens[i])


def class_token_comes_first(method, vision, inputs):
    """Of what the tower's blocks are given, another class token changes the first token of each image, and no other."""
    given, blocks = [], vision_tower(method.model)[2]
    (token,) = (p for n, p in vision_tower(method.model)[1].named_parameters() if n.endswith(CLASS_TOKENS))
    hook = blocks[0].register_forward_pre_hook(lambda _, args, kwargs: given.append(args[0].clone()), with_kwargs=True)
    for _ in range(2):
        with torch.no_grad():
            token.normal_()
        method.pool_tasks.queries(method.model, inputs)
    hook.remove()
    changed = (given[0] - given[1]).abs().amax(-1) > 1e-9
    assert changed[:, 0].all()
    assert not changed[:, 1:].any()


BEHAVIOURS = {
    b.__name__.replace("_", " "): b
    for b in (train, generate, mixed_batch, projector, towers, merge, export, compile, pclr)
}
_UNKNOWN = "nothing tells where it is"
_RAW = "its weight is a raw Parameter and no linear layer"
_NOT_BELOW = r"is not below the model's decoder, and nothing tells whose the .* rows are that it sees of"
_ONE_BY_ONE = r"projector\.linear_1, ahead of the language model, sees .* rows, which .* do not explain"
_SUBCLASS = "not an nn.Linear: nothing says that its forward runs"
_NO_TOWER = "has no vision tower of transformer blocks that queries could come from"
CROSS_ATTENTION = {"mllama"}  # of text to tiles of images: whose these rows are is not known
REFUSED = {
    **{(name, "pclr"): _NO_TOWER for name in ("kosmos-2.5", "mllama", "phi4_multimodal", "t5gemma2")},
    ("aria", "towers"): _SUBCLASS,  # the projector's nn.MultiheadAttention
    ("gemma3", "projector"): _RAW,
    ("got_ocr2", "towers"): "vision_tower.* ahead of the language model, sees .* do not explain",  # windows of images
    ("kosmos-2.5", "projector"): _UNKNOWN,
    ("kosmos-2.5", "towers"): _NOT_BELOW,
    ("lfm2_vl", "projector"): _ONE_BY_ONE,
    ("lfm2_vl", "towers"): _ONE_BY_ONE,
    ("llama4", "towers"): _SUBCLASS,  # the router
    ("mllama", "projector"): _UNKNOWN,
    ("mllama", "towers"): _NOT_BELOW,
    ("paddleocr_vl", "projector"): _ONE_BY_ONE,
    ("paddleocr_vl", "towers"): _ONE_BY_ONE,
    ("phi4_multimodal", "compile"): "Data-dependent branching",  # its own forward asks whether there are images
    ("phi4_multimodal", "projector"): _UNKNOWN,
    ("phi4_multimodal", "towers"): _SUBCLASS,  # the pooling head's nn.MultiheadAttention
    ("t5gemma2", "projector"): _RAW,
    ("t5gemma2", "towers"): _NOT_BELOW,
}


def applies(name, behaviour):
    family = FAMILIES[name]
    if behaviour in ("projector", "towers", "pclr"):
        return family.text and family.batches != (NO_IMAGES,)
    return behaviour not in ("generate", "compile") or family.auto not in CLASSIFIERS


CELLS = [(name, behaviour) for name in FAMILIES for behaviour in BEHAVIOURS if applies(name, behaviour)]
# Families of which each stands for others of its structure in what `make test` runs of few.
STANDING = {
    "llava", "llava_onevision", "qwen2_5_vl", "idefics3", "gemma4", "glm4v_moe", "qwen3_vl_moe", "blip-2", "mllama", "florence2",
    "gpt2", "t5", "falcon_h1", "bert (classification)", "vit",
}  # fmt: skip
OF_ALL = {"train", "mixed batch", "projector", "towers"}


def cell(name, behaviour):
    few = name not in STANDING and behaviour not in OF_ALL
    return pytest.param(name, behaviour, id=f"{name}-{behaviour}", marks=pytest.mark.recorded if few else ())


@pytest.mark.parametrize("name, behaviour", [cell(*both) for both in CELLS])
def test_cell(name, behaviour, record_property):
    record_property("cell", (name, behaviour))
    reason = REFUSED.get((name, behaviour))
    if reason is None:
        BEHAVIOURS[behaviour](name)
        return
    with pytest.raises((UserError, ValueError, Unsupported), match=reason) as refusal:
        BEHAVIOURS[behaviour](name)
    if isinstance(refusal.value, Unsupported):
        record_property("refused", "torch.compile: Data-dependent branching in the model's own forward")
        return
    assert "\n" not in str(refusal.value)
    record_property("refused", str(refusal.value).partition(";")[0])
