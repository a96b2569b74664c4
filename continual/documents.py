"""Units of work: pieces of a source that yield its documents, in bounded memory and each on its own.

How a source is cut into units depends on the source alone, so the documents and their order are the same
whatever the number of processes. A unit is small and picklable; what it yields may be larger than memory.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from continual.embedded import python_reference

UNIT_BYTES = 8 << 20
PIECE_BYTES = 64 << 10
CUT_WINDOW_BYTES = 4 << 10


class UnreadableError(ValueError):
    """Text that cannot be read; names the file and the place in it."""


class Unit(Protocol):
    """A piece of a source."""

    @property
    def size(self) -> int:
        """Bytes to read, nearly; the measure of progress."""

    def documents(self) -> Iterator[str]:
        """The documents, in order.

        Raises: UnreadableError.
        """


@dataclass(frozen=True, slots=True)
class TextFiles:
    """Whole files; each is a document."""

    paths: list[Path]
    size: int

    def documents(self) -> Iterator[str]:
        """The text of each file."""
        for path in self.paths:
            yield _decoded(path.read_bytes(), path, 0)


@dataclass(frozen=True, slots=True)
class TextPieces:
    """Pieces `first` to `last` (exclusive) of a long file; each is a document of about PIECE_BYTES."""

    path: Path
    first: int
    last: int
    pieces: int

    @property
    def size(self) -> int:
        """Bytes, nearly."""
        return (self.last - self.first) * PIECE_BYTES

    def documents(self) -> Iterator[str]:
        """The text between neighbouring cuts."""
        with self.path.open("rb") as file:
            start = self._cut(file, self.first)
            for piece in range(self.first + 1, self.last + 1):
                stop = self._cut(file, piece)
                file.seek(start)
                yield _decoded(file.read(stop - start), self.path, start)
                start = stop

    def _cut(self, file: Any, piece: int) -> int:
        """Where a piece starts: after a line's end, else after a space, else at a character."""
        if piece in {0, self.pieces}:
            return 0 if piece == 0 else os.fstat(file.fileno()).st_size
        place = piece * PIECE_BYTES
        file.seek(place)
        window: bytes = file.read(CUT_WINDOW_BYTES)
        for separator in (b"\n", b" "):
            if (found := window.find(separator)) >= 0:
                return place + found + 1
        return place + next((i for i, byte in enumerate(window) if byte & 0xC0 != 0x80), 0)


@dataclass(frozen=True, slots=True)
class JsonLines:
    """The lines of a file that start in [start, stop)."""

    path: Path
    start: int
    stop: int
    text_field: str

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start

    def documents(self) -> Iterator[str]:
        """The text of each line."""
        with self.path.open("rb") as file:
            if self.start:
                file.seek(self.start - 1)
                file.readline()
            while (place := file.tell()) < self.stop and (line := file.readline()):
                try:
                    if line.strip():
                        yield _text_of_line(line, self.text_field)
                except UnreadableError as error:
                    raise UnreadableError(f"{self.path}, line {self._line_at(place)}: {error}") from None

    def _line_at(self, place: int) -> int:
        with self.path.open("rb") as file:
            return 1 + sum(file.read(min(UNIT_BYTES, place - at)).count(b"\n") for at in range(0, place, UNIT_BYTES))


@dataclass(frozen=True, slots=True)
class CompressedJsonLines:
    """A gzip file of JSON lines."""

    path: Path
    size: int
    text_field: str

    def documents(self) -> Iterator[str]:
        """The text of each line."""
        number = 1
        try:
            with gzip.open(self.path) as file:
                for line in file:
                    if line.strip():
                        yield _text_of_line(line, self.text_field)
                    number += 1
        except (UnreadableError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise UnreadableError(f"{self.path}, line {number}: {error}") from None


@dataclass(frozen=True, slots=True)
class RowGroup:
    """One row group of a Parquet file."""

    path: Path
    number: int
    size: int
    text_field: str

    def documents(self) -> Iterator[str]:
        """The text of each row."""
        with _parquet(self.path) as file:
            fields = file.schema_arrow.names
            if self.text_field not in fields:
                raise UnreadableError(f"{self.path}: {_no_field(self.text_field, fields)}")
            for rows in file.iter_batches(256, row_groups=[self.number], columns=[self.text_field]):
                for text in rows.column(0).to_pylist():
                    yield _checked(text, self.text_field, f"{self.path}, row group {self.number}: ")


@dataclass(frozen=True, slots=True)
class SavedRows:
    """Rows `start` to `stop` of a data set that Hugging Face's `save_to_disk` wrote."""

    folder: Path
    start: int
    stop: int
    size: int
    text_field: str

    def documents(self) -> Iterator[str]:
        """The text of each row."""
        rows = import_module("datasets").load_from_disk(str(self.folder))
        yield from _text_of_rows(
            (rows[index] for index in range(self.start, self.stop)), self.text_field, str(self.folder)
        )


@dataclass(frozen=True, slots=True)
class HubShard:
    """One shard of a data set on the Hugging Face Hub, streamed."""

    path: str
    name: str | None
    split: str
    revision: str | None
    shard: int
    shards: int
    text_field: str
    size: int = UNIT_BYTES
    """A guess; what comes over the network has no size beforehand."""

    def documents(self) -> Iterator[str]:
        """The text of each row."""
        rows = stream_from_hub(self.path, self.name, self.split, self.revision)
        shard = rows.shard(num_shards=self.shards, index=self.shard)
        yield from _text_of_rows(shard, self.text_field, f"{self.path}, shard {self.shard}")


@dataclass(frozen=True, slots=True)
class ReferenceTopics:
    """Python's language reference."""

    size: int = 1

    def documents(self) -> Iterator[str]:
        """The text of each topic."""
        yield from python_reference()


def stream_from_hub(path: str, name: str | None, split: str, revision: str | None) -> Any:
    """The data set, opened for reading from its beginning.

    Raises: UnreadableError when it does not exist or cannot be reached.
    """
    datasets = import_module("datasets")
    try:
        return datasets.load_dataset(path, name=name, split=split, revision=revision, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UnreadableError(
            f"{path} is no embedded corpus, file or folder, and the Hugging Face Hub gave no such data set "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'})"
        ) from error


def row_groups(path: Path) -> list[int]:
    """The bytes in each row group of a Parquet file.

    Raises: UnreadableError.
    """
    with _parquet(path) as file:
        return [file.metadata.row_group(number).total_byte_size for number in range(file.num_row_groups)]


def _parquet(path: Path) -> Any:
    try:
        return import_module("pyarrow.parquet").ParquetFile(path)
    except import_module("pyarrow").ArrowInvalid as error:
        raise UnreadableError(f"{path} is not a Parquet file: {error}") from None


def _text_of_line(line: bytes, text_field: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:  # broken JSON, or bytes that are not UTF-8
        raise UnreadableError(f"not valid JSON ({error}); JSON Lines holds one object per line") from None
    if not isinstance(record, dict):
        raise UnreadableError("a line must hold a JSON object such as {" + f'"{text_field}": "..."' + "}")
    if text_field not in record:
        raise UnreadableError(_no_field(text_field, record))
    return _checked(record[text_field], text_field, "")


def _text_of_rows(rows: Iterable[dict[str, Any]], text_field: str, where: str) -> Iterator[str]:
    for row in rows:
        if text_field not in row:
            raise UnreadableError(f"{where}: {_no_field(text_field, row)}")
        yield _checked(row[text_field], text_field, f"{where}: ")


def _no_field(text_field: str, fields: Iterable[str]) -> str:
    return f"has no field {text_field!r}; set data.text_field to one of: {', '.join(map(str, fields))}"


def _checked(text: Any, text_field: str, where: str) -> str:
    if not isinstance(text, str):
        raise UnreadableError(f"{where}field {text_field!r} must hold text, got {type(text).__name__}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UnreadableError(f"{where}field {text_field!r} holds half a surrogate pair ({error})") from None
    return text


def _decoded(content: bytes, path: Path, start: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UnreadableError(
            f"{path} is not UTF-8 text (byte {start + error.start}); name the text files by a pattern, "
            "such as 'folder/**/*.txt', or convert the file"
        ) from None
