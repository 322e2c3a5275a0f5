"""SD-LoRA against its formula, written out with dense matrices in fp64."""

import pytest
import torch
from support.toy import HIDDEN, SCALING, WIDTH, begin, close, end, make, no_batches, restored, same_function

from lilora.methods import Stage


def dense(layer, x, blocks):
    """The linear with the blocks [(m, A, B, norm or None)] multiplied out, one after the other."""
    weight = layer.base_layer.weight.clone()
    for m, a, b, norm in blocks:
        update = b @ a
        if norm is not None:
            size = torch.linalg.matrix_norm(update) if norm == "product" else a.norm() * b.norm()
            update = update / size
        weight = weight + SCALING * m * update
    return x @ weight.T + layer.base_layer.bias


@pytest.mark.parametrize(("norm", "restart"), [("product", None), ("factors", 0.8)])
def test_directions_stay_and_all_magnitudes_train(norm, restart):
    method = make("sdlora", norm=norm, restart=restart)
    layer, earlier = method.layers["up"], []
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    for number, task in enumerate(("first", "second", "third")):
        method.begin(Stage("learn", task), no_batches)
        magnitudes = layer.choose.lora_magnitude
        before = torch.cat([torch.stack([m for m, *_ in earlier]), torch.ones(1)]) if earlier else torch.ones(1)
        close(magnitudes, torch.full_like(magnitudes, restart) if restart else before.double())
        begin_values(method)
        a, b = layer.part("new")
        assert sum(p.requires_grad for p in method.model.parameters()) == 9  # A, B and magnitudes of three linears
        leaves = [t.detach().clone().requires_grad_() for t in (x, a, b, magnitudes)]
        blocks = [(leaves[3][k], *parts, norm) for k, (_, *parts) in enumerate(earlier)]
        want = dense(layer, leaves[0], [*blocks, (leaves[3][number], leaves[1], leaves[2], None)])
        y = layer(x)
        close(y, want)
        dy = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
        gradients = torch.autograd.grad(y, [x, a, b, magnitudes], dy), torch.autograd.grad(want, leaves, dy)
        for got, expected in zip(*gradients, strict=True):
            close(got, expected)
        earlier = [(leaves[3][k].detach(), *parts) for k, (_, *parts) in enumerate(earlier)]
        own = a.detach().clone(), b.detach().clone()
        end(method, task)
        close(layer(x), want)  # divided by its norm and multiplied by it
        size = torch.linalg.matrix_norm(own[1] @ own[0]) if norm == "product" else own[0].norm() * own[1].norm()
        close(layer.part("new")[1], own[1] / size)
        earlier.append((leaves[3][number].detach() * size, *own))
        close(layer.choose.lora_magnitude, torch.stack([m for m, *_ in earlier]))


def begin_values(method):
    with torch.no_grad():
        for p in method.model.parameters():
            if p.requires_grad:
                p.copy_(0.4 * torch.randn_like(p))


def test_a_linear_that_nothing_reached_stays_without_a_function():
    method = make("sdlora")
    method.begin(Stage("learn", "first"), no_batches)
    end(method, "first")
    assert method.layers["idle"].choose.lora_magnitude.tolist() == [1]
    assert not method.layers["idle"].part("new")[1].any()


def test_a_bank_gives_the_same_function_and_goes_on_alike():
    method = make("sdlora")
    for task in ("first", "second"):
        begin(method, task)
        end(method, task)
    again = restored(method)
    same_function(method, again)
    for one in (method, again):
        torch.manual_seed(3)
        begin(one, "third")
        end(one, "third")
    assert method.fingerprints(["third"]) == again.fingerprints(["third"])
    assert method.parameters() == 3 * again.inference_parameters(again.options, [(9, 7), (7, 9), (3, 7)])[1]
