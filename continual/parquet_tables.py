"""Parquet files of labelled sets: which of a folder are to train on, what is in them, and what labels are called."""

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from relora.errors import ConfigError

TEST = ("test", "val", "validation")
"""How names of files and folders to measure on begin, the preferred ones first."""


def split_tables(path: Path, key: str) -> tuple[list[Path], list[Path]]:
    """The files to train on and those to measure on, told apart by their names.

    Raises: ConfigError
    """
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    tests = [file for file in files if path.is_dir() and file.name.startswith(TEST)]
    trains = [file for file in files if file not in tests]
    if not trains:
        raise ConfigError(f"{key}: {path} has no Parquet file to train on, such as train-00000-of-00001.parquet")
    first = next((begin for begin in TEST if any(file.name.startswith(begin) for file in tests)), "")
    return trains, [file for file in tests if file.name.startswith(first)]


def read_table(file: Path, key: str) -> Any:
    """A table of pyarrow.

    Raises: ConfigError
    """
    try:
        return import_module("pyarrow.parquet").read_table(file)
    except import_module("pyarrow").ArrowInvalid as error:
        raise ConfigError(f"{key}: {file} is not a Parquet file: {error}") from None


def image_columns(file: Path, key: str) -> list[str]:
    """The columns that hold encoded images.

    Raises: ConfigError
    """
    try:
        schema = import_module("pyarrow.parquet").read_schema(file)
    except import_module("pyarrow").ArrowInvalid as error:
        raise ConfigError(f"{key}: {file} is not a Parquet file: {error}") from None
    is_struct = import_module("pyarrow").types.is_struct
    return [one.name for one in schema if is_struct(one.type) and one.type.get_field_index("bytes") >= 0]


def class_names(table: Any, label: str) -> Sequence[str] | None:
    """What the numbers of a column of labels stand for, as data sets of Hugging Face tell; None if they do not."""
    described = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    names: Sequence[str] | None = described.get("info", {}).get("features", {}).get(label, {}).get("names")
    return names
