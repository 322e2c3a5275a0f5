"""Which rows belong to which task in the composed plan: known to the host or not, in runs or mixed, with a task or without."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from support.cases import NAMES, SCALING, adapter, base, gradients, make, options, oracle

from lilora_kernels import functional
from lilora_kernels.ops.delta import eager, reference, task_rows

pytestmark = pytest.mark.usefixtures("no_cpu_kernels")


@pytest.mark.parametrize("coefficients", ["fusion", "plain", "lora"])
def test_the_path_for_other_devices_gives_the_same(coefficients, monkeypatch):
    """Where the host does not see ids every task gets all rows and a mask; forced here on the CPU."""
    i = make(coefficients=coefficients, gate=True)
    grouped, all_rows = i.leaves(), i.leaves()
    want = functional.delta(*adapter(grouped), **options(grouped))
    dy = torch.randn_like(want)
    wanted = gradients(want, grouped, NAMES, dy)
    monkeypatch.setattr(task_rows, "seen_by_host", lambda tensor: False)
    got = functional.delta(*adapter(all_rows), **options(all_rows))
    torch.testing.assert_close(got, want)
    for name, grad in gradients(got, all_rows, NAMES, dy).items():
        torch.testing.assert_close(grad, wanted[name])


def test_a_row_of_no_task_that_the_host_does_not_see_leaves_the_tasks_gradients_alone(monkeypatch):
    monkeypatch.setattr(task_rows, "seen_by_host", lambda tensor: False)
    i = make(rows=4, tasks=2).with_(task=torch.tensor([0, 7, 1, 0], dtype=torch.int32)).leaves()
    y = functional.delta(*adapter(i), **options(i))
    assert y[1].isnan().all()
    grads = gradients(y, i, ("u", "v"), torch.randn_like(y))
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("ids", [[0, 2, 2, 1], [1, 1, -1, 0], [2, 0, 2, -1]], ids=str)
@pytest.mark.parametrize("rank", [2, 16], ids=["by-m", "by-factors"])
def test_ids_that_the_host_knows_beside_a_device_give_the_same(ids, rank, monkeypatch):
    """As a BatchContext hands them over: the runs of rows are found once, and no row gets a mask."""
    i = make(rows=12, rank=rank).with_(task=torch.tensor(ids, dtype=torch.int32).repeat_interleave(3))
    one, other = i.leaves(), i.leaves()
    want = functional.delta(*adapter(one), **options(one))
    dy = torch.randn_like(want)
    wanted = gradients(want, one, NAMES, dy)
    other.task.layouts, other.task.on_host = [], other.task.clone()
    monkeypatch.setattr(task_rows, "seen_by_host", lambda tensor: False)
    found = []
    monkeypatch.setattr(
        task_rows, "layout", lambda *args, make=task_rows.layout: found.append(make(*args)) or found[-1]
    )
    got = functional.delta(*adapter(other), **options(other))
    grads = gradients(got, other, NAMES, dy)
    assert len(found) == 1
    assert all(run.mask is None for run in found[0].runs)
    torch.testing.assert_close(got, want)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name])


def test_rows_whose_layout_is_kept_need_no_garbage_collector():
    i = make(rows=4, rank=16)
    task = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    task.layouts = []
    functional.delta(*adapter(i), **options(i) | {"task": task})
    assert len(task.layouts) == 1
    kept = weakref.ref(task)
    gc.disable()
    try:
        del task
        assert kept() is None
    finally:
        gc.enable()


def test_a_gradient_of_m_beyond_the_range_of_fp16_is_summed_in_fp32(monkeypatch):
    """As under a GradScaler; on a machine with fast products of 16 bits, for which nothing is widened beforehand."""
    monkeypatch.setattr(eager, "has_fast_products", lambda dtype: True)
    i = make(rows=64, tasks=1, dtype=torch.float32).with_(task=None)
    i = i.with_(v=i.v * 2**-10, u=i.u * 2**-10)
    half = i.to(torch.float16).leaves()
    wide = half.to(torch.float32).leaves()
    dy = torch.full((64, half.b0.shape[0]), 2.0**15)
    wanted = gradients(functional.delta(*adapter(wide), **options(wide)), wide, ("u", "v"), dy)
    dm = dy.T @ (wide.x @ wide.a.T)
    assert dm.abs().max() > torch.finfo(torch.float16).max
    grads = gradients(functional.delta(*adapter(half), **options(half)), half, ("u", "v"), dy.half())
    for name, grad in grads.items():
        torch.testing.assert_close(grad.float(), wanted[name], rtol=2**-7, atol=2**-7 * wanted[name].abs().max().item())


def test_nan_in_a_row_of_no_task_stays_there_without_factors_of_tasks():
    i = make(rows=20, coefficients="lora", dtype=torch.float32)
    i.task[3] = -1
    x = i.x.clone()
    x[3] = torch.nan
    i = i.with_(x=x).leaves()
    y = functional.delta(*adapter(i), **options(i))
    others = torch.arange(20) != 3
    assert (y[3] == 0).all()
    grads = gradients(y, i, ("b0", "x"), torch.ones_like(y))
    assert y[others].isfinite().all()
    assert grads["b0"].isfinite().all()
    assert grads["x"].isfinite().all()


@pytest.mark.parametrize("coefficients", ["fusion", "plain", "lora"])
@pytest.mark.parametrize("rows, rank", [(12, 16), (90, 4)], ids=["by-factors", "by-m"])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("order", ["runs", "mixed"])
def test_rows_without_a_task_take_nothing_of_what_is_not_finite(coefficients, rows, rank, order, gate):
    """Neither of a or b0 nor of an h that leaves fp16's range; nor do they give any of it."""
    i = make(rows=rows, rank=rank, coefficients=coefficients, tasks=2, gate=gate, dtype=torch.float32)
    ids = torch.arange(rows, dtype=torch.int32) % 3 - 1
    task = ids if order == "mixed" else ids.sort().values
    bare = task < 0
    bias = torch.randn(i.b0.shape[0])
    for name in ("a", "b0"):
        broken = i.with_(task=task)
        broken = broken.with_(
            **{name: getattr(broken, name).clone().index_fill_(0, torch.tensor([0]), torch.nan)}
        ).leaves()
        y = functional.linear(
            broken.x, torch.zeros(len(bias), i.x.shape[1]), bias, *adapter(broken)[1:], **options(broken)
        )
        assert torch.equal(y[bare], bias.expand(int(bare.sum()), -1))
        assert y[~bare].isnan().any()
        if name == "b0":
            dx = gradients(y, broken, ("x",), torch.ones_like(y))["x"]
            assert (dx[bare] == 0).all()
            assert dx[~bare].isnan().any()
    half = i.with_(task=task).to(torch.float16)
    half.x[bare] = 60000
    half = half.leaves()
    y = functional.delta(*adapter(half), **options(half))
    assert (y[bare] == 0).all()
    assert y.isfinite().all()
    names = [name for name in NAMES if getattr(half, name) is not None]
    for name, grad in gradients(y, half, names, torch.ones_like(y)).items():
        assert grad.isfinite().all(), name


def test_ids_below_those_without_a_task_get_no_adapter_where_the_host_does_not_see_them(monkeypatch):
    monkeypatch.setattr(task_rows, "seen_by_host", lambda tensor: False)
    i = make(rows=4, tasks=2).with_(task=torch.tensor([0, -2, 1, -9], dtype=torch.int32))
    y = functional.delta(*adapter(i), **options(i))
    assert (y[[1, 3]] == 0).all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("wrong", [-1, -2, 2])
def test_a_row_of_gate_that_does_not_exist_is_refused(rows, wrong):
    i = make(rows=rows, gate=True)
    i = i.with_(gate=i.gate[:2], gate_row=torch.tensor([wrong] + [0] * (rows - 1), dtype=torch.int32))
    with pytest.raises(IndexError, match="out of range"):
        functional.delta(*adapter(i), **options(i))


@pytest.mark.parametrize("rows", [[-1] * 6, [0, 1] * 3], ids=["no-task", "tasks"])
def test_gradients_are_contiguous_whatever_the_parameters_are(rows):
    """As the compiler was told."""
    i = make(rows=6, tasks=2, rank=4).with_(task=torch.tensor(rows, dtype=torch.int32))
    turned = {name: getattr(i, name).mT.contiguous().mT for name in ("a", "b0", "u", "v")}
    plain = turned | dict.fromkeys(("u", "v", "fusion"))
    for of, names in ((turned, ("a", "b0", "u", "v")), (plain, ("b0",))):
        made = i.with_(**of).leaves(names)
        y = functional.delta(*adapter(made), **options(made) | ({"ranks": (1, 3)} if made.u is None else {}))
        assert all(grad.is_contiguous() for grad in gradients(y, made, names, torch.ones_like(y)).values())


def test_layouts_go_to_a_device_without_a_wait(monkeypatch):
    """A tensor made on a device from a list makes the host wait for it."""
    made = torch.tensor
    monkeypatch.setattr(
        torch, "tensor", lambda *args, **kwargs: made(*args, **kwargs) if "device" not in kwargs else 1 / 0
    )
    for ids in ([1, 1, 0, 0], [0, 0, 2, 2], [0, 2, 0, 2]):
        found = task_rows.layout(made(ids, dtype=torch.int32), 3, torch.device("meta"))
        assert all(t is None or t.is_meta for t in (found.order, found.present))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fusion", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seen", [True, False], ids=["seen", "beside-a-device"])
@pytest.mark.parametrize("rank", [2, 16], ids=["by-m", "by-factors"])
def test_runs_of_equal_length_in_every_dtype(dtype, fusion, seen, rank, monkeypatch):
    """Without widening beforehand, as on a GPU."""
    monkeypatch.setattr(eager, "has_fast_products", lambda dtype: True)
    i = make(rows=6, rank=rank).with_(task=torch.tensor([2, 2, 2, 0, 0, 0], dtype=torch.int32))
    wide = i.leaves()
    got = i.to(dtype).with_(fusion=i.fusion.to(fusion)).leaves()
    y = functional.delta(*adapter(wide), **options(wide))
    dy = torch.randn_like(y)
    wanted = gradients(y, wide, NAMES, dy)
    if not seen:
        got.task.layouts, got.task.on_host = [], got.task.clone()
        monkeypatch.setattr(task_rows, "seen_by_host", lambda tensor: False)
    y = functional.delta(*adapter(got), **options(got))
    tolerance = 40 * torch.finfo(dtype).eps
    for name, grad in gradients(y, got, NAMES, dy.to(dtype)).items():
        want = wanted[name]
        torch.testing.assert_close(grad.to(want.dtype), want, rtol=tolerance, atol=tolerance * want.abs().max().item())


@pytest.mark.parametrize("op", ["delta", "linear"])
@pytest.mark.parametrize("rows", [3, 40], ids=["by-factors", "by-m"])
def test_one_task_needs_no_dimension_of_tasks(op, rows):
    i = make(rows=rows, tasks=1).with_(task=None)
    flat = i.with_(u=i.u[0], v=i.v[0])

    def run(i):
        i = i.leaves()
        given = adapter(i) if op == "delta" else (i.x, *base(i), *adapter(i)[1:])
        y = getattr(functional, op)(*given, **options(i))
        return y, gradients(y, i, NAMES, torch.ones_like(y))

    (want, wanted), (got, grads) = run(i), run(flat)
    torch.testing.assert_close(got, want)
    exact = oracle(i, SCALING) + (F.linear(i.x, *base(i)) if op == "linear" else 0)
    torch.testing.assert_close(got, exact)
    for name, grad in grads.items():
        assert grad.shape == getattr(flat, name).shape
        torch.testing.assert_close(grad.reshape(wanted[name].shape), wanted[name])


@pytest.mark.parametrize("ids", [[0, -1, 2, -1, 1], [2, 0, 1, -1, -1], [1, -1, 0, 2, -1], [-1, 2, 1, 0, -1]], ids=str)
def test_equal_samples_between_rows_without_an_adapter(ids):
    task = torch.tensor(ids, dtype=torch.int32).repeat_interleave(32)
    x = torch.randn(len(task), 6, dtype=torch.float64)
    a, b0 = torch.randn(128, 6).double(), torch.randn(5, 128).double()
    u, v, fusion = torch.randn(3, 5, 2).double(), torch.randn(3, 2, 128).double(), torch.randn(3).double()
    got = functional.delta(x, a, b0, u, v, fusion, task=task)
    wanted = reference.delta(x, a, b0, u, v, fusion, task=task)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
