"""What a joining head needs of the others' state, on its way through the meeting point: files of frames."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parallel.frames import packed

_CHUNK = 1 << 20


class StateSpool:
    """Frames of a state by sync and position, in the order in which they came."""

    def __init__(self, folder: Path) -> None:
        """Nothing that an earlier meeting point left in the folder is of use."""
        self._folder = folder
        self._finished: dict[int, set[int]] = defaultdict(set)
        for path in folder.glob("state_*"):
            path.unlink()

    def add(self, sync: int, position: int, header: dict[str, Any], payload: bytearray) -> None:
        """Keep a frame."""
        with self._path(sync, position).open("ab") as file:
            file.write(packed(header, len(payload)))
            file.write(payload)

    def begin(self, sync: int, position: int) -> None:
        """Forget what a broken connection had brought."""
        self._finished[sync].discard(position)
        self._path(sync, position).unlink(missing_ok=True)

    def finish(self, sync: int, position: int) -> int:
        """A position's state is complete; returns how many are."""
        self._finished[sync].add(position)
        return len(self._finished[sync])

    def frames(self, sync: int, position: int) -> Iterator[bytes]:
        """The same bytes, piece by piece."""
        with self._path(sync, position).open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk

    def keep_only(self, syncs: set[int]) -> None:
        """Remove all others."""
        for path in self._folder.glob("state_*"):
            if int(path.name.split("_")[1]) not in syncs:
                path.unlink()

    def _path(self, sync: int, position: int) -> Path:
        return self._folder / f"state_{sync}_{position}"
