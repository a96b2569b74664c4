"""Folders that appear whole or not at all, and one process at a time to make them."""

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def new_folder(final: Path, *, within: Path) -> Iterator[Path]:
    """A private folder that becomes `final` when the block ends well; who comes second gives way."""
    private = private_name(within / final.name)
    shutil.rmtree(private, ignore_errors=True)
    private.mkdir(parents=True)
    try:
        yield private
        try:
            private.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(private, ignore_errors=True)


def private_name(path: Path) -> Path:
    """A name next to `path` that no other process uses."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}")


@contextmanager
def only_one(lock: Path) -> Iterator[None]:
    """Wait for other processes in the same block.

    On a file system without locks all go ahead; what they make must be equal and appear at once.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
