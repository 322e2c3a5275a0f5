"""The CPU kernels for more rows and with gradients, the plan one_launch, against the fp64 oracle and the plain formula."""

import weakref
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import (
    SCALING,
    Errors,
    adapter,
    add_errors,
    base,
    case_id,
    gradients,
    make,
    options,
    oracle,
    pairwise,
)
from support.forked import passes_in_child
from support.pair_cases import PAIR_CASES, adapters, check_pair, pair_id
from torch import nn

import lilora_kernels
from lilora_kernels import backends, functional
from lilora_kernels.ops import cpu_training
from lilora_kernels.ops.delta import eager
from lilora_kernels.ops.delta_pair import eager as pair
from lilora_kernels.ops.philox import keep_scale
from lilora_kernels.ops.schema import AdapterArgs

LEAVES = ("x", "a", "b0", "u", "v", "fusion")


@pytest.fixture(autouse=True)
def one_launch(kernels):
    """Hence no other backend."""
    with backends.plan("one_launch"):
        yield


@contextmanager
def chosen(plan=None):
    """As nothing is forced, or another plan is."""
    backends.forced["plan"] = plan
    try:
        yield
    finally:
        backends.forced["plan"] = "one_launch"


def run(op, i, **more):
    """Of delta_pair the sum of the same adapter twice."""
    if op == "delta":
        return functional.delta(*adapter(i), **options(i, **more))
    if op == "delta_pair":
        more = {"task": i.task, "scaling": SCALING, **more}
        return sum(functional.delta_pair(i.x, adapters(i), adapters(i), bases=[base(i)] * 2, **more))
    return functional.linear(i.x, *base(i), *adapter(i)[1:], **options(i, **more))


def results(op, i, dy, names=LEAVES, **more):
    names = [name for name in names if getattr(i, name) is not None]
    ours = i.leaves(names)
    y = run(op, ours, **more)
    return {"y": y.detach()} | gradients(y, ours, names, dy)


def same(got, want):
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert torch.equal(value, want[name]), name


AXES = {
    "rows": [0, 1, 2, 3, 7, 67, 300],
    "columns": [1, 24, 33, 600],
    "outputs": [1, 20, 47],
    "rank": [1, 4, 13, 300],
    "sub_rank": [1, 8, 19],
    "tasks": [1, 3, 8],
    "coefficients": ["fusion", "plain", "lora"],
    "mix": ["one", "same", "distinct", "sorted", "random"],
    "op": ["delta", "linear"],
}


@pytest.mark.parametrize("case", pairwise(AXES), ids=case_id)
def test_it_is_as_good_as_the_plain_formula(case, instructions):
    shape = {name: value for name, value in case.items() if name != "op"}
    errors = Errors()
    for seed in range(3):
        add_errors(errors, make(**shape, dtype=torch.float32, seed=seed), case["op"], LEAVES)
    errors.check()


def test_any_size_and_any_stride_of_rows(instructions):
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(
        rows=st.integers(0, 40),
        columns=st.integers(1, 50),
        outputs=st.integers(1, 50),
        rank=st.integers(1, 40),
        sub_rank=st.integers(1, 40),
        tasks=st.integers(1, 6),
        coefficients=st.sampled_from(AXES["coefficients"]),
        mix=st.sampled_from(AXES["mix"]),
        op=st.sampled_from(AXES["op"]),
        names=st.sets(st.sampled_from(LEAVES), min_size=1),
        layout=st.sampled_from(["rows apart", "columns apart", "negated", "every row the same"]),
    )
    def check(rows, columns, outputs, rank, sub_rank, tasks, coefficients, mix, op, names, layout):
        i = make(rows, columns, outputs, rank, sub_rank, tasks, coefficients, mix, dtype=torch.float32)
        if not any(getattr(i, name) is not None for name in names):
            return
        if layout == "every row the same":
            i = i.with_(x=i.x[:1].expand(rows, columns))
        x = {
            "rows apart": lambda: torch.randn(rows, columns + 3)[:, :columns],
            "columns apart": lambda: torch.randn(columns, rows).T,
            "negated": lambda: torch._neg_view(torch.randn(rows, columns)),
            "every row the same": lambda: i.x,
        }[layout]()
        dy = torch.randn(outputs, rows).T
        names = [name for name in LEAVES if name in names and getattr(i, name) is not None]
        ours, wide = i.leaves(names), i.with_(x=x.clone()).to(torch.float64).leaves(names)
        given = x.detach().requires_grad_("x" in names)
        y = run(op, ours.with_(x=given))
        truth = oracle(wide, SCALING)
        if op == "linear":
            truth = truth + nn.functional.linear(wide.x, *(t.double() for t in base(i)))
        want = gradients(truth, wide, names, dy.double())
        got = gradients(y, ours.with_(x=given), names, dy)
        for name in names:
            largest = want[name].abs().max().item() if want[name].numel() else 0
            torch.testing.assert_close(got[name].double(), want[name], rtol=1e-3, atol=1e-4 * (1 + largest))
        torch.testing.assert_close(y.double(), truth, rtol=1e-4, atol=1e-4)

    check()


@pytest.mark.parametrize("p", [1e-6, 0.4])  # the first is none at all in the dropout's stream
@pytest.mark.parametrize("mix", ["one", "random"])
@pytest.mark.parametrize("op", ["delta", "linear"])
@pytest.mark.parametrize("rows, columns", [(37, 24), (130, 70)])
def test_dropout_has_the_mask_of_the_composed_plan(op, rows, columns, mix, p, instructions):
    i, seed = make(rows=rows, columns=columns, mix=mix), torch.tensor([5])
    dy = torch.randn(rows, 20)
    got = results(op, i.to(torch.float32), dy, p=p, seed=seed)
    keep = eager.kept(rows, columns, p, seed)
    wide = i.leaves(LEAVES)
    truth = oracle(wide, SCALING, *(() if keep is None else (keep, keep_scale(p))))
    if op == "linear":
        truth = truth + nn.functional.linear(wide.x, *base(i))
    for name, want in ({"y": truth} | gradients(truth, wide, LEAVES, dy.double())).items():
        torch.testing.assert_close(got[name].double(), want, rtol=0, atol=1e-5 * want.abs().max().item())


def test_bits_depend_on_neither_threads_nor_calls():
    i, dy = make(rows=300, columns=128, outputs=160, rank=48, dtype=torch.float32), torch.randn(300, 160)
    alone = results("linear", i, dy)

    def by_two():
        torch.set_num_threads(2)
        same(results("linear", i, dy), alone)

    assert passes_in_child(by_two)


def test_a_nan_stays_with_its_task():
    i, dy = make(rows=12, outputs=11, dtype=torch.float32), torch.randn(12, 11)
    i = i.with_(task=torch.tensor([0, 1, 2, -1] * 3, dtype=torch.int32))
    clean = results("linear", i, dy)
    for name in ("u", "v", "fusion"):
        broken = i.leaves(())
        getattr(broken, name)[1] = torch.nan
        got = results("linear", broken, dy)
        others = i.task != 1
        for of_rows in ("y", "x"):
            assert torch.equal(got[of_rows][others], clean[of_rows][others])
        for of_tasks in ("u", "v", "fusion"):
            assert torch.equal(got[of_tasks][::2], clean[of_tasks][::2])
        assert got["y"][~others].isnan().all()
    broken = i.leaves(())
    broken.x[3], dy[3] = torch.inf, torch.nan  # a row without a task
    got = results("linear", broken, dy)
    for name in ("a", "b0", "u", "v", "fusion"):
        assert torch.equal(got[name], clean[name])


def test_a_task_without_rows_gets_zeros():
    i = make(rows=4, tasks=3, dtype=torch.float32).with_(task=torch.tensor([2, -1, 2, 2], dtype=torch.int32))
    got = results("linear", i, torch.randn(4, 20))
    for name in ("u", "v", "fusion"):
        assert not got[name][:2].any()
        assert got[name][2].any()


def test_what_it_does_not_take_raises_if_forced_and_is_composed_else():
    i = make(rows=5, dtype=torch.float32)
    cases = [
        (make(rows=1025, dtype=torch.float32), {}, "it takes up to 1024 rows, here are 1025"),
        (
            i.with_(gate=torch.rand(4, 8), gate_row=torch.zeros(5, dtype=torch.int32)),
            {},
            "it has neither gates nor ranks",
        ),
        (i, {"ranks": (2, 5)}, "it has neither gates nor ranks"),
        (i.with_(v=i.v.double()), {}, r"all of torch\.float32, here is torch\.float64"),
        (i.to(torch.bfloat16), {}, r"all of torch\.float32, here is torch\.bfloat16"),
        (i.with_(b0=i.b0.T.contiguous().T), {}, "its parameters must be contiguous"),
        (i, {"task": i.task.repeat_interleave(2)[::2]}, "its ids must be contiguous"),
    ]
    for wrong, more, reason in cases:
        dy = torch.randn(len(wrong.x), 20).to(wrong.x.dtype)
        with pytest.raises(backends.Unsupported, match=f"plan 'one_launch' cannot run here: .*{reason}"):
            run("linear", wrong.leaves(), **more)
        with chosen("composed"):
            want = results("linear", wrong, dy, **more)
        with chosen():
            got = results("linear", wrong, dy, **more)
        for name, value in got.items():
            torch.testing.assert_close(value, want[name], rtol=1e-2, atol=1e-2)


def test_larger_products_are_left_to_the_library(monkeypatch):
    monkeypatch.setattr(cpu_training.cpu_library.load(), "outruns", False)
    i = make(rows=7, columns=24, outputs=20, rank=8, dtype=torch.float32)
    products, seen = 7 * (24 * 20 + 8 * 44), []
    train = cpu_training.cpu_library.load().train_forward
    monkeypatch.setattr(cpu_training.cpu_library.load(), "train_forward", lambda call: seen.append(1) or train(call))
    for most, taken in ((products, 1), (products - 1, 0)):
        monkeypatch.setattr(cpu_training, "MOST_PRODUCTS", most)
        seen.clear()
        with chosen():
            results("linear", i, torch.randn(7, 20))
        assert len(seen) == taken


def calls_of(monkeypatch, outruns):
    """Names of the library's functions, as they are called from now on."""
    seen, library = [], cpu_training.cpu_library.load()
    monkeypatch.setattr(library, "outruns", outruns)
    for name in ("train_forward", "train_backward"):
        function = getattr(library, name)
        monkeypatch.setattr(
            library, name, lambda call, name=name, function=function: seen.append(name) or function(call)
        )
    return seen


@pytest.mark.parametrize("op", ["delta", "linear", "delta_pair"])
@pytest.mark.parametrize("leaves", [(), LEAVES])
def test_forward_alone_is_taken_for_more_rows(op, leaves, monkeypatch):
    monkeypatch.setattr(cpu_training, "MOST_PRODUCTS", 0)
    seen = calls_of(monkeypatch, outruns=False)
    monkeypatch.setattr(cpu_training, "FORWARD_X", 256 * 24)
    for rows, columns, taken in ((65, 24, True), (256, 24, True), (257, 23, False), (256, 25, False)):
        i = make(rows=rows, columns=columns, dtype=torch.float32).leaves(leaves)
        seen.clear()
        with chosen():
            y = run(op, i)
            if leaves:
                y.sum().backward()
        assert seen == ["train_forward"] * taken * (2 if op == "delta_pair" else 1)
        with chosen("composed"):
            torch.testing.assert_close(y, run(op, i), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ["delta", "linear", "delta_pair"])
def test_where_the_kernels_outrun_the_library_all_products_of_enough_rows_are_theirs(op, monkeypatch):
    for name in ("MOST_PRODUCTS", "FORWARD_X", "FORWARD_ROWS"):
        monkeypatch.setattr(cpu_training, name, 0)
    seen = calls_of(monkeypatch, outruns=True)
    calls = 2 if op == "delta_pair" else 1
    for rows, leaves, taken in (
        (31, LEAVES, []),
        (32, LEAVES, ["train_backward"] + ["train_forward"] * (op != "delta_pair")),  # the plan decode is a pair's
        (1024, LEAVES, ["train_forward", "train_backward"]),
        (1025, LEAVES, []),
        (65, (), ["train_forward"]),
        (1024, (), ["train_forward"]),
        (1025, (), []),
    ):
        i = make(rows=rows, dtype=torch.float32).leaves(leaves)
        seen.clear()
        with chosen():
            y = run(op, i)
            if leaves:
                y.sum().backward()
        assert sorted(seen) == sorted(taken * calls), rows
        with chosen("composed"):
            torch.testing.assert_close(y, run(op, i), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", [None, "one_launch"])
@pytest.mark.parametrize("case", PAIR_CASES, ids=pair_id)
def test_two_adapters_of_one_x_are_a_call_each(case, plan, monkeypatch):
    monkeypatch.setattr(pair, "forward", None)
    monkeypatch.setattr(pair, "backward", None)
    with chosen(plan):
        check_pair(**case)


@pytest.mark.parametrize("wanted", [((), ("u",)), (("a",), ())])
def test_an_adapter_whose_gradients_nobody_wants_costs_no_call(wanted, monkeypatch):
    library, seen = cpu_training.cpu_library.load(), []
    train = library.train_backward
    monkeypatch.setattr(library, "train_backward", lambda call: seen.append(1) or train(call))
    one, two = (make(rows=5, dtype=torch.float32).leaves(names) for names in wanted)
    first, second = functional.delta_pair(one.x, adapters(one), adapters(two), task=one.task)
    (first + second).sum().backward()
    assert len(seen) == 1


def test_a_row_has_the_same_bits_in_any_company(instructions):
    i, dy = make(rows=140, columns=130, outputs=43, rank=13, dtype=torch.float32), torch.randn(140, 43)
    whole = results("linear", i, dy)
    for rows in (*torch.arange(60).split(1), *torch.arange(140).split(130), *torch.randperm(140).split(7)):
        part = results("linear", i.with_(x=i.x[rows], task=i.task[rows]), dy[rows])
        for name in ("y", "x"):
            assert torch.equal(part[name], whole[name][rows])


@pytest.mark.parametrize("op", ["delta", "linear", "delta_pair"])
def test_a_bound_forward_is_that_of_a_call(op):
    """Of more rows than decode takes, and of fewer with dropout; it keeps no parameter alive."""
    task = torch.randint(0, 3, (70,), dtype=torch.int32)
    i, seed = make(rows=70, dtype=torch.float32).with_(task=task), torch.tensor([5])
    for p, rows in ((0.0, 70), (0.4, 70), (0.4, 3)):
        factors = AdapterArgs(*adapters(i), task, None, None, None, SCALING, p, None)
        given = {"delta": (), "linear": base(i), "delta_pair": list(zip(base(i), base(i), strict=True))}[op]
        with chosen():
            bound = cpu_training.bind_forward(i.x, *given, (factors,) * 2 if op == "delta_pair" else factors)
            y = bound(i.x[:rows].unsqueeze(1), task[:rows], seed)
            want = run(op, i.with_(x=i.x[:rows], task=task[:rows]), p=p, seed=seed)
        assert torch.equal((sum(y) if op == "delta_pair" else y).squeeze(1), want)
    given_tensors = weakref.ref(i.a), weakref.ref(i.task)
    i = factors = task = None
    assert [of() for of in given_tensors] == [None, None]


def test_a_call_with_many_rows_leaves_later_ones_to_the_kernels(monkeypatch):
    layer, seen = lilora_kernels.LiLoRALinear(nn.Linear(24, 20), r=8, sub_rank=4), []
    layer.add_task("one")
    library = cpu_training.cpu_library.load()
    train = library.train_forward
    monkeypatch.setattr(library, "train_forward", lambda call: seen.append(1) or train(call))
    with chosen():
        for rows, taken in ((1025, 0), (1025, 0), (5, 1), (5, 2)):
            layer(torch.randn(rows, 24)).sum().backward()
            assert len(seen) == taken


def test_a_mask_that_no_gradient_needs_is_not_drawn_again(monkeypatch):
    i = make(rows=5, dtype=torch.float32).leaves(("b0", "u"))
    y = run("linear", i, p=0.4, seed=torch.tensor([5]))
    monkeypatch.setattr(eager, "kept", None)
    y.sum().backward()


@pytest.mark.parametrize("ids", [[0, 3], [-2, 1]])
def test_an_id_of_no_task_raises_what_the_composed_plan_raises(ids):
    i = make(rows=2, dtype=torch.float32).with_(task=torch.tensor(ids, dtype=torch.int32))
    said = []
    for plan in (None, "one_launch", "composed"):
        with chosen(plan), pytest.raises(ValueError, match="task has the id") as error:
            run("linear", i.leaves())
        said.append(str(error.value))
    assert len(set(said)) == 1


# --- autograd ---------------------------------------------------------------------------------------------------------


def test_a_parameter_written_before_the_backward_raises():
    for name in ("a", "b0", "u", "v", "fusion", "x"):
        i = make(rows=3, dtype=torch.float32).leaves(LEAVES)
        y = run("linear", i)
        with torch.no_grad():
            getattr(i, name).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_memory_that_came_or_went_before_the_backward():
    i, dy = make(rows=3, mix="one", dtype=torch.float32), torch.randn(3, 20)
    want = results("linear", i, dy)
    ours = i.leaves(LEAVES)
    y = run("linear", ours)
    for name in ("a", "b0", "u", "v", "fusion"):  # as a shard that is gathered anew
        t = getattr(ours, name)
        t.data = t.data.clone()
    same({"y": y.detach()} | gradients(y, ours, LEAVES, dy), want)
    ours = i.leaves(LEAVES)
    with torch.autograd.graph.save_on_cpu():
        y = run("linear", ours)
    same({"y": y.detach()} | gradients(y, ours, LEAVES, dy), want)


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_what_is_another_tensor_in_the_backward_is_left_to_the_composed_plan():
    """Nothing is read past its end: torch says what is wrong, or computes."""
    i = make(rows=3, mix="one", dtype=torch.float32)
    for name in ("x", "a", "b0", "u", "v", "fusion"):
        ours = i.leaves(LEAVES)
        with chosen():
            y = run("linear", ours)
            getattr(ours, name).data = torch.randn(1, 2, 3)
            with pytest.raises((RuntimeError, IndexError, ValueError)):
                y.sum().backward()
    halves = torch.autograd.graph.saved_tensors_hooks(lambda t: t.half() if t.shape == i.x.shape else t, lambda t: t)
    ours = i.leaves(("x", "a"))
    with chosen(), halves:
        y = run("linear", ours)
    dy = torch.randn(3, 20)
    with chosen():
        got = gradients(y, ours, ("a",), dy)["a"]
    want = results("linear", i, dy, ("x", "a"))["a"]
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3 * want.abs().max().item())
    ours = i.leaves(("x",))
    with chosen():
        got = torch.autograd.grad(run("linear", ours), ours.x, torch._efficientzerotensor(3, 20))[0]
    assert not got.any()


def test_whoever_sees_the_backward_gets_the_registered_operation():
    i, dy = make(rows=3, mix="one", dtype=torch.float32), torch.randn(3, 20)
    want = results("linear", i, dy)
    ours = i.leaves(LEAVES)
    y = run("linear", ours)
    one_more = torch.autograd.grad(y, ours.x, dy, create_graph=True)[0]
    torch.testing.assert_close(one_more.detach(), want["x"])
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        one_more.sum().backward()
    y = run("linear", i.leaves(("x",)))
    x = y.grad_fn.saved_tensors  # kept alive
    assert x


@pytest.mark.parametrize("mix", ["one", "random"])
@pytest.mark.parametrize("leaves", [("x",), LEAVES])
@pytest.mark.parametrize("rows", [7, 60])
def test_a_batch_of_gradients(rows, leaves, mix):
    """As of `is_grads_batched`, or of a Jacobian with vectorize=True."""
    i, many = make(rows=rows, mix=mix, dtype=torch.float32), torch.randn(4, rows, 20)
    ours = i.leaves(leaves)
    wanted = [getattr(ours, name) for name in leaves]
    got = torch.autograd.grad(run("linear", ours), wanted, many, is_grads_batched=True)
    for at, dy in enumerate(many):
        want = results("linear", i, dy, leaves)
        for name, own in zip(leaves, got, strict=True):
            torch.testing.assert_close(own[at], want[name], rtol=1e-4, atol=1e-5)


def test_outputs_may_be_written_to():
    i, dy = make(rows=6, mix="one", dtype=torch.float32), torch.randn(2, 3, 20)
    ours = i.leaves(LEAVES)
    y = functional.linear(ours.x.view(2, 3, -1), *base(i), *adapter(ours)[1:], **options(ours))
    y.mul_(2)
    got = gradients(y, ours, LEAVES, dy)
    want = results("linear", i, 2 * dy.flatten(0, 1))
    for name in LEAVES:
        torch.testing.assert_close(got[name], want[name])


def test_the_first_call_of_a_layer_has_the_bits_of_later_ones():
    layer = lilora_kernels.LiLoRALinear(nn.Linear(24, 20), r=8, sub_rank=4, dropout=0.2)
    layer.add_task("one")
    nn.init.normal_(layer.lilora_U["one"])
    x, found = torch.randn(2, 3, 24, requires_grad=True), []
    parameters = [x, *(p for p in layer.parameters() if p.requires_grad)]
    for _ in range(3):
        torch.manual_seed(0)
        with chosen():
            y = layer(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), parameters)])
    for first, *others in zip(*found, strict=True):
        assert all(torch.equal(first, other) for other in others)
