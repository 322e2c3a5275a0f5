"""Scores with many ties, in any layout, and what `rank_gate` must make of them, written out without torch."""

import math

import torch
from hypothesis import strategies as st

from lilora_kernels import functional

INF, NAN = math.inf, math.nan
FEW = (NAN, INF, -INF, 0.0, -0.0, 1.0, 1.0 + 2**-7, -3.5, 2.0**-14)  # of any dtype exactly
LAYOUTS = ("rows", "columns", "strided")
BY_HAND = {
    "order": ([0.5, 2.0, -1.0, 3.0], [3, 1, 0, 2]),
    "ties": ([1.0, 2.0, 1.0, 2.0, 1.0], [1, 3, 0, 2, 4]),
    "nan last": ([NAN, 1.0, NAN, -5.0], [1, 3, 0, 2]),
    "nan is -inf": ([-INF, NAN, INF, -INF, NAN, 0.0], [2, 5, 0, 1, 3, 4]),
    "zeros": ([-0.0, 0.0, -0.0, 0.0], [0, 1, 2, 3]),
    "infinities": ([-INF, INF, -INF, INF], [1, 3, 0, 2]),
    "one": ([NAN], [0]),
}
ANY_SCORES = {
    "rows": st.integers(0, 4),
    "n": st.integers(1, 150),
    "share": st.floats(0, 1),  # of the ranks that are chosen; 1 and n at its ends
    "values": st.lists(st.sampled_from(FEW), min_size=1, unique_by=str),
    "layout": st.sampled_from(LAYOUTS),
    "seed": st.integers(0, 2**32),
}


def draw(rows, n, values, dtype, seed, layout="rows"):
    """[rows, n] drawn from a few values; every layout holds the same scores."""
    at = torch.randint(len(values), (rows, n), generator=torch.Generator().manual_seed(seed))
    return laid_out(torch.tensor(values, dtype=dtype)[at], layout)


def laid_out(scores, layout):
    if layout == "columns":
        return scores.T.contiguous().T
    if layout == "strided":
        rows, n = scores.shape
        wide = scores.new_full((2 * rows, 3 * n + 1), INF)
        wide[::2, 1::3] = scores
        return wide[::2, 1::3]
    return scores


def first_ranks(row, r):
    """The r best of a list of floats: by value, then by index."""
    return sorted(range(len(row)), key=lambda j: (INF if math.isnan(row[j]) else -row[j], j))[:r]


def check_rank_gate(scores, r):
    gate, chosen = functional.rank_gate(scores, r)
    rows, n = scores.shape
    assert (gate.dtype, gate.shape, chosen.dtype, chosen.shape) == (scores.dtype, (rows, n), torch.int64, (rows, r))
    assert gate.is_contiguous()
    assert chosen.is_contiguous()
    want = [first_ranks(row, r) for row in scores.tolist()]
    assert chosen.tolist() == want
    assert gate.tolist() == [[float(j in ranks) for j in range(n)] for ranks in map(set, want)]


def check_any(rows, n, share, values, layout, seed, dtype):
    check_rank_gate(draw(rows, n, values, dtype, seed, layout), 1 + round(share * (n - 1)))
