"""What the singular values of an update say: how many directions it really uses.

The update of a run is W - W_start, the sum of all merges. One cycle alone cannot exceed the adapter rank;
that the sum can is the claim of ReLoRA, and these functions measure it.
"""

import torch
from torch import Tensor


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values in descending order, in float64, to about 1e-8 of the largest.

    From the smaller Gram matrix in float64: more precise than a float32 decomposition, and several times faster.
    Shapes: (m, n) -> (min(m, n),)
    """
    exact = matrix.double()
    gram = exact @ exact.t() if exact.shape[0] <= exact.shape[1] else exact.t() @ exact
    squares: Tensor = torch.linalg.eigvalsh(gram)
    return squares.flip(0).clamp_min(0).sqrt()


def product_singular_values(down: Tensor, up: Tensor) -> Tensor:
    """Singular values of up @ down, which is never formed: of the product of the factors' triangular parts.

    Shapes: (k, in), (out, k) -> (min(k, in, out),)
    """
    left, right = (torch.linalg.qr(factor.double(), mode="r").R for factor in (up, down.t()))
    return singular_values(left @ right.t())


def effective_rank(values: Tensor) -> float:
    """The exponential of the entropy of the normalised singular values; 0 for a matrix of zeros.

    Source: Roy and Vetterli, The effective rank (EUSIPCO 2007), definition 1.
    """
    total = values.double().sum()
    if total == 0:
        return 0.0
    share = values.double() / total
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


def numerical_rank(
    values: Tensor, base_norm: float, merges: int = 1, eps: float = torch.finfo(torch.float32).eps
) -> int:
    """How many singular values of W - W_start stand above what rounding alone can put there.

    `base_norm` is the Frobenius norm of W, and `eps` belongs to the format in which W is kept. One merge
    rounds every entry by at most eps/2 of itself, an error with a spectral norm of at most eps/2 * ||W||_F,
    and errors of several merges add up like the root of their number. The difference and the decomposition err
    by less than eps times the largest value.
    """
    merging = base_norm * max(1, merges) ** 0.5
    largest = float(values.max()) if values.numel() else 0.0
    return int((values > eps * (merging + largest)).sum())
