"""JSON Lines: one record per line, appended whole, so that a run can be read while it is being written.

A process that dies may leave a torn last line; readers pass over it, and `truncate_records` takes it away
together with whatever a resumed run is about to do again.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from relora.errors import ConfigError

Record = dict[str, Any]


def append_records(path: Path, *records: Record) -> None:
    """Append the records in one write; numbers that are not finite become null: JSON has no word for them."""
    lines = "".join(_encode(record) for record in records)
    with path.open("a", encoding="ascii") as file:
        file.write(lines)


def read_records(path: Path) -> list[Record]:
    """All records of the file, without a torn last line.

    Raises: ConfigError for a line that is damaged and not the last.
    """
    return [record for _, record in _lines(path)]


def truncate_records(path: Path, step: int) -> int:
    """Drop the records whose `step` lies after the given one, and a torn last line; return how many went.

    The file is replaced in one move. A missing file counts as empty.
    """
    if not path.exists():
        return 0
    before = _lines(path)
    kept = [line for line, record in before if record.get("step", step) <= step]
    aside = path.with_name(path.name + ".partial")
    with aside.open("wb") as file:
        file.writelines(line + b"\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    return len(before) - len(kept)


def _lines(path: Path) -> list[tuple[bytes, Record]]:
    lines = path.read_bytes().split(b"\n")
    found: list[tuple[bytes, Record]] = []
    for number, line in enumerate(lines, start=1):
        record = decode(line)
        if record is not None:
            found.append((line, record))
        elif line.strip() and any(rest.strip() for rest in lines[number:]):
            raise ConfigError(
                f"{path}, line {number} is not a JSON object: {line[:80]!r}; only the last line may be torn. "
                "Take the line out, or restore the file from a copy"
            )
    return found


def decode(line: bytes) -> Record | None:
    """The record of a line; None if it is torn."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _encode(record: Record) -> str:
    try:
        return json.dumps(record, allow_nan=False) + "\n"
    except ValueError:
        return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
