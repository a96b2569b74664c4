"""Where processes meet when only MPI knows: the main process picks a port, and MPI tells the others.

MPI is asked only under mpirun, so that machines without an MPI library lack nothing.
"""

import dataclasses
import socket

from parallel.launchers import Announcement
from parallel.mpi import library_of, mpi_world
from relora.errors import ConfigError

_WAY_OUT = "or set MASTER_ADDR (the first machine) and MASTER_PORT, which make MPI unnecessary"


def with_address(found: Announcement) -> Announcement:
    """The announcement with the address that all processes meet at. Collectives: one MPI broadcast under mpirun.

    Raises:
        ConfigError: mpi4py or an MPI library is missing, or it belongs to another MPI than mpirun.
    """
    if found.world_size == 1 or found.address is not None:
        return found
    mpi, world = mpi_world(found.launcher, _WAY_OUT)
    if (world.Get_rank(), world.Get_size()) != (found.process_rank, found.world_size):
        raise ConfigError(
            f"{found.launcher} started {found.world_size} processes, but mpi4py sees {world.Get_size()}: it uses "
            f"{library_of(mpi)}, which is not this launcher's MPI. Use that library's mpirun, or install mpi4py "
            f"against this one (MPICC=mpicc pip install --no-binary mpi4py mpi4py), {_WAY_OUT}"
        )
    one_machine = world.Split_type(mpi.COMM_TYPE_SHARED).Get_size() == found.world_size
    address = "127.0.0.1" if one_machine else _address()
    address, port = world.bcast((address, _free_port()))
    return dataclasses.replace(found, address=address, port=port)


def _address() -> str:
    """This machine as others reach it: the address of its name, or the name itself."""
    name = socket.gethostname()
    try:
        addresses = [str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    except socket.gaierror as error:
        raise ConfigError(f"this machine's name {name!r} has no address ({error}): mend that, {_WAY_OUT}") from error
    # Debian's /etc/hosts gives a machine's own name a loopback address, which others cannot use: they ask by name.
    return name if any(address.startswith("127.") for address in addresses) else addresses[0]


def _free_port() -> int:
    with socket.create_server(("", 0)) as probe:
        return int(probe.getsockname()[1])
