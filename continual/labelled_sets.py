"""Labelled sets by name or path: which format a path has, and who reads it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from continual.image_sets import read_cifar, read_digits, read_folders, read_lists, read_parquet
from continual.labelled import LabelledSet, renamed
from continual.parquet_tables import image_columns
from continual.set_spec import SetFormat, SetSpec, check_effect
from continual.text_sets import read_texts
from relora.errors import ConfigError

READERS: dict[SetFormat, Callable[[SetSpec, Path, str], LabelledSet]] = {
    SetFormat.digits: read_digits,
    SetFormat.cifar: read_cifar,
    SetFormat.parquet: read_parquet,
    SetFormat.folders: read_folders,
    SetFormat.lists: read_lists,
    SetFormat.text: read_texts,
}
LISTS = ("txt", "yaml", "yml", "json")
RECORDS = (".jsonl", ".ndjson")


def open_set(spec: SetSpec, key: str) -> LabelledSet:
    """A labelled set, its images still undecoded.

    Raises: ConfigError
    """
    path = Path(spec.path).expanduser()
    found = spec.format or _format(spec.path, path, key)
    check_effect(spec, found, key)
    labelled = READERS[found](spec, path, key)
    if labelled.test is not None and spec.test_fraction is not None:
        raise ConfigError(f"{key}.test_fraction has no effect: {labelled.name} has a test split of its own")
    if spec.test_fraction is not None:
        labelled = replace(labelled, test_fraction=spec.test_fraction)
    return renamed(labelled, spec.prefix)


def _format(name: str, path: Path, key: str) -> SetFormat:
    if name == "digits":
        return SetFormat.digits
    if path.is_file():
        return _of_table(path, key) if path.suffix == ".parquet" else SetFormat.text
    if not path.is_dir():
        raise ConfigError(f"{key}: there is no file or folder {path.absolute()}: give one that exists, or digits")
    hundred = all((path / side).is_file() for side in ("train", "test", "meta"))
    if hundred or (path / "data_batch_1").is_file():
        return SetFormat.cifar
    if (table := next(path.rglob("*.parquet"), None)) is not None:
        return _of_table(table, key)
    tests = {
        SetFormat.lists: any(next(path.glob(f"*_train.{ending}"), None) for ending in LISTS),
        SetFormat.text: any(one.suffix in RECORDS or one.name == "train.json" for one in path.iterdir()),
        SetFormat.folders: any(one.is_dir() and not one.name.startswith(".") for one in path.iterdir()),
    }
    for found, holds in tests.items():
        if holds:
            return found
    raise ConfigError(
        f"{key}: {path} holds no labelled set of a known format: see docs/streams.md, or set {key}.format"
    )


def _of_table(file: Path, key: str) -> SetFormat:
    """Images or texts, which have readers of their own."""
    return SetFormat.parquet if image_columns(file, key) else SetFormat.text
