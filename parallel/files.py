"""Files that appear whole or not at all, survive a power cut, and have the permissions that the user asked for."""

import errno
import hashlib
import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file so that a reader sees the old or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The checksum of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def usual_mode() -> int:
    """The permissions that the user's umask gives to new files; asking is safe while no other thread makes one."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def share(folder: Path) -> None:
    """Give a folder's files the usual permissions; safetensors writes them private."""
    mode = usual_mode()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def is_disk_error(error: BaseException) -> bool:
    """Whether an error says that the disk is full, over quota or read-only.

    safetensors wraps the operating system's error in its own, so its text is looked at, too.
    """
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
    if isinstance(error, OSError) and error.errno in numbers:
        return True
    return any(f"os error {number}" in str(error) for number in numbers)
