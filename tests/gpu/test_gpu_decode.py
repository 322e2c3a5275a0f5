"""A decode step of whole layers on a GPU: nothing waits for the device, and a graph of it follows the task ids."""

import copy

import pytest
import torch
from support.gpu_cases import capture
from torch import nn

from lilora_kernels import LiLoRALinear, attach, fuse_mlps, rank_gate, set_task
from lilora_kernels.layers.rank_pool import Choice, RankPoolLinear

TASKS = ("one", "two", "three")


class GatedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(128, 256), nn.Linear(128, 256), nn.Linear(256, 128)
        self.act_fn = nn.SiLU()
        self.requires_grad_(False)
        for name, base in list(self.named_children())[:3]:
            layer = LiLoRALinear(base, r=16, sub_rank=8, alpha=16)
            for task in TASKS:
                layer.add_task(task)
            setattr(self, name, layer)

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def model(fused):
    made = nn.Sequential(*(GatedMLP() for _ in range(3)))
    for name, parameter in made.named_parameters():
        if "lilora_" in name:
            nn.init.normal_(parameter, std=0.2)
    made = made.to("cuda", torch.bfloat16).eval()
    attach(made)
    if fused:
        assert set(fuse_mlps(made).values()) == {None}
    set_task(made, "two", train=False)
    return made


def without_waiting(step):
    """The result of a second call, in which whatever makes the host wait for the device raises."""
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("how", ["active", "mixed", "deleted"])
@pytest.mark.parametrize("samples", [1, 7])
def test_a_decode_step_never_waits(fused, how, samples):
    made = model(fused)
    if how == "deleted":
        for mlp in made:
            for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
                layer.delete_task("one")
    x = torch.randn(samples, 1, 128, device="cuda", dtype=torch.bfloat16)
    ids = torch.tensor([2, -1, 1, 1, 2, -1, 2][:samples], device="cuda", dtype=torch.int32)
    options = {} if how == "active" else {"task_ids": ids}
    with torch.no_grad():
        got = without_waiting(lambda: made(x, **options))
        assert torch.equal(got, made(x, **options))
    assert got.isfinite().all()


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_a_graph_of_a_decode_step_follows_the_task_ids(fused):
    made = model(fused)
    x = torch.randn(5, 1, 128, device="cuda", dtype=torch.bfloat16)
    ids = torch.tensor([0, 1, 2, -1, 0], device="cuda", dtype=torch.int32)
    with torch.no_grad():
        graph, y = capture(lambda: made(x, task_ids=ids))
        for _ in range(3):
            ids.copy_(ids.roll(1))
            graph.replay()
            assert torch.equal(y, made(x, task_ids=ids))


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_fused_equals_apart(kernels):
    """One training step with dropout 0, in fp32: the largest difference of outputs and gradients."""
    apart = model(False).float().train()
    for layer in [m for m in apart.modules() if isinstance(m, LiLoRALinear)]:
        layer.dropout = 0.0
    fused = copy.deepcopy(apart)
    fuse_mlps(fused)
    x, ids = torch.randn(4, 50, 128, device="cuda"), torch.tensor([0, 2, -1, 0], device="cuda")
    results = []
    for each in (fused, apart):
        set_task(each, *TASKS)
        y = each(x, task_ids=ids)
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad for p in each.parameters() if p.requires_grad)])
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("value", ["score", "binary"])
def test_a_decode_step_with_a_pool_of_ranks_never_waits(value):
    scores, rows = torch.randn(5, 12).cuda().half(), torch.arange(5, device="cuda", dtype=torch.int32)

    def choose(layer, x):
        gate = rank_gate(scores, 3)[0]
        return Choice(((("old",), None),), gate * scores if value == "score" else gate), rows

    layer = RankPoolLinear(nn.Linear(64, 96).requires_grad_(False), choose)
    layer.put("old", torch.randn(12, 64), torch.randn(96, 12), train=False)
    layer.to("cuda", torch.float16)
    x = torch.randn(5, 64).cuda().half()
    with torch.no_grad():
        assert without_waiting(lambda: layer(x)).isfinite().all()
