"""What one microbatch takes: bytes of activations, FLOPs, bytes sent between parts of the model.

It is run and watched, on the meta device (launch/planning/weightless.py) or any other, so that the figures hold for
every architecture without a formula for it.
"""

import weakref
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from continual.batches import Batch
from launch.models.model import model_class
from launch.planning.flops import operation_flops
from launch.training.objective import summed_loss
from parallel.pretence import counted_collectives
from relora.merged import formed_weights


@dataclass(kw_only=True, slots=True, frozen=True)
class Microbatch:
    """One forward and backward in one process."""

    saved: int
    """Bytes that the forward pass leaves for the backward pass, without the logits; with the formed weights."""
    at_loss: int
    """Most bytes until the gradient of the logits is there, `saved` among them."""
    in_backward: int
    """Most bytes from then on: activations, and gradients on their way; those that stay are not in it."""
    forward_flops: int
    backward_flops: int
    """Recomputation included."""
    forming_flops: int = 0
    """Of merged layers' weights, which all microbatches of an update share."""
    all_reduced: int = 0
    """Bytes that are summed over the tensor axis."""
    gathered: int = 0
    """Bytes of this process that all of the tensor axis get."""

    def update_flops(self, microbatches: int) -> int:
        """FLOPs of an update of so many microbatches."""
        return microbatches * (self.forward_flops + self.backward_flops) + self.forming_flops

    def deeper(self, other: "Microbatch", blocks: int) -> "Microbatch":
        """With `blocks` further blocks, of which `other` has one."""
        mine, theirs = asdict(self), asdict(other)
        return Microbatch(**{key: value + blocks * (theirs[key] - value) for key, value in mine.items()})


class Ledger(TorchDispatchMode):
    """Counts FLOPs, and the bytes of all tensors that operations have made and that are still alive."""

    def __init__(self, known: list[Tensor]) -> None:
        """`known` tensors do not count."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.flops = 0
        self._seen: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and take note of what it made."""
        result = func(*args, **(kwargs or {}))
        self.flops += operation_flops(func, args, kwargs or {}, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _note(self, storage: Any) -> None:
        if storage not in self._seen:
            size = storage.nbytes()
            self._seen[storage] = True
            self.now += size
            weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size


def run_microbatch(model: nn.Module, *, sequences: int, length: int, packed: bool = False) -> Microbatch:
    """Run a model in training mode forward and backward; its gradients are dropped one by one.

    Args:
        packed: whether sequences are several documents each.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    removed = [parameter.register_post_accumulate_grad_hook(_drop_gradient) for parameter in parameters]
    device = parameters[0].device
    batch = _example(model, sequences, length, packed).to(device)
    marks: dict[str, int] = {}
    here = [*model.parameters(), *model.buffers(), *batch.inputs.values()]
    with counted_collectives() as tally, Ledger(here) as ledger, formed_weights(model, seed=0, step=0):
        forming_flops = ledger.flops

        def turn(gradient: Tensor) -> None:
            marks["at_loss"], ledger.peak = ledger.peak, ledger.now

        def run(**named: Any) -> Any:
            output = model(**named)
            marks["saved"] = ledger.now - output.logits.untyped_storage().nbytes()
            output.logits.register_hook(turn)
            return output

        loss = summed_loss(model, batch, device, run)
        forward_flops = ledger.flops - forming_flops
        torch.autograd.backward(loss)
    for hook in removed:
        hook.remove()
    return Microbatch(
        saved=marks["saved"],
        at_loss=marks["at_loss"],
        in_backward=ledger.peak,
        forward_flops=forward_flops,
        backward_flops=ledger.flops - forward_flops - forming_flops,
        forming_flops=forming_flops,
        all_reduced=tally.all_reduced,
        gathered=tally.gathered,
    )


def _example(model: Any, sequences: int, length: int, packed: bool) -> Batch:
    """A batch of a model's own kind, of zeros; where the model has no memory, neither has the batch."""
    config = model.config
    ids = torch.zeros(sequences, length, dtype=torch.int64)
    if model_class(config) is AutoModelForCausalLM:
        return Batch(inputs={"input_ids": ids, "position_ids": ids} if packed else {"input_ids": ids}, labels=ids)
    if (size := getattr(config, "image_size", None)) is None:
        return Batch(inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels=ids[:, 0])
    images = torch.zeros(sequences, config.num_channels, size, size)
    return Batch(inputs={"pixel_values": images}, labels=ids[:, 0])


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
