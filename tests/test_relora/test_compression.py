"""Rounding for the way against numbers worked out one by one, and what a block must survive."""

import math
from fractions import Fraction

import pytest
import torch

from relora.compression import BLOCK, decode, encode, encoded_bytes
from relora.heads import Compression

BLOCKWISE = [Compression.fp8, Compression.int8]


def _there_and_back(values, compression):
    return decode(encode(values, compression), values.shape[-1], compression)


def _wild(shape):
    """Normal numbers of very different sizes from block to block."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(-100, 100, (*shape[:-1], -(-shape[-1] // BLOCK)), generator=generator)
    factors = torch.exp2(sizes.float()).repeat_interleave(BLOCK, -1)[..., : shape[-1]]
    return torch.randn(shape, generator=generator) * factors


def _grid(compression):
    """All positive numbers that 8 bits can be, before the scale."""
    if compression == Compression.int8:
        return [Fraction(number) for number in range(128)]
    subnormal = [Fraction(m, 8) * Fraction(1, 2**6) for m in range(8)]
    normal = [(1 + Fraction(m, 8)) * Fraction(2) ** (e - 7) for e in range(1, 16) for m in range(8)]
    return subnormal + normal[:-1]  # the last is E4M3's NaN


def _nearest(value, grid):
    below = max(i for i, one in enumerate(grid) if one <= value)
    above = min(below + 1, len(grid) - 1)
    apart = (value - grid[below]) - (grid[above] - value)
    if apart == 0:
        return grid[below] if below % 2 == 0 else grid[above]
    return grid[below] if apart < 0 else grid[above]


@pytest.mark.parametrize("compression", BLOCKWISE)
def test_blocks_are_rounded_as_one_works_out_by_hand(compression):
    grid = _grid(compression)
    values = _wild((3 * BLOCK + 5,))
    values[:3] = torch.tensor([0.0, -0.0, 1e-3])
    for got, block in zip(_there_and_back(values, compression).split(BLOCK), values.split(BLOCK), strict=True):
        exact = [Fraction(value) for value in block.tolist()]
        scale = Fraction(2) ** -200
        while max(abs(value) for value in exact) > grid[-1] * scale:
            scale *= 2
        expected = [_nearest(abs(value) / scale, grid) * scale * (1 if value > 0 else -1) for value in exact]
        assert got.tolist() == [float(value) for value in expected]


def test_bf16_is_torch_s():
    values = torch.cat([_wild((1000,)), torch.tensor([math.inf, -math.inf, math.nan, 3.4e38, 1e-45])])
    assert torch.equal(_there_and_back(values, Compression.bf16).nan_to_num(7), values.bfloat16().float().nan_to_num(7))


@pytest.mark.parametrize("compression", Compression)
def test_rounding_what_is_rounded_changes_no_bit(compression):
    edges = torch.tensor([1.75, 1.76, 1.999, 127 / 64, 1.99, 1.0, 0.0, -1.9375, 1.8750001])
    values = torch.cat([_wild((5, 4096)), _wild((5, BLOCK)) * 0 + edges.repeat(4)[:BLOCK]], dim=1)
    largest, least = torch.finfo(torch.float32).max, 1e-45
    values = torch.cat([values, torch.tensor([largest, least, 1e-38, -1e-40]).repeat(5, 8), values[:, :7]], dim=1)
    once = _there_and_back(values, compression)
    assert torch.equal(_there_and_back(once, compression).view(torch.int32), once.view(torch.int32))
    assert once.isfinite().all() or compression == Compression.bf16, "only bfloat16 rounds the largest float32 up"
    assert not torch.equal(once, values) or compression == Compression.none


@pytest.mark.parametrize("compression", Compression)
@pytest.mark.parametrize("entries", [0, 1, 31, 32, 33, 64, 100])
def test_bytes_are_as_told_and_rows_do_not_touch_each_other(compression, entries):
    values = _wild((2, 3, entries))
    encoded = encode(values, compression)
    assert encoded.shape == (2, 3, encoded_bytes(entries, compression))
    assert encoded.dtype == torch.uint8
    both = decode(encoded, entries, compression)
    for i in range(2):
        for j in range(3):
            assert torch.equal(both[i, j], _there_and_back(values[i, j], compression))


@pytest.mark.parametrize("compression", Compression)
@pytest.mark.parametrize("evil", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_visible_and_spoils_no_other_block(compression, evil):
    values = _wild((3 * BLOCK,))
    clean = _there_and_back(values, compression)
    values[BLOCK + 3] = evil
    got = _there_and_back(values, compression)
    assert not got[BLOCK + 3].isfinite()
    others = torch.arange(3 * BLOCK) // BLOCK != 1
    assert torch.equal(got[others], clean[others])
    if compression in BLOCKWISE:
        assert got[~others].isnan().all()


@pytest.mark.parametrize("compression", Compression)
def test_zeros_and_the_smallest_numbers_do_no_harm(compression):
    assert not _there_and_back(torch.zeros(40), compression).any()
    tiny = torch.tensor([1e-45, -1e-40, 3e-39] * 20)
    got = _there_and_back(tiny, compression)
    assert (got - tiny).abs().max() <= 2.0**-126


@pytest.mark.parametrize(("compression", "error"), [("bf16", 2**-8), ("fp8", 2**-4), ("int8", 1 / 127)])
def test_errors_are_within_the_format_s(compression, error):
    values = _wild((2, 3200))
    blocks = values.unflatten(-1, (-1, BLOCK))
    wrong = (_there_and_back(values, Compression(compression)) - values).unflatten(-1, (-1, BLOCK)).abs()
    assert (wrong <= error * blocks.abs().amax(-1, keepdim=True)).all()
    assert wrong.max() > 0
