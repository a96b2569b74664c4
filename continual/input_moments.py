"""Second moments of what enters linear layers, over a task's samples: X' X / rows, un-centred.

Layers that share an input, such as the projections to queries, keys and values, share its moment; the first of them
names it. An input is known by its tensor while the model runs, so any model will do, cut or partitioned. A moment
takes d * d * 8 bytes on each process's device while it is collected, one for each distinct input: products and sums are
in float64, since weak directions must come out alike on any number of processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from continual.batches import Batch, HeldOut, Samples
from continual.method import Trainee
from relora.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """The second moments of a model's inputs to linear layers."""

    by_source: dict[str, Tensor]
    """By the first layer that has the input. Shapes: (d, d), float64"""
    sources: dict[str, str]
    """Whose moment belongs to each layer."""


@torch.no_grad()
def input_moments(on: Trainee, modules: Mapping[str, nn.Module], samples: HeldOut | Samples, count: int) -> Moments:
    """The moments of the inputs of modules over the first samples, without dropout; equal on all processes.

    Raises: ConfigError when a module takes no part in the forward pass.
    """
    collector = _Collector(on=on)
    hooks = [
        # Before the hooks of an engine, which may hand on copies of what layers share.
        module.register_forward_pre_hook(collector.hook(name), with_kwargs=True, prepend=True)
        for name, module in modules.items()
    ]
    was_training = on.model.training
    on.model.eval()
    try:
        for batch, counts in on.turns(samples, count):
            collector.begin(batch, counts)
            wanted = {"use_cache": False} if batch.labels.ndim > 1 else {}
            on.model(**batch.inputs, **wanted)
    finally:
        on.model.train(was_training)
        for hook in hooks:
            hook.remove()
    for name in modules:
        if name not in collector.sources:
            raise ConfigError(
                f"lora.target_modules: {name} takes no part in the model's forward pass, so there are "
                "no inputs to protect: leave it out"
            )
    return collector.summed()


def rows_that_count(batch: Batch) -> Tensor | None:
    """Positions that may act on the loss; None: all. Shapes: (B, T), bool.

    Those of the attention mask, if there is one; of next tokens, those before the last target: what follows is
    padding, or is never asked to predict.
    """
    mask = batch.inputs.get("attention_mask")
    if mask is not None:
        return mask.bool()
    if batch.labels.ndim == 1:
        return None
    targets = torch.zeros_like(batch.labels, dtype=torch.int64)
    targets[:, :-1] = batch.labels[:, 1:] != -100
    return targets.flip(1).cumsum(1).flip(1) > 0


@dataclass(kw_only=True, slots=True)
class _Collector:
    """Sums of one collection."""

    on: Trainee
    sums: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    alive: dict[str, tuple[ReferenceType[Tensor], int]] = field(default_factory=dict)
    """The last input of each source and its version: an input that was overwritten is another one."""
    mask: Tensor | None = None
    counts: bool = True

    def begin(self, batch: Batch, counts: bool) -> None:
        """Before a forward pass."""
        self.alive.clear()
        self.mask, self.counts = rows_that_count(batch), counts

    def hook(self, name: str) -> Any:
        """What a module calls before its forward."""

        def look(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.take(name, arguments[0] if arguments else next(iter(named.values())))

        return look

    def take(self, name: str, inputs: Tensor) -> None:
        """Add an input of a layer to its moment, unless it is another layer's too."""
        source = self.sources.get(name) or self._same_input(inputs) or name
        self.sources[name] = source
        if source != name:
            shared = self._same_input(inputs, source)
            assert shared == source, f"{name} shared the input of {source} before, and does not now"
            return
        self.alive[name] = ref(inputs), inputs._version
        whole = self.on.whole_inputs(name, inputs)
        features = whole.shape[-1]
        if name not in self.sums:
            self.sums[name] = torch.zeros(features, features, dtype=torch.float64, device=whole.device)
            self.rows[name] = 0
        if not self.counts:
            return
        masked = self.mask is not None and self.mask.shape == whole.shape[:-1]
        rows = (whole[self.mask] if masked else whole.reshape(-1, features)).double()
        self.sums[name].addmm_(rows.t(), rows)
        self.rows[name] += len(rows)

    def summed(self) -> Moments:
        """The moments over all processes."""
        names = list(self.sums)
        device = self.on.device
        totals = torch.tensor([self.rows[name] for name in names], dtype=torch.float64, device=device)
        counted = self.on.sum(totals).clamp_min(1).tolist()
        moments = {name: self.on.sum(self.sums[name]) / rows for name, rows in zip(names, counted, strict=True)}
        return Moments(by_source=moments, sources=dict(self.sources))

    def _same_input(self, inputs: Tensor, source: str | None = None) -> str | None:
        for name in self.alive if source is None else [source]:
            kept, version = self.alive.get(name, (None, 0))
            if kept is not None and kept() is inputs and version == inputs._version:
                return name
        return None
