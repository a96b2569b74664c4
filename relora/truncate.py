"""The best low-rank stand-in for a matrix, as the two factors of an adapter."""

import torch
from torch import Tensor

EXACT_WIDTH = 2048
"""Up to this smaller dimension, or for ranks above a quarter of it, the decomposition is exact."""
_OVERSAMPLED = 16
_POWER_ITERATIONS = 4


@torch.no_grad()
def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors (down, up) of the nearest matrix of a rank; each takes the root of the singular values.

    Large matrices are decomposed by randomized iteration, always with the same random numbers.
    Shapes: (out, in) -> (rank, in), (out, rank)
    Source: Eckart and Young 1936; Halko, Martinsson and Tropp 2011, algorithm 5.1.
    """
    width = min(matrix.shape)
    assert rank <= width, "a matrix has no more singular values than that"
    if width > EXACT_WIDTH and 4 * rank < width:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, q=rank + _OVERSAMPLED, niter=_POWER_ITERATIONS)
        right = right.t()
    else:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root
