"""`warmup` runs what will be run later, and leaves no trace."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import lilora_kernels
from lilora_kernels import LiLoRALinear
from lilora_kernels.ops import triton_runtime
from lilora_kernels.ops.delta import triton_backend
from lilora_kernels.ops.delta_pair import triton_backend as delta_pair


def model():
    bases = [torch.nn.Linear(24, 20).requires_grad_(False) for _ in range(2)]
    layers = [LiLoRALinear(base, r=8, sub_rank=4, dropout=0.1) for base in bases]
    for layer in layers:
        layer.add_task("one")
        layer.add_task("two")
    return torch.nn.Sequential(*layers, torch.nn.Linear(20, 4))


@pytest.mark.parametrize("train", [True, False])
def test_each_distinct_layer_runs_once_for_each_bucket(train, monkeypatch):
    monkeypatch.setattr(triton_runtime, "bucket_rows", lambda device: [2, 5])
    launches, run = [], triton_backend.run
    monkeypatch.setattr(triton_backend, "run", lambda *a: launches.append((a[0].__name__, a[2])) or run(*a))
    layers = model()
    for layer in layers[:2]:
        layer.set_task("two", train=train)
    before, state = {n: p.clone() for n, p in layers.named_parameters()}, torch.get_rng_state()
    # Two buckets, with the active task and with ids, and in training with and without a gradient of x.
    assert lilora_kernels.warmup(layers) == (8 if train else 4)
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in layers.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert {name for name, _ in launches} == ({"delta_forward", "delta_backward"} if train else {"delta_forward"})


def test_a_layer_with_parameters_that_lie_elsewhere_is_another_one(monkeypatch):
    """Views of an optimizer's flat buffer are seldom at multiples of 16 bytes, for which Triton compiles otherwise."""
    monkeypatch.setattr(triton_runtime, "bucket_rows", lambda device: [2])
    bases = [torch.nn.Linear(24, 24).requires_grad_(False) for _ in range(3)]
    layers = torch.nn.Sequential(*(LiLoRALinear(base, r=8, sub_rank=4, dropout=0.0) for base in bases))
    for layer in layers:
        layer.add_task("one")
    layers.requires_grad_(False)
    assert lilora_kernels.warmup(layers) == 2  # with the active task and with ids
    parameter = layers[2].lilora_V["one"]
    parameter.data = torch.cat([parameter.data.new_zeros(1), parameter.data.flatten()])[1:].view_as(parameter)
    assert lilora_kernels.warmup(layers) == 4


def test_merged_layers_routes_and_other_backends(monkeypatch):
    monkeypatch.setattr(triton_runtime, "bucket_rows", lambda device: [2])
    layers = model()
    lilora_kernels.attach(layers)
    layers[0].merge("one")
    with lilora_kernels.route(layers, torch.tensor([0, 1, 0])):
        assert lilora_kernels.warmup(layers) == 4  # the other layer
    layers[0].unmerge()
    with lilora_kernels.backend("eager"):
        assert lilora_kernels.warmup(layers) == 0


def test_nothing_to_do():
    assert lilora_kernels.warmup(torch.nn.Linear(3, 3)) == 0
    assert lilora_kernels.warmup(LiLoRALinear(torch.nn.Linear(3, 3), r=2, sub_rank=2)) == 0


def test_a_device_that_cannot_hold_the_grid_runs_phase_by_phase(monkeypatch):
    launches, run = [], triton_backend.run

    def refusing(kernel, device, first, last, *rest):
        launches.append((first, last))
        if first < last:
            raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")
        run(kernel, device, first, last, *rest)

    x, a, b0 = torch.randn(5, 24), torch.randn(4, 24), torch.randn(20, 4)
    with lilora_kernels.backend("triton"):
        want = lilora_kernels.delta(x, a, b0)
        monkeypatch.setattr(triton_backend, "run", refusing)
        assert torch.equal(lilora_kernels.delta(x, a, b0), want)
    assert launches[0] == (0, 2)
    assert len(launches) > 2


class GatedMLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = model()[0], model()[0], torch.nn.Linear(20, 24)
        self.act_fn = torch.nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_a_fused_mlp_runs_as_a_pair(monkeypatch):
    monkeypatch.setattr(triton_runtime, "bucket_rows", lambda device: [2])
    pairs, forward = [], delta_pair.forward
    monkeypatch.setattr(delta_pair, "forward", lambda *a: pairs.append(a[0].shape) or forward(*a))
    mlp = GatedMLP()
    assert lilora_kernels.fuse_mlps(mlp) == {"": None}
    # The pair and its layers alone, with the active task and with ids, with and without a gradient of x.
    assert lilora_kernels.warmup(mlp) == 8
    assert pairs == [(2, 24)] * 4


# --- what runs after a warm-up has been compiled by it ----------------------------------------------------------------


def variant(kernel, device, first, last, items, tensors, numbers, constants):
    """What decides which compiled kernel a launch takes, but for alignment."""
    kinds = tuple(None if t is None else t.dtype for t in tensors)
    return kernel.__name__, first, last, kinds, numbers[5] % 16, tuple(sorted(constants.items()))


class Two(torch.nn.Module):
    """A layer whose input wants no gradient, and a fused MLP behind it."""

    def __init__(self):
        super().__init__()
        self.first, self.mlp = model()[0], GatedMLP()
        self.between = torch.nn.Linear(20, 24)

    def forward(self, x):
        return self.mlp(self.between(self.first(x)))


def use(made, train):
    """What users do with a model: the active task and ids of all kinds, few rows and many, and checkpoints."""
    ids = torch.tensor([0, 1, -1, 1])
    for tokens, ways in ((1, ({}, {"task_ids": ["one", None, "two", "one"]})), (2, ({"task_ids": ids},))):
        for options in ways:
            y = made(torch.randn(4, tokens, 24), **options)
            if train:
                y.sum().backward()
                made.zero_grad()
    with torch.no_grad():
        made(torch.randn(1, 1, 24), task_ids=ids[:1])
    if train:
        with lilora_kernels.route(made, ids):
            x = torch.randn(4, 1, 24, requires_grad=True)
            torch.utils.checkpoint.checkpoint(
                made.first, x, use_reentrant=False, context_fn=made.first.routes.checkpoint_context
            ).sum().backward()


@pytest.mark.parametrize("train, unfused", [(True, False), (False, True)], ids=["train", "eval-hooked"])
def test_nothing_that_runs_later_is_new(train, unfused, monkeypatch):
    monkeypatch.setattr(triton_runtime, "bucket_rows", lambda device: [4, 8])
    monkeypatch.setattr(triton_runtime, "ONE_LAUNCH_ROWS", 7)
    made = Two()
    lilora_kernels.attach(made)
    lilora_kernels.fuse_mlps(made)
    if unfused:  # base and adapter apart
        made.first.base_layer.register_forward_hook(lambda *_: None)
    lilora_kernels.set_task(made, "one", train=train)
    made.train(train)
    launched, run = [], triton_backend.run
    monkeypatch.setattr(triton_backend, "run", lambda *a: launched.append(variant(*a)) or run(*a))
    assert lilora_kernels.warmup(made) > 0
    known = set(launched)
    launched.clear()
    use(made, train)
    assert len(launched) > 9
    assert set(launched) <= known


def test_the_cuda_library_is_loaded_by_every_plan_and_the_eager_backend_by_none(monkeypatch):
    from lilora_kernels import backends
    from lilora_kernels.ops.linear import cuda_backend

    rows = cuda_backend.rows(torch.device("cpu"))
    call = SimpleNamespace(rank_sizes=(8, 4))
    plans = {cuda_backend.plan_of(torch.empty(m, 24), torch.empty(20, 24), call) for m in rows}
    assert plans == {"decode", "one launch", "by phase"}
    asked = []
    monkeypatch.setattr(cuda_backend, "rows", lambda device: asked.append(device) or [3])
    able = replace(backends._table["linear"]["cuda"], refusal=lambda *_: None)
    ran = []
    able = replace(
        able, forward=lambda x, *rest: ran.append(len(x)) or backends._table["linear"]["eager"].forward(x, *rest)
    )
    monkeypatch.setitem(backends._table["linear"], "cuda", able)
    layers = model()
    layers.requires_grad_(False)
    assert lilora_kernels.warmup(layers) == 2
    assert (ran, len(asked)) == ([3, 3], 1)
    with lilora_kernels.backend("eager"):
        assert lilora_kernels.warmup(layers) == 0
