"""Readers of labelled images: the embedded digits, CIFAR's archive, Parquet files, class folders and lists of files."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from continual.documents import UnreadableError
from continual.file_lists import find_lists, read_list
from continual.images import ArrayImages, EncodedImages
from continual.labelled import LabelledSet, Modality, Part
from continual.order import Indices
from continual.parquet_tables import TEST, class_names, image_columns, read_table, split_tables
from continual.plain_pickle import load_plain
from continual.set_spec import SetSpec
from relora.errors import ConfigError

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
TRAIN = ("train",)


def read_digits(spec: SetSpec, path: Path, key: str) -> LabelledSet:
    """1797 handwritten digits of 8 x 8 pixels. Source: Alpaydin and Kaynak 1998, by way of scikit-learn."""
    bunch = import_module("sklearn.datasets").load_digits()
    pixels = (bunch.images[:, None] / 16.0).astype(np.float32)
    content = ArrayImages(pixels=pixels, form=spec.form)
    train = Part(content=content, labels=bunch.target.astype(np.int64))
    return _set("digits", [str(name) for name in bunch.target_names], train, None)


def read_cifar(spec: SetSpec, path: Path, key: str) -> LabelledSet:
    """CIFAR-100's files train, test and meta, or CIFAR-10's data_batch_1 to 5, test_batch and batches.meta.

    Raises: ConfigError
    """
    hundred = (path / "meta").is_file()
    named = "fine_label_names" if hundred else "label_names"
    meta = _unpickled(path / ("meta" if hundred else "batches.meta"), key, named)
    names = [str(name) for name in meta[named]]
    label = "fine_labels" if hundred else "labels"
    trains = [path / "train"] if hundred else sorted(path.glob("data_batch_*"))

    def part(files: Sequence[Path]) -> Part:
        found = [_unpickled(file, key, label, "data") for file in files]
        labels = np.concatenate([np.asarray(one[label], dtype=np.int64) for one in found])
        rows = np.concatenate([np.asarray(one["data"], dtype=np.uint8) for one in found])
        check_labels(labels, len(names), f"{key}: {files[0]}")
        if rows.shape != (len(labels), 3072):
            raise ConfigError(f"{key}: {files[0]} holds {len(labels)} labels and pixels of shape {rows.shape}")
        return Part(content=ArrayImages(pixels=rows.reshape(-1, 3, 32, 32), form=spec.form), labels=labels)

    return _set(path.name, names, part(trains), part([path / ("test" if hundred else "test_batch")]))


def read_parquet(spec: SetSpec, path: Path, key: str) -> LabelledSet:
    """Parquet files with a column of encoded images; the split is told by the file's name.

    Raises: ConfigError
    """
    trains, tests = split_tables(path, key)
    train_rows = _parquet_rows(trains, spec, key)
    names = spec.names or train_rows.names
    raw = [str(label) for label in train_rows.labels]
    if names is None:
        names = sorted(set(raw), key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))

    def part(rows: "_Rows") -> Part:
        content = EncodedImages(sources=rows.images, names=rows.places, form=spec.form)
        return Part(content=content, labels=numbered(rows.labels, names, str(path), key))

    return _set(path.stem, names, part(train_rows), part(_parquet_rows(tests, spec, key)) if tests else None)


def read_folders(spec: SetSpec, path: Path, key: str) -> LabelledSet:
    """A folder for each class, below train/ and test/ (or val/) or at once; the classes in the order of their names.

    Raises: ConfigError
    """
    train = next((path / name for name in TRAIN if (path / name).is_dir()), None)
    test = next((path / name for name in TEST if (path / name).is_dir()), None) if train else None
    base = train or path
    names = sorted(one.name for one in base.iterdir() if one.is_dir() and not one.name.startswith("."))
    if not names:
        raise ConfigError(f"{key}: {base} has no folder for a class")
    if test is not None:
        extra = [one.name for one in sorted(test.iterdir()) if one.is_dir() and one.name not in names]
        if extra:
            raise ConfigError(f"{key}: {test} has classes that {base} lacks: {', '.join(extra[:5])}")

    def part(folder: Path) -> Part:
        files = [
            (file, number)
            for number, name in enumerate(names)
            for file in sorted((folder / name).rglob("*"))
            if file.suffix.lower() in ENDINGS
        ]
        return _of_files([file for file, _ in files], [number for _, number in files], path, spec)

    return _set(path.name, names, part(base), part(test) if test is not None else None)


def read_lists(spec: SetSpec, path: Path, key: str) -> LabelledSet:
    """Files NAME_train and NAME_test that list images and labels; several NAMEs are domains.

    Raises: ConfigError
    """
    domains = find_lists(path)
    chosen = [name for name in domains if spec.domain in (None, name)]
    if not chosen:
        known = ", ".join(domains) or "none"
        raise ConfigError(f"{key}.domain={spec.domain}: {path} has lists of {known}")
    sides = {}
    try:
        for side in ("train", "test"):
            lists = [domains[name][side] for name in chosen if side in domains[name]]
            found = [read_list(one, path) for one in lists]
            files = [file for one, _ in found for file in one]
            labels = np.concatenate([np.asarray(some, dtype=np.int64) for _, some in found] or [np.zeros(0, np.int64)])
            sides[side] = files, labels
    except UnreadableError as error:
        raise ConfigError(f"{key}: {error}") from error
    names = spec.names or _names_of(sides)
    parts = {}
    for side, (files, labels) in sides.items():
        check_labels(labels, len(names), f"{key}: the {side} lists of {path}")
        parts[side] = _of_files(files, labels.tolist(), path, spec)
    name = f"{path.name}:{spec.domain}" if spec.domain else path.name
    return _set(name, names, parts["train"], parts["test"] if len(parts["test"].labels) else None)


def check_labels(labels: Indices, count: int, where: str) -> None:
    """Refuse labels that stand for no class.

    Raises: ConfigError
    """
    outside = np.flatnonzero((labels < 0) | (labels >= count))
    if len(outside):
        raise ConfigError(
            f"{where}: label {labels[outside[0]]} of sample {outside[0]} is out of range: with {count} classes, labels "
            f"are 0 to {count - 1}"
        )


def numbered(labels: Sequence[Any], names: Sequence[str], where: str, key: str) -> Indices:
    """The numbers of classes that labels stand for, which are names, or numbers of names.

    Raises: ConfigError
    """
    place = {name: number for number, name in enumerate(names)}
    numbers = np.zeros(len(labels), dtype=np.int64)
    for row, label in enumerate(labels):
        if label is None:
            raise ConfigError(f"{key}: sample {row} of {where} has no label: give it one, or remove it")
        if str(label) in place:
            numbers[row] = place[str(label)]
        elif isinstance(label, int) and not isinstance(label, bool):
            check_labels(np.array([label]), len(names), f"{key}: {where}, sample {row}")
            numbers[row] = label
        else:
            raise ConfigError(f"{key}: sample {row} of {where} has the label {label!r}, which is not among its classes")
    return numbers


class _Rows:
    """Rows of Parquet files."""

    def __init__(self) -> None:
        self.images: list[bytes] = []
        self.labels: list[Any] = []
        self.places: list[str] = []
        self.names: list[str] | None = None


def _parquet_rows(files: Sequence[Path], spec: SetSpec, key: str) -> _Rows:
    rows = _Rows()
    for file in files:
        table, images = read_table(file, key), image_columns(file, key)
        columns = table.schema.names
        label = spec.label_field or ("fine_label" if "fine_label" in columns else "label")
        if not images or label not in columns:
            raise ConfigError(
                f"{key}: {file} needs a column of images with bytes, and one of labels, {label!r}; it has "
                f"{', '.join(columns)}: set {key}.label_field"
            )
        encoded = table.column(images[0]).to_pylist()
        if missing := [number for number, one in enumerate(encoded) if not one or not one["bytes"]]:
            raise ConfigError(f"{key}: row {missing[0]} of {file} has no image")
        rows.images += [one["bytes"] for one in encoded]
        rows.labels += table.column(label).to_pylist()
        rows.places += [f"{file.name}, row {number}" for number in range(len(encoded))]
        rows.names = list(class_names(table, label) or rows.names or []) or None
    return rows


def _unpickled(path: Path, key: str, *wanted: str) -> dict[str, Any]:
    try:
        found = load_plain(path)
    except (UnreadableError, OSError) as error:
        raise ConfigError(f"{key}: {path} is not a file of CIFAR's archive for Python ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{key}: {path} is not a file of CIFAR's archive for Python: it holds no dictionary")
    entries = {name.decode() if isinstance(name, bytes) else str(name): value for name, value in found.items()}
    if missing := [name for name in wanted if name not in entries]:
        raise ConfigError(f"{key}: {path} is not a file of CIFAR's archive for Python: it lacks {missing[0]}")
    return entries


def _names_of(sides: dict[str, tuple[list[Path], Indices]]) -> list[str]:
    """The folders that files of one label are in, where each label has one of its own; else the labels."""
    folders: dict[int, set[str]] = {}
    for files, labels in sides.values():
        for file, label in zip(files, labels.tolist(), strict=True):
            folders.setdefault(label, set()).add(file.parent.name)
    names = [next(iter(folders.get(label, {str(label)}))) for label in range(max(folders, default=-1) + 1)]
    alone = all(len(found) == 1 for found in folders.values()) and len(set(names)) == len(names)
    return names if alone else [str(label) for label in range(len(names))]


def _of_files(files: Sequence[Path], labels: Sequence[int], base: Path, spec: SetSpec) -> Part:
    names = [file.relative_to(base).as_posix() if file.is_relative_to(base) else file.name for file in files]
    content = EncodedImages(sources=files, names=names, form=spec.form)
    return Part(content=content, labels=np.asarray(labels, dtype=np.int64))


def _set(name: str, classes: list[str], train: Part, test: Part | None) -> LabelledSet:
    return LabelledSet(name=name, modality=Modality.images, classes=classes, train=train, test=test)
