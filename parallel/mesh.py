"""The mesh of processes: (head, data, tensor) degrees to ranks and groups. Pure arithmetic.

Tensor parallelism is innermost, so that its many small exchanges stay between neighbours (the GPUs of one node);
heads are outermost, since they talk least. Where the processes come from: parallel/runtime.py.
"""

from dataclasses import dataclass

from relora.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Place:
    """Where one process stands on the mesh."""

    head: int
    data: int
    tensor: int


@dataclass(frozen=True, slots=True)
class Mesh:
    """Number of processes along each axis."""

    heads: int = 1
    """Blocks of data x tensor processes, each of one LTE head, or one process that hosts several."""
    data: int = 1
    """Processes of a head that train on different sequences, and that ZeRO partitions over."""
    tensor: int = 1
    """Processes that hold the parts of one model."""

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.heads * self.data * self.tensor

    def place(self, process_rank: int) -> Place:
        """Coordinates of a process."""
        rest, tensor = divmod(process_rank, self.tensor)
        head, data = divmod(rest, self.data)
        return Place(head, data, tensor)

    def rank(self, place: Place) -> int:
        """The process at some coordinates."""
        return (place.head * self.data + place.data) * self.tensor + place.tensor

    def groups(self, *axes: str) -> list[list[int]]:
        """Processes that differ along `axes` only, one list for each combination of the other coordinates."""
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            place = self.place(rank)
            fixed = tuple(getattr(place, axis) for axis in ("head", "data", "tensor") if axis not in axes)
            members.setdefault(fixed, []).append(rank)
        return list(members.values())


def mesh_of(world_size: int, *, tensor: int, heads: int = 1) -> Mesh:
    """The mesh of a number of processes; what heads and tensor parallelism leave over is the data axis.

    With fewer processes than heads, each hosts as many heads as the others.

    Raises:
        ConfigError: the degrees do not divide the number of processes.
    """
    if tensor == 1 and world_size < heads:
        if heads % world_size:
            raise ConfigError(
                f"lte.heads={heads} cannot be spread evenly over {world_size} processes: start a number that divides "
                f"it, or a multiple of {heads}"
            )
        return Mesh(heads=world_size)
    if world_size % (heads * tensor):
        needed = f"parallel.tensor={tensor}" if heads == 1 else f"lte.heads={heads} x parallel.tensor={tensor}"
        raise ConfigError(
            f"{needed} must divide the number of processes, got {world_size}: start a multiple of {heads * tensor} "
            "processes, or lower it"
        )
    return Mesh(heads=heads, data=world_size // (heads * tensor), tensor=tensor)
