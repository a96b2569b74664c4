"""The best matrix of a lower rank, and what is given up for large ones."""

import pytest
import torch

from relora import truncate
from relora.truncate import truncated


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_what_is_left_out_is_the_tail_of_the_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    down, up = truncated(matrix, 5)
    assert (down.shape, up.shape) == ((5, shape[1]), (shape[0], 5))
    tail = torch.linalg.svdvals(matrix)[5:].norm()
    assert torch.dist(matrix, up @ down) == pytest.approx(float(tail), rel=1e-5)
    assert down.norm() == pytest.approx(float(up.norm()), rel=1e-5)  # the root goes to both


def test_a_rank_that_the_matrix_does_not_exceed_leaves_nothing_out():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(24, 3, generator=generator) @ torch.randn(3, 16, generator=generator)
    for rank in (3, 7, 16):
        down, up = truncated(matrix, rank)
        assert torch.dist(matrix, up @ down) < 1e-5 * matrix.norm()
    down, up = truncated(torch.zeros(8, 6), 2)
    assert not (up @ down).any()


def test_large_matrices_lose_hardly_more_and_always_the_same(monkeypatch):
    matrix = torch.randn(200, 150, generator=torch.Generator().manual_seed(0))  # a flat spectrum: the worst case
    exact = torch.dist(matrix, torch.matmul(*reversed(truncated(matrix, 8))))
    monkeypatch.setattr(truncate, "EXACT_WIDTH", 100)
    before = torch.get_rng_state()
    down, up = truncated(matrix, 8)
    assert torch.equal(torch.get_rng_state(), before)
    assert exact < torch.dist(matrix, up @ down) < 1.01 * exact
    torch.manual_seed(5)
    assert torch.equal(truncated(matrix, 8)[0], down)
