"""Prototypes of classes: the mean of what enters a classifier's outputs, and how far a sample is from its class's.

Distances are KL(softmax(prototype) || softmax(features)), in nats.
Source: GS-LoRA++ (arXiv 2501.09705), whose prototypes are of the model as each task finds it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continual.batches import Batch, Samples
from continual.method import Trainee
from relora.errors import ConfigError
from relora.targets import output_layer


def outputs_of(model: nn.Module) -> nn.Linear:
    """The layer of a classifier's outputs.

    Raises: ConfigError when the model has none, or it is low-rank.
    """
    layer = output_layer(model)
    if not isinstance(layer, nn.Linear):
        raise ConfigError(
            "continual.gs_lora's prototypes are of what enters a classifier's output layer, and this model has no "
            "such layer, or lora.target_modules names it: leave it out there, or leave out the prototypes"
        )
    return layer


@contextmanager
def features_of(model: nn.Module) -> Iterator[list[Tensor]]:
    """The inputs of the output layer, one for each forward pass made inside; the graph of gradients stays.

    Raises: ConfigError as `outputs_of` does.
    """
    caught: list[Tensor] = []

    def catch(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        caught.append(arguments[0])

    # Before the hooks of an engine, which may hand on a copy.
    hook = outputs_of(model).register_forward_pre_hook(catch, prepend=True)
    try:
        yield caught
    finally:
        hook.remove()


def pooled(features: Tensor, batch: Batch) -> Tensor:
    """Features of samples in fp32; of sequences, the mean over what is no padding. Shapes: (B, [T,] D) -> (B, D)."""
    features = features.float()
    if features.ndim == 2:
        return features
    mask = batch.inputs.get("attention_mask")
    if mask is None:
        return features.mean(1)
    weights = mask.to(features)[..., None]
    return (features * weights).sum(1) / weights.sum(1).clamp_min(1.0)


@torch.no_grad()
def prototypes_of(on: Trainee, sets: Sequence[Samples]) -> Tensor:
    """The prototype of each class that has samples in the sets, without dropout; zeros for others. Shapes: (C, D)."""
    was_training = on.model.training
    on.model.eval()
    sums: Tensor | None = None
    for samples in sets:
        for batch, counts in on.turns(samples, len(samples)):
            with features_of(on.model) as caught:
                on.model(**batch.inputs)
            rows = pooled(caught[0], batch).double()
            if sums is None:
                sums = rows.new_zeros(outputs_of(on.model).out_features, rows.shape[1] + 1)
            if counts:
                sums.index_add_(0, batch.labels, F.pad(rows, (0, 1), value=1.0))
    on.model.train(was_training)
    assert sums is not None, "tasks have samples"
    sums = on.sum(sums)
    return (sums[:, :-1] / sums[:, -1:].clamp_min(1.0)).float()


def distances(features: Tensor, prototypes: Tensor) -> Tensor:
    """KL(softmax(prototype) || softmax(features)) of each sample. Shapes: (B, D), (B, D) -> (B,)."""
    near, far = F.log_softmax(prototypes, dim=1), F.log_softmax(features, dim=1)
    return (near.exp() * (near - far)).sum(1)
