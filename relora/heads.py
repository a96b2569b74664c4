"""What LTE's heads bring to a sync and what they get back, whatever carries it.

A sync is a list of parcels, the same list on all heads. A parcel travels by `gather`: each head's tensor goes to all
others; or by `mean`: all get the weighted mean. What comes back is equal on all heads that took part, bit for bit.
relora/lte.py makes the parcels; parallel/exchange.py and its neighbours carry them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from torch import Tensor


class Compression(str, Enum):
    """How the entries of a parcel travel."""

    none = "none"
    """As they are, in float32."""
    bf16 = "bf16"
    """Rounded to bfloat16."""
    fp8 = "fp8"
    """float8 e4m3 with a power of two for each block of 32 (OCP's MXFP8)."""
    int8 = "int8"
    """8-bit integers with a power of two for each block of 32 (OCP's MXINT8)."""


class Way(str, Enum):
    """How a parcel travels."""

    gather = "gather"
    mean = "mean"


@dataclass(kw_only=True, slots=True)
class Parcel:
    """One tensor of each head that this process hosts; flat, in float32."""

    name: str
    way: Way
    entries: int
    """Of the largest head's tensor; smaller ones travel padded with zeros."""
    own: Callable[[], list[Tensor]]
    """Compute the tensors, one for each hosted head; without collectives, perhaps in another thread, once."""
    alike: bool
    """Whether all processes of a head's data axis bring the same, so that each may send a part."""
    compression: Compression = Compression.none
    residuals: list[Tensor] | None = None
    """Error feedback of a mean: what rounding has kept back so far, a tensor like each own one; updated in place."""
    replicas: int = 0
    """Processes of a head that hold this very part, for its share in `Delivery.products`; 0: it has none."""


class Delivery(Protocol):
    """What a sync brings; `result` is called once for each parcel, in order, then `products`."""

    @property
    def members(self) -> list[int]:
        """Heads that took part, ascending."""

    @property
    def weights(self) -> list[float]:
        """Of each member in the means; they sum to 1."""

    @property
    def words(self) -> list[list[float]]:
        """What each member said."""

    def result(self) -> list[Tensor]:
        """Return the next parcel's outcome.

        Of a gather each member's tensor as all members see it, decoded, of `entries`; of a mean one tensor. Waits.
        """

    def products(self) -> Tensor:
        """Return the inner products of members' tensors that travelled as means, one share a process.

        Over the processes of a head the shares sum to each part's products, counted once.
        Shapes: (members, members), float64, on the CPU.
        """


class Heads(Protocol):
    """The way to the other heads; all call the same methods in the same order."""

    count: int
    """How many there are."""
    sent: int
    """Bytes that this process has sent to the others."""

    @property
    def hosted(self) -> Sequence[int]:
        """Those whose model this process holds (a part of): one, or all in one process."""

    def exchange(
        self, parcels: Sequence[Parcel], words: Sequence[Sequence[float]], *, background: bool = False
    ) -> Delivery:
        """Bring parcels to all heads.

        Args:
            words: a few numbers that each hosted head tells the others; the first is its weight.
            background: go on at once, and carry everything while the caller works on something else. Otherwise
                parcels are made and carried one by one as their results are asked for.
        """

    def by_factors(self, factors: int, part: int, *, alike: bool) -> bool:
        """Tell whether a layer's factors (so many entries a head) are cheaper to gather than the mean of its part."""
