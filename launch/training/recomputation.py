"""What of a block's activations is kept for the backward pass: all, only its input, or its input and all products.

`selective` keeps what matrix products and attention have made and computes the rest anew, which is cheap arithmetic
but most of the memory. torch's own selective contexts refuse products that add in place, as the `addmm` path has them.
"""

from collections import defaultdict, deque
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from relora.errors import ConfigError
from relora.kernels.fused import two_products

_aten = torch.ops.aten
_KEPT = {
    *(_aten.mm, _aten.addmm, _aten.addmm_, _aten.bmm, _aten.baddbmm, _aten.baddbmm_),
    two_products,
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_efficient_attention,
    _aten._scaled_dot_product_cudnn_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu,
}


class Checkpointing(str, Enum):
    """Which activations of a block are computed anew in the backward pass."""

    none = "none"
    full = "full"
    """All of them."""
    selective = "selective"
    """All but those of matrix products and attention."""


def checkpoint_blocks_(model: nn.Module, wanted: Checkpointing) -> None:
    """Let a model's blocks recompute what is not to be kept."""
    if wanted is Checkpointing.none:
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if wanted is Checkpointing.selective:
        settings["context_fn"] = _contexts
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)  # type: ignore[operator]


def _contexts() -> tuple["_Keeping", "_Replaying"]:
    """For one block: what its forward pass runs in, and what its recomputation does."""
    keeping = _Keeping()
    return keeping, _Replaying(keeping)


class _Keeping(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values: dict[Callable[..., Any], deque[Any]] = defaultdict(deque)
        """Results of each product in order; None where it runs again."""
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written, result = _written(func, args), func(*args, **(kwargs or {}))
        on_kept = any(one.untyped_storage()._cdata in self._storages for one in written)
        if func._overloadpacket in _KEPT:
            keeps = on_kept or not written  # what is added to a value that comes anew has to be added anew
            found = tree_map(_detached, result) if keeps else None
            self.values[func].append(found)
            self._storages.update(one.untyped_storage()._cdata for one in _tensors(found))
        elif on_kept:
            raise ConfigError(
                "training.activation_checkpointing=selective cannot be with this model, which writes over its "
                "products: choose full or none"
            )
        return result


class _Replaying(TorchDispatchMode):
    def __init__(self, kept: _Keeping) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = self._kept.values[func].popleft() if func._overloadpacket in _KEPT else None
        return func(*args, **(kwargs or {})) if found is None else found


def _written(func: Any, args: Any) -> list[Tensor]:
    """What an operation writes over."""
    if not func._schema.is_mutable:
        return []
    pairs = zip(func._schema.arguments, args, strict=False)
    return [one for argument, value in pairs if argument.is_write for one in _tensors(value)]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _tensors(values: Any) -> list[Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, Tensor)]
