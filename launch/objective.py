"""The next-token loss: of one update in microbatches, and of the validation sequences."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from continual.data import Batch, Validation
from parallel.engine import Engine


def summed_loss(model: Callable[..., Any], batch: Batch, device: torch.device) -> Tensor:
    """Cross-entropy summed over the batch's targets, in nats.

    Logits are cast to fp32 first: a bf16 log-sum-exp over a vocabulary is off in the third digit.
    """
    here = batch.to(device)
    logits = model(input_ids=here.input_ids, position_ids=here.position_ids, use_cache=False).logits
    return F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), here.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def accumulate(engine: Engine, batch: Batch, *, microbatch_size: int, device: torch.device) -> float:
    """Forward and backward of one update; returns the mean loss per target over the global batch.

    Each microbatch counts by its targets, so that the split into microbatches does not change the result.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for part in microbatches(batch, microbatch_size):
        loss = summed_loss(engine, part, device) / batch.targets
        engine.backward(loss)
        total += loss.detach()
    return float(total)


def microbatches(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch in parts of `size` sequences."""
    for start in range(0, len(batch.input_ids), size):
        rows = slice(start, start + size)
        places = None if batch.position_ids is None else batch.position_ids[rows]
        yield Batch(input_ids=batch.input_ids[rows], labels=batch.labels[rows], position_ids=places)


def validation_batches(validation: Validation, *, sequences: int | None, size: int) -> Iterator[Batch]:
    """The first `sequences` of validation (None: all), `size` at a time."""
    end = len(validation) if sequences is None else min(sequences, len(validation))
    for start in range(0, end, size):
        yield validation.batch(start, min(size, end - start))


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> float:
    """Mean loss per target over validation batches, in evaluation mode."""
    was_training = model.training
    model.eval()
    total, targets = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in batches:
        total += summed_loss(model, batch, device)
        targets += batch.targets
    model.train(was_training)
    return float(total) / targets
