"""MPI as the carrier between heads, for clusters whose fast path is MPI: the same bytes as over torch.distributed.

What lies on a GPU goes through host memory, so that any MPI library will do.
"""

import torch
from torch import Tensor

from parallel.mpi import library_of, mpi_world
from parallel.runtime import Runtime
from relora.errors import ConfigError

_WAY_OUT = "or choose lte.transport=torch, which needs no MPI"


class MpiCarrier:
    """mpi4py, over a communicator of this process's counterparts.

    Collectives: making one, by all processes.
    """

    def __init__(self, runtime: Runtime) -> None:
        """Join the counterparts.

        Raises:
            ConfigError: mpi4py or an MPI library is missing, or MPI's processes are not the run's.
        """
        mpi, world = mpi_world("lte.transport=mpi", _WAY_OUT)
        if (world.Get_rank(), world.Get_size()) != (runtime.process_rank, runtime.world_size):
            raise ConfigError(
                f"lte.transport=mpi needs a run that MPI has started, but MPI ({library_of(mpi)}) takes this process "
                f"for {world.Get_rank()} of {world.Get_size()}, and the run for {runtime.process_rank} of "
                f"{runtime.world_size}: start it by that library's mpirun, or by srun --mpi=..., {_WAY_OUT}"
            )
        self._group = world.Split(runtime.head.ranks[0], runtime.head.index)
        self._size = runtime.head.size
        self._threads = mpi.Query_thread() == mpi.THREAD_MULTIPLE

    def all_gather(self, flat: Tensor) -> Tensor:
        """All counterparts' bytes, in order. Shapes: (bytes,), to (counterparts, bytes)."""
        told = torch.empty(self._size, flat.numel(), dtype=torch.uint8)
        self._group.Allgather(flat.cpu().contiguous().numpy(), told.numpy())
        return told.to(flat.device)

    def all_to_all(self, rows: Tensor) -> Tensor:
        """Send row i to counterpart i; what each sent here, in order. Shapes: (counterparts, bytes), both."""
        received = torch.empty(rows.shape, dtype=torch.uint8)
        self._group.Alltoall(rows.cpu().contiguous().numpy(), received.numpy())
        return received.to(rows.device)

    def check_thread(self) -> None:
        """Refuse an MPI library that the main thread alone may call.

        Raises:
            ConfigError: it is one.
        """
        if not self._threads:
            raise ConfigError(
                "lte.delay needs MPI calls from a second thread, which this MPI library does not allow "
                "(MPI_THREAD_MULTIPLE; unset MPI4PY_RC_THREAD_LEVEL and MPI4PY_RC_THREADS if you have set them): "
                f"choose lte.delay=0, {_WAY_OUT}"
            )
