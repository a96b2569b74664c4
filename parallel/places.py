"""Where DeepSpeed keeps one parameter: the flat range of it that this process holds, and the tensors it lies in.

Each ZeRO stage has its own bookkeeping, and this is the only module that reads it. Stage 0 in fp32 has none;
bf16, stage 1 and stage 2 optimize a flat fp32 partition of each parameter group; stage 3 cuts every parameter,
frozen ones too, into equal flat pieces.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from relora.coded_moments import Coded, CodedPart


@dataclass(slots=True, frozen=True)
class Place:
    """The range of a parameter that this process optimizes."""

    owner: Tensor
    """The tensor that the optimizer holds: the parameter itself, or a flat partition of its group."""
    offset: int
    """Where the range begins in `owner`."""
    start: int
    """Where it begins in the flattened parameter."""
    count: int
    """Its length; 0 when this process holds nothing of the parameter."""

    def of(self, tensor: Tensor) -> Tensor:
        """The range in a tensor of the owner's layout, flat."""
        return tensor.view(-1).narrow(0, self.offset, self.count)

    def of_moment(self, moment: Tensor | Coded) -> Tensor | CodedPart:
        """The range in one of Adam's moments."""
        return moment.part(self.offset, self.count) if isinstance(moment, Coded) else self.of(moment)


def trainable_places(optimizer: torch.optim.Optimizer, zero: Any, groups: Sequence[Sequence[nn.Parameter]]) -> Any:
    """Every trainable parameter's place.

    Args:
        optimizer: torch's, with the state.
        zero: DeepSpeed's optimizer around it; the same object when there is none.
        groups: the parameters of each group, as they were before DeepSpeed replaced them.
    """
    places: dict[nn.Parameter, Place] = {}
    for index, members in enumerate(groups):
        for parameter in members:
            if zero is optimizer:
                places[parameter] = Place(parameter, 0, 0, parameter.numel())
            elif is_partitioned(parameter):
                places[parameter] = _stage_three(zero, parameter)
            else:
                places[parameter] = _flat(optimizer.param_groups[index]["params"][0], parameter)
    return places


def is_partitioned(parameter: Tensor) -> bool:
    """Whether stage 3 has cut a parameter into pieces."""
    return hasattr(parameter, "ds_id")


def piece(parameter: Any) -> Tensor:
    """This process's flat piece of a parameter of stage 3, without padding."""
    _, count = piece_range(parameter)
    flat: Tensor = parameter.ds_tensor.data.view(-1)
    return flat.narrow(0, 0, count)


def piece_range(parameter: Any) -> tuple[int, int]:
    """Start and length of that piece in the flattened parameter."""
    size = int(parameter.ds_tensor.ds_numel)
    start = min(size * int(parameter.ds_zero_partition_rank), int(parameter.ds_numel))
    return start, min(size, int(parameter.ds_numel) - start)


def drop_whole(parameters: Iterable[Any]) -> None:
    """Let go of the whole copies that stage 3 keeps of small parameters, so that their pieces may be edited.

    The next forward pass gathers them anew.
    """
    for parameter in parameters:
        if parameter.ds_status.name == "AVAILABLE":
            parameter.partition()


def state_of(optimizer: torch.optim.Optimizer, owner: Tensor) -> Mapping[str, Any] | None:
    """Adam's state of an owner, or None before the first update."""
    return optimizer.state.get(owner) or None  # indexing would make an empty state


def _flat(partition: Tensor, parameter: Any) -> Place:
    mapping = parameter._hp_mapping
    if mapping is None:  # the group's partition of this process has nothing of it
        return Place(partition, 0, 0, 0)
    master, live = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
    return Place(partition, master.start, live.start, master.numel)


def _stage_three(zero: Any, parameter: Any) -> Place:
    group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
    start, count = piece_range(parameter)
    return Place(zero.fp32_partitioned_groups_flat[group], offset, start, count)
