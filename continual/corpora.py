"""Sources that were found: how each kind is fingerprinted and cut into units of work.

A fingerprint decides whether prepared tokens can be used again, so it must be quick: the content of small
data, sizes and times of large data, and the name of a data set on the Hub, which may be out of reach.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Protocol

from continual import documents
from continual.documents import PIECE_BYTES, UNIT_BYTES, Unit
from continual.embedded import python_reference

SMALL_BYTES = 64 << 20
SAVED_ROWS = 10_000
LINES = (".jsonl", ".ndjson", ".json")
COMPRESSED_LINES = (".jsonl.gz", ".ndjson.gz", ".json.gz")
PARQUET = (".parquet",)


class Corpus(Protocol):
    """A source that was found."""

    @property
    def label(self) -> str:
        """The name in tables and messages."""

    def fingerprint(self) -> str:
        """A digest that changes when the text does."""

    def units(self, text_field: str) -> Sequence[Unit]:
        """The units of work, in order.

        Raises: UnreadableError.
        """


@dataclass(frozen=True, slots=True)
class Files:
    """Files in the order of their names below `base`."""

    label: str
    base: Path
    paths: list[Path]

    def fingerprint(self) -> str:
        """Names, sizes and content; above 64 MiB in all, times of change instead of content."""
        found = [(path, path.stat()) for path in self.paths]
        small = sum(stat.st_size for _, stat in found) <= SMALL_BYTES
        digest = blake2b(digest_size=16)
        for path, stat in found:
            name = path.relative_to(self.base).as_posix()
            digest.update(repr((name, stat.st_size, None if small else stat.st_mtime_ns)).encode())
            if small:
                digest.update(path.read_bytes())
        return digest.hexdigest()

    def units(self, text_field: str) -> list[Unit]:
        """Neighbouring short texts together; long texts and records in ranges."""
        units: list[Unit] = []
        short: list[Path] = []
        size = 0
        for path in self.paths:
            path_size = path.stat().st_size
            alone = is_records(path) or path_size >= 2 * PIECE_BYTES
            if short and (alone or size + path_size > UNIT_BYTES):
                units.append(documents.TextFiles(short, size))
                short, size = [], 0
            if alone:
                units += _units_of(path, path_size, text_field)
            else:
                short.append(path)
                size += path_size
        return [*units, documents.TextFiles(short, size)] if short else units


@dataclass(frozen=True, slots=True)
class Reference:
    """The embedded corpus `python_reference`."""

    label: str

    def fingerprint(self) -> str:
        """The content."""
        return blake2b("\0".join(python_reference()).encode(), digest_size=16).hexdigest()

    def units(self, text_field: str) -> list[Unit]:
        """One."""
        return [documents.ReferenceTopics()]


@dataclass(frozen=True, slots=True)
class Saved:
    """A data set that Hugging Face's `save_to_disk` wrote."""

    label: str
    folder: Path

    def fingerprint(self) -> str:
        """As of files."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return Files(self.label, self.folder, paths).fingerprint()

    def units(self, text_field: str) -> list[Unit]:
        """Ranges of rows."""
        saved = import_module("datasets").load_from_disk(str(self.folder))
        rows, row_bytes = len(saved), saved.data.nbytes // max(1, len(saved))
        return [
            documents.SavedRows(self.folder, start, stop, (stop - start) * row_bytes, text_field)
            for start in range(0, rows, SAVED_ROWS)
            for stop in [min(start + SAVED_ROWS, rows)]
        ]


@dataclass(frozen=True, slots=True)
class Hub:
    """A data set on the Hugging Face Hub."""

    label: str
    path: str
    name: str | None
    split: str
    revision: str | None

    def fingerprint(self) -> str:
        """The names alone: a machine without network must find what another has prepared."""
        names = repr((self.path, self.name, self.split, self.revision))
        return blake2b(names.encode(), digest_size=16).hexdigest()

    def units(self, text_field: str) -> list[Unit]:
        """Its shards."""
        shards = documents.stream_from_hub(self.path, self.name, self.split, self.revision).num_shards
        return [
            documents.HubShard(self.path, self.name, self.split, self.revision, shard, shards, text_field)
            for shard in range(shards)
        ]


def documents_of(corpus: Corpus, text_field: str) -> Iterator[str]:
    """All documents, in order; nothing is opened before the first is asked for."""
    for unit in corpus.units(text_field):
        yield from unit.documents()


def is_records(path: Path) -> bool:
    """Whether a file holds records with fields, told by its name."""
    return path.name.endswith((*LINES, *COMPRESSED_LINES, *PARQUET))


def _units_of(path: Path, size: int, text_field: str) -> list[Unit]:
    if path.name.endswith(COMPRESSED_LINES):
        return [documents.CompressedJsonLines(path, size, text_field)]
    if path.name.endswith(LINES):
        return [
            documents.JsonLines(path, start, min(start + UNIT_BYTES, size), text_field)
            for start in range(0, size, UNIT_BYTES)
        ]
    if path.name.endswith(PARQUET):
        return [
            documents.RowGroup(path, number, bytes_read, text_field)
            for number, bytes_read in enumerate(documents.row_groups(path))
        ]
    pieces, step = size // PIECE_BYTES, UNIT_BYTES // PIECE_BYTES
    return [documents.TextPieces(path, first, min(first + step, pieces), pieces) for first in range(0, pieces, step)]
