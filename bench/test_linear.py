"""One adapted linear layer against PEFT's LoRA on a CPU: fp32, 2048 -> 5504, r = 128, 8 samples of 64 tokens.

Every case first compares both layers with the formula in fp64, outputs and gradients: a wrong result gets no figure.
Ratios are reported, not asserted.
"""

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn

from lilora_kernels import functional
from lilora_kernels.linear import LiLoRALinear
from lilora_kernels.ops.call import Call
from lilora_kernels.ops.delta import eager, reference
from lilora_kernels.ops.philox import keep_scale

from .pairs import alternate, summary

IN, OUT, RANK, SUB_RANK, SAMPLES, TOKENS = 2048, 5504, 128, 64, 8, 64
SCALING = 2.0
ROUNDS = 21
TOLERANCE = 1e-5  # largest error, as a share of the largest value


def base_linear() -> nn.Linear:
    return nn.Linear(IN, OUT, bias=False).requires_grad_(False)


def lilora_layer(base: nn.Linear, tasks: list[str], dropout: float) -> LiLoRALinear:
    layer = LiLoRALinear(base, RANK, SUB_RANK, SCALING * RANK, dropout)
    for task in tasks:
        layer.add_task(task)
    return randomised(layer)


def peft_layer(base: nn.Linear, tasks: list[str], dropout: float) -> nn.Module:
    config = peft.LoraConfig(r=RANK, lora_alpha=SCALING * RANK, lora_dropout=dropout, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config, adapter_name=tasks[0])
    for task in tasks[1:]:
        model.add_adapter(task, config)
    return randomised(model.base_model.model[0])


def randomised(layer: nn.Module) -> nn.Module:
    """Every adapter parameter random: the usual initialisation leaves the adapter's output zero."""
    for name, parameter in layer.named_parameters():
        if not name.startswith("base_layer."):
            nn.init.normal_(parameter, std=0.02)
    return layer


def trainable(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def assert_close(what: str, got: Tensor, truth: Tensor) -> None:
    error = ((got.double() - truth).abs().max() / truth.abs().max()).item()
    assert error <= TOLERANCE, f"{what} is wrong by {error:.1e} of its largest value; no figure is taken"


def adapted(x: Tensor, base: nn.Linear, delta: Tensor) -> Tensor:
    return x @ base.weight.double().T + delta


def test_forward_of_a_mixed_batch(record):
    """Inference, every sample in another task than its neighbour; PEFT gets the tasks as adapter_names."""
    base = base_linear()
    tasks = ["a", "b", "c", "d"]
    ours, theirs = lilora_layer(base, tasks, 0.0).eval(), peft_layer(base, tasks, 0.0).eval()
    x = torch.randn(SAMPLES, TOKENS, IN)
    ids = torch.arange(SAMPLES, dtype=torch.int32) % len(tasks)
    names = [tasks[i] for i in ids.tolist()]
    functions = {
        "base": lambda: base(x),
        "ours": lambda: ours(x, task=ids),
        "peft": lambda: theirs(x, adapter_names=names),
    }
    with torch.no_grad():
        for row, name in enumerate(names):
            wide = x[row].double()
            factors = ours.lilora_A[name], ours.lilora_B[name], ours.lilora_U[name][None], ours.lilora_V[name][None]
            delta = reference.delta(wide, *(f.double() for f in (*factors, ours.lilora_fusion[name])), scaling=SCALING)
            assert_close("ours", functions["ours"]()[row], adapted(wide, base, delta))
            factors = theirs.lora_A[name].weight.double(), theirs.lora_B[name].weight.double()
            delta = reference.delta(wide, *factors, scaling=SCALING)
            assert_close("peft", functions["peft"]()[row], adapted(wide, base, delta))
        seconds = alternate(functions, ROUNDS)
    record("forward, 4 tasks mixed", summary(seconds, over="peft"))


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_training_step_of_one_task(record, dropout):
    """Forward and backward with gradients for x and for every adapter parameter."""
    base = base_linear()
    ours, theirs = lilora_layer(base, ["a"], dropout), peft_layer(base, ["a"], dropout)
    x, dy = torch.randn(SAMPLES, TOKENS, IN, requires_grad=True), torch.randn(SAMPLES, TOKENS, OUT)
    for name, layer, truth in (("ours", ours, lilora_truth), ("peft", theirs, peft_truth)):
        check_step(name, layer, truth, x, base, dropout)

    def step(layer: nn.Module) -> Callable[[], object]:
        inputs = [x, *trainable(layer)]
        return lambda: torch.autograd.grad(layer(x), inputs, dy)

    seconds = alternate({"base": step(base), "ours": step(ours), "peft": step(theirs)}, ROUNDS)
    saved = {name: saved_bytes(layer, x) for name, layer in (("base", base), ("ours", ours), ("peft", theirs))}
    figures = summary(seconds, over="peft") | {"saved_bytes": saved}
    record(f"forward and backward, one task, dropout {dropout}", figures)


def check_step(name: str, layer: nn.Module, delta_of: Callable, x: Tensor, base: nn.Linear, dropout: float) -> None:
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)  # both masks are drawn from torch's generator
    wide = x.detach().double().requires_grad_()
    leaves = [parameter.detach().double().requires_grad_() for parameter in trainable(layer)]
    truth = adapted(wide, base, delta_of(wide.flatten(0, 1), leaves, dropout).unflatten(0, x.shape[:-1]))
    assert_close(f"{name}: y", y, truth)
    # dy = y, as from |y|^2 / 2: with a random dy the gradient of fusion, one sum over everything, all but cancels.
    dy = y.detach()
    got = torch.autograd.grad(y, [x, *trainable(layer)], dy)
    want = torch.autograd.grad(truth, [wide, *leaves], dy.double())
    for i, (grad, exact) in enumerate(zip(got, want, strict=True)):
        assert_close(f"{name}: gradient {i}", grad, exact)


def lilora_truth(x: Tensor, parameters: list[Tensor], dropout: float) -> Tensor:
    a, b0, u, v, fusion = parameters
    u, v = u[None], v[None]
    keep = None
    if dropout:
        seed = functional.draw_seed(x.device)
        call = Call(a, b0, u, v, fusion, None, None, None, seed, SCALING, dropout, None)
        keep = eager.dropout_mask(*x.shape, torch.float32, call)
    return reference.delta(x, a, b0, u, v, fusion, keep=keep, keep_scale=keep_scale(dropout), scaling=SCALING)


def peft_truth(x: Tensor, parameters: list[Tensor], dropout: float) -> Tensor:
    a, b = parameters
    # The module multiplies x by a mask that already holds the scale.
    keep = nn.functional.dropout(torch.ones(SAMPLES, TOKENS, IN), dropout).flatten(0, 1) if dropout else None
    return reference.delta(x, a, b, keep=keep, scaling=SCALING)


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Memory that autograd holds between forward and backward, the parameters' own left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)  # alive until the sum is taken, so that no two storages share an address
    return sum(storages.values()) if y.requires_grad else 0
