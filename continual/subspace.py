"""Which inputs of a layer earlier tasks use: a subspace that grows with every task, and what is left free.

One of two orthonormal bases is kept, that of the protected subspace or that of its complement, whichever is the
smaller: DualGPM. Everything is computed in float64 from symmetric matrices, and eigenvectors have a sign rule, so that
equal moments give equal bases. It knows no model and no processes; what it is good for is in methods/inflora.py.
Shapes: d input features, k directions of the basis.
Source: Liang and Li, InfLoRA (arXiv 2404.00228) and its code, of which docs/inflora.md names the differences.
"""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from relora.initialize import keyed_generator

_ROUNDING = 1e-12
"""Share of the energy below which a threshold counts as reached: sums of shares do not end at exactly 1."""


class Energy(str, Enum):
    """What counts as the energy of a direction of inputs."""

    activation = "activation"
    """The mean square of the inputs along it: eigenvalues of their second moment."""
    reference = "reference"
    """As the published code has it: squared eigenvalues, so that few strong directions outweigh all others."""

    def matrix(self, moment: Tensor) -> Tensor:
        """The symmetric matrix whose quadratic form is the energy, in float64. Shapes: (d, d)."""
        exact = moment.double()
        exact = (exact + exact.t()) / 2
        return exact if self is Energy.activation else exact @ exact


class Spans(str, Enum):
    """What a basis spans."""

    protected = "protected"
    """The directions that must not be touched; `remove` in the published code."""
    free = "free"
    """The directions that may be used, its complement; `retain` in the published code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subspace:
    """The protected inputs of a layer."""

    basis: Tensor
    """Orthonormal columns, in float32 on the CPU. Shapes: (d, k) with k at most d / 2."""
    spans: Spans

    @property
    def features(self) -> int:
        """Input features of the layer."""
        return self.basis.shape[0]

    @property
    def protected(self) -> int:
        """Dimensions of the protected subspace."""
        held = self.basis.shape[1]
        return held if self.spans is Spans.protected else self.features - held

    def onto_protected(self, inputs: Tensor) -> Tensor:
        """The part of inputs that lies in the protected subspace, in float64. Shapes: (..., d)."""
        exact = inputs.double()
        held = self._along(exact)
        return held if self.spans is Spans.protected else exact - held

    def onto_free(self, inputs: Tensor) -> Tensor:
        """The part of inputs that lies in its complement, in float64. Shapes: (..., d)."""
        return inputs.double() - self.onto_protected(inputs)

    def free_basis(self, device: torch.device) -> Tensor:
        """An orthonormal basis of the complement, in float64. Shapes: (d, d - protected)."""
        exact = self.basis.to(device).double()
        if self.spans is Spans.free:
            return exact
        result: Tensor = torch.linalg.qr(exact, mode="complete").Q[:, exact.shape[1] :]
        return result

    def _along(self, exact: Tensor) -> Tensor:
        basis = self.basis.to(exact)
        held: Tensor = exact @ basis @ basis.t()
        return held


def nothing_protected(features: int) -> Subspace:
    """The subspace before the first task."""
    return Subspace(basis=torch.zeros(features, 0), spans=Spans.protected)


def protect(before: Subspace, moment: Tensor, *, energy: Energy, threshold: float) -> tuple[Subspace, float]:
    """Protect so many more directions that this share of a task's energy is protected; also tells the share.

    The strongest free ones are taken. The first task of the published code stops one direction earlier than its later
    ones, before the share is reached but not before one direction; so does `reference`.
    """
    matrix = energy.matrix(moment)
    shares, vectors, kept = _free_directions(before, matrix)
    reached = kept + torch.cumsum(shares, 0)
    count = int((torch.cat([reached.new_tensor([kept]), reached[:-1]]) < threshold - _ROUNDING).sum())
    if energy is Energy.reference and before.protected == 0:
        count = max(1, count - 1)
    after = float(reached[count - 1]) if count else kept
    features, protected = before.features, before.protected + count
    if 2 * protected > features:
        return Subspace(basis=_kept(vectors[:, count:]), spans=Spans.free), after
    assert before.spans is Spans.protected, "what is protected never shrinks"
    return Subspace(basis=torch.cat([before.basis, _kept(vectors[:, :count])], dim=1), spans=Spans.protected), after


def free_directions(before: Subspace, moment: Tensor, *, energy: Energy, count: int) -> tuple[Tensor, Tensor]:
    """The strongest free directions of a task, and the share of its energy that each one has.

    There are fewer where fewer are free. Shapes: (count, d), orthonormal rows in float32 on the CPU; (count,)
    """
    shares, vectors, _ = _free_directions(before, energy.matrix(moment))
    return _kept(vectors[:, :count]).t().contiguous(), shares[:count].cpu()


def eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of a symmetric matrix, the largest first, and eigenvectors. Shapes: (n,), (n, n) with columns."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0), vectors.flip(1)


def _free_directions(before: Subspace, matrix: Tensor) -> tuple[Tensor, Tensor, float]:
    """Free directions by energy, with their shares of it, and the share that is protected already.

    To solve within a basis of the complement, rather than to project the matrix, keeps weak directions orthogonal
    to the protected ones, too.
    """
    total = float(matrix.trace())
    if before.protected:
        basis = before.free_basis(matrix.device)
        values, inner = eigenvectors(basis.t() @ matrix @ basis)
        vectors = basis @ inner
    else:
        values, vectors = eigenvectors(matrix)
    vectors = vectors * _signs(vectors)
    if total <= 0:  # all inputs were zero: there is nothing to protect
        return torch.zeros_like(values), vectors, 1.0
    shares = values.clamp_min(0) / total
    return shares, vectors, max(0.0, 1.0 - float(shares.sum()))


def _signs(vectors: Tensor) -> Tensor:
    """Signs that make each column's product with one fixed random vector positive.

    The largest entry would not decide: symmetric data has eigenvectors that hold it twice, with both signs.
    """
    fixed = torch.randn(len(vectors), dtype=torch.float64, generator=keyed_generator(0, "signs", len(vectors)))
    products = fixed.to(vectors) @ vectors
    return torch.where(products < 0, -1.0, 1.0).to(vectors)


def _kept(vectors: Tensor) -> Tensor:
    return vectors.float().cpu().contiguous()
