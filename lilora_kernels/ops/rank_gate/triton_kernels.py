"""The Triton kernel of `rank_gate`: every rank counts the ranks before it. ops/README.md has the definition."""

import triton
import triton.language as tl


@triton.jit
def rank_scores(scores, j, n, stride):
    """scores[j] in fp32, exact for every narrower type; -inf for NaN and behind the last rank."""
    s = tl.load(scores + j.to(tl.int64) * stride, mask=j < n, other=float("-inf")).to(tl.float32)
    return tl.where(s == s, s, float("-inf"))


@triton.jit(do_not_specialize=["scores", "n", "r", "row_stride", "stride"])
def rank_gate(scores, gate, chosen, n, r, row_stride, stride, BLOCK: tl.constexpr):
    """gate and chosen of BLOCK ranks of one row of scores: program (row, block).

    The positions of a row are a permutation, so every element of chosen has one writer. What lies behind the last rank has a
    score of -inf and a higher index: it comes after every rank.
    """
    row = tl.program_id(0).to(tl.int64)
    scores += row * row_stride
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mine = rank_scores(scores, j, n, stride)
    before = tl.zeros((BLOCK, BLOCK), tl.int32)  # [i, j]
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        other = rank_scores(scores, i, n, stride)[:, None]
        before += ((other > mine[None, :]) | ((other == mine[None, :]) & (i[:, None] < j[None, :]))).to(tl.int32)
    position = tl.sum(before, axis=0)
    taken = position < r
    tl.store(gate + row * n + j, taken.to(gate.dtype.element_ty), mask=j < n)
    tl.store(chosen + row * r + position, j.to(tl.int64), mask=taken)
