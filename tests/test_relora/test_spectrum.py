import math

import pytest
import torch

from relora.spectrum import effective_rank, numerical_rank, product_singular_values, singular_values


def merged(shape: tuple[int, int], *, merges: int, adapter_rank: int, size: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A random start, and what it becomes by merges whose sum has about `size` times its norm."""
    generator = torch.Generator().manual_seed(7)
    start = torch.randn(shape, generator=generator)
    now = start.clone()
    for _ in range(merges):
        up = torch.randn(shape[0], adapter_rank, generator=generator)
        delta = up @ torch.randn(adapter_rank, shape[1], generator=generator)
        now += delta * (size / merges**0.5 * start.norm() / delta.norm())
    return start, now


def test_singular_values_descend_and_match_a_known_decomposition():
    left, _ = torch.linalg.qr(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    right, _ = torch.linalg.qr(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)))
    known = torch.tensor([8.0, 4.0, 2.0, 0.5])
    values = singular_values(left @ known.diag() @ right.t())
    torch.testing.assert_close(values, torch.cat([known, torch.zeros(1)]).double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 40), (17, 90), (90, 17), (1, 5), (5, 1)])
def test_singular_values_are_precise_for_any_shape_and_dtype(shape, dtype):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    matrix[:, : shape[1] // 2] *= 1e-3
    exact = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(singular_values(matrix), exact, rtol=1e-6, atol=3e-8 * float(exact[0]))


@pytest.mark.parametrize("inner", [1, 5, 12, 40])
def test_singular_values_of_a_product_need_its_factors_only(inner):
    generator = torch.Generator().manual_seed(5)
    down, up = torch.randn(inner, 12, generator=generator), torch.randn(17, inner, generator=generator)
    exact = torch.linalg.svdvals(up.double() @ down.double())[:inner]
    values = product_singular_values(down, up)
    torch.testing.assert_close(values, exact, rtol=1e-6, atol=3e-8 * float(exact[0]))


def test_effective_rank_counts_equal_directions():
    assert effective_rank(torch.tensor([3.0] * 6 + [0.0] * 4)) == pytest.approx(6)


def test_effective_rank_follows_its_definition():
    shares = [0.7, 0.2, 0.1]
    entropy = -sum(share * math.log(share) for share in shares)
    assert effective_rank(5 * torch.tensor(shares)) == pytest.approx(math.exp(entropy))


def test_effective_rank_of_no_update_is_zero():
    assert effective_rank(torch.zeros(4)) == 0


@pytest.mark.parametrize("shape", [(64, 64), (160, 48), (48, 192)])
@pytest.mark.parametrize("merges", [1, 5])
@pytest.mark.parametrize("size", [0.5, 1e-2, 1e-4])
def test_numerical_rank_is_adapter_rank_times_merges(shape, merges, size):
    start, now = merged(shape, merges=merges, adapter_rank=4, size=size)
    assert numerical_rank(singular_values(now - start), float(now.norm()), merges) == 4 * merges


def test_numerical_rank_takes_a_large_updates_own_error_for_rounding():
    start, now = merged((96, 96), merges=1, adapter_rank=3, size=1e4)
    assert numerical_rank(singular_values(now - start), float(now.norm())) == 3


def test_rounding_to_bfloat16_does_not_count_as_rank():
    start, now = merged((64, 64), merges=1, adapter_rank=4, size=0.5)
    start, now = start.bfloat16().float(), (start.bfloat16().float() + now - start).bfloat16().float()
    values = singular_values(now - start)
    eps = torch.finfo(torch.bfloat16).eps
    assert numerical_rank(values, float(now.norm()), 1, eps) == 4
    assert numerical_rank(values, float(now.norm()), 1) > 4


def test_no_update_has_rank_zero():
    assert numerical_rank(torch.zeros(5), 1.0) == 0
