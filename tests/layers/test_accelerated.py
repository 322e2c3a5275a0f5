"""accelerate_linears: the product of few rows, everything else as torch has it, and the way back."""

import copy
import io

import pytest
import torch
from support.layers import close, expected, layer
from support.tiny_llava import tiny_llava
from torch import nn

import lilora_kernels
from lilora_kernels import accelerate_linears, cpu_library, restore_linears
from lilora_kernels.layers import accelerated
from lilora_kernels.layers.base import AdaptedLinear

pytestmark = pytest.mark.skipif(isinstance(cpu_library.load(), str), reason=f"{cpu_library.load()}")
K, N = 24, 20


@pytest.fixture(autouse=True)
def by_torch(monkeypatch):
    """How many products torch computes: `by_torch()`, beginning anew with each question."""
    forward, calls = nn.Linear.forward, []
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: calls.append(x) or forward(self, x))
    monkeypatch.setattr(cpu_library.load(), "has_bf16", False)
    monkeypatch.setattr(cpu_library.load(), "outruns", False)

    def since():
        found = len(calls)
        calls.clear()
        return found

    return since


def product(module, x):
    weight, bias = module.weight.double(), module.bias
    return x.double() @ weight.T + (0 if bias is None else bias.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, K), (64, K), (0, K)])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows(dtype, shape, bias, by_torch):
    linear = nn.Linear(K, N, bias=bias, dtype=dtype)
    assert accelerate_linears(linear) == {"": None}
    x = torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        y, wanted = linear(x), product(linear, x)
    assert by_torch() == 0
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("rows, taken", [(8, 0), (9, 1)])
def test_a_processor_that_multiplies_bf16_itself_has_more_rows_of_it(rows, taken, by_torch, monkeypatch):
    monkeypatch.setattr(cpu_library.load(), "has_bf16", True)
    for dtype, count in ((torch.bfloat16, taken), (torch.float32, 0)):
        linear = nn.Linear(K, N, dtype=dtype)
        accelerate_linears(linear)
        with torch.no_grad():
            linear(torch.randn(rows, K, dtype=dtype))
        assert by_torch() == count


def test_prompts(by_torch, monkeypatch):
    linear, x = nn.Linear(K, N), torch.randn(4, 64, K)
    accelerate_linears(linear)
    with torch.no_grad():
        linear(x)
    assert by_torch() == 1  # of a small weight
    monkeypatch.setattr(accelerated, "PROMPTS_FROM", K * N)
    linear = nn.Linear(K, N)
    accelerate_linears(linear)
    with torch.no_grad():
        y, wanted = linear(x), product(linear, x)
        assert torch.equal(linear(x.flatten(0, 1)[:65]), y.flatten(0, 1)[:65])
        assert by_torch() == 0
        torch.testing.assert_close(y.double(), wanted, rtol=1e-6, atol=1e-6)
        linear.bfloat16()(x.bfloat16())
    assert by_torch() == 1
    monkeypatch.setattr(accelerated, "PROMPTS_FROM", K * N + 1)
    monkeypatch.setattr(cpu_library.load(), "outruns", True)
    linear = nn.Linear(K, N)
    accelerate_linears(linear)
    with torch.no_grad():
        linear(x)
    assert by_torch() == 0


def test_everything_else_is_torchs(by_torch):
    linear, x = nn.Linear(K, N), torch.randn(3, K)
    accelerate_linears(linear)
    linear(x).sum().backward()  # its parameters learn
    assert linear.weight.grad is not None
    with torch.no_grad():
        linear(torch.randn(257, K))
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x).dtype == torch.bfloat16
        for forced in (lilora_kernels.backend("eager"), lilora_kernels.plan("composed")):
            with forced:
                linear(x)
        with pytest.raises(RuntimeError, match="shape"):
            linear(torch.randn(3, K + 1))
        with pytest.raises(RuntimeError, match="dtype"):
            linear(x.double())
        linear.to("meta")(x.to("meta"))
    assert by_torch() == 8


def test_gradients_of_the_input(by_torch):
    linear, x = nn.Linear(K, N).requires_grad_(False), torch.randn(3, K, requires_grad=True)
    wanted = torch.autograd.grad(linear(x).square().sum(), x)
    accelerate_linears(linear)
    assert torch.equal(torch.autograd.grad(linear(x).square().sum(), x)[0], wanted[0])


def test_compiled_and_exported(by_torch):
    linear, x = nn.Linear(K, N).requires_grad_(False), torch.randn(3, K)
    accelerate_linears(linear)
    with torch.no_grad():
        compiled = torch.compile(linear, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), linear(x))


def test_changed_parameters_are_seen():
    linear, x = nn.Linear(K, N), torch.randn(3, K)
    accelerate_linears(linear)
    changes = [
        lambda: linear.weight.mul_(2),
        lambda: setattr(linear.weight, "data", torch.randn(N, K)),
        lambda: setattr(linear.weight, "data", torch.randn(K, N).T),
        lambda: setattr(linear, "bias", None),
        lambda: linear.double(),
        lambda: linear.bfloat16().float(),
    ]
    with torch.no_grad():
        for change in changes:
            change()
            x = x.to(linear.weight.dtype)
            torch.testing.assert_close(linear(x).double(), product(linear, x), rtol=1e-5, atol=1e-5)


def test_which_layers_of_a_model_and_the_way_back():
    model = tiny_llava()
    plain = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    before = {path: module.forward for path, module in model.named_modules()}
    keys = list(model.state_dict())
    found = accelerate_linears(model)
    assert found == dict.fromkeys(plain)
    assert accelerate_linears(model) == found
    assert list(model.state_dict()) == keys
    adapted = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    assert all(module.unfused_reason() is None for module in adapted)
    restore_linears(model)
    assert {path for path, module in model.named_modules() if type(module) is nn.Linear} == plain
    assert all(module.forward == before[path] for path, module in model.named_modules())


def test_the_base_of_an_adapted_layer(by_torch):
    made, x = layer().eval(), torch.randn(3, K)
    accelerate_linears(made)
    with torch.no_grad():
        for change in (lambda: made.set_task(), lambda: made.set_task("cats"), lambda: made.merge("cats")):
            change()
            for _ in range(3):
                close(made(x), expected(made, x, "cats" if made.active and made.merged_task is None else None))
    assert by_torch() == 0


def test_layers_that_are_left_alone():
    class Own(nn.Linear):
        pass

    replaced, model = nn.Linear(K, N), nn.ModuleDict({"own": Own(K, N), "wide": nn.Linear(K, N).double()})
    model["replaced"], model["adapted"] = replaced, layer()
    replaced.forward = lambda x: x
    assert accelerate_linears(model) == {
        "own": "it is a Own of a Parameter",
        "wide": "it does not support torch.float64",
        "replaced": "its forward was replaced",
        "adapted.base_layer": None,
    }
    restore_linears(model)
    assert "forward" in replaced.__dict__


def test_copies_and_files(by_torch):
    linear, x = nn.Linear(K, N), torch.randn(3, K)
    accelerate_linears(linear)
    with torch.no_grad():
        linear(x)
        twin = copy.deepcopy(linear)
        twin.weight.mul_(3)
        file = io.BytesIO()
        torch.save(linear, file)
        file.seek(0)
        for each in (linear, twin, torch.load(file, weights_only=False)):
            torch.testing.assert_close(each(x).double(), product(each, x), rtol=1e-5, atol=1e-5)
    assert by_torch() == 0


def test_hooks_run_as_before():
    linear, x, seen = nn.Linear(K, N), torch.randn(3, K), []
    linear.register_forward_hook(lambda module, inputs, y: seen.append(y))
    accelerate_linears(linear)
    with torch.no_grad():
        linear(x)
    assert len(seen) == 1


def test_parameters_that_torch_refuses_or_broadcasts(by_torch):
    """Whatever they have become since, it is torch's product or its error."""
    x = torch.randn(3, K)

    def changed(change):
        linear = nn.Linear(K, N).requires_grad_(False)
        accelerate_linears(linear)
        linear(x)
        change(linear)
        return linear

    def bias(tensor):
        return lambda linear: setattr(linear, "bias", nn.Parameter(tensor, requires_grad=False))

    with torch.no_grad():
        one = changed(bias(torch.full((1,), 2.0)))
        torch.testing.assert_close(one(x), x @ one.weight.T + 2)
        wrong = [
            bias(torch.ones(N + 1)),
            bias(torch.ones(N).bfloat16()),
            bias(torch.ones(N).int()),
            lambda linear: linear.to("meta"),
            lambda linear: linear.weight.untyped_storage().resize_(0),
            lambda linear: linear.bias.untyped_storage().resize_(0),
        ]
        for change in wrong:
            with pytest.raises(RuntimeError):
                changed(change)(x)


def test_inputs_that_are_not_plain_memory():
    linear = nn.Linear(K, N).requires_grad_(False)
    accelerate_linears(linear)
    x = torch.randn(3, K)
    with torch.no_grad():
        torch.testing.assert_close(linear(torch._neg_view(x)), product(linear, -x).float())
        torch.testing.assert_close(linear(torch.randn(K, 3).copy_(x.T).T), product(linear, x).float())
        torch.testing.assert_close(linear(x.to_sparse_csr()), product(linear, x).float())
        ragged = torch.nested.nested_tensor([x, x[:2]])
        torch.testing.assert_close(linear(ragged).unbind()[0], product(linear, x).float())
        freed = torch.randn(3, K)
        freed.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError):
            linear(freed)
        empty = nn.Linear(0, 5)
        accelerate_linears(empty)
        torch.testing.assert_close(empty(torch.randn(2, 0)), empty.bias.expand(2, 5))


def test_a_shallow_copy_has_parameters_of_its_own():
    linear, x = nn.Linear(K, N), torch.randn(3, K)
    accelerate_linears(linear)
    with torch.no_grad():
        linear(x)
        other = linear._replicate_for_data_parallel()
        other._parameters = {"bias": linear.bias}
        other.weight = torch.zeros(N, K)
        torch.testing.assert_close(other(x), linear.bias.expand(3, N))


def test_a_forced_plan_that_is_not_its_own(by_torch):
    linear, x = nn.Linear(K, N), torch.randn(3, K)
    accelerate_linears(linear)
    with torch.no_grad(), lilora_kernels.plan("by_phase"):
        linear(x)
    assert by_torch() == 1
