"""The loss inside of the output layer: the logits of some tokens at a time, and never those of all.

While labels are at hand the output layer returns the summed loss in place of logits. `chunked` finds the loss of some
tokens and its gradients, and drops their logits: since the loss is a sum, the backward pass has only to scale what is
there. It takes as many FLOPs as the plain loss, and keeps the gradients of hidden states and weight from the forward
pass on. `liger` is Liger's kernel for the same.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from parallel.tensor_layers import Split, copied
from parallel.vocabulary import IGNORED, logit_gradients, token_losses
from relora.errors import ConfigError
from relora.targets import output_embedding

_LOGITS = 1 << 25
"""Logits at a time: enough rows for a product to be fast, with about 0.5 GB of temporaries."""


class OutputLoss(str, Enum):
    """How a language model's loss is computed."""

    plain = "plain"
    """From the logits of all tokens."""
    chunked = "chunked"
    """From the logits of some tokens at a time."""
    liger = "liger"
    """By Liger's fused kernel; wants a GPU and the package."""
    auto = "auto"
    """liger where it can be, else chunked."""


def take_output_loss_(model: nn.Module, wanted: OutputLoss, device: torch.device) -> OutputLoss:
    """Let the output layer return the loss while labels are at hand; returns what was taken.

    Raises: ConfigError when the model has no output layer over a vocabulary, or cannot have this loss.
    """
    if wanted is OutputLoss.plain:
        return wanted
    head = output_embedding(model)
    if not (isinstance(head, nn.Linear) and head.weight.ndim == 2):
        kind = "none" if head is None else type(head).__name__
        raise ConfigError(
            f"training.loss={wanted.value} needs a language model with a plain linear output layer, and this one's is "
            f"{kind}: leave it at plain"
        )
    taken = _possible(wanted, head, device)
    own: Any = head  # nn.Module knows no such attributes
    plain = own.forward

    def forward(x: Tensor) -> Any:
        if own.labels is None:
            return plain(x)
        loss = own.made = loss_by(taken, x.flatten(0, -2), own, own.labels)
        return loss

    own.labels = own.made = None
    own.forward = forward
    return taken


def gives_loss(model: nn.Module) -> bool:
    """Whether the model's output layer can return the loss."""
    return hasattr(output_embedding(model), "labels")


@contextmanager
def labels_at_hand(model: nn.Module, labels: Tensor) -> Iterator[None]:
    """Within it the model's logits are the summed loss of predicting each next label. Shapes: (B, T)."""
    head: Any = output_embedding(model)
    head.labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    try:
        yield
    finally:
        head.labels = head.made = None


def loss_in(model: nn.Module, output: Any) -> Tensor:
    """The loss that a model returned as its logits.

    Raises: ConfigError when the model computes with what its output layer returns.
    """
    head: Any = output_embedding(model)
    # Its memory tells: ZeRO-3 wraps what a module returns, and gives it on as another tensor.
    if output.logits.untyped_storage()._cdata != head.made.untyped_storage()._cdata:
        raise ConfigError(
            f"training.loss must be plain for {type(model).__name__}, which changes logits after its output layer"
        )
    loss: Tensor = output.logits
    return loss


def _possible(wanted: OutputLoss, head: nn.Linear, device: torch.device) -> OutputLoss:
    installed = importlib.util.find_spec("liger_kernel") is not None
    obstacles = {
        "parallel.tensor=1, since its kernel wants all of the vocabulary": isinstance(head, Split),
        "a GPU": device.type != "cuda",
        "the package liger-kernel (pip install 'accrete[liger]')": not installed,
    }
    needed = [what for what, stands in obstacles.items() if stands]
    if wanted is OutputLoss.liger and needed:
        raise ConfigError(f"training.loss=liger needs {needed[0]}: choose chunked, which needs nothing")
    return OutputLoss.chunked if needed or wanted is OutputLoss.chunked else OutputLoss.liger


def loss_by(taken: OutputLoss, x: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """The summed cross-entropy of hidden states under an output layer, by `chunked` or `liger`.

    Shapes: (positions, features), (positions).
    """
    loss: Tensor
    if taken is OutputLoss.liger:
        fused = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
        return fused(  # type: ignore[no-any-return]
            x, head.weight, labels, bias=head.bias, ignore_index=IGNORED, reduction="sum", accum_dtype=torch.float32
        )
    split = head if isinstance(head, Split) else None
    if split is not None:
        x = copied(x, split.axis)
    loss = _ChunkedCrossEntropy.apply(x, head.weight, head.bias, labels, split, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return loss


class _ChunkedCrossEntropy(Function):
    """L = sum over tokens of lse(x W' + b) - (x W' + b)[label]; its gradient of the logits is softmax - one-hot."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, split: Split | None, learns: bool
    ) -> Tensor:
        for_x, for_weight, for_bias = (learns and needed for needed in ctx.needs_input_grad[:3])
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        of_x = torch.empty_like(x) if for_x else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if for_bias and bias is not None else None
        rows = max(1, _LOGITS // len(weight))
        for first in range(0, len(x), rows):
            part = slice(first, first + rows)
            logits = F.linear(x[part], weight, bias)
            losses, *found = token_losses(logits, labels[part], split)
            total += losses.sum()
            if not (for_x or for_weight or for_bias):
                continue
            gradient = logit_gradients(logits, *found).to(logits.dtype)
            if of_x is not None:
                torch.mm(gradient, weight, out=of_x[part])
            if of_weight is not None:
                _add_product_(of_weight, gradient.t(), x[part])
            if of_bias is not None:
                of_bias += gradient.sum(0)
        ctx.save_for_backward(of_x, of_weight, of_bias)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if one is None else (one * gradient).to(dtype) for one, dtype in found), None, None, None


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product to an fp32 sum."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
