"""The next-token loss: of one update in microbatches, and of the validation sequences."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from continual.batches import Batch, HeldOut, joined
from continual.method import Term
from launch.models.masks import one_document_each
from parallel.collectives import sum_over
from parallel.engine import Engine
from parallel.hosted import HostedEngine
from parallel.output_loss import gives_loss, labels_at_hand, loss_in
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
    if here.labels.ndim > 1 and gives_loss(model):
        with labels_at_hand(model, here.labels):
            return [loss_in(model, called(run or model, here))]
    output = called(run or model, here)
    if here.labels.ndim == 1:
        return [class_losses(output.logits, here).sum()]
    pairs = zip(output.logits[:, :-1].chunk(heads), here.labels[:, 1:].chunk(heads), strict=True)
    return [summed_cross_entropy(model, logits.flatten(0, 1), labels.flatten()) for logits, labels in pairs]


def called(run: Callable[..., Any], batch: Batch, **wanted: Any) -> Any:
    """The output of a model, or of the engine around it, for a batch on its device."""
    if batch.labels.ndim > 1:
        wanted["use_cache"] = False
    with nullcontext() if "position_ids" in batch.inputs else one_document_each():
        return run(**batch.inputs, **wanted)


def class_losses(logits: Tensor, batch: Batch) -> Tensor:
    """The cross-entropy of each sample of a classifier, among the classes that compete for it. Shapes: (B,)."""
    losses: Tensor = F.cross_entropy(competing(logits, batch), batch.labels, ignore_index=IGNORED, reduction="none")
    return losses


def competing(logits: Tensor, batch: Batch) -> Tensor:
    """Logits in fp32, those of classes that do not compete for a sample as low as can be. Shapes: (B, C)."""
    logits = logits.float()
    return logits if batch.classes is None else logits.masked_fill(~batch.classes, torch.finfo(logits.dtype).min)


def row_losses(model: nn.Module, output: Any, batch: Batch) -> Tensor:
    """The cross-entropy of each sample, summed over its targets, from a model's output. Shapes: (B,)."""
    if batch.labels.ndim == 1:
        return class_losses(output.logits, batch)
    pairs = zip(output.logits[:, :-1], batch.labels[:, 1:], strict=True)
    return torch.stack([summed_cross_entropy(model, logits, labels) for logits, labels in pairs])


def accumulate(
    engine: Engine | HostedEngine, term: Term, *, targets: Sequence[int], microbatch_size: int, device: torch.device
) -> Tensor:
    """Forward and backward of this process's share of a term; returns its part of each head's weighted mean loss.

    Each microbatch counts by its targets, so that the split into microbatches does not change the result.

    Args:
        targets: of the whole batch of each head that this process hosts.
        microbatch_size: sequences of a head.
    """

    def forward(batch: Batch, **wanted: Any) -> Any:
        return called(engine, batch, **wanted)

    total = torch.zeros(len(targets), dtype=torch.float64, device=device)
    for part in microbatches(term.batch, microbatch_size, heads=len(targets)):
        if term.loss is None:
            sums = head_losses(engine.model, part, device, engine, heads=len(targets))
        else:
            sums = [term.loss(forward, part.to(device))]
        losses = torch.stack([one / count for one, count in zip(sums, targets, strict=True)]) * term.weight
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
    for mine, counts in turns(batches, axis, heads_in(model)):
        loss = summed_loss(model, mine, device)
        if counts:
            sums += torch.stack([loss.double(), loss.new_tensor(mine.targets, dtype=torch.float64)])
    model.train(was_training)
    loss_sum, targets = sum_over(axis, sums).tolist()
    return float(loss_sum / targets)


def turns(batches: Iterable[Batch], axis: Axis, heads: int) -> Iterator[tuple[Batch, bool]]:
    """This process's batches, one for each of its heads side by side, and whether they count."""
    left, first = iter(batches), axis.index * heads
    while turn := list(islice(left, axis.size * heads)):
        mine = turn[first : first + heads]
        yield side_by_side(mine or turn[:1], heads), bool(mine)
