"""Which row belongs to which task, through a whole LLaVA: text rows, packed images, beams, copies, bad ids."""

import pytest
import torch
from support.routed import alone, close, layers_of, logits
from support.tiny_llava import PATCHES, TASKS, batch, randomise, sample, tiny_llava
from torch import nn

from lilora_kernels import BatchContext, LiLoRALinear, attach, route
from lilora_kernels.layers.lilora import set_task
from lilora_kernels.routing.context import AHEAD, TEXT, tasks_of

BATCHES = {
    "one image each": [1, 1, 1, 1],
    "as many images as samples": [2, 0, 1, 1],
    "none for some": [0, 2, 0, 1],
    "several": [2, 1, 2, 1],
    "no image at all": [0, 0, 0, 0],
}


NAMES = ["where", "read", None, "count"]


# --- a mixed batch is its samples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", BATCHES.values(), ids=BATCHES)
def test_a_mixed_batch_equals_its_samples_one_by_one(model, images):
    inputs = batch(images)
    wanted = torch.stack([alone(model, inputs, images, i, name) for i, name in enumerate(NAMES)])
    close(logits(model, inputs, task_ids=NAMES), wanted)
    ids = torch.tensor([-1 if name is None else TASKS.index(name) for name in NAMES])
    close(logits(model, inputs, task_ids=ids), wanted)
    close(logits(model, inputs, task_ids=ids.tolist()), wanted)
    with route(model, NAMES, vision_tokens=[PATCHES * count for count in images]):
        close(logits(model, inputs), wanted)
    # The comparison can only fail if tasks differ.
    assert (logits(model, inputs, task_ids=NAMES[::-1]) - wanted).abs().max() > 0.1 * wanted.abs().max()


def test_every_image_gets_the_task_of_its_sample(model):
    """Two images of the first sample, none of the second: as many images as samples, and both belong to the first."""
    seen = []
    projector = model.model.multi_modal_projector.linear_1
    hook = projector.register_forward_hook(lambda layer, inputs, y: seen.append((inputs[0], y)))
    logits(model, batch([2, 0]), task_ids=["count", "where"])
    hook.remove()
    (x, y), *more = seen
    assert not more
    assert x.shape[:2] == (2, PATCHES)
    set_task(model, "count")
    with torch.no_grad():
        close(y, projector(x))


def test_gradients_of_a_mixed_batch_are_the_sums_over_its_samples(model):
    images, names = [2, 0, 1], ["count", "where", "count"]
    inputs = batch(images)
    set_task(model, *TASKS)
    model(**inputs, task_ids=names).logits.square().sum().backward()
    mixed = gradients(model)
    for i, name in enumerate(names):
        model(**sample(inputs, images, i), task_ids=[name]).logits.square().sum().backward()
    summed = gradients(model)
    assert mixed.keys() == summed.keys()
    for name, gradient in mixed.items():
        if ".read" in name and not name.endswith(("lilora_A.read", "lilora_B.read")):
            assert torch.count_nonzero(gradient) == 0, name
        else:
            torch.testing.assert_close(gradient, summed[name], rtol=1e-3, atol=1e-4 * summed[name].abs().max().item())


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_written_values_are_seen_by_every_way_to_route():
    model, inputs = tiny_llava(), batch([1, 1])
    layers, names = layers_of(model), ["count", "where"]
    vision_tokens = [PATCHES, PATCHES]

    def ways():
        yield logits(model, inputs, task_ids=names)
        with route(model, names, vision_tokens=vision_tokens):
            yield logits(model, inputs)

    before = [y.clone() for y in ways()]
    with torch.no_grad():
        for layer in layers:
            for own in (*layer.lilora_U.values(), *layer.lilora_V.values()):
                own.copy_(torch.randn_like(own) / 3)
    wanted = torch.stack([alone(model, inputs, [1, 1], i, name) for i, name in enumerate(names)])
    for old, new in zip(before, ways(), strict=True):
        assert not torch.equal(old, new)
        close(new, wanted)
    with route(model, names, vision_tokens=vision_tokens), torch.no_grad():
        logits(model, inputs)
        randomise(model)
        within = logits(model, inputs)
    close(within, logits(model, inputs, task_ids=names))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids, error, why",
    [
        (["read"], ValueError, r"shape \[1\]; it must be \[2\]"),
        (["read", "fly"], ValueError, r"'fly' is unknown; this model knows \['read', 'count', 'where'\]"),
        ("read", TypeError, "is 'read'; pass one name or id per sample"),
        ([0, 3], ValueError, "holds 3; known ids are"),
        ([0, -2], ValueError, "holds -2"),
        ([0, 1.0], TypeError, "task names or integer ids"),
        ([0, True], TypeError, "task names or integer ids"),
        (torch.tensor([0.0, 1.0]), TypeError, "torch.float32"),
        (torch.tensor([[0], [1]]), ValueError, r"shape \[2, 1\]"),
    ],
    ids=str,
)
def test_bad_task_ids(model, ids, error, why):
    inputs = batch([1, 1])
    with pytest.raises(error, match=why):
        logits(model, inputs, task_ids=ids)
    with pytest.raises(error, match=why):
        model.generate(**inputs, task_ids=ids, max_new_tokens=2)
    assert tasks_of(model).current is None


def test_images_that_the_route_does_not_explain_raise_with_both_counts(model):
    inputs = batch([1, 1])
    inputs["input_ids"][0, 1] = 5
    with pytest.raises(ValueError, match=r"linear_1.*\[2, 4\] rows.*2 images .* do not explain \[3, 4\] image tokens"):
        logits(model, inputs, task_ids=["read", "count"])


def test_a_route_without_units_takes_them_from_the_batch(model):
    inputs, names = batch([2, 0]), ["read", "count"]
    wanted = logits(model, inputs, task_ids=names)
    with route(model, names):
        close(logits(model, inputs), wanted)


def test_a_batch_of_another_size_than_the_route_raises_with_both_counts(model):
    with (
        pytest.raises(ValueError, match=r"task_ids has the shape \[2\]; it must be \[3\]"),
        route(model, ["read", "count"]),
    ):
        logits(model, batch([0, 0, 0]))


def test_a_model_that_is_not_attached_says_so():
    with pytest.raises(RuntimeError, match=r"call attach\(model\) once"), route(nn.Linear(2, 2), [0]):
        pass


def test_layers_with_other_tasks_cannot_share_a_route():
    layers = [LiLoRALinear(nn.Linear(4, 4), r=2, sub_rank=2) for _ in range(2)]
    layers[0].add_task("a")
    layers[1].add_task("b")
    with pytest.raises(ValueError, match=r"1 has the tasks \['b'\] but other layers have \['a'\]"):
        attach(nn.Sequential(*layers))


# --- Route by itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vision_tokens", [[8, 0, 4], torch.tensor([8, 0, 4])], ids=["eager", "in-graph"])
def test_packed_rows(vision_tokens):
    r = BatchContext(torch.tensor([7, 8, 9], dtype=torch.int32), vision_tokens=vision_tokens)
    assert r.rows(torch.empty(3, 4, 5), AHEAD).tolist() == [7] * 8 + [9] * 4
    assert r.rows(torch.empty(12, 5), AHEAD).tolist() == [7] * 8 + [9] * 4
    assert r.rows(torch.empty(24, 5), AHEAD).tolist() == [7] * 16 + [9] * 8
    # A vision tower's class token: 5 rows per image for 4 image tokens.
    assert r.rows(torch.empty(3, 5, 5), AHEAD).tolist() == [7] * 10 + [9] * 5
    for shape in [(2, 4, 5), (13, 5), (5, 5, 5)]:
        with pytest.raises((ValueError, RuntimeError), match=r"image tokens .* do not explain"):
            r.rows(torch.empty(*shape), AHEAD)


def test_flattened_text_rows():
    r = BatchContext(torch.tensor([1, 0], dtype=torch.int32), length=3)
    assert r.rows(torch.empty(2, 3, 4), TEXT).tolist() == [1, 1, 1, 0, 0, 0]
    assert r.rows(torch.empty(6, 4), TEXT).tolist() == [1, 1, 1, 0, 0, 0]
    assert r.rows(torch.empty(2, 3, 2, 4), TEXT).tolist() == [1] * 6 + [0] * 6
    assert r.rows(torch.empty(2, 4), TEXT).tolist() == [1, 0]
    for shape in [(3, 4), (5, 4), (3, 2, 4)]:
        with pytest.raises(ValueError, match="but the route has 2 samples of 3 tokens"):
            r.rows(torch.empty(*shape), TEXT)
