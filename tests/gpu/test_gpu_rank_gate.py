"""`rank_gate` on a GPU, by the kernel and by torch's sort there, against a sort of Python's."""

import pytest
import torch
from support.gpu_cases import capture
from support.rank_gate_cases import BY_HAND, FEW, LAYOUTS, check_rank_gate, draw, laid_out

from lilora_kernels import backends, functional
from lilora_kernels.ops.rank_gate.triton_backend import CONSTANTS

BLOCK = CONSTANTS["BLOCK"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, params=["triton", "eager"])
def kernels(request, monkeypatch):
    """Takes the place of the folder's: this operation has no CUDA C++ kernel, and its eager backend sorts differently here."""
    monkeypatch.setitem(backends.forced, "backend", request.param)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 12, BLOCK - 1, BLOCK, BLOCK + 1, 256, 1000, 4099])
def test_few_values(n, dtype, layout):
    for r in {1, (n + 1) // 2, n}:
        check_rank_gate(laid_out(draw(3, n, FEW, dtype, n).cuda(), layout), r)


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_hand(name, dtype):
    row, order = BY_HAND[name]
    for r in range(1, len(row) + 1):
        _, chosen = functional.rank_gate(torch.tensor([row] * 2, dtype=dtype, device="cuda"), r)
        assert chosen.tolist() == [order[:r]] * 2


def test_scores_that_differ_below_the_normal_numbers():
    check_rank_gate(torch.arange(100, device="cuda").view(2, 50).int().view(torch.float32), 7)


@pytest.mark.parametrize("rows", [0, 1, 5000])
def test_any_number_of_rows(rows):
    check_rank_gate(torch.randn(rows, 70, device="cuda"), 9)


def test_one_row_for_all_samples():
    check_rank_gate(torch.randn(90, device="cuda").expand(33, 90), 30)


def test_a_graph_follows_changed_scores():
    scores = torch.randn(8, 256, device="cuda", dtype=torch.bfloat16)
    graph, results = capture(lambda: functional.rank_gate(scores, 64))
    for turn in range(5):
        scores.copy_(draw(8, 256, FEW, torch.bfloat16, turn))
        graph.replay()
        for replayed, launched in zip(results, functional.rank_gate(scores, 64), strict=True):
            assert torch.equal(replayed, launched)


def test_nothing_waits_for_the_device():
    scores = torch.randn(8, 256, device="cuda")
    functional.rank_gate(scores, 64)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        functional.rank_gate(scores, 64)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_with_inductor():
    torch.compiler.reset()

    def run(scores):
        gate, chosen = functional.rank_gate(scores * 2, 16)
        return gate * 3, chosen

    compiled = torch.compile(run, fullgraph=True)
    for turn in range(3):
        scores = draw(6, 100, FEW, torch.float32, turn).cuda()
        for got, want in zip(compiled(scores), run(scores), strict=True):
            assert torch.equal(got, want)
