"""`warmup` runs what will be run later, and leaves no trace."""

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
    monkeypatch.setattr(triton_runtime, "bucket_rows", lambda device: [2, 300])
    launches, run = [], triton_backend.run
    monkeypatch.setattr(triton_backend, "run", lambda *a: launches.append((a[0].__name__, a[2])) or run(*a))
    layers = model()
    for layer in layers[:2]:
        layer.set_task("two", train=train)
    before, state = {n: p.clone() for n, p in layers.named_parameters()}, torch.get_rng_state()
    assert lilora_kernels.warmup(layers) == 4  # two buckets, with the active task and with ids
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
        assert lilora_kernels.warmup(layers) == 2  # the other layer
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
    assert lilora_kernels.warmup(mlp) == 4  # the pair and its layers alone, with the active task and with ids
    assert pairs == [(2, 24)] * 2
