"""A model that holds several of LTE's heads: what they share once, what each has of its own stacked.

Every parameter that trains has the heads as its first dimension; frozen ones, the base weights above all, are there
once. The batch is as many equal runs of rows as there are heads, and each head's parameters see its own rows only:
base weights in one product over all rows, factors in one batched product over heads (ASPEN's batch fusion).
Source: ASPEN, Ye et al. 2023 (arXiv 2312.02515).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from relora.convert import low_rank_modules
from relora.errors import ConfigError
from relora.initialize import draw_down
from relora.linear import LowRankLinear


@dataclass(slots=True)
class _Batch:
    """The batch that the model is at."""

    rows: int = 0


class HostedLinear(LowRankLinear):
    """A low-rank layer with the factors of several heads.

    Shapes: down (heads, adapter_rank, in), up (heads, out, adapter_rank); W as it was.
    """

    def output(self, x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output of all heads' rows."""
        if bias is None or bias.ndim == 1:
            return super().output(x, down, up, bias)
        y = super().output(x, down, up, None)
        return (y.view(self.hosted, -1, self.out_features) + bias.unsqueeze(1)).view(y.shape)

    def _factored(self, x: Tensor, dropped: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
        base = F.linear(x, self.matrix, bias)
        rows = dropped.reshape(self.hosted, -1, self.in_features)
        update = torch.bmm(torch.bmm(rows, down.transpose(1, 2)) * self.scaling, up.transpose(1, 2))
        return (base.view(self.hosted, -1, self.out_features) + update).view(base.shape)

    def _factors(self, down: Tensor | None, up: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return factors of the heads' mean change."""
        down, up = self.change(self.down if down is None else down, self.up if up is None else up)
        mean = (up / self.hosted).transpose(0, 1).flatten(1)
        return down.flatten(0, 1).to(self.weight.device), mean.to(self.weight.device)


class Hosted(nn.Module):
    """Mixed into a module whose own parameters, some or all, are stacked: each head's rows meet its parameters."""

    hosted: int
    stacked: frozenset[str]
    batch: _Batch

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return the module's outputs, head by head, as one vectorized call."""
        leaves, layout = tree_flatten((inputs, named))
        ours = [isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) > 1 for leaf in leaves]
        rows = [
            leaf.reshape(self.hosted, -1, *leaf.shape[1:]) if mine else None
            for leaf, mine in zip(leaves, ours, strict=True)
        ]

        def one(parameters: dict[str, Tensor], mine: list[Tensor]) -> Any:
            left = iter(mine)
            arguments = [next(left) if chosen else leaf for leaf, chosen in zip(leaves, ours, strict=True)]
            args, kwargs = tree_unflatten(arguments, layout)
            stand_in = object.__new__(type(self))
            stand_in.__dict__.update(self.__dict__, _parameters={**self._parameters, **parameters})
            return super(Hosted, stand_in).forward(*args, **kwargs)

        parameters = {name: getattr(self, name) for name in sorted(self.stacked)}
        outputs = torch.vmap(one, randomness="different")(parameters, [row for row in rows if row is not None])
        return tree_map(self._all_rows, outputs)

    def _all_rows(self, output: Tensor) -> Tensor:
        """Put heads after each other; a row that stood for all of a batch is repeated, since heads differ."""
        if output.shape[1] == 1:
            output = output.expand(-1, self.batch.rows // self.hosted, *output.shape[2:])
        return output.flatten(0, 1)


class HostedOutput(Hosted, nn.Linear):
    """A dense linear layer: one batched product."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (rows, ..., in) -> (rows, ..., out)."""
        y = torch.bmm(x.reshape(self.hosted, -1, self.in_features), self.weight.transpose(1, 2))
        if self.bias is not None:
            y = y + (self.bias.unsqueeze(1) if self.bias.ndim > 1 else self.bias)
        return y.view(*x.shape[:-1], self.out_features)


class HostedEmbedding(Hosted, nn.Embedding):
    """An embedding: one look-up in the heads' tables, one below the other."""

    def forward(self, ids: Tensor) -> Tensor:
        """Shapes: (rows, ...) -> (rows, ..., dimension)."""
        if len(ids) == 1:
            ids = ids.expand(self.batch.rows, *ids.shape[1:])
        first = torch.arange(self.hosted, device=ids.device).mul_(self.num_embeddings)
        first = first.repeat_interleave(len(ids) // self.hosted).view(-1, *[1] * (ids.ndim - 1))
        found = F.embedding(ids + first, self.weight.flatten(0, 1))
        if self.padding_idx is None:
            return found
        return torch.where((ids == self.padding_idx).unsqueeze(-1), found.detach(), found)


def heads_in(model: nn.Module) -> int:
    """Return how many heads a model hosts."""
    return int(getattr(model, "hosted_heads", 1))


@torch.no_grad()
def host_heads(model: nn.Module, heads: Sequence[int], *, seed: int) -> None:
    """Make a model host several heads in place: each starts as it would in a process of its own.

    Low-rank layers whose `up` is not zero, or whose `down` does not train, keep both for all heads.

    Raises: ConfigError when a module cannot be stacked.
    """
    batch = _Batch()
    for name, layer in low_rank_modules(model).items():
        _host_low_rank(name, layer, heads, seed)
    copies: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        stacked = [key for key, one in module.named_parameters(recurse=False) if _is_dense(module, key, one)]
        if not stacked:
            continue
        for key in stacked:
            parameter = module._parameters[key]
            assert parameter is not None
            copy = copies.setdefault(id(parameter), nn.Parameter(_repeated(parameter, len(heads))))
            module._parameters[key] = copy
        if not isinstance(module, LowRankLinear):
            _mix_in(name, module, frozenset(stacked), len(heads), batch)
    model.hosted_heads = len(heads)  # type: ignore[assignment]

    def note(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        batch.rows = len(named["input_ids"] if "input_ids" in named else inputs[0])
        assert batch.rows % len(heads) == 0, "each head has as many rows"

    model.register_forward_pre_hook(note, with_kwargs=True)


def _host_low_rank(name: str, layer: LowRankLinear, heads: Sequence[int], seed: int) -> None:
    down = _repeated(layer.down, len(heads))
    if layer.down.requires_grad and not layer.up.any():
        rank, inputs = layer.down.shape
        down.copy_(torch.stack([draw_down(name, (rank, inputs), seed=seed, head=head) for head in heads]))
    layer.__class__ = HostedLinear
    layer.hosted = len(heads)
    layer.down = nn.Parameter(down, requires_grad=layer.down.requires_grad)
    layer.up = nn.Parameter(_repeated(layer.up, len(heads)))
    for key in ("synced_down", "synced_up"):
        synced = getattr(layer, key)
        if synced is not None:
            setattr(layer, key, _repeated(synced, len(heads)))


def _is_dense(module: nn.Module, key: str, parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and not (isinstance(module, LowRankLinear) and key in ("down", "up"))


def _repeated(tensor: Tensor, count: int) -> Tensor:
    return tensor.detach().expand(count, *tensor.shape).clone()


def _mix_in(name: str, module: nn.Module, stacked: frozenset[str], heads: int, batch: _Batch) -> None:
    if any(True for child in module.children() for _ in child.parameters()):
        raise ConfigError(
            f"lte.heads: {name} has parameters beside parts with parameters, and one process cannot hold those of "
            f"{heads} heads: start a process for each head"
        )
    plain = type(module)
    if plain is nn.Linear and "weight" in stacked:
        module.__class__ = HostedOutput
    elif plain is nn.Embedding and not (module.max_norm or module.sparse or module.scale_grad_by_freq):
        module.__class__ = HostedEmbedding
    else:
        module.__class__ = type(f"Hosted{plain.__name__}", (Hosted, plain), {})
    module.__dict__.update(hosted=heads, stacked=stacked, batch=batch)
