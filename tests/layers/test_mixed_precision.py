"""Autocast, gradient scaling and checkpointing together: as near to a run in fp32 as the plain formula is."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.tiny_llava import TASKS, batch, tiny_llava

from lilora_kernels import functional, fuse_mlps, set_task

pytestmark = pytest.mark.filterwarnings("ignore:.*checkpoint.*:FutureWarning")
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
NAMES = ["count", None, "where"]


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(3)
    return tiny_llava(train_a="always", train_b0="always").train()


@pytest.fixture
def inputs():
    return batch([1, 0, 2])


def variant(made, fused=False, reentrant=None):
    model = copy.deepcopy(made)
    if fused:
        fuse_mlps(model)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    set_task(model, *TASKS)
    return model


def gradients(model, inputs, dtype=None, scaler=None):
    """Of the mean square of the logits, as a scaler leaves them for the optimiser."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        loss = model(**inputs, task_ids=NAMES).logits.float().square().mean()
    if scaler is None:
        loss.backward()
    else:
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        scaler.update()  # it tells optimisers apart by their ids, which another may have once this one is gone
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_linear(x, weight, bias, a, b0, u, v, fusion, *, task, scaling, **_):
    """The formula as one writes it: autocast rounds every product."""
    y, h, task = F.linear(x, weight, bias), F.linear(x, a), task.view(x.shape[:-1])
    for t, f in enumerate(torch.sigmoid(fusion)):
        delta = scaling * F.linear(h, f * b0 + (1 - f) * (u[t] @ v[t]))
        y = y + torch.where((task == t)[..., None], delta, 0.0).to(y.dtype)
    return y


def error(got, wanted):
    """Root mean square over all gradients of the relative error of each."""
    assert got.keys() == wanted.keys()
    assert all(gradient.dtype == torch.float32 for gradient in got.values())
    # fusion's is a sum that may all but cancel; that of an absent task is zero
    named = {name: want for name, want in wanted.items() if "fusion" not in name and want.any()}
    return torch.stack([(got[n] - want).norm() / want.norm() for n, want in named.items()]).square().mean().sqrt()


@DTYPES
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_scaled_gradients_err_no_more_than_the_formulas(made, dtype, fused, reentrant, monkeypatch):
    """Over several batches: in one, an activation's kink may lie between the two."""
    batches, scaler = [batch([1, 0, 2]) for _ in range(4)], torch.amp.GradScaler("cpu", init_scale=2.0**10)
    wanted = [gradients(variant(made), inputs) for inputs in batches]
    ours = [gradients(variant(made, fused, reentrant), inputs, dtype, scaler) for inputs in batches]
    monkeypatch.setattr(functional, "linear", plain_linear)
    formula = [gradients(variant(made), inputs, dtype) for inputs in batches]
    assert error(gradients(variant(made), batches[0]), wanted[0]) < 1e-5

    def of_all(found):
        return torch.stack([error(got, want) for got, want in zip(found, wanted, strict=True)]).square().mean().sqrt()

    assert 0 < of_all(ours) <= 1.1 * of_all(formula)


def test_an_overflow_skips_the_step_and_lowers_the_scale(made, inputs):
    model = variant(made, fused=True)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps = 0
    while all(torch.equal(p, before[name]) for name, p in model.named_parameters()):
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**inputs, task_ids=NAMES).logits.float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        steps += 1
    assert 1 < steps < 40
    assert scaler.get_scale() == 2.0 ** (40 - steps + 1)
    assert all(p.isfinite().all() for p in model.parameters())
