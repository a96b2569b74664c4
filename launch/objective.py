"""The next-token loss: of one update in microbatches, and of the validation sequences."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from continual.batches import Batch, HeldOut, joined
from parallel.collectives import sum_over
from parallel.engine import Engine
from parallel.hosted import HostedEngine
from parallel.runtime import Axis
from parallel.vocabulary import IGNORED, summed_cross_entropy
from relora.hosted import heads_in

ALONE = Axis(1, 0, None, (0,))
"""The data axis of one process."""


def summed_loss(model: nn.Module, batch: Batch, device: torch.device, run: Callable[..., Any] | None = None) -> Tensor:
    """Cross-entropy summed over the batch's targets, in nats.

    Args:
        run: what computes the model's output; None: the model itself.
    """
    return head_losses(model, batch, device, run)[0]


def head_losses(
    model: nn.Module, batch: Batch, device: torch.device, run: Callable[..., Any] | None = None, *, heads: int = 1
) -> list[Tensor]:
    """The same for each of so many equal runs of the batch's sequences, as LTE's heads in one process have them.

    Logits are cast to fp32 first: a bf16 log-sum-exp over a vocabulary is off in the third digit.
    """
    here = batch.to(device)
    output = (run or model)(**here.inputs, use_cache=False)
    pairs = zip(output.logits[:, :-1].chunk(heads), here.labels[:, 1:].chunk(heads), strict=True)
    return [summed_cross_entropy(model, logits.flatten(0, 1), labels.flatten()) for logits, labels in pairs]


def accumulate(
    engine: Engine | HostedEngine, batch: Batch, *, targets: Sequence[int], microbatch_size: int, device: torch.device
) -> Tensor:
    """Forward and backward of this process's share of one update; returns its part of each head's mean loss.

    Each microbatch counts by its targets, so that the split into microbatches does not change the result.

    Args:
        targets: of the whole batch of each head that this process hosts.
        microbatch_size: sequences of a head.
    """
    total = torch.zeros(len(targets), dtype=torch.float64, device=device)
    for part in microbatches(batch, microbatch_size, heads=len(targets)):
        sums = head_losses(engine.model, part, device, engine, heads=len(targets))
        losses = torch.stack([one / count for one, count in zip(sums, targets, strict=True)])
        engine.backward(losses.sum())
        total += losses.detach()
    return total


def microbatches(batch: Batch, size: int, *, heads: int = 1) -> Iterator[Batch]:
    """The batch in parts of `size` sequences of each of so many equal runs."""
    share = len(batch) // heads
    for start in range(0, share, size):
        yield batch.rows(torch.arange(len(batch)).view(heads, share)[:, start : start + size].flatten())


def apart(batch: Batch, heads: int) -> list[Batch]:
    """The batch as so many equal runs of sequences."""
    return [batch.rows(rows) for rows in torch.arange(len(batch)).chunk(heads)]


def side_by_side(batches: Sequence[Batch], heads: int) -> Batch:
    """One batch for each of LTE's heads in this process; gaps are filled with sequences without targets."""
    if heads == 1:
        return batches[0]
    size = max(len(one) for one in batches)
    parts = [_filled(one, size, len(one)) for one in batches]
    return joined([*parts, *[_filled(batches[0], size, 0)] * (heads - len(parts))])


def _filled(batch: Batch, size: int, kept: int) -> Batch:
    """A batch of `size` sequences, of which those from `kept` on have no targets."""
    more = batch.rows(torch.arange(size).clamp(max=len(batch) - 1))
    more.labels[kept:] = IGNORED
    return more


def validation_batches(validation: HeldOut, *, sequences: int | None, size: int) -> Iterator[Batch]:
    """The first `sequences` of validation (None: all), `size` at a time."""
    end = len(validation) if sequences is None else min(sequences, len(validation))
    for start in range(0, end, size):
        yield validation.batch(start, min(size, end - start))


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch], device: torch.device, axis: Axis = ALONE) -> float:
    """Mean loss per target over validation batches, in evaluation mode; the processes of an axis take turns.

    So do the heads that a model hosts, as they would in processes of their own. All run the same number of forward
    passes, since a partitioned model needs everyone for each: who has no batch left runs another's, and does not count
    it.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, targets
    for mine, counts in _turns(batches, axis, heads_in(model)):
        loss = summed_loss(model, mine, device)
        if counts:
            sums += torch.stack([loss.double(), loss.new_tensor(mine.targets, dtype=torch.float64)])
    model.train(was_training)
    loss_sum, targets = sum_over(axis, sums).tolist()
    return float(loss_sum / targets)


def _turns(batches: Iterable[Batch], axis: Axis, heads: int) -> Iterator[tuple[Batch, bool]]:
    """This process's batches, one for each of its heads side by side, and whether they count."""
    left, first = iter(batches), axis.index * heads
    while turn := list(islice(left, axis.size * heads)):
        mine = turn[first : first + heads]
        yield side_by_side(mine or turn[:1], heads), bool(mine)
