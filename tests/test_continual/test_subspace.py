"""The protected subspaces of InfLoRA against the published algorithm in numpy, over tasks and past the switch."""

import numpy as np
import pytest
import torch

from continual.subspace import Energy, Spans, free_directions, nothing_protected, protect


def moments(count, d=12):
    draw = np.random.default_rng(0)
    for _ in range(count):
        x = draw.normal(size=(200, d)) * draw.exponential(size=d) ** 2
        x = x @ np.linalg.qr(draw.normal(size=(d, d)))[0]
        yield x.T @ x / len(x)


def published(moment, protected, threshold, first):
    """update_DualGPM by projections on the protected subspace alone, in SVDs of the moment."""
    rest = moment - protected @ protected.T @ moment
    u, s, _ = np.linalg.svd(rest)
    total = (np.linalg.svd(moment)[1] ** 2).sum()
    if first:
        return u[:, : max(1, int((np.cumsum(s**2) / total < threshold).sum()))]
    kept, r = 1 - (s**2).sum() / total, 0
    while r < len(s) and kept < threshold:
        kept, r = kept + s[r] ** 2 / total, r + 1
    return np.hstack([protected, u[:, :r]])


def test_subspaces_and_directions_equal_the_published_ones_through_the_switch():
    one, theirs, spans = nothing_protected(12), np.zeros((12, 0)), set()
    for task, moment in enumerate(moments(6)):
        exact = torch.from_numpy(moment)
        rows, _ = free_directions(one, exact, energy=Energy.reference, count=2)
        u = np.linalg.svd(moment - theirs @ theirs.T @ moment)[0]
        if one.protected <= 10:
            np.testing.assert_allclose(np.abs((rows.numpy() @ u[:, :2]).diagonal()), 1, atol=1e-5)
        threshold = 0.99 + 0.0099 * task / 6
        one, _ = protect(one, exact, energy=Energy.reference, threshold=threshold)
        theirs = published(moment, theirs, threshold, task == 0)
        np.testing.assert_allclose(one.onto_protected(torch.eye(12)).numpy(), theirs @ theirs.T, atol=2e-6)
        spans.add(one.spans)
    assert spans == {Spans.protected, Spans.free}


@pytest.mark.parametrize("energy", Energy)
def test_bases_stay_orthonormal_and_small_and_directions_avoid_what_is_protected(energy):
    one, before = nothing_protected(24), 0
    for task, moment in enumerate(moments(20, 24)):
        exact = torch.from_numpy(moment)
        rows, _ = free_directions(one, exact, energy=energy, count=4)
        assert one.onto_protected(rows).norm() < 1e-5
        one, share = protect(one, exact, energy=energy, threshold=0.8 + 0.2 * task / 20)
        assert energy is Energy.reference or share >= 0.8 + 0.2 * task / 20 - 1e-9
        k = one.basis.shape[1]
        assert k <= 12
        assert one.protected >= before
        before = one.protected
        assert (one.basis.T @ one.basis - torch.eye(k)).abs().max() < 1e-6 if k else True
