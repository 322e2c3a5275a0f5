"""`expert_linear`: `linear` for each expert and task, in one operation."""

import pytest
import torch
from support.counting import Operations
from support.expert_cases import NAMES, SCALING, gradients, make

from lilora_kernels import backends, functional
from lilora_kernels.ops.delta.eager import dropout_mask
from lilora_kernels.ops.experts import groups
from lilora_kernels.ops.experts.register import expert_linear
from lilora_kernels.ops.philox import keep_scale
from lilora_kernels.ops.schema import AdapterArgs

CASES = {
    "mixed": {},
    "no fusion": {"fusion": False},
    "one task": {"tasks": None},
    "one task without fusion": {"tasks": None, "fusion": False},
    "one expert": {"experts": 1, "tasks": 2},
    "no rows": {"tokens": 0},
    "one row": {"tokens": 1, "choices": 1},
    "many experts": {"experts": 40, "tasks": 5, "tokens": 30},
}


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_the_formula(case, p):
    made = make(**case)
    keep = dropout_mask(*made.x.shape, made.x.dtype, AdapterArgs(*[None] * 8, torch.tensor([5]), 1.0, p, None))
    options = {} if keep is None else {"keep": keep, "keep_scale": keep_scale(p)}
    found = []
    for run in (
        lambda x, f: made.run(x, f, seed=torch.tensor([5]), p=p),
        lambda x, f: made.reference(x, f, **options),
    ):
        x, factors = made.leaves()
        y = run(x, factors)
        found.append([y, *gradients(y, [x, *factors], torch.ones_like(y).cumsum(0))])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("names", [(n,) for n in NAMES] + [("u", "v"), ("x", "fusion")], ids="-".join)
def test_gradients_that_are_asked_for_alone_are_the_same(names):
    made = make()
    x, factors = made.leaves()
    every = dict(zip(NAMES, gradients(made.run(x, factors), [x, *factors], torch.ones(18, 12).double()), strict=True))
    x, factors = made.leaves(names)
    with Operations() as seen:
        got = gradients(made.run(x, factors), [x, *factors], torch.ones(18, 12).double())
    assert seen.ours == {"expert_linear": 1, "expert_linear_backward": 1}
    assert all(torch.equal(g, every[n]) for g, n in zip(got, [n for n in NAMES if n in names], strict=True))


def test_each_of_a_batch_of_gradients_has_the_bits_that_it_has_alone():
    made = make()
    x, factors = made.leaves()
    y, wanted = made.run(x, factors, seed=torch.tensor([5]), p=0.3), [x, *factors]
    many = torch.randn(3, *y.shape, dtype=y.dtype)
    got = torch.autograd.grad(y, wanted, many, retain_graph=True, is_grads_batched=True)
    for at, dy in enumerate(many):
        for own, want in zip(got, torch.autograd.grad(y, wanted, dy, retain_graph=True), strict=True):
            assert torch.equal(own[at], want)


def test_gradcheck():
    made = make(tokens=4, experts=2, tasks=2, k=3, n=3, r=2, s=1)

    def run(x, *factors):
        return made.run(x, factors, seed=torch.tensor([3]), p=0.3)

    x, factors = made.leaves()
    assert torch.autograd.gradcheck(run, [x, *factors])


@pytest.mark.parametrize("case", ["mixed", "one task"])
def test_opcheck(case):
    torch.library.opcheck(
        torch.ops.lilora.expert_linear.default, make(**CASES[case], dtype=torch.float32).arguments(0.1)
    )


def test_two_doors_and_fullgraph_compile():
    torch._dynamo.reset()
    made = make(dtype=torch.float32)

    def run(x, *factors):
        return made.run(torch.sin(x), factors).square().sum()

    grads = []
    for how in (run, torch.compile(run, fullgraph=True)):
        x, factors = made.leaves()
        how(x, *factors).backward()
        grads.append([t.grad for t in (x, *factors)])
    x, factors = made.leaves()
    with torch.device("cpu"):  # a mode: the registered door
        y = made.run(x, factors)
    assert "GeneratedBackwardFor_lilora_expert_linear" in y.grad_fn.name()
    x, factors = made.leaves()
    assert made.run(x, factors).grad_fn.name() == "lilora::expert_linearBackward"
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


def test_a_rows_bits_depend_on_no_other_task():
    """Another task's NaN reaches neither the values nor the gradients of a row, nor those of its task."""
    made = make(tokens=40)
    wanted = made.run()
    for factor in made.factors[2:]:
        factor[1] = torch.nan
    x, factors = made.leaves()
    y = made.run(x, factors)
    others = made.task != 1
    assert torch.equal(y[others], wanted[others])
    assert y[~others].isnan().all()
    dy = torch.ones_like(y)
    dx, _, _, du, dv, dfusion = gradients(y, [x, *factors], dy)
    assert not dx[others].isnan().any()
    assert not any(g[[0, 2]].isnan().any() for g in (du, dv, dfusion))


def test_uninitialised_memory_shows_nowhere():
    made = make(tokens=40)
    wanted = made.run()
    torch.use_deterministic_algorithms(True)  # fills memory that is allocated with NaN
    try:
        assert torch.empty(1).isnan().all()
        x, factors = made.leaves()
        y = made.run(x, factors)
        found = gradients(y, [x, *factors], torch.ones_like(y))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(y, wanted)
    assert all(gradient.isfinite().all() for gradient in found)


def test_rows_without_a_task_take_nothing_of_what_is_not_finite():
    made = make()
    wanted = made.run(made.x, made.factors)
    bare = made.task < 0
    (clean,) = gradients(wanted := made.run(*(given := made.leaves(("x",)))), given[:1], torch.ones_like(wanted))
    for at in (0, 1):  # a, b0
        x, factors = made.leaves(("x",))
        factors[at][:] = torch.nan
        y = made.run(x, factors)
        assert torch.equal(y[bare], wanted[bare])
        assert y[~bare].isnan().any()
        if at == 1:
            (dx,) = gradients(y, [x], torch.ones_like(y))
            assert torch.equal(dx[bare], clean[bare])
            assert dx[~bare].isnan().any()
    x, factors = made.leaves()
    with torch.no_grad():
        x[bare] = torch.inf
    grads = gradients(made.run(x, factors), [x, *factors], torch.ones_like(wanted))
    assert all(grad.isfinite().all() for grad in grads[2:])


def test_sixteen_bits_and_masters_in_fp32():
    made = make(tokens=64, dtype=torch.float32)
    exact = made.run()
    x, weight = made.x.bfloat16(), made.weight.bfloat16()
    leaves = [t.clone().requires_grad_() for t in made.factors]
    y = functional.expert_linear(x, weight, made.ends, *leaves, scaling=SCALING)
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).abs().max() < 0.03 * exact.abs().max()
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            made.run(), functional.expert_linear(x, made.weight, made.ends, *made.factors, scaling=SCALING)
        )


def test_the_devices_grouped_product_gives_the_same(monkeypatch):
    """As on a GPU in bf16, with torch's CPU kernel in its place: one product of all groups, whatever their number."""
    made = make(tokens=40, k=24, n=16, r=8, s=8, dtype=torch.float32)
    found, seen = [], []
    for grouped in (False, True):
        monkeypatch.setattr(groups, "takes_grouped_product", lambda *_, grouped=grouped: grouped)
        x, factors = made.leaves()
        y = made.run(x, factors, seed=torch.tensor([5]), p=0.3)
        dy = torch.ones_like(y).cumsum(1)
        with Operations() as forward:
            made.run(seed=torch.tensor([5]), p=0.3)
        with Operations() as backward:
            found.append([y, *gradients(y, [x, *factors], dy)])
        seen.append((forward.seen, backward.seen))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    (_, (forward, backward)) = seen
    assert forward["_grouped_mm"] == 5  # h, q B0^T, z, z U^T, the base
    assert backward["_grouped_mm"] == 10  # P, Q, z, dB0, dU, dV, dq, dx and that of the base, dA
    assert not {"mm", "addmm", "addmm_"} & (forward.keys() | backward.keys())
    # the forward's other 20 but the dropout's mask: 4 to lay u, v and f by group, 4 to spread f and e over the rows, 3 to keep
    # rows without a task free of what is not finite, as 5 of the backward's
    assert forward.total() <= 25 + 6, forward
    assert backward.total() <= 57 + 7, backward


@pytest.mark.parametrize("tasks", [(), (3,)], ids=["one task", "mixed"])
def test_the_host_waits_for_no_device(tasks, monkeypatch):
    """On the meta device, which has no values, whatever reads one raises."""
    monkeypatch.setattr(groups, "takes_grouped_product", lambda *_: True)
    with torch.device("meta"):
        made = [torch.zeros(s, dtype=torch.bfloat16, requires_grad=True) for s in ((6, 16), (4, 8, 16), (4, 24, 8))]
        made += [torch.zeros(*tasks, 4, *s, dtype=torch.bfloat16, requires_grad=True) for s in ((24, 8), (8, 8), ())]
        weight, seed = torch.zeros(4, 24, 16, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
        expert = torch.zeros(6, 2, dtype=torch.int64)
        task = torch.zeros(6, dtype=torch.int32) if tasks else None
    x, *factors = made
    with Operations() as seen:  # runs the bodies of our operations
        order, ends = groups.group_rows(expert, task, 4, *(tasks or (1,)))
        functional.expert_linear(x[order // 2], weight, ends, *factors, p=0.1, seed=seed).sum().backward()
    assert seen.seen["_grouped_mm"] == 15
    assert x.grad.shape == (6, 16)


def test_launches_follow_the_groups_that_have_rows():
    """On a CPU a product for each expert or pair that has rows: none for the others, and none that forms M."""
    made = make(tokens=30, experts=40, tasks=5)
    pairs = len(set(zip(made.expert.tolist(), made.task.tolist(), strict=True)) - {(e, -1) for e in range(40)})
    experts = len(made.expert.unique())
    with Operations() as seen:
        made.run()
    products = sum(seen.seen[name] for name in ("mm", "addmm", "addmm_"))
    assert products == 3 * experts + 2 * pairs
    most = made.x.shape[0] * 12 * 8
    assert seen.bytes <= 4 * most, "y and three of the rows' smaller products; not M of all experts"


@pytest.mark.parametrize(
    "change, kind, words",
    [
        ({"ends": torch.zeros(4, 4)}, TypeError, "ends is torch.float32; it must be torch.int32"),
        ({"ends": torch.zeros(3, 4, dtype=torch.int32)}, ValueError, r"ends is \[3, 4\]; it must be \[E\] or"),
        ({"ends": torch.zeros(4, 1, dtype=torch.int32)}, ValueError, "of no task; give ends"),
        ({"ends": torch.zeros(4, dtype=torch.int32)}, ValueError, r"u is \[3, 4, 12, 2\]; it must be \[E, N, S\]"),
        ({"ends": torch.zeros(4, 4, dtype=torch.int32)}, ValueError, "it must be what group_rows gives"),
        ({"weight": torch.zeros(12, 8).double()}, ValueError, r"it must be \[E, N, K\]"),
        ({"weight": torch.zeros(4, 12, 8).double().requires_grad_()}, ValueError, "the base is frozen here"),
        ({"a": torch.zeros(3, 4, 8).double()}, ValueError, r"a is \[3, 4, 8\]; it must be \[E, R, K\] with E = 4"),
        ({"v": torch.zeros(3, 4, 3, 4).double()}, ValueError, r"v is \[3, 4\]; it must be \[S, R\]"),
        ({"p": 1.0, "seed": None}, ValueError, "the dropout probability must be in"),
    ],
)
def test_what_does_not_fit(change, kind, words):
    made = make()
    names = ("x", "weight", "ends", *NAMES[1:])
    given = dict(zip(names, (made.x.requires_grad_(), made.weight, made.ends, *made.factors), strict=True)) | change
    with pytest.raises(kind, match=words):
        functional.expert_linear(**given)


def test_refused_transforms():
    made = make()
    with pytest.raises(NotImplementedError, match="would need the rows of all samples in one order"):
        torch.func.vmap(lambda x: made.run(x))(made.x.expand(2, -1, -1))
    x, factors = made.leaves()
    (dx,) = torch.autograd.grad(made.run(x, factors).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        dx.sum().backward()
    with backends.backend("cpu"):  # there is no kernel of it: the choice is open
        made.run()
    assert expert_linear.name == "lilora::expert_linear"


def test_order_of_rows():
    expert, task = torch.tensor([[1, 0], [1, 2], [1, 0]]), torch.tensor([1, 2, 0], dtype=torch.int32)
    order, ends = groups.group_rows(expert, task, 3, 2)
    assert order.tolist() == [5, 1, 2, 4, 0, 3]
    assert ends.tolist() == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]
    order, ends = groups.group_rows(expert, None, 4, 1)
    assert (order.tolist(), ends.tolist()) == ([1, 5, 0, 2, 4, 3], [2, 5, 6, 6])
