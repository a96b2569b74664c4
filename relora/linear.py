"""A linear layer whose frozen weight is trained through two small factors.

y = x W' + b + scaling * (x down') up'. The weight keeps its name, its orientation and its Parameter object,
so state dictionaries keep their Hugging Face names. When to merge: see relora/restart.py and relora/lte.py.
Shapes: W (out, in), down (adapter_rank, in), up (out, adapter_rank); transformers' Conv1D has W as (in, out).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from relora.initialize import draw_down
from relora.paths import ForwardPath, addmm, base_only, factored, merged
from relora.precision import MergePrecision, add_, join, split
from relora.quantised import BaseFormat, QuantisedBase, Taken

BLOCK_ENTRIES = 1 << 19
"""What works on whole base weights does so by blocks of rows of about this size, so that its temporaries stay small."""


@dataclass(kw_only=True, slots=True, frozen=True)
class BasePart:
    """A flat range of a layer's base weight, in memory order: all of it, or what one process holds."""

    weight: Tensor
    """Its codes, if it is quantised; such a part is all of it, and `LowRankLinear.requantise_` edits it.

    Shapes: (count,)"""
    extra_bits: Tensor | None
    """The same range of the extra bits, where there are any."""
    start: int = 0
    """Where the range begins in the flattened weight."""
    replicas: int = 1
    """Processes that hold this very part."""
    layer_replicas: int = 1
    """Processes that hold these very factors."""
    quantised: QuantisedBase | None = None
    """What the codes belong to."""

    @property
    def entries(self) -> int:
        """Entries of the weight."""
        return self.weight.numel() if self.quantised is None else self.quantised.entries

    def squared_norm(self) -> float:
        """Return the square of the norm."""
        if self.quantised is not None:
            return float(self.quantised.squared_norm())
        return squared(self.weight)


class LowRankLinear(nn.Module):
    """A frozen linear layer plus a trainable product of two factors."""

    weight: nn.Parameter
    """W; gone when it is quantised."""
    down: nn.Parameter
    up: nn.Parameter
    extra_bits: Tensor | None
    quantised: QuantisedBase | None
    synced_down: Tensor | None
    synced_up: Tensor | None
    hosted: int = 1
    """Heads of LTE whose factors it holds."""
    path: ForwardPath = ForwardPath.factored
    """How it computes; never `auto`."""
    formed: Tensor | None = None
    """W + scaling * up @ down while the passes of an update run (relora/merged.py). Shapes: (out, in)."""
    stand_in: tuple[Tensor, Tensor] | None = None
    """What takes the place of down and up in the forward pass."""

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        adapter_rank: int,
        scaling: float,
        dropout: float = 0.0,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.transposed = transposed
        self.out_features, self.in_features = reversed(weight.shape) if transposed else weight.shape
        self.adapter_rank = adapter_rank
        self.scaling = scaling
        self.dropout_probability = dropout
        weight.requires_grad_(False)
        self.weight = weight
        self.bias = bias
        # One zero factor keeps the function unchanged; two would leave both gradients zero for ever.
        down = draw_down("", (adapter_rank, self.in_features), seed=0)
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(self.out_features, adapter_rank))
        self.register_buffer("extra_bits", None)
        self.register_module("quantised", None)
        self.register_buffer("synced_down", None)
        self.register_buffer("synced_up", None)

    @classmethod
    def from_module(
        cls, module: nn.Module, *, adapter_rank: int, scaling: float, dropout: float = 0.0
    ) -> LowRankLinear:
        """Wrap an nn.Linear or a transformers Conv1D around the very same parameters."""
        weight, bias = module.weight, module.bias
        assert isinstance(weight, nn.Parameter)
        assert bias is None or isinstance(bias, nn.Parameter)
        layer = cls(
            weight,
            bias,
            adapter_rank=adapter_rank,
            scaling=scaling,
            dropout=dropout,
            transposed=isinstance(module, Conv1D),
        )
        return layer.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        return self.output(x, *self.live(), self.bias)

    def live(self) -> tuple[Tensor, Tensor]:
        """Return the down and up that the forward pass uses."""
        return (self.down, self.up) if self.stand_in is None else self.stand_in

    @property
    def matrix(self) -> Tensor:
        """Return a view of the base weight. Shapes: (out, in)."""
        return self.weight.t() if self.transposed else self.weight

    def output(self, x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output by the layer's path, from the values of `down` and `up`."""
        down, up = self.change(down, up)
        if self.formed is not None and self.stand_in is None:
            return merged(x, self.formed, bias, down, up, self.scaling)
        drops = self.training and self.dropout_probability > 0
        dropped = F.dropout(x, self.dropout_probability) if drops else None
        if self.path != ForwardPath.factored:
            return addmm(
                x,
                self.weight if self.quantised is None else self.quantised.stored,
                bias,
                down,
                up,
                self.scaling,
                transposed=self.transposed,
                dropped=dropped,
                fused=self.path == ForwardPath.fused,
            )
        return self._factored(x, x if dropped is None else dropped, down, up, bias)

    def _factored(self, x: Tensor, dropped: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
        if self.quantised is not None:
            base = base_only(x, self.quantised.stored, bias, transposed=self.transposed)
        else:
            base = F.linear(x, self.matrix, bias)
        return base + factored(dropped, down, up, self.scaling)

    def change(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Return factors of what the layer adds to its base weight, from the values of `down` and `up`.

        Their product is up @ down less what LTE's last sync has put into the base weight: synced_up @ synced_down.
        Shapes: (..., k, in), (..., out, k), with k once or twice the adapter rank.
        """
        return self.change_from((down, up), (self.synced_down, self.synced_up))

    @staticmethod
    def change_from(now: tuple[Tensor, Tensor], synced: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor, Tensor]:
        """Return factors of the product of `now` less that of `synced`, if any; no synced down means the same one."""
        (down, up), (synced_down, synced_up) = now, synced
        if synced_up is None:
            return down, up
        if synced_down is None:
            return down, up - synced_up.to(up)
        return torch.cat([down, synced_down.to(down)], dim=-2), torch.cat([up, -synced_up.to(up)], dim=-1)

    @torch.no_grad()
    def keep_synced_(self) -> None:
        """Make room for the factors of the last sync; they are zero, since there was none yet."""
        self.synced_up = torch.zeros_like(self.up, dtype=torch.float32, requires_grad=False)
        if self.down.requires_grad:
            self.synced_down = torch.zeros_like(self.down, dtype=torch.float32, requires_grad=False)

    def extra_repr(self) -> str:
        """Describe the layer in the model's printout."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, adapter_rank={self.adapter_rank}, "
            f"scaling={self.scaling:g}, dropout={self.dropout_probability:g}"
        )

    @torch.no_grad()
    def delta(self, down: Tensor | None = None, up: Tensor | None = None) -> Tensor:
        """Return scaling * up @ down in float32, from the given factors (say, the masters) or the live ones.

        Shapes: (out, in)
        """
        down, up = self._factors(down, up)
        delta, down = torch.empty(len(up), down.shape[1], device=up.device), down.double()
        for rows, _, _ in _row_blocks(0, delta.numel(), delta.shape[1]):
            delta[rows] = _product(up[rows], down, self.scaling)
        return delta

    @torch.no_grad()
    def base(self) -> Tensor:
        """Return the base weight in float32, with its extra bits where it has them.

        A quantised one is what passes compute with: its remainder is left out.

        Shapes: (out, in)
        """
        if self.quantised is not None:
            exact = self.quantised.weight()
        else:
            exact = self.weight.float() if self.extra_bits is None else join(self.weight, self.extra_bits)
        return exact.t() if self.transposed else exact

    @torch.no_grad()
    def delta_norm(self, down: Tensor | None = None, up: Tensor | None = None) -> float:
        """Return the Frobenius norm of the delta from the factors' Gram matrices, without forming it."""
        down, up = (factor.double() for factor in self._factors(down, up))
        squared = ((up.t() @ up) * (down @ down.t())).sum().clamp_min(0.0)
        return self.scaling * float(squared.sqrt())

    @torch.no_grad()
    def split_base_(self) -> None:
        """Turn a float32 base weight into bfloat16 plus the 16 bits it lacks; no information is lost."""
        assert self.weight.dtype == torch.float32
        self.weight.data, self.extra_bits = split(self.weight.data)

    @torch.no_grad()
    def quantise_base_(self, form: BaseFormat, *, remainder: bool) -> None:
        """Put codes in the place of a float32 base weight.

        Args:
            remainder: whether to keep what merges need so that they lose nothing (relora/quantised.py).
        """
        assert self.extra_bits is None, "the remainder is a quantised weight's extra bits"
        self.quantised = QuantisedBase(self.weight.data, form, remainder=remainder)
        del self.weight

    @torch.no_grad()
    def requantise_(self, down: Tensor | None = None, up: Tensor | None = None) -> Taken:
        """Add the delta to a quantised base weight, as `merge_` does to another; return what it did."""
        assert self.quantised is not None
        down, up = self._factors(down, up)
        left, right = (down.t(), up.t().double()) if self.transposed else (up, down.double())
        return self.quantised.add_(lambda rows: _product(left[rows], right, self.scaling))

    @torch.no_grad()
    def merge_(
        self,
        precision: MergePrecision,
        down: Tensor | None = None,
        up: Tensor | None = None,
        key: int | None = None,
        part: BasePart | None = None,
    ) -> int:
        """Add the delta to the base weight and leave the factors alone; return how many entries changed.

        Given factors (float32 masters) take the place of the live ones; `stochastic` needs the key of its chances.
        Of a base weight that lies elsewhere in parts, only the given part is touched, and only its delta is formed.
        """
        part = self.whole_base() if part is None else part
        return self.add_product_(precision, *self._factors(down, up), key, part)

    @torch.no_grad()
    def add_product_(
        self,
        precision: MergePrecision,
        down: Tensor,
        up: Tensor,
        key: int | None,
        part: BasePart,
        *,
        scaling: float | None = None,
    ) -> int:
        """Add scaling * up @ down to a part of the base weight, for factors of any rank; return the entries changed.

        Without a scaling, the layer's own.
        """
        return _add_blocks_(self._product_blocks(down, up, part, scaling), precision, key, part)

    @torch.no_grad()
    def add_part_(self, precision: MergePrecision, delta: Tensor, key: int | None, part: BasePart) -> int:
        """Add an update to a part of the base weight; return the entries changed."""
        starts = range(0, delta.numel(), BLOCK_ENTRIES)
        places = (slice(start, min(start + BLOCK_ENTRIES, delta.numel())) for start in starts)
        return _add_blocks_(((inside, delta[inside]) for inside in places), precision, key, part)

    @torch.no_grad()
    def product_part(self, down: Tensor, up: Tensor, part: BasePart, *, scaling: float | None = None) -> Tensor:
        """Return scaling * up @ down in float32, where a part of the base weight is, flat."""
        delta = torch.empty(part.weight.numel(), device=part.weight.device)
        for inside, block in self._product_blocks(down, up, part, scaling):
            delta[inside] = block
        return delta

    def _product_blocks(
        self, down: Tensor, up: Tensor, part: BasePart, scaling: float | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield a product where a part of the base weight is, block by block."""
        down, up = (factor.to(part.weight.device) for factor in (down, up))
        left, right = (down.t(), up.t().double()) if self.transposed else (up, down.double())
        for rows, inside, skipped in _row_blocks(part.start, part.weight.numel(), right.shape[1]):
            delta = _product(left[rows], right, self.scaling if scaling is None else scaling).view(-1)
            yield inside, delta[skipped:][: inside.stop - inside.start]
            del delta  # before the next one is formed

    def whole_base(self) -> BasePart:
        """Return the base weight as its own only part."""
        if self.quantised is not None:
            return BasePart(weight=self.quantised.codes.view(-1), extra_bits=None, quantised=self.quantised)
        bits = self.extra_bits
        return BasePart(weight=self.weight.data.view(-1), extra_bits=None if bits is None else bits.view(-1))

    def _factors(self, down: Tensor | None, up: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the change by the given factors or the live ones, on the weight's device."""
        down, up = self.change(self.down if down is None else down, self.up if up is None else up)
        device = self.weight.device if self.quantised is None else self.quantised.codes.device
        return down.to(device), up.to(device)


@contextmanager
def standing_in(factors: Mapping[LowRankLinear, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let other factors take the place of these layers' own in forward passes."""
    for layer, pair in factors.items():
        layer.stand_in = pair
    try:
        yield
    finally:
        for layer in factors:
            layer.stand_in = None


def _add_blocks_(
    blocks: Iterable[tuple[slice, Tensor]], precision: MergePrecision, key: int | None, part: BasePart
) -> int:
    changed = torch.zeros((), dtype=torch.int64, device=part.weight.device)
    for inside, delta in blocks:
        bits = None if part.extra_bits is None else part.extra_bits[inside]
        changed += add_(part.weight[inside], bits, delta, precision, key, part.start + inside.start)
        del delta
    return int(changed)


def squared(tensor: Tensor) -> float:
    """Return the sum of squares, by blocks: with a dtype of their own, norms copy what they read."""
    blocks = tensor.reshape(-1).split(BLOCK_ENTRIES)
    norms = [torch.linalg.vector_norm(block, dtype=torch.float64) for block in blocks]
    return float(torch.stack(norms).square().sum())


def _product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    # float64 inside: autocast and the TF32 and bfloat16 matmul settings, which may hold during training, must
    # not touch a merge, and they leave float64 alone.
    return (left.double() @ right).mul_(scaling).float()


def _row_blocks(start: int, count: int, width: int) -> Iterator[tuple[slice, slice, int]]:
    """Cut a flat range of a matrix into blocks of rows.

    Yields the rows, their slice of the range, and how many entries of the first row lie before the range.
    """
    if not count:
        return
    height = max(1, BLOCK_ENTRIES // max(1, width))
    first, last = start // width, -(-(start + count) // width)
    for row in range(first, last, height):
        end = min(row + height, last)
        begin, stop = max(start, row * width), min(start + count, end * width)
        yield slice(row, end), slice(begin - start, stop - start), begin - row * width
