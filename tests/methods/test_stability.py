import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lilora.errors import UserError
from lilora.methods.stability import StabilityLoss
from lilora_kernels import LiLoRALinear

SHAPES = {"wide": (9, 31), "tall": (14, 23), "square": (12, 12)}  # name -> in, out
R, SUB_RANK = 6, 3


def make_layers(tasks=("a", "b", "c"), dtype=torch.float64, shapes=SHAPES):
    """Layers with random parameters; the tasks' U V are alike, so that cosines lie between 0 and 1."""
    layers = {}
    for name, (k, n) in shapes.items():
        base = nn.Linear(k, n, dtype=dtype)
        layers[name] = layer = LiLoRALinear(
            base, r=R, sub_rank=SUB_RANK, alpha=2.0, train_a="always", train_b0="always"
        )
        common_u, common_v = torch.randn(n, SUB_RANK), torch.randn(SUB_RANK, R)
        for task in tasks:
            layer.add_task(task)
            with torch.no_grad():
                layer.lilora_U[task].copy_(common_u + torch.randn_like(common_u))
                layer.lilora_V[task].copy_(common_v + 0.5 * torch.randn_like(common_v))
        layer.lilora_B[tasks[0]].data.normal_()
        layer.set_task(tasks[-1])
    return layers


def move(layers, by=0.3):
    for layer in layers.values():
        b0 = next(iter(layer.lilora_B.values()))
        b0.data += by * torch.randn_like(b0)


def similarities(layers, task):
    for layer in layers.values():
        p = (layer.lilora_U[task] @ layer.lilora_V[task]).double().flatten()
        cosines = []
        for name in layer.tasks[: layer.tasks.index(task)]:
            other = (layer.lilora_U[name] @ layer.lilora_V[name]).double().flatten()
            norm = p.norm() * other.norm()
            cosines.append((p @ other) / norm if norm > 0 else torch.zeros((), dtype=torch.float64))
        yield torch.stack(cosines).mean().clamp(0, 1).detach()


def dense(layers, previous, task, weight):
    """The formula as written, with every U V formed."""
    terms = []
    for (name, layer), c in zip(layers.items(), similarities(layers, task), strict=True):
        change = (layer.lilora_B[task].double() - previous[name].double()).norm() ** 2
        terms.append((1 - c) * change / previous[name].double().norm() ** 2)
    return weight * torch.stack(terms).mean()


def b0s(layers):
    return [next(iter(layer.lilora_B.values())) for layer in layers.values()]


def teacher(layers):
    return {name: b0.detach().clone() for name, b0 in zip(layers, b0s(layers), strict=True)}


@pytest.mark.parametrize("dtype, rel", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-4)])
@pytest.mark.parametrize("task", ["b", "c"])
def test_value_and_gradient_equal_the_dense_formula(task, dtype, rel):
    layers, weight = make_layers(dtype=dtype), 0.7
    assert all(0.05 < c < 0.95 for c in similarities(layers, task)), "the weights must matter"
    loss = StabilityLoss(layers, task, weight)
    previous = teacher(layers)
    assert loss().item() == 0
    move(layers)
    wide = {name: layer.double() for name, layer in copies(layers).items()}
    expected = dense(wide, previous, task, weight)
    got = loss()
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert got.shape == ()
    assert got.item() == pytest.approx(expected.item(), rel=rel)
    gradients = torch.autograd.grad(got, b0s(layers))
    for gradient, truth in zip(gradients, torch.autograd.grad(expected, b0s(wide)), strict=True):
        assert truth.abs().max() > 0
        torch.testing.assert_close(gradient.double(), truth, rtol=max(rel, torch.finfo(dtype).eps), atol=1e-9)


def copies(layers):
    same = make_layers(dtype=b0s(layers)[0].dtype)
    for name, layer in layers.items():
        same[name].load_state_dict(layer.state_dict())
    return same


def test_the_similarity_is_a_weight_and_follows_the_task_as_it_trains():
    layers = make_layers()
    loss = StabilityLoss(layers, "c", 1.0)
    previous = teacher(layers)
    move(layers)
    before = loss()
    before.backward()
    for layer in layers.values():
        assert layer.lilora_U["c"].requires_grad
        assert layer.lilora_U["c"].grad is None
        assert layer.lilora_V["c"].grad is None
        layer.lilora_U["c"].data.normal_()
    after = loss()
    assert after.item() != pytest.approx(before.item(), rel=1e-3)
    assert after.item() == pytest.approx(dense(layers, previous, "c", 1.0).item(), rel=1e-12)


def test_first_task_costs_nothing():
    layers = make_layers()
    loss = StabilityLoss(layers, "a", 1.0)
    move(layers)
    assert loss().item() == 0


def test_a_task_at_its_initialisation_is_unlike_all_others():
    layers = make_layers()
    loss = StabilityLoss(layers, "c", 1.0)
    previous = teacher(layers)
    move(layers)
    for layer in layers.values():
        layer.lilora_U["c"].data.zero_()
    plain = [(b - previous[n]).norm() ** 2 / previous[n].norm() ** 2 for n, b in zip(layers, b0s(layers), strict=True)]
    got = loss()
    assert got.item() == pytest.approx(torch.stack(plain).mean().item(), rel=1e-12)
    assert all(g.isfinite().all() for g in torch.autograd.grad(got, b0s(layers)))


def test_an_earlier_task_without_an_update_counts_zero():
    layers = make_layers()
    for layer in layers.values():
        layer.lilora_U["a"].data.zero_()
    loss, previous = StabilityLoss(layers, "c", 1.0), teacher(layers)
    move(layers)
    assert loss().item() == pytest.approx(dense(layers, previous, "c", 1.0).item(), rel=1e-12)


def test_opposite_and_equal_tasks_are_clamped():
    for sign, expected in ((-1, 1.0), (1, 0.0)):
        layers = make_layers(("a", "b"))
        for layer in layers.values():
            layer.lilora_U["b"].data = sign * layer.lilora_U["a"].data
            layer.lilora_V["b"].data = layer.lilora_V["a"].data.clone()
        loss = StabilityLoss(layers, "b", 1.0)
        for b0 in b0s(layers):
            b0.data *= 2
        assert loss().item() == pytest.approx(expected, abs=1e-12)


def test_a_layer_with_a_zero_basis_contributes_zero():
    layers = make_layers()
    layers["tall"].lilora_B["a"].data.zero_()
    loss, previous = StabilityLoss(layers, "c", 1.0), teacher(layers)
    move(layers)
    others = {name: layer for name, layer in layers.items() if name != "tall"}
    got = loss()
    assert got.item() == pytest.approx(dense(others, previous, "c", 1.0).item() * 2 / 3, rel=1e-12)
    gradient = torch.autograd.grad(got, layers["tall"].lilora_B["c"])[0]
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_deleted_tasks_do_not_count():
    layers = make_layers()
    for layer in layers.values():
        layer.delete_task("a")
    loss, previous = StabilityLoss(layers, "c", 1.0), teacher(layers)
    move(layers)
    assert loss().item() == pytest.approx(dense(layers, previous, "c", 1.0).item(), rel=1e-12)


def test_autocast_changes_nothing():
    layers = make_layers(dtype=torch.float32)
    loss = StabilityLoss(layers, "c", 1.0)
    move(layers)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss()
    assert torch.equal(inside, loss())


class Shapes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.seen.append((str(function), tuple(tensor.shape)))
        return result


def test_no_update_is_formed():
    """Of size [out, r] there is B0's copy and its difference, never a product U V."""
    (_, n), layers = SHAPES["tall"], make_layers(shapes={"tall": SHAPES["tall"]})
    with Shapes() as shapes:
        loss = StabilityLoss(layers, "c", 1.0)
        loss()
    products = [shape for function, shape in shapes.seen if function.startswith(("aten.mm", "aten.bmm", "aten.addmm"))]
    assert products == [(SUB_RANK, SUB_RANK)] * len(products)
    # Two Gram matrices per norm of an earlier task at construction; per call for the own norm and each pair.
    assert len(products) == 2 * 2 + 2 * 3
    full = [function for function, shape in shapes.seen if shape == (n, R)]
    assert set(full) <= {"aten.detach.default", "aten.clone.default", "aten.sub.Tensor", "aten.pow.Tensor_Scalar"}
    shapes.seen.clear()
    with shapes:
        loss()
    assert len([p for p in shapes.seen if p[0].startswith("aten.mm")]) == 2 * 3, "norms of earlier tasks are cached"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"layers": {}}, "layers is empty; pass"),
        ({"weight": -0.1}, "weight is -0.1; .* at least 0"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"task": "z"}, "task 'z' is unknown to wide, which has \\['a', 'b', 'c'\\]; add the task first"),
    ],
)
def test_bad_arguments_are_one_sentence(change, words):
    arguments = {"layers": make_layers(), "task": "c", "weight": 1.0} | change
    with pytest.raises(UserError, match=words) as caught:
        StabilityLoss(**arguments)
    assert "\n" not in str(caught.value)
