"""What the singular values of an update say: how many directions it really uses.

The update of a run is W - W_start, the sum of all merges. One cycle alone cannot exceed the adapter rank;
that the sum can is the claim of ReLoRA, and these functions measure it.
"""

import torch
from torch import Tensor


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values in descending order, in fp32 or, for an fp64 matrix, in fp64.

    Shapes: (m, n) -> (min(m, n),)
    """
    precise = matrix if matrix.dtype == torch.float64 else matrix.float()
    values: Tensor = torch.linalg.svdvals(precise)
    return values


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
    and errors of several merges add up like the root of their number. The decomposition itself errs by one or
    two eps times the largest value.
    """
    merging = base_norm * max(1, merges) ** 0.5
    decomposing = 4 * float(values.max()) if values.numel() else 0.0
    return int((values > eps * (merging + decomposing)).sum())
