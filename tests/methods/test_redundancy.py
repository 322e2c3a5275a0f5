"""Gram matrices against the vectors themselves, in fp64: outer products written out, least squares, QR."""

import pytest
import torch

from lilora.methods.redundancy import principal_cosines, rank_gram, residual_share, whitening

D = 40


def vectors(n, seed, dimensions=D):
    return torch.randn(n, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dependent():
    """Nine vectors in five dimensions: a zero one, a copy, sums, and lengths from 1e-9 to 1e6."""
    x = vectors(5, 0)
    x = torch.cat([x, x[:1], x[1:2] + x[2:3], torch.zeros(1, D), x[3:4] - 2 * x[4:5]])
    return x * torch.logspace(-9, 6, 9, dtype=torch.float64)[:, None]


def residual_by_least_squares(x, others):
    unit = others / others.norm(dim=1, keepdim=True).clamp_min(1e-300)
    weights = torch.linalg.lstsq(unit.T, x.T, driver="gelsd", rcond=1e-9).solution
    return (x.T - unit.T @ weights).square().sum(0) / x.square().sum(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rank_gram_is_the_inner_product_of_outer_products(dtype):
    a, a2 = vectors(4, 1).to(dtype), vectors(6, 2).to(dtype)
    b, b2 = vectors(4, 3, 30).to(dtype).T, vectors(6, 4, 30).to(dtype).T
    ranks, ranks2 = (
        torch.stack([torch.outer(y.double(), x.double()).flatten() for x, y in zip(rows, columns.T, strict=True)])
        for rows, columns in ((a, b), (a2, b2))
    )
    gram = rank_gram(a, b, a2, b2)
    assert gram.dtype == torch.float64
    torch.testing.assert_close(gram, ranks @ ranks2.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("others", [vectors(7, 5), dependent()], ids=["independent", "dependent"])
def test_whitening_gives_an_orthonormal_basis(others):
    w = whitening(others @ others.T)
    basis = w.T @ others
    assert w.shape[1] == torch.linalg.matrix_rank(others / others.norm(dim=1, keepdim=True).clamp_min(1e-300))
    torch.testing.assert_close(basis @ basis.T, torch.eye(w.shape[1], dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("others", [vectors(7, 5), dependent()], ids=["independent", "dependent"])
def test_residual_share_is_that_of_least_squares(others):
    inside = others[:3] / others[:3].norm(dim=1, keepdim=True)
    x = torch.cat([vectors(6, 6), vectors(2, 7) * 1e-8, inside.sum(0, keepdim=True), vectors(1, 8) + 5 * inside])
    got = residual_share(x.square().sum(1), x @ others.T, others @ others.T)
    want = residual_by_least_squares(x, others)
    assert ((want > 0.02) & (want < 0.98)).sum() >= 8  # the oracle tells vectors apart
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_a_direction_of_1e_5_counts_and_one_of_1e_9_is_rounding():
    x, off = vectors(4, 13), torch.linalg.qr(vectors(5, 14).T).Q.T[4:]
    for size, dimension in ((1e-5, 5), (1e-9, 4)):
        others = torch.cat([x, x[:1] + size * x[0].norm() * off])
        assert whitening(others @ others.T).shape[1] == dimension
        share = residual_share(off.square().sum(1), off @ others.T, others @ others.T)
        want = residual_by_least_squares(off, others if dimension == 5 else x)
        torch.testing.assert_close(share, want, rtol=0, atol=1e-4)


def test_residual_share_at_its_ends():
    others = vectors(3, 9)
    complement = torch.linalg.qr(others.T, mode="complete").Q.T[3:]
    x = torch.cat([complement[:2], others, torch.zeros(1, D)])
    got = residual_share(x.square().sum(1), x @ others.T, others @ others.T)
    torch.testing.assert_close(got, torch.tensor([1.0, 1, 0, 0, 0, 0], dtype=torch.float64), rtol=0, atol=1e-12)
    assert got.min() >= 0
    none = others[:0]
    assert residual_share(x.square().sum(1), x @ none.T, none @ none.T).tolist() == [1, 1, 1, 1, 1, 0]


def test_principal_cosines_are_those_of_orthonormal_bases():
    x, y = (
        vectors(5, 10),
        torch.cat([vectors(3, 11), vectors(5, 10)[:2] @ torch.diag(torch.linspace(1, 2, D).double())]),
    )
    want = torch.linalg.svdvals(torch.linalg.qr(x.T).Q.T @ torch.linalg.qr(y.T).Q)
    got = principal_cosines(whitening(x @ x.T), x @ y.T, whitening(y @ y.T))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    mixed = vectors(5, 12)[:, :5] @ x  # other vectors of the same span
    same = principal_cosines(whitening(x @ x.T), x @ mixed.T, whitening(mixed @ mixed.T))
    torch.testing.assert_close(same, torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-9)
    assert same.max() <= 1
