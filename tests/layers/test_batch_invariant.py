"""freeze(model, batch_invariant=True): a row's bits depend on nothing but that row and its task."""

import copy

import pytest
import torch
from support.tiny_llava import randomise
from torch import nn

import lilora_kernels
from lilora_kernels import (
    LiLoRALinear,
    accelerate_linears,
    attach,
    cpu_library,
    freeze,
    fuse_mlps,
    restore_linears,
    unfreeze,
)

pytestmark = pytest.mark.skipif(isinstance(cpu_library.load(), str), reason=f"{cpu_library.load()}")

K = 200  # more than one tile of columns, and not a multiple of a vector
NAMES = ["a", "b", "c", None]
Unsupported = lilora_kernels.backends.Unsupported


class Model(nn.Sequential):
    """x [B, L, K] -> [B, L, K]; the last layer is not adapted."""

    def forward(self, x):
        return super().forward(x)


def made(dtype=torch.float32, invariant=True, bias=True):
    torch.manual_seed(0)
    layers = [LiLoRALinear(nn.Linear(K, K, bias=bias).requires_grad_(False), r=16, sub_rank=8) for _ in range(2)]
    model = Model(*layers, nn.Linear(K, K)).to(dtype).requires_grad_(False)
    for layer in layers:
        for task in NAMES[:3]:
            layer.add_task(task)
    randomise(model)
    attach(model)
    model.eval()
    if invariant:
        accelerate_linears(model)
        freeze(model, batch_invariant=True)
    return model


@torch.no_grad()
def run(model, x, names):
    return model(x, task_ids=names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_samples_bits_do_not_depend_on_the_batch(dtype):
    model, other = made(dtype), made(dtype, invariant=False)
    x = torch.randn(40, 5, K).to(dtype)
    names = [NAMES[i % 4] for i in range(40)]
    whole = run(model, x, names)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    wanted = run(other, x, names)
    torch.testing.assert_close(whole, wanted, rtol=0, atol=tolerance * wanted.abs().max().item())
    for chosen in ([7], [3, 2, 1, 0], list(range(13, 40)), [5] * 30):
        assert torch.equal(run(model, x[chosen], [names[i] for i in chosen]), whole[chosen])


def test_without_a_task_and_with_the_active_one():
    model, x = made(), torch.randn(30, 3, K)
    layer = model[0]
    lilora_kernels.set_task(model, "b", train=False)
    with torch.no_grad():
        whole = model(x)
        assert torch.equal(model(x[4:5]), whole[4:5])
        assert torch.equal(run(model, x, ["b"] * 30), whole)
        layer.merge("b")
        model[1].merge("b")
        whole = model(x)
        assert torch.equal(model(x[4:5]), whole[4:5])


def test_what_the_kernels_cannot_run_raises():
    model, x = made(), torch.randn(30, 3, K)
    wanting = x.clone().requires_grad_()
    for call in (lambda: model(wanting), lambda: model[2](wanting), lambda: model.double()(x.double())):
        with pytest.raises(Unsupported, match="a batch-invariant layer takes the CPU kernels alone"):
            call()
    model = made()
    for layer in (model[0], model[2]):
        for forced in (lilora_kernels.plan("composed"), lilora_kernels.backend("eager")):
            with forced, torch.no_grad(), pytest.raises(Unsupported, match="batch-invariant"):
                layer(x)
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes"):
        model[2](x[..., :7])


def test_layers_that_would_take_other_kernels_are_refused():
    def others(model):
        with pytest.raises(RuntimeError, match=r"1 modules would take kernels of torch's choice.*accelerate_linears"):
            freeze(model, batch_invariant=True)
        assert model[0].capacity is None

    model = made(invariant=False)
    accelerate_linears(model)
    model[2] = nn.Linear(K, K)
    others(model)
    accelerate_linears(model)
    hook = model[1].base_layer.register_forward_hook(lambda *_: None)
    others(model)
    hook.remove()
    freeze(model, batch_invariant=True)


@pytest.mark.parametrize("first", [True, False])
def test_a_fused_mlp_runs_apart(first, monkeypatch):
    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = made(invariant=False)
            self.act_fn = nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    model = Model(MLP())
    attach(model)
    accelerate_linears(model)
    if first:
        assert fuse_mlps(model) == {"0": None}
    freeze(model, batch_invariant=True)
    if not first:
        assert fuse_mlps(model) == {"0": "gate_proj is batch-invariant"}
    library, sides, seen = cpu_library.load(), [], []
    forward = library.decode
    monkeypatch.setattr(library, "decode", lambda calls, count: sides.append(count) or forward(calls, count))
    x, names = torch.randn(40, 5, K), [NAMES[i % 4] for i in range(40)]
    run(model, x[:8], names[:8])  # few enough rows for the kernels to take both at once
    assert set(sides) == {1}
    for layer in (model[0].gate_proj, model[0].up_proj):
        layer.register_forward_hook(lambda *called: seen.append(called[-1]))
    run(model, x, names)
    whole, seen[:] = list(seen), []
    run(model, x[3:4], names[3:4])
    for one, all_rows in zip(seen, whole, strict=True):
        assert torch.equal(one, all_rows[3:4])


def test_its_linears_are_not_restored():
    model = made()
    with pytest.raises(RuntimeError, match=r"unfreeze\(model\) first"):
        restore_linears(model)
    unfreeze(model)
    restore_linears(model)
    assert type(model[2]) is nn.Linear


@pytest.mark.parametrize("end", [unfreeze, nn.Module.train, lambda model: freeze(model), copy.deepcopy])
def test_what_ends_it(end):
    model, x = made(), torch.randn(30, 3, K)
    model = end(model) or model
    model.eval()
    assert not any(module.batch_invariant for module in model.modules() if hasattr(module, "batch_invariant"))
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_frozen_model_moves_with_it():
    model, x = made(), torch.randn(30, 3, K)
    model.bfloat16()
    whole = run(model, x.bfloat16(), ["a"] * 30)
    assert torch.equal(run(model, x[:2].bfloat16(), ["a", "a"]), whole[:2])
