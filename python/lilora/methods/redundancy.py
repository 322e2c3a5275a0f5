"""How far vectors depend linearly on others, from inner products alone: for a rank the [N, K] matrix is never formed.

All in float64. `gram` [m, m] holds the inner products of the vectors that span, `cross` [n, m] those of n others with
them. Vectors that are zero or depend on each other are allowed everywhere.
"""

import torch
from torch import Tensor


def rank_gram(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """Inner products of ranks as matrices: <b_i a_i^T, b2_j a2_j^T>_F = (a_i . a2_j) (b_i . b2_j).

    a [n, K], b [N, n], a2 [m, K], b2 [N, m], any floating dtype -> [n, m] in float64.
    """
    return (a.double() @ a2.double().mT) * (b.double().mT @ b2.double())


def whitening(gram: Tensor) -> Tensor:
    """W [m, d] with W^T gram W = I: the vectors combined by its columns are an orthonormal basis of their span.

    Directions that hold less than about 1e-7 of the (unit) vectors count as rounding and do not add to d.
    """
    norm = gram.double().diagonal().sqrt()
    inverse = torch.where(norm > 0, 1 / norm, 0)  # a span does not change with its vectors' lengths
    values, vectors = torch.linalg.eigh(gram.double() * inverse * inverse[:, None])
    kept = values > len(gram) * torch.finfo(torch.float64).eps
    return inverse[:, None] * vectors[:, kept] / values[kept].sqrt()


def residual_share(square: Tensor, cross: Tensor, gram: Tensor) -> Tensor:
    """||x - P x||^2 / ||x||^2 of n vectors, P the projection onto the span of m others; 0 for a zero vector.

    square [n] = ||x||^2, cross [n, m], gram [m, m] -> [n] in float64, from 0 (in the span) to 1 (orthogonal to it).
    """
    square = square.double()
    explained = (cross.double() @ whitening(gram)).square().sum(1)
    return torch.where(square > 0, 1 - explained / square, 0).clamp(0, 1)


def principal_cosines(gram: Tensor, cross: Tensor, gram2: Tensor) -> Tensor:
    """Cosines of the principal angles between the spans of m and of n vectors, falling.

    gram [m, m], cross [m, n], gram2 [n, n] -> [min(d, d2)] in float64, d and d2 the dimensions of the spans.
    """
    return torch.linalg.svdvals(whitening(gram).mT @ cross.double() @ whitening(gram2)).clamp(max=1)
