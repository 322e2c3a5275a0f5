"""The plan `recorded`: torch's own autograd over the formula of one task."""

import pytest
import torch
from support.cases import SCALING, adapter, base, gradients, make, options, oracle
from support.counting import saved
from torch import nn

import lilora_kernels
from lilora_kernels import LiLoRALinear, backends, functional
from lilora_kernels.ops import recorded

LEAVES = ("x", "a", "b0", "u", "v", "fusion")


def one(coefficients="fusion", **sizes):
    i = make(mix="one", coefficients=coefficients, **sizes)
    return i if i.u is None else i.with_(u=i.u[0], v=i.v[0])


def run(op, i, bias=True, **more):
    if op == "delta":
        return functional.delta(*adapter(i), **options(i, **more))
    return functional.linear(i.x, *base(i, bias=bias), *adapter(i)[1:], **options(i, **more))


def is_recorded(y):
    """Whether none of our nodes leads to y."""
    seen, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    return not any("lilora" in node.name() for node in seen)


def same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-12 * wanted[name].abs().max().item())


@pytest.mark.parametrize("coefficients", ["fusion", "plain", "lora"])
@pytest.mark.parametrize("op, bias", [("delta", False), ("linear", True), ("linear", False)])
def test_the_formula_and_its_gradients(op, bias, coefficients):
    i = one(coefficients)
    ours, wide = i.leaves(), i.leaves()
    y = run(op, ours, bias)
    assert is_recorded(y)
    want = oracle(wide if i.u is None else wide.with_(u=wide.u[None], v=wide.v[None]), SCALING)
    if op == "linear":
        want = want + nn.functional.linear(wide.x, *base(i, bias=bias))
    dy = torch.randn_like(y)
    same({"y": y} | gradients(y, ours, LEAVES, dy), {"y": want} | gradients(want, wide, LEAVES, dy))


@pytest.mark.parametrize("p", [1e-6, 0.4])  # the first is none at all in the dropout's stream
@pytest.mark.parametrize("op", ["delta", "linear"])
@pytest.mark.parametrize("names", [LEAVES, ("x",), ("u", "v"), ("a",)], ids=str)
def test_the_mask_of_the_composed_plan(op, names, p):
    found = []
    for plan in ("composed", "recorded"):
        i = one().leaves(names)
        with lilora_kernels.plan(plan):
            y = run(op, i, p=p, seed=torch.tensor([5]))
            assert is_recorded(y) == (plan == "recorded")
            found.append({"y": y} | gradients(y, i, names, torch.ones_like(y)))
    same(*found)


def test_what_it_does_not_take_is_composed_or_raises():
    i = one()
    gate = torch.rand(1, 8, dtype=torch.float64)
    cases = [
        (make(mix="random"), {}, "it takes the factors of one task for all rows"),
        (make(mix="one"), {}, "it takes the factors of one task for all rows"),
        (i.with_(gate=gate), {}, "it has neither gates nor ranks"),
        (i, {"ranks": (2, 5)}, "it has neither gates nor ranks"),
        (
            i.with_(v=i.v.float()),
            {},
            r"it takes .* all of float32 or float64, here are \['torch.float32', 'torch.float64'\]",
        ),
        (i.to(torch.bfloat16), {}, r"it takes .* all of float32 or float64, here are \['torch.bfloat16'\]"),
    ]
    for given, more, reason in cases:
        for op in ("delta", "linear"):
            assert not is_recorded(run(op, given.leaves(), **more))
            with (
                lilora_kernels.plan("recorded"),
                pytest.raises(backends.Unsupported, match=f"plan 'recorded' cannot run here: {reason}"),
            ):
                run(op, given.leaves(), **more)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_larger_calls_are_composed(p, monkeypatch):
    sizes = {"rows": 7, "columns": 24, "outputs": 20, "rank": 8}
    of_row, of_m = 20 + 24 * (3 if p else 1), 2 * 20 * 8
    seed = torch.tensor([1]) if p else None
    for most, small in ((8 * (7 * of_row + of_m), True), (8 * (7 * of_row + of_m) - 1, False)):
        monkeypatch.setattr(recorded, "MOST_BYTES", most)
        assert is_recorded(run("linear", one(**sizes).leaves(), p=p, seed=seed)) == small
        with lilora_kernels.plan("recorded"):
            assert is_recorded(run("linear", one(**sizes).leaves(), p=p, seed=seed))


def test_whoever_sees_the_operation_whole_cannot_take_it():
    i = one()

    def loss(u):
        return run("linear", i.with_(u=u)).sum()

    with lilora_kernels.plan("recorded"):
        for without in (lambda: torch.func.grad(loss)(i.u), lambda: run("linear", i)):
            with pytest.raises(
                backends.Unsupported, match=r"takes calls whose gradients are wanted, outside of torch\.comp"
            ):
                without()
    assert torch.func.grad(loss)(i.u).abs().sum() > 0


def test_a_base_that_learns_is_refused_whatever_the_size():
    i = one().leaves()
    weight, _ = base(i)
    for rows in (i.x, i.x.repeat(2000, 1)):
        with pytest.raises(ValueError, match="the base is frozen here"):
            functional.linear(rows, weight.requires_grad_(), None, *adapter(i)[1:])


# --- layers -----------------------------------------------------------------------------------------------------------


def layer(dropout=0.0):
    made = LiLoRALinear(nn.Linear(24, 20).requires_grad_(False), r=8, sub_rank=4, dropout=dropout).double()
    for name in ("cats", "dogs"):
        made.add_task(name)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    made.set_task("cats")
    return made


def step(made, x):
    made.zero_grad()
    torch.manual_seed(3)
    y = made(x)
    y.square().sum().backward()
    return y, {"y": y} | {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


def test_a_layer_sees_what_changes_between_steps():
    made, x = layer(), torch.randn(2, 3, 24, dtype=torch.float64)

    def other_memory():
        made.lilora_U["cats"].data = torch.randn_like(made.lilora_U["cats"])
        made.base_layer.weight = nn.Parameter(torch.randn(20, 24, dtype=torch.float64), requires_grad=False)

    def other_object_of_the_same_memory():
        """And the old one gives its memory up, as offloading does."""
        for _ in range(2):
            step(made, x)  # the second is bound
        old = made.base_layer.weight
        made.base_layer.weight = nn.Parameter(old.data, requires_grad=False)
        step(made, x)
        old.data = torch.zeros_like(old)

    changes = [
        lambda: None,
        lambda: made.lilora_V["cats"].data.mul_(2),
        lambda: setattr(made, "alpha", made.alpha * 3),
        lambda: setattr(made, "dropout", 0.5),
        other_memory,
        other_object_of_the_same_memory,
        lambda: made.set_task("dogs"),
        lambda: made.eval(),
        lambda: made.lilora_A["dogs"].requires_grad_(True),
    ]
    for change in changes:
        change()
        for rows in (x, x, x[0], x.repeat(1, 2000, 1)):
            y, found = step(made, rows)
            assert is_recorded(y) == (rows.numel() < 10**5)
            with lilora_kernels.plan("composed"):
                same(found, step(made, rows)[1])


def test_what_autograd_keeps():
    """M_t, U V and f beside x and h, which the composed plan keeps too."""
    made, x = layer(), torch.randn(6, 24, dtype=torch.float64)
    held = saved(made, lambda: made(x))
    assert sum(held.values()) == 8 * (6 * 24 + 6 * 8 + 2 * 20 * 8 + 1)  # x and h; M_t and U V; f
