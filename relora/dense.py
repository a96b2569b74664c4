"""Parameters that every head of LTE trains at full rank beside its factors, and the two ways to keep them together.

Averaged at syncs: each head trains them for itself, and Adam's state of them stays its own. Or their gradients are
averaged in every step, so that they are always the same on all heads: each head clips by its own norm first, so what
is averaged is what each would have taken, and an update that one head refuses, all refuse.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from relora.heads import Compression, Heads, Parcel, Way
from relora.outer import Outer
from relora.restart import ParameterStore

DENSE = "dense"
"""Name of the dense parameters' parcel, momentum and residuals."""


class DenseParameters:
    """Parameters that are averaged at syncs, all in one parcel: masters, or their change since the last sync."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], store: ParameterStore, heads: Heads, *, anchored: bool
    ) -> None:
        """Take hold of the parameters.

        Args:
            anchored: remember what they were after the last sync, so that changes travel.
        """
        self.parameters, self._store, self._heads = parameters, store, heads
        self._anchored = anchored and bool(parameters)
        self._anchors: Tensor | None = None
        self.settle()

    def settle(self) -> None:
        """Take them as they are now, equal on all heads, for what they were after the last sync."""
        if self._anchored:
            self._anchors = self.masters()[0].clone()

    def drop_changes(self) -> None:
        """Set them back to what they were after the last sync, as far as that is remembered."""
        if self._anchors is not None:
            self._set([self._anchors] * len(self._heads.hosted))

    def masters(self) -> Tensor:
        """Their masters as far as they are here. Shapes: (hosted heads, entries)."""
        hosted = len(self._heads.hosted)
        return torch.cat([self._store.master(one).float().view(hosted, -1) for one in self.parameters], dim=1)

    def parcel(
        self, compression: Compression, residuals: Callable[[str, int, torch.device], list[Tensor] | None]
    ) -> Parcel:
        """What travels."""
        here, anchors = self.masters(), self._anchors
        return Parcel(
            name=DENSE,
            way=Way.mean,
            entries=here.shape[1],
            own=lambda: list((here if anchors is None else here - anchors).unbind()),
            alike=self._store.masters_alike,
            compression=compression,
            residuals=residuals(DENSE, here.shape[1], here.device),
        )

    def take_up(self, mean: Tensor, members: Sequence[int], outer: Outer) -> None:
        """Set the members' parameters to the mean, or to what an outer optimizer makes of it."""
        before = self._anchors
        now = mean if before is None else before + outer.step(DENSE, mean)
        rows = []
        for row, head in zip(self.masters(), self._heads.hosted, strict=True):
            if head in members:
                rows.append(now)
            else:  # its own change stays on top
                assert before is not None
                rows.append(row + (now - before))
        self._set(rows)
        if before is not None:
            self._anchors = now.clone()

    def _set(self, rows: Sequence[Tensor]) -> None:
        start = 0
        for parameter in self.parameters:
            master = self._store.master(parameter).view(len(self._heads.hosted), -1)
            for target, row in zip(master, rows, strict=True):
                target.copy_(row[start : start + master.shape[1]])
            start += master.shape[1]
        self._store.publish(self.parameters)


class DenseGradients:
    """What heads do together in each update."""

    def __init__(self, heads: Heads, *, alike: bool) -> None:
        """Take hold of the way to the others.

        Args:
            alike: whether all processes of a head's data axis hold the same gradients.
        """
        self._heads, self._alike = heads, alike

    def agree(self, may: bool) -> bool:
        """Tell the other heads whether this one may update; returns whether all may."""
        said = self._heads.exchange([], [[1.0, float(not may)] for _ in self._heads.hosted])
        return not any(refuses for _, refuses in said.words)

    def average(self, gradients: Sequence[Tensor]) -> None:
        """Replace gradients by their means over heads."""
        hosted = len(self._heads.hosted)
        rows = torch.cat([gradient.reshape(hosted, -1).float() for gradient in gradients], dim=1) if gradients else None
        if rows is None or not rows.numel():
            return
        parcel = Parcel(
            name="gradients",
            way=Way.mean,
            entries=rows.shape[1],
            own=lambda: list(rows.unbind()),
            alike=self._alike,
        )
        (mean,) = self._heads.exchange([parcel], [[1.0]] * hosted).result()
        sizes = [gradient.numel() // hosted for gradient in gradients]
        for gradient, value in zip(gradients, mean.split(sizes), strict=True):
            gradient.copy_(value.expand(hosted, -1).reshape(gradient.shape))
