"""mpi4py, imported only where it is needed: importing it starts MPI."""

from typing import Any

from relora.errors import ConfigError


def mpi_world(needed_by: str, way_out: str) -> tuple[Any, Any]:
    """The module mpi4py.MPI and its communicator of all processes.

    Args:
        needed_by: what asked for it, as a message begins.
        way_out: what else can be done, as a message ends.

    Raises:
        ConfigError: mpi4py or an MPI library is missing.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py found no MPI library to load
        raise ConfigError(
            f"{needed_by} needs mpi4py and its MPI library ({error}): install mpi4py (pip install mpi4py; with conda "
            f"or modules, the one of the same MPI), {way_out}"
        ) from error
    return MPI, MPI.COMM_WORLD


def library_of(mpi: Any) -> str:
    """Name and version of the MPI library."""
    return str(mpi.Get_library_version()).split("\n", maxsplit=1)[0].strip()
