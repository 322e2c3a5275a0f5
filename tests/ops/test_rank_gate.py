"""`rank_gate` with the eager backend against a sort of Python's, and the sentences of refused arguments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rank_gate_cases import ANY_SCORES, BY_HAND, FEW, check_any, check_rank_gate, draw
from torch._subclasses.fake_tensor import FakeTensorMode

import lilora_kernels
from lilora_kernels import backends, functional
from lilora_kernels.ops.rank_gate import eager, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(dtype=st.sampled_from(DTYPES), **ANY_SCORES)
def test_any_scores(dtype, **case):
    check_any(dtype=dtype, **case)


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_hand(name, dtype):
    row, order = BY_HAND[name]
    for r in range(1, len(row) + 1):
        gate, chosen = functional.rank_gate(torch.tensor([row], dtype=dtype), r)
        assert chosen.tolist() == [order[:r]]
        assert gate.tolist() == [[float(j in order[:r]) for j in range(len(row))]]


@pytest.mark.parametrize("r", [1, 64, 3000])
def test_pools_of_thousands(r):
    check_rank_gate(draw(3, 3000, FEW, torch.float32, seed=r), r)
    check_rank_gate(torch.randn(3, 3000), r)


def test_one_row_for_all_samples():
    check_rank_gate(torch.randn(9).expand(4, 9), 3)


def test_the_shipped_reference_is_the_definition():
    for seed in range(20):
        scores = draw(3, 1 + seed, FEW, torch.float32, seed)
        for r in {1, 1 + seed // 2, 1 + seed}:
            for ours, theirs in zip(reference.rank_gate(scores, r), functional.rank_gate(scores, r), strict=True):
                assert torch.equal(ours, theirs)
                assert ours.dtype == theirs.dtype


def test_there_is_no_gradient():
    gate, chosen = functional.rank_gate(torch.randn(5, 12, requires_grad=True), 4)
    assert not gate.requires_grad
    assert not chosen.requires_grad


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, layout", [(0, "rows"), (3, "rows"), (3, "strided")])
def test_opcheck(rows, layout):
    scores = draw(rows, 12, (0.0, 1.0, -2.0), torch.float32, 0, layout)
    torch.library.opcheck(torch.ops.lilora.rank_gate.default, (scores, 4))


def test_fullgraph_compile_follows_the_values():
    torch._dynamo.reset()

    def run(scores):
        gate, chosen = functional.rank_gate(torch.sin(scores), 4)
        return gate * 3, chosen

    compiled = torch.compile(run, fullgraph=True)
    for turn in range(4):
        scores = torch.randn(5, 12)
        with torch._dynamo.config.patch(error_on_recompile=turn > 0):
            for got, want in zip(compiled(scores), run(scores), strict=True):
                assert torch.equal(got, want)


def test_fullgraph_compile_with_symbolic_sizes():
    torch._dynamo.reset()

    def run(scores, r):
        return functional.rank_gate(scores * 2, r)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for turn, (rows, n, r) in enumerate(((3, 12, 4), (5, 30, 7), (2, 31, 31))):
        scores = torch.randn(rows, n)
        with torch._dynamo.config.patch(error_on_recompile=turn == 1):
            for got, want in zip(compiled(scores, r), run(scores, r), strict=True):
                assert torch.equal(got, want)


def test_autocast_does_not_round_the_scores():
    scores = (1 + torch.arange(8) * 2**-20).unsqueeze(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gate, chosen = functional.rank_gate(scores, 3)
    assert gate.dtype == torch.float32
    assert chosen.tolist() == [[7, 6, 5]]


def test_the_scores_stay_as_they_are():
    scores = draw(4, 20, FEW, torch.float32, 3)
    before = scores.clone()
    functional.rank_gate(scores, 5)
    assert scores._version == 0
    assert torch.equal(scores.view(torch.int32), before.view(torch.int32))


def test_the_eager_backend_needs_no_values_on_the_host():
    gate, chosen = eager.forward(torch.empty(3, 20, device="meta"), 5)
    assert (gate.shape, chosen.shape) == ((3, 20), (3, 5))


# --- what is refused --------------------------------------------------------------------------------------------------

WRONG = {
    "one dimension": (torch.randn(6), 2, ValueError, r"scores is \[6\]; it must be \[G, n\]"),
    "three dimensions": (torch.randn(2, 3, 4), 2, ValueError, r"scores is \[2, 3, 4\]; it must be \[G, n\]"),
    "no ranks": (torch.randn(2, 0), 1, ValueError, r"scores is \[2, 0\].*at least 1"),
    "integers": (torch.ones(2, 6, dtype=torch.int64), 2, TypeError, "scores is torch.int64; it must be a floating"),
    "r of zero": (torch.randn(2, 6), 0, ValueError, "r is 0; it must be between 1 and n = 6"),
    "negative r": (torch.randn(2, 6), -1, ValueError, "r is -1; it must be between 1 and n = 6"),
    "r beyond n": (torch.randn(0, 6), 7, ValueError, "r is 7; it must be between 1 and n = 6"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_arguments_give_one_sentence_in_eager_fake_and_compiled_code(name):
    scores, r, error, words = WRONG[name]
    with pytest.raises(error, match=words) as plain:
        functional.rank_gate(scores, r)
    assert str(plain.value).startswith("lilora::rank_gate: ")
    assert "\n" not in str(plain.value)
    with FakeTensorMode() as mode, pytest.raises(error, match=words) as fake:
        functional.rank_gate(mode.from_tensor(scores), r)
    assert str(fake.value) == str(plain.value)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=words):  # Dynamo wraps what the fake raises in its own type
        torch.compile(functional.rank_gate, fullgraph=True, backend="eager")(scores, r)


def test_backends_that_cannot_run_say_why():
    scores = torch.randn(2, 6)
    reasons = backends.unsupported_reasons("rank_gate", scores, 2, 0)
    assert reasons["cuda"] == "this operation has no kernel of its own there"
    assert reasons["eager"] is None
    with lilora_kernels.backend("cuda"):  # an order for the operations that have such kernels
        assert functional.rank_gate(scores, 2)[1].shape == (2, 2)
    with lilora_kernels.backend("triton"), pytest.raises(RuntimeError, match="'triton' cannot run on cpu"):
        functional.rank_gate(scores, 2)
