"""What heads have brought to a sync, and what it makes of it: all members' bytes, or a weighted mean.

Means are made here, in float64 and in order of heads, so that all heads get the very same bits. In numpy, so that a
meeting point needs no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_AT_ONCE = 1 << 20
"""Entries of a mean that are in float64 at the same time."""
_BLOCK, _BIAS, _NAN_SCALE = 32, 127, 255
_SCALE_SHIFT = {"fp8": 0, "int8": 6}

Floats = npt.NDArray[np.float32]
Parcels = list["Brought"]


@dataclass(kw_only=True, slots=True)
class Brought:
    """One parcel of one process of a head, as it travels."""

    mean: bool
    """Whether heads want the mean of it, rather than all members' bytes."""
    entries: int
    compression: str
    share: float
    """What its inner products with other heads' count here; see relora.heads.Parcel.replicas."""
    told: dict[str, Any]
    """All that its process said of it, for those that did not bring one."""
    data: bytes | bytearray

    @classmethod
    def from_header(cls, header: Mapping[str, Any], data: bytearray) -> "Brought":
        """A parcel that has just come."""
        return cls(
            mean=bool(header["mean"]),
            entries=int(header["entries"]),
            compression=str(header["compression"]),
            share=float(header["share"]),
            told=dict(header),
            data=data,
        )


class Outcome:
    """What one sync brings to one process of each head."""

    def __init__(self, weights: Sequence[float], brought: Sequence[Parcels]) -> None:
        """From the members' weights, and what their processes at this position have brought."""
        self._weights, self._brought = weights, brought
        self._means: dict[int, bytes] = {}
        self.products: npt.NDArray[np.float64] = np.zeros((len(weights), len(weights)))
        """Of what travelled as means; complete when all of them have been asked for."""

    def __len__(self) -> int:
        return len(self._brought[0])

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        kept = sum(len(parcel.data) for parcels in self._brought for parcel in parcels)
        return kept + sum(len(mean) for mean in self._means.values())

    def is_mean(self, index: int) -> bool:
        """Whether a parcel's outcome is a mean."""
        return self._brought[0][index].mean

    def told(self, index: int) -> dict[str, Any]:
        """What the first member said of a parcel."""
        return self._brought[0][index].told

    def gathered(self, index: int) -> list[bytes | bytearray]:
        """A parcel of all members."""
        return [parcels[index].data for parcels in self._brought]

    def mean(self, index: int) -> bytes:
        """The weighted mean of a parcel, in float32."""
        if index not in self._means:
            parcels = [parcels[index] for parcels in self._brought]
            mean, products = weighted_mean([decoded(parcel) for parcel in parcels], self._weights)
            self.products += products * parcels[0].share
            self._means[index] = mean.astype("<f4").tobytes()
            for parcel in parcels:
                parcel.data = b""  # nobody will ask for it
        return self._means[index]


def decoded(parcel: Brought) -> Floats:
    """The float32 entries of a parcel, as relora/compression.py's `decode` gives them."""
    data, entries = parcel.data, parcel.entries
    if parcel.compression == "none":
        return np.frombuffer(data, dtype="<f4")
    if parcel.compression == "bf16":
        return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    stored = np.frombuffer(data, dtype=np.uint8)
    numbers, scales = stored[:entries], stored[entries:].astype(np.int32)
    plain = numbers.view(np.int8).astype(np.float32) if parcel.compression == "int8" else _FP8[numbers]
    exponents = scales - (_SCALE_SHIFT[parcel.compression] + _BIAS)
    factors = ((exponents + _BIAS) << 23).view(np.float32)
    factors[scales == _NAN_SCALE] = np.nan
    return np.asarray(plain * np.repeat(factors, _BLOCK)[:entries], dtype=np.float32)


def _fp8_values() -> Floats:
    """Every float8 e4m3fn by its bits: sign, 4 bits of exponent, 3 of mantissa; no infinity."""
    bits = np.arange(256)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    sizes = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    sizes[(bits & 127) == 127] = np.nan
    return np.where(bits & 128, -sizes, sizes).astype(np.float32)


_FP8 = _fp8_values()


def weighted_mean(rows: Sequence[Floats], weights: Sequence[float]) -> tuple[Floats, npt.NDArray[np.float64]]:
    """The mean of the rows and their inner products."""
    mean = np.empty(len(rows[0]), dtype=np.float32)
    products = np.zeros((len(rows), len(rows)))
    plain = len(set(weights)) == 1  # then the sum is divided once, as it is between processes of one job
    for start in range(0, len(mean), _AT_ONCE):
        blocks = [row[start : start + _AT_ONCE].astype(np.float64) for row in rows]
        total = np.zeros(len(blocks[0]))
        for weight, block in zip(weights, blocks, strict=True):
            total += block if plain else weight * block
        mean[start : start + _AT_ONCE] = total / len(rows) if plain else total
        products += np.array([[float(one @ other) for other in blocks] for one in blocks])
    return mean, products
