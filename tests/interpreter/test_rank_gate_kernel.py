"""The Triton kernel of `rank_gate` in the interpreter; what it leaves unwritten would show as NaN or an absurd rank."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.counting import Operations
from support.rank_gate_cases import ANY_SCORES, FEW, LAYOUTS, check_any, check_rank_gate, draw
from triton.runtime.interpreter import GridExecutor

import lilora_kernels
from lilora_kernels import functional
from lilora_kernels.ops.rank_gate.triton_backend import CONSTANTS

DTYPES = [torch.float32, torch.float16]
BLOCK = CONSTANTS["BLOCK"]
NEW_EMPTY = torch.Tensor.new_empty


@pytest.fixture(autouse=True, scope="module")
def _triton():
    def poisoned(*args, **kwargs):
        t = NEW_EMPTY(*args, **kwargs)
        return t.fill_(float("nan") if t.is_floating_point() else -7777)

    with lilora_kernels.backend("triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", poisoned)
        yield


@settings(max_examples=40, deadline=None, derandomize=True)
@given(dtype=st.sampled_from(DTYPES), **ANY_SCORES)
def test_any_scores(dtype, **case):
    check_any(dtype=dtype, **case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [1, 12, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 5 * BLOCK - 1])
def test_around_the_edges_of_a_block(n, layout):
    for r in {1, (n + 1) // 2, n}:
        check_rank_gate(draw(2, n, FEW, torch.float32, n, layout), r)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_without_ties(dtype):
    check_rank_gate(torch.randperm(4 * 200).view(4, 200).to(dtype), 64)


def test_one_row_for_all_samples():
    check_rank_gate(torch.randn(90).expand(3, 90), 30)


@pytest.mark.parametrize("rows, launches", [(0, 0), (1, 1), (40, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_launch_and_nothing_beside_it(rows, launches, layout, monkeypatch):
    """No copy of strided scores, nothing that fills gate or chosen, nothing that makes the host wait for the device."""
    scores, grids = draw(rows, 300, FEW, torch.float16, 0, layout), []
    monkeypatch.setattr(GridExecutor, "__call__", lambda kernel, *_, **__: grids.append(kernel.grid))
    monkeypatch.setattr(torch.Tensor, "new_empty", NEW_EMPTY)
    with Operations() as work:
        functional.rank_gate(scores, 64)
    assert not work.seen
    assert grids == [(rows, 5, 1)] * launches
