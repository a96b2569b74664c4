"""Records of JSON files: a list of objects, or an object per line, each with the place it stands at."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from relora.errors import ConfigError

LINES = (".jsonl", ".ndjson")
ENDINGS = (".json", *LINES)


def split_file(folder: Path, names: Sequence[str], key: str, *, required: bool = True) -> Path | None:
    """The first of some splits that a folder has a file of.

    Raises: ConfigError when one is required and there is none.
    """
    for name in names:
        for ending in ENDINGS:
            if (path := folder / f"{name}{ending}").is_file():
                return path
    if required:
        raise ConfigError(f"{key}: the folder {folder} has no {' or '.join(names)} file ({', '.join(ENDINGS)})")
    return None


def read_records(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place and the fields of each record; places count from 1.

    Raises: ConfigError
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: {path} cannot be read as text ({error})") from error
    found = False
    for place, value in _values(path, text, key):
        if not isinstance(value, dict):
            raise ConfigError(f"{key}: {place} must be an object with fields, got {str(value)[:60]!r}")
        found = True
        yield place, value
    if not found:
        raise ConfigError(f"{key}: {path} holds no records")


def _values(path: Path, text: str, key: str) -> Iterator[tuple[str, Any]]:
    if path.suffix not in LINES and text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{key}: {path} is not valid JSON ({error})") from error
        yield from ((f"item {number} of {path}", value) for number, value in enumerate(values, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"line {number} of {path}"
            try:
                yield place, json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{key}: {place} is not valid JSON ({error})") from error
