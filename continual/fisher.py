"""The diagonal of the Fisher information: how much a task's mean loss would rise if a weight moved.

F = sum over samples of g^2 / all their targets, with g the gradient of a sample's loss summed over its targets. So
half of F times a squared move estimates a rise of the mean loss per target. Squares of a batch's mean gradient would
be another thing, and vanish as a task is learned.
Source: Martens, New insights and perspectives on the natural gradient method (arXiv 1412.1193), sections 5 and 11.
"""

from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
import torch
from torch import Tensor, nn

from continual.batches import Batch
from continual.method import Forward, Stage, Term, Trainee
from relora.initialize import keyed_generator


class Labels(str, Enum):
    """Which labels the gradients are of."""

    data = "data"
    """The samples' own: the empirical Fisher, which shrinks as a task is fitted."""
    model = "model"
    """Drawn from the model's distribution for each sample, as the definition has it; for classifiers."""


@dataclass(kw_only=True, slots=True)
class _SignedLoss:
    """The loss of samples times a sign for each; it is called for one part of them after the other."""

    on: Trainee
    signs: Tensor
    chances: Tensor | None
    """Where in the model's distribution each label is drawn; None: the samples' own labels."""
    done: int = 0

    def __call__(self, forward: Forward, batch: Batch) -> Tensor:
        output = forward(batch)
        mine = slice(self.done, self.done + len(batch))
        self.done += len(batch)
        if self.chances is not None:
            batch = replace(batch, labels=_drawn(output.logits.detach(), batch, self.chances[mine]))
        rows = self.on.row_losses(output, batch)
        return (rows * self.signs[mine].to(rows)).sum()


def fisher_diagonal(
    on: Trainee, stage: Stage, *, labels: Labels, samples: int | None, group: int
) -> dict[nn.Parameter, Tensor]:
    """The information of a finished stage at the weights as they are, without dropout, in parts like masters.

    Samples of a group share one backward pass, and where their number allows it all processes share the group.
    With signs s of chance 1/2 the mean of (sum of s g)^2 is the sum of g^2.
    """
    train = stage.data.train
    count = min(len(train), samples or stage.steps * on.global_batch)
    identities = train.identities(0, count)
    generator = keyed_generator(on.seed, "fisher", stage.index)
    signs = torch.randint(0, 2, (count,), generator=generator).mul(2).sub(1)
    chances = torch.rand(count, generator=generator, dtype=torch.float64) if labels is Labels.model else None
    processes = round(float(on.sum(torch.ones(1, device=on.device))))
    sums: dict[nn.Parameter, Tensor] = {}
    targets = 0.0
    was_training = on.model.training
    on.model.eval()
    for start in range(0, count, group):
        places = np.arange(start, min(start + group, count))
        copies = processes if len(places) % processes else 1
        places = places if copies > 1 else on.mine(places)
        batch, mine = train.at(identities[places]), torch.from_numpy(places)
        loss = _SignedLoss(on=on, signs=signs[mine], chances=None if chances is None else chances[mine])
        total = float(on.sum(torch.tensor(float(batch.targets), device=on.device)))
        term = Term(name="fisher", batch=batch, weight=total / copies, loss=loss, stage=stage)
        for parameter, gradient in on.gradients([term]).items():
            squared = gradient.square()
            sums[parameter] = sums[parameter].add_(squared) if parameter in sums else squared
        targets += total / copies
    on.model.train(was_training)
    return {parameter: one.div_(targets) for parameter, one in sums.items()}


def _drawn(logits: Tensor, batch: Batch, chances: Tensor) -> Tensor:
    """A class for each sample, drawn from a classifier's distribution over those that compete. Shapes: (B,)."""
    exact = logits.double()
    if batch.classes is not None:
        exact = exact.masked_fill(~batch.classes, -torch.inf)
    below = exact.softmax(1).cumsum(1)
    below[:, -1] = torch.inf
    return (below <= chances.to(exact)[:, None]).sum(1)
