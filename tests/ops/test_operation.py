"""The two doors of an operation: which one a call takes, that both give the same, and what torch.func can do."""

import pytest
import torch
import torch.nn.functional as F
from support.cases import NAMES, SCALING, adapter, base, gradients, make, options, oracle
from support.counting import Operations
from support.pair_cases import adapters
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import lilora_kernels
from lilora_kernels import functional
from lilora_kernels.ops.delta.register import delta

BASE = base(make())
REGISTERED = "GeneratedBackwardFor_lilora_{}_defaultBackward"
OPS = ("delta", "linear", "delta_pair")


def run(op, i, x=None, **more):
    """The operation on these inputs; of delta_pair, with the same adapter twice, both results side by side."""
    x, more, frozen = i.x if x is None else x, options(i, **more), [t.to(i.a) for t in BASE]
    if op == "delta":
        return functional.delta(x, *adapter(i)[1:], **more)
    if op == "linear":
        return functional.linear(x, *frozen, *adapter(i)[1:], **more)
    del more["gate"], more["gate_row"]
    return torch.cat(functional.delta_pair(x, adapters(i), adapters(i), bases=[frozen, frozen], **more), 1)


def door(y):
    """The node of the operation, behind the views and the sum of `run`."""
    node = y.grad_fn
    while "lilora" not in node.name():
        node = node.next_functions[0][0]
    return node.name()


def registered():
    """A mode that changes nothing: inside, calls take the registered door."""
    return torch.device("cpu")


class Wrapped(torch.Tensor):
    """A subclass that lets every operation see the tensor inside, and notes ours."""

    seen: list = []  # noqa: RUF012

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        if operation.namespace == "lilora":
            cls.seen.append(operation.overloadpacket.__name__)
        args, kwargs = tree_map(lambda t: t.inner if isinstance(t, cls) else t, (args, kwargs or {}))
        return tree_map(lambda t: cls(t) if isinstance(t, torch.Tensor) else t, operation(*args, **kwargs))


# --- which door -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_eager_code_takes_the_plain_door(op):
    i = make(dtype=torch.float32).leaves()
    assert door(run(op, i)) == f"lilora::{op}Backward"
    with registered():
        assert door(run(op, i)) == REGISTERED.format(op)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_gradient_there_is_no_node(mode):
    i = make(dtype=torch.float32)
    with mode():
        y = run("linear", i.leaves())
    assert not y.requires_grad
    assert torch.equal(y, run("linear", i))
    assert run("linear", i).grad_fn is None


def test_modes_see_the_operations_and_those_of_backward():
    i = make(dtype=torch.float32).leaves()
    with Operations() as seen:
        run("linear", i).sum().backward()
    assert seen.ours == {"linear": 1, "linear_backward": 1}
    y = run("linear", i)
    with Operations() as seen:
        y.sum().backward()
    assert seen.ours == {"linear_backward": 1}


def test_subclasses_see_the_operations():
    i = make(dtype=torch.float32).leaves()
    Wrapped.seen.clear()
    want = run("linear", i)
    got = run("linear", i, Wrapped(i.x.detach()).requires_grad_())
    torch.testing.assert_close(
        got.inner, want
    )  # the registered one is not told of gradients, and may take another plan
    got.sum().backward()
    assert Wrapped.seen == ["linear", "linear_backward"]


def test_tracers_see_the_operations():
    i = make(dtype=torch.float32)
    assert "lilora::linear" in str(torch.jit.trace(lambda x: run("linear", i, x), i.x, check_trace=False).graph)
    assert torch.ops.lilora.linear.default in [
        n.target for n in make_fx(lambda x: run("linear", i, x))(i.x).graph.nodes
    ]
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch.compile(lambda x: run("linear", i, x), backend=keep, fullgraph=True)(i.x)
    assert any("lilora.linear" in str(node.target) for node in graphs[0].graph.nodes)


def test_the_meta_device_is_for_the_fake():
    i = make(dtype=torch.float32)
    on_meta = type(i)(
        **{name: None if t is None else t.to("meta").requires_grad_(name in NAMES) for name, t in vars(i).items()}
    )
    assert door(run("linear", on_meta)) == REGISTERED.format("linear")


# --- the same through both --------------------------------------------------------------------------------------------

SAME = {
    "dropout": {"p": 0.3, "seed": torch.tensor([5])},
    "ranks": {"ranks": (2, 6)},
    "all": {"p": 0.3, "seed": torch.tensor([5]), "ranks": (2, 6)},
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("more", SAME.values(), ids=SAME)
@pytest.mark.parametrize("coefficients, mix", [("fusion", "random"), ("lora", "one"), ("plain", "runs")])
def test_both_doors_give_the_same_bits(op, more, coefficients, mix):
    i = make(rows=50, coefficients=coefficients, mix=mix, gate=True, dtype=torch.float32)
    plain, other = i.leaves(), i.leaves()
    y = run(op, plain, **more)
    dy = torch.randn_like(y)
    names = [name for name in i.differentiable() if name != "gate" or op != "delta_pair"]
    grads = gradients(y, plain, names, dy)
    with registered():
        want = run(op, other, **more)
        want_grads = gradients(want, other, names, dy)
    assert door(y) != door(want)
    assert torch.equal(y, want)
    for name in names:
        assert torch.equal(grads[name], want_grads[name]), name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("more", SAME.values(), ids=SAME)
@pytest.mark.parametrize("enter", ["plain", "registered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_of_a_batch_of_gradients_has_the_bits_that_it_has_alone(op, more, enter, dtype):
    """As of `is_grads_batched`, or of a Jacobian with vectorize=True."""
    i = make(rows=50, gate=True, dtype=dtype).leaves()
    wanted = [getattr(i, name) for name in NAMES if name != "gate" or op != "delta_pair"]
    with registered() if enter == "registered" else torch.enable_grad():
        y = run(op, i, **more)
        many = torch.randn(3, *y.shape, dtype=dtype)
        got = torch.autograd.grad(y, wanted, many, retain_graph=True, is_grads_batched=True)
        for at, dy in enumerate(many):
            for own, want in zip(got, torch.autograd.grad(y, wanted, dy, retain_graph=True), strict=True):
                assert torch.equal(own[at], want)


def test_a_batch_of_gradients_of_one_of_a_pair():
    i = make(dtype=torch.float32).leaves()
    more = {name: value for name, value in options(i).items() if not name.startswith("gate")}
    y, _ = functional.delta_pair(i.x, adapters(i), adapters(i), **more)
    wanted, many = [i.x, i.a, i.u], torch.randn(3, *y.shape)
    got = torch.autograd.grad(y, wanted, many, retain_graph=True, is_grads_batched=True)
    for at, dy in enumerate(many):
        for own, want in zip(got, torch.autograd.grad(y, wanted, dy, retain_graph=True), strict=True):
            assert torch.equal(own[at], want)


@pytest.mark.parametrize("fixed", [False, True], ids=["routed", "active"])
def test_a_jacobian_of_a_layer_in_training(fixed):
    layer = lilora_kernels.LiLoRALinear(torch.nn.Linear(24, 20), r=8, sub_rank=4, dropout=0.3)
    for task in ("one", "two"):
        layer.add_task(task)
        torch.nn.init.normal_(layer.lilora_U[task])
    layer.set_task(*(["one"] if fixed else ["one", "two"]))
    route = {} if fixed else {"task": torch.tensor([0, 1, -1], dtype=torch.int32)}
    x, found = torch.randn(3, 24), []
    for vectorize in (True, False):
        torch.manual_seed(0)
        found.append(torch.autograd.functional.jacobian(lambda x: layer(x, **route), x, vectorize=vectorize))
        found.append(torch.rand(1))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3]), "nothing else draws other numbers for it"


@pytest.mark.parametrize("names", [NAMES, ("x",), ("x", "u", "v"), ("a",), ("b0",)], ids="+".join)
@pytest.mark.parametrize("op", OPS)
def test_both_doors_save_the_same(op, names):
    i = make(rows=64, dtype=torch.float32, mix="one").leaves(names)

    def saved():
        kept = []
        with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            run(op, i)
        return [(t.shape, t.dtype) for t in kept]

    plain = saved()
    with registered():
        assert saved() == plain


@pytest.mark.parametrize("enter", ["plain", "registered"])
def test_both_doors_refuse_the_same(enter):
    i = make(dtype=torch.float32)
    weight, bias = (t.to(torch.float32) for t in BASE)
    with registered() if enter == "registered" else torch.enable_grad():
        with pytest.raises(
            ValueError, match="lilora::linear: weight or bias requires a gradient, but the base is frozen"
        ):
            functional.linear(i.x, weight, bias.clone().requires_grad_(), *adapter(i)[1:], **options(i))
        with pytest.raises(ValueError, match="lilora::linear: task is None"):
            functional.linear(i.x, weight, bias, *adapter(i)[1:])
        leaves = i.leaves()
        (dx,) = torch.autograd.grad(run("linear", leaves).square().sum(), leaves.x, create_graph=True)
        with pytest.raises(NotImplementedError, match="lilora::linear: second derivatives are not implemented"):
            dx.sum().backward()


# --- what autograd can do to a call -----------------------------------------------------------------------------------


@pytest.fixture
def wanted():
    """Inputs, a gradient of the result, and the gradients of a plain call."""
    i = make(rows=40, dtype=torch.float32)
    leaves = i.leaves()
    y = run("linear", leaves, p=0.2, seed=torch.tensor([3]))
    dy = torch.randn_like(y)
    return i, dy, gradients(y, leaves, i.differentiable(), dy)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "on cpu", "packed"])
def test_checkpoints_and_hooks(how, wanted):
    i, dy, want = wanted
    leaves = i.leaves()
    call = lambda x: run("linear", leaves, x, p=0.2, seed=torch.tensor([3]))  # noqa: E731
    if "reentrant" in how:
        y = checkpoint(call, leaves.x, use_reentrant=how == "reentrant")
    else:
        with save_on_cpu() if how == "on cpu" else saved_tensors_hooks(torch.Tensor.clone, torch.Tensor.clone):
            y = call(leaves.x)
    y.backward(dy)
    for name, grad in want.items():
        assert torch.equal(getattr(leaves, name).grad, grad), name


def test_compiled_autograd(wanted):
    i, dy, want = wanted
    leaves = i.leaves()
    torch._dynamo.reset()
    y = run("linear", leaves, p=0.2, seed=torch.tensor([3]))
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: y.backward(dy), backend="eager")()
    for name, grad in want.items():
        assert torch.equal(getattr(leaves, name).grad, grad), name


def test_any_layout_of_the_gradient_and_writes_into_the_result(wanted):
    i, _, _ = wanted
    for dy in (torch.ones(()).expand(40, 20), torch.randn(20, 40).T, torch.randn(40, 40)[:, ::2]):
        plain, strided = i.leaves(), i.leaves()
        want = gradients(run("linear", plain), plain, i.differentiable(), dy.contiguous())
        got = gradients(run("linear", strided), strided, i.differentiable(), dy)
        for name, grad in want.items():
            torch.testing.assert_close(got[name], grad)
    leaves = i.leaves()
    y = run("linear", leaves)
    y += 1  # neither result is read by backward
    y.sum().backward()
    with torch.no_grad():
        leaves.u += 1
    y = run("linear", leaves)
    with torch.no_grad():
        leaves.u += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_h_alone_has_no_gradient():
    i = make(dtype=torch.float32).leaves()
    rest = (i.u, i.v, i.fusion, i.task, None, None, None, SCALING, 0.0, None)
    y, h = delta(i.x, i.a, i.b0, *rest)
    assert y.requires_grad
    assert not h.requires_grad


# --- torch.func -------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch():
    """fp64 inputs, x [3, M, K], our function and the formula's of x and one of the factors."""
    i = make(rows=11, gate=True)
    x = torch.randn(3, *i.x.shape, dtype=torch.float64)

    def ours(x, name="x", value=None):
        return run("linear", given(x, name, value), x)

    def formula(x, name="x", value=None):
        return oracle(given(x, name, value), SCALING) + F.linear(x, *BASE)

    def given(x, name, value):
        return type(i)(**{**vars(i), "x": x, **({} if value is None else {name: value})})

    return i, x, ours, formula


@pytest.mark.parametrize("name", NAMES)
def test_grad_and_vjp(name, batch):
    i, x, ours, formula = batch
    value = x[0] if name == "x" else getattr(i, name)

    def of(function):
        def loss(value):
            return (function(value) if name == "x" else function(x[0], name, value)).square().sum()

        return loss

    torch.testing.assert_close(torch.func.grad(of(ours))(value), torch.func.grad(of(formula))(value))
    got, pull = torch.func.vjp(of(ours), value)
    want, pull_formula = torch.func.vjp(of(formula), value)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(pull(torch.ones_like(got)), pull_formula(torch.ones_like(got)))


def test_vmap_over_x(batch):
    i, x, ours, formula = batch
    vmap, grad = torch.func.vmap, torch.func.grad
    want = torch.stack([formula(each) for each in x])
    torch.testing.assert_close(vmap(ours)(x), want)
    torch.testing.assert_close(vmap(ours, 1, 2)(x.transpose(0, 1)), want.permute(1, 2, 0))
    slopes = torch.stack([grad(lambda each: formula(each).square().sum())(each) for each in x])
    torch.testing.assert_close(vmap(grad(lambda each: ours(each).square().sum()))(x), slopes)
    total = grad(lambda u: sum(formula(each, "u", u).square().sum() for each in x))(i.u)
    torch.testing.assert_close(grad(lambda u: vmap(lambda each: ours(each, "u", u))(x).square().sum())(i.u), total)
    torch.testing.assert_close(torch.func.jacrev(ours)(x[0]), torch.func.jacrev(formula)(x[0]))
    leaves = i.leaves()
    vmap(lambda each: run("linear", leaves, each))(x).square().sum().backward()
    torch.testing.assert_close(leaves.u.grad, total)


def test_vmap_over_a_pair(batch):
    i, x, _, _ = batch
    got = torch.func.vmap(lambda each: run("delta_pair", i, each))(x)
    torch.testing.assert_close(got, torch.stack([run("delta_pair", i, each) for each in x]))


def test_what_torch_func_cannot_do_is_said(batch):
    i, x, ours, _ = batch
    words = "torch.func.vmap works over x alone.*; loop over the samples instead"
    loss = lambda u, each: ours(each, "u", u).sum()  # noqa: E731
    for call in (
        lambda: torch.func.vmap(lambda u: ours(x[0], "u", u))(torch.stack([i.u, i.u])),
        lambda: torch.func.vmap(lambda each: run("linear", i, each, p=0.1, seed=torch.tensor([1])))(x),
        lambda: torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(i.u, x),
    ):
        with pytest.raises(NotImplementedError, match=words):
            call()
    words = "forward-mode derivatives are not implemented; use reverse mode"
    with pytest.raises(NotImplementedError, match=words):
        torch.func.jvp(ours, (x[0],), (x[0],))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x[0], x[0])
        for context in (torch.no_grad(), registered(), torch.enable_grad()):
            with context, pytest.raises(NotImplementedError, match=words):
                ours(dual)
        assert forward_ad.unpack_dual(ours(x[0])).tangent is None
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.func.grad(lambda z: torch.func.grad(lambda each: ours(each).square().sum())(z).sum())(x[0])
