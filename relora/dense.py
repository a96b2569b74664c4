"""Dense parameters whose gradients LTE's heads average in every step, so that they are always the same on all heads.

Each head clips by its own norm first, so what is averaged is what each would have taken. An update that one head
refuses, all refuse: otherwise the dense parameters would part.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from relora.heads import Heads, Parcel, Way


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
