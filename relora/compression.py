"""Float32 numbers as fewer bytes, and back: bfloat16, or 8 bits with a power of two for each block of 32.

A block's scale is the least power of two by which its largest entry fits; so nothing saturates (but near float32's own
end), and rounding what is rounded already changes nothing. A block with an entry that is no finite number comes back as
NaN throughout. Entries are rounded to multiples of 2^-126 at least.
Source: OCP Microscaling Formats (MX) v1.0, sections 5 and 6: MXFP8 (E4M3), MXINT8, E8M0 scales.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from relora.heads import Compression

BLOCK = 32
"""Entries that share a scale."""
_BIAS, _NAN_SCALE = 127, 255
_LARGEST = {Compression.fp8: 448.0, Compression.int8: 127.0}
_SCALE_SHIFT = {Compression.fp8: 0, Compression.int8: 6}
"""MXINT8's elements are multiples of 2^-6."""
_LEAST_EXPONENT, _END_EXPONENT = -126, 128
"""Of normal float32 numbers, and of the first power of two beyond them."""


def encoded_bytes(entries: int, compression: Compression) -> int:
    """Return the bytes of so many encoded entries."""
    if compression == Compression.none:
        return 4 * entries
    if compression == Compression.bf16:
        return 2 * entries
    return entries + -(-entries // BLOCK)


def block_of(compression: Compression) -> int:
    """Return how many neighbouring entries are rounded together."""
    return 1 if compression in (Compression.none, Compression.bf16) else BLOCK


def encode(values: Tensor, compression: Compression) -> Tensor:
    """Return float32 rows as bytes.

    Shapes: (..., entries), to uint8 (..., encoded_bytes(entries, compression)).
    """
    values = values.contiguous()
    if compression == Compression.none:
        return values.view(torch.uint8)
    if compression == Compression.bf16:
        return values.to(torch.bfloat16).view(torch.uint8)
    entries = values.shape[-1]
    blocks = torch.nn.functional.pad(values, (0, -entries % BLOCK)).unflatten(-1, (-1, BLOCK))
    exponents, finite = _exponents(blocks, _LARGEST[compression])
    scaled = torch.where(finite[..., None], blocks, 0.0) * _power(-exponents)[..., None]
    scaled.clamp_(-_LARGEST[compression], _LARGEST[compression])
    rounded = scaled.to(torch.float8_e4m3fn) if compression == Compression.fp8 else scaled.round_().to(torch.int8)
    scales = torch.where(finite, exponents + (_SCALE_SHIFT[compression] + _BIAS), _NAN_SCALE).to(torch.uint8)
    return torch.cat([rounded.view(torch.uint8).flatten(-2)[..., :entries], scales], dim=-1)


def decode(encoded: Tensor, entries: int, compression: Compression) -> Tensor:
    """Return the float32 rows that `encode` made bytes of.

    Shapes: as there.
    """
    shape = (*encoded.shape[:-1], entries)
    if compression == Compression.none:
        return encoded.reshape(-1).view(torch.float32).view(shape)
    if compression == Compression.bf16:
        return encoded.reshape(-1).view(torch.bfloat16).float().view(shape)
    rounded, scales = encoded.split([entries, encoded.shape[-1] - entries], dim=-1)
    stored = torch.float8_e4m3fn if compression == Compression.fp8 else torch.int8
    numbers: Tensor = rounded.view(stored).float()
    factors = _power(scales.int() - (_SCALE_SHIFT[compression] + _BIAS))
    factors = torch.where(scales == _NAN_SCALE, torch.nan, factors)
    return numbers * factors.repeat_interleave(BLOCK, dim=-1)[..., :entries]


def _exponents(blocks: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Return the least exponent of each block at which its entries fit, and whether all of them are finite."""
    sizes = blocks.abs().amax(-1)
    finite = sizes.isfinite()
    mantissas, exponents = torch.frexp(torch.where(finite, sizes, 0.0))  # in [0.5, 1)
    mantissa, exponent = math.frexp(largest)
    fitting = exponents.int() - exponent + (mantissas > mantissa).int()
    return fitting.clamp(_LEAST_EXPONENT, _END_EXPONENT - exponent), finite


def _power(exponents: Tensor) -> Tensor:
    """Return exact powers of two, from their bits."""
    return ((exponents + _BIAS) << 23).view(torch.float32)
