"""One parameter's fp32 master and Adam state, wherever the engine keeps them.

The engine either optimizes a parameter itself (fp32) or a flat fp32 copy of its whole group (bf16), in which
each parameter owns a range. `Shards` finds that range, so that restarts and checkpoints address parameters by
identity and never see the difference.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from relora.optimizer import Moments


@dataclass(slots=True, frozen=True)
class _Place:
    """The tensor that the optimizer holds, and the range of it that belongs to one parameter."""

    owner: Tensor
    start: int
    count: int

    def of(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        return tensor.view(-1).narrow(0, self.start, self.count).view(shape)


class Shards:
    """Access to masters and moments of an engine's trainable parameters.

    Implements `relora.restart.ParameterStore`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        self._optimizer = optimizer
        held = {id(tensor): tensor for group in optimizer.param_groups for tensor in group["params"]}
        self._places = {parameter: self._place(parameter, held) for parameter in parameters}

    def _place(self, parameter: nn.Parameter, held: dict[int, Tensor]) -> _Place:
        if id(parameter) in held:
            return _Place(parameter, 0, parameter.numel())
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        assert mapping is not None, "a trainable parameter that the engine does not optimize"
        address = mapping.get_hp_fragment_address()
        flat = self._optimizer.param_groups[mapping.param_group_index]["params"][0]
        return _Place(flat, address.start, address.numel)

    def has_master(self, parameter: nn.Parameter) -> bool:
        """Whether an fp32 copy exists beside the parameter that the forward pass uses."""
        return self._places[parameter].owner is not parameter

    def master(self, parameter: nn.Parameter) -> Tensor:
        """The fp32 values that the optimizer updates. Shapes: the parameter's."""
        place = self._places[parameter]
        return place.of(place.owner.detach(), parameter.shape)

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set the master and the copy that the next forward pass uses."""
        self.master(parameter).copy_(value)
        if self.has_master(parameter):
            parameter.data.copy_(value)

    def moments(self, parameter: nn.Parameter) -> Moments | None:
        """Live views of the parameter's Adam state, or None before the first update."""
        place = self._places[parameter]
        state = self._optimizer.state.get(place.owner)
        if not state:
            return None
        return Moments(
            exp_avg=place.of(state["exp_avg"], parameter.shape),
            exp_avg_sq=place.of(state["exp_avg_sq"], parameter.shape),
            step=state["step"],
        )

    @torch.no_grad()
    def write_moments(self, parameter: nn.Parameter, moments: Moments) -> None:
        """Set the parameter's Adam state, making the optimizer's where there is none yet."""
        owner = self._places[parameter].owner
        if not self._optimizer.state.get(owner):
            self._optimizer.state[owner] = {
                "step": torch.zeros_like(moments.step, device=owner.device),
                "exp_avg": torch.zeros_like(owner, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(owner, memory_format=torch.preserve_format),
            }
        live = self.moments(parameter)
        assert live is not None
        live.exp_avg.copy_(moments.exp_avg)
        live.exp_avg_sq.copy_(moments.exp_avg_sq)
        live.step.copy_(moments.step)
