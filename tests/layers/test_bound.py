"""From its second call on a layer runs a call bound to its parameters: it must see whatever changes afterwards."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from support.layers import K, N, R, S, close, expected, layer
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import lilora_kernels
from lilora_kernels import attach, cpu_library, freeze, functional
from lilora_kernels.ops import cpu_training

pytestmark = pytest.mark.skipif(isinstance(cpu_library.load(), str), reason=f"{cpu_library.load()}")


def bind_by(bind, monkeypatch):
    """Let the CPU kernels' calls be bound by this function."""
    table = lilora_kernels.backends._table
    for op in ("linear", "delta"):
        monkeypatch.setitem(table[op], "cpu", replace(table[op]["cpu"], bind=bind))


@pytest.fixture
def bound(monkeypatch):
    """How many calls took the bound one: `bound()`, beginning anew with each question."""
    taken = []

    def counting(*args):
        run = cpu_training.bind_forward(*args)

        def counted(*args):
            y = run(*args)
            taken.append(y is not None)
            return y

        return run and counted

    bind_by(counting, monkeypatch)

    def since():
        found = sum(taken)
        taken.clear()
        return found

    return since


def settled(**options):
    """A layer whose one active task has been called twice."""
    made = layer(**options).eval()
    made.set_task("cats")
    with torch.no_grad():
        for _ in range(2):
            made(torch.randn(3, K, dtype=made.base_layer.weight.dtype))
    return made


@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K), (64, K)])
def test_it_computes_the_formula(shape, bound):
    made, x = settled(), torch.randn(shape)
    assert bound() == 1
    with torch.no_grad():
        close(made(x), expected(made, x, "cats"))
    assert bound() == 1


def a_of(made):
    return next(iter(made.lilora_A.values()))


CHANGES = {
    "values in place": lambda made: made.lilora_U["cats"].data.mul_(-2),
    "memory of a factor": lambda made: setattr(made.lilora_V["cats"], "data", torch.randn(S, R)),
    "memory of the base": lambda made: setattr(made.base_layer.weight, "data", torch.randn(N, K)),
    "strides over the same memory": lambda made: setattr(a_of(made), "data", a_of(made).data.view(K, R).T),
    "the base": lambda made: setattr(made, "base_layer", nn.Linear(K, N).requires_grad_(False)),
    "the bias": lambda made: setattr(made.base_layer, "bias", None),
    "alpha": lambda made: setattr(made, "alpha", 2 * made.alpha),
    "the dtype": lambda made: made.double(),
    "the dtype and back": lambda made: made.double().float(),
}


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_sees_what_changes(change, rows):
    made = settled()
    change(made)
    x = torch.randn(rows, K, dtype=made.base_layer.weight.dtype)
    with torch.no_grad():
        for _ in range(3):
            close(made(x), expected(made, x, "cats"))


def test_another_task_another_dtype_and_more_rows(bound):
    made = settled()
    with torch.no_grad():
        for name in ("dogs", "cats", "birds"):
            made.set_task(name)
            for rows in (3, 3, 65, 3):
                x = torch.randn(rows, K)
                close(made(x), expected(made, x, name))
        strided = torch.randn(K, 3).T
        close(made(strided), expected(made, strided, "birds"))


def test_more_rows_are_bound_too():
    made = settled()
    x, registered = torch.randn(70, K), lilora_kernels.backends._table["linear"]["cpu"].bind
    with torch.no_grad():
        made(x)
    assert registered is cpu_training.bind_forward
    assert made._slot.settled[1](x) is not None


def test_what_is_forced_afterwards(bound):
    made, x = settled(), torch.randn(3, K)
    with torch.no_grad():
        made(x)
        assert bound() == 2
        for forced in (lilora_kernels.backend("eager"), lilora_kernels.plan("composed")):
            with forced:
                close(made(x), expected(made, x, "cats"))
                made(x)
        assert bound() == 0
        with lilora_kernels.plan("decode"), pytest.raises(lilora_kernels.backends.Unsupported, match="65"):
            made(torch.randn(65, K))


def test_gradients_modes_and_transforms_take_the_operation(bound):
    made, x = settled(), torch.randn(3, K)
    bound()
    (grad,) = torch.autograd.grad(made(x).sum(), made.lilora_U["cats"])
    assert grad.abs().sum() > 0
    wanted = x.clone().requires_grad_()
    made(wanted).sum().backward()
    assert wanted.grad.abs().sum() > 0

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Mode():
        made(x)
    assert any("lilora.linear" in name for name in seen)
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        made(forward_ad.make_dual(x, x))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert made(x).dtype == torch.bfloat16
    assert bound() == 0


def test_a_call_of_another_kind_while_one_is_bound(monkeypatch):
    """As from a second thread: what it settles must not be taken together with what is bound here."""
    made, x = settled(), torch.randn(3, K)

    def interrupted(*args):
        bind_by(cpu_training.bind_forward, monkeypatch)
        made.alpha *= 2
        made(x)
        return cpu_training.bind_forward(*args)

    with torch.no_grad():
        made.alpha /= 4
        made(x)
        bind_by(interrupted, monkeypatch)
        made(x)
        for _ in range(3):
            close(made(x), expected(made, x, "cats"))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("name", ["weight", "bias", "a", "b0", "u", "v", "fusion"])
def test_memory_that_is_gone_raises(name, backend):
    """As code that shards leaves it outside of a model's forward."""
    made = settled()
    own = dict(zip(("a", "b0", "u", "v", "fusion"), made._parameters_of("cats"), strict=True))
    (own | dict(made.base_layer.named_parameters()))[name].untyped_storage().resize_(0)
    with torch.no_grad(), lilora_kernels.backend(backend), pytest.raises(RuntimeError, match=r"\] has no memory: "):
        made(torch.randn(3, K))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("at", range(8))
def test_memory_that_is_gone_raises_in_functions_too(at, backend):
    made = settled()
    given = [torch.randn(3, K), made.base_layer.weight, made.base_layer.bias, *made._parameters_of("cats")]
    given[at].untyped_storage().resize_(0)
    for graph in (False, True):
        with (
            torch.set_grad_enabled(graph),
            lilora_kernels.backend(backend),
            pytest.raises(RuntimeError, match="memory"),
        ):
            functional.linear(*given)


def test_negated_inputs_and_parameters():
    made, x = settled(), torch.randn(3, K)
    with torch.no_grad():
        close(made(torch._neg_view(x)), expected(made, -x, "cats"))
        for own in (made.lilora_U["cats"], made.base_layer.weight):
            own.data = torch._neg_view(own.data)
            for _ in range(3):
                close(made(x), expected(made, x, "cats"))


def test_copies_and_files():
    made, x = settled(), torch.randn(3, K)
    twin = copy.deepcopy(made)
    twin.lilora_U["cats"].data.mul_(3)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        for each in (made, twin, loaded, made):
            for _ in range(3):
                close(each(x), expected(each, x, "cats"))


def test_a_frozen_model_of_several_tasks(bound):
    model = nn.Sequential(layer(), nn.Linear(N, K), layer()).requires_grad_(False).eval()
    attach(model)
    freeze(model)
    x, names = torch.randn(4, 2, K), ["dogs", None, "cats", "dogs"]
    with torch.no_grad():
        whole = [model(x, task_ids=names) for _ in range(3)][-1]
        assert bound() > 0
        for at, name in enumerate(names):
            y = expected(model[0], x[at], name).float()
            close(whole[at], expected(model[2], model[1](y), name), 1e-4)


def test_a_wrong_id_raises_after_the_first_calls_too():
    made = settled()
    with torch.no_grad():
        for _ in range(3):
            made(torch.randn(2, K), task=torch.tensor([0, 1], dtype=torch.int32))
        with pytest.raises(ValueError, match="task"):
            made(torch.randn(2, K), task=torch.tensor([0, 3], dtype=torch.int32))
        with pytest.raises(ValueError, match="task"):
            made(torch.randn(2, K), task=torch.tensor([0], dtype=torch.int32))


def test_operations_are_never_bound():
    """What `functional` gets is checked in every call."""
    a, b0 = torch.randn(R, K), torch.randn(N, R)
    for _ in range(3):
        with pytest.raises(ValueError, match="b0"):
            functional.delta(torch.randn(3, K), a, b0[:, 1:])
