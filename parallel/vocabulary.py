"""Embedding, output layer and loss, cut along the vocabulary: the logits of all tokens never come together.

The loss needs two numbers per position and process: the log-sum-exp of the logits here, and the target's logit where
it is here. They travel in one collective; the backward pass needs none.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from parallel.tensor_layers import Split, summed
from relora.targets import output_embedding

IGNORED = -100
"""The label of positions without a target."""


class VocabularyEmbedding(Split):
    """Mixed into an embedding that holds some of the tokens; the others' vectors come from the other processes."""

    num_embeddings: int

    def forward(self, ids: Tensor) -> Tensor:
        """Shapes: (...) -> (..., dimension)."""
        local = ids - self.first
        elsewhere = (local < 0) | (local >= self.num_embeddings)
        found: Tensor = super().forward(local.masked_fill(elsewhere, 0))
        return summed(found.masked_fill(elsewhere.unsqueeze(-1), 0), self.axis)


def token_losses(logits: Tensor, labels: Tensor, split: Split | None) -> tuple[Tensor, ...]:
    """The fp32 cross-entropy of each position, and what `logit_gradients` needs: normalizer, label here, here, counted.

    Shapes: (positions, vocabulary or part of it), (positions).
    Collectives: with a split output layer one gather of two numbers per position, by all of the tensor axis.
    """
    local = labels if split is None else labels - split.first
    here = (local >= 0) & (local < logits.shape[1])
    local = local.masked_fill(~here, 0)
    found = logits.gather(1, local.unsqueeze(1)).squeeze(1).float().masked_fill(~here, 0)
    normalizer = torch.logsumexp(logits.float(), dim=1)
    if split is not None:
        pairs = torch.stack([normalizer, found])
        gathered = pairs.new_empty(split.axis.size, *pairs.shape)
        dist.all_gather(list(gathered), pairs, group=split.axis.group)
        normalizer, found = torch.logsumexp(gathered[:, 0], dim=0), gathered[:, 1].sum(0)
    counted = labels != IGNORED
    return (normalizer - found).masked_fill(~counted, 0), normalizer, local, here, counted


def logit_gradients(logits: Tensor, normalizer: Tensor, local: Tensor, here: Tensor, counted: Tensor) -> Tensor:
    """Softmax less one-hot in fp32, of the positions that count."""
    result = torch.sub(logits, normalizer.unsqueeze(1)).exp_().mul_(counted.unsqueeze(1))
    return result.scatter_add_(1, local.unsqueeze(1), -here.to(result.dtype).unsqueeze(1))


class _SummedCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, split: Split) -> Tensor:
        losses, *found = token_losses(logits, labels, split)
        ctx.save_for_backward(logits, *found)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, *found = ctx.saved_tensors
        # The softmax is worked out anew: kept from the forward pass it would take the logits' memory once more.
        return logit_gradients(logits, *found).mul_(gradient).to(logits.dtype), None, None


def summed_cross_entropy(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in fp32 summed over the targets, in nats; equal on all processes of the tensor axis.

    `model` is the bare model, whose output layer says whether it gives all logits or some.
    Shapes: (positions, vocabulary or part of it), (positions).
    Collectives: where the output layer is split, one gather of two numbers per position, by all of the tensor axis.
    """
    head = output_embedding(model)
    if isinstance(head, Split):
        loss: Tensor = _SummedCrossEntropy.apply(logits, labels, head)  # type: ignore[no-untyped-call]
        return loss
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")


def likeliest(model: nn.Module, logits: Tensor) -> Tensor:
    """The token with the highest logit, of equal ones the first; equal on all processes of the tensor axis.

    Shapes: (positions, vocabulary or part of it) -> (positions).
    Collectives: where the output layer is split, one gather of two numbers per position, by all of the tensor axis.
    """
    best, place = logits.float().max(dim=1)
    head = output_embedding(model)
    if not isinstance(head, Split):
        return place
    pairs = torch.stack([best.double(), (place + head.first).double()])
    gathered = pairs.new_empty(head.axis.size, *pairs.shape)
    dist.all_gather(list(gathered), pairs, group=head.axis.group)
    owner = gathered[:, 0].argmax(dim=0)
    return gathered[:, 1].gather(0, owner.unsqueeze(0)).squeeze(0).long()
