"""How far vectors depend linearly on others, from inner products alone: the [N, K] matrix of a rank is never formed.

All in float64. Vectors that are zero, or that depend on each other, are allowed everywhere.
"""

import torch
from torch import Tensor


def rank_gram(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """Inner products of ranks as matrices: <b_i a_i^T, b2_j a2_j^T>_F = (a_i . a2_j) (b_i . b2_j).

    a [n, K], b [N, n], a2 [m, K], b2 [N, m], any floating dtype -> [n, m] in float64.
    """
    return (a.double() @ a2.double().mT) * (b.double().mT @ b2.double())


def whitening(gram: Tensor) -> Tensor:
    """W [m, d] with W^T gram W = I: it combines m vectors with inner products `gram` into an orthonormal basis of their span.

    The vectors are normalised first; a direction with a singular value below sqrt(m eps), about 1e-7, counts as
    rounding and does not add to d.
    """
    norm = gram.double().diagonal().sqrt()
    inverse = torch.where(norm > 0, 1 / norm, 0)
    values, vectors = torch.linalg.eigh(gram.double() * inverse * inverse[:, None])
    kept = values > len(gram) * torch.finfo(torch.float64).eps
    return inverse[:, None] * vectors[:, kept] / values[kept].sqrt()


def residual_share(square: Tensor, cross: Tensor, gram: Tensor) -> Tensor:
    """||x - P x||^2 / ||x||^2 of n vectors x, P the projection onto the span of m others; 0 for x = 0.

    square [n] holds ||x||^2, cross [n, m] the inner products with the others, gram [m, m] those among the others
    -> [n] in float64, from 0 (in the span) to 1 (orthogonal to it).
    """
    square = square.double()
    explained = (cross.double() @ whitening(gram)).square().sum(1)
    return torch.where(square > 0, 1 - explained / square, 0).clamp(0, 1)


def principal_cosines(w: Tensor, cross: Tensor, w2: Tensor) -> Tensor:
    """Cosines of the principal angles between the spans of m and of n vectors, falling.

    w [m, d] and w2 [n, d2] are their `whitening`, cross [m, n] the inner products -> [min(d, d2)] in float64.
    """
    return torch.linalg.svdvals(w.mT @ cross.double() @ w2).clamp(max=1)
