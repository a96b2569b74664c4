"""What `data.path` may say: a name or a mapping for each source, and where to look for it."""

import glob
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from continual.corpora import COMPRESSED_LINES, PARQUET, Corpus, Files, Hub, Reference, Saved
from continual.embedded import EMBEDDED, EMBEDDED_FILES
from relora.errors import ConfigError

# In a folder, a .json file next to the data is more often a description than data.
RECORDS_IN_FOLDERS = (".jsonl", ".ndjson", *COMPRESSED_LINES, *PARQUET)
NAMED_LIKE_FILES = (*RECORDS_IN_FOLDERS, ".json", ".txt", ".md", ".py", ".csv", ".gz", ".zst", ".zip")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One entry of `data.path`."""

    path: str
    """An embedded corpus, a file, a folder, a pattern, or the name or folder of a Hugging Face data set."""
    weight: float | None = None
    """Share of the sequences relative to the other weights; None: in proportion to its sequences."""
    name: str | None = None
    """Configuration of a data set on the Hub, such as `en`."""
    split: str | None = None
    """Split of a Hugging Face data set; None: train."""
    revision: str | None = None
    """Commit, branch or tag of a data set on the Hub."""
    text_field: str | None = None
    """Field that holds the text; None: data.text_field."""


def parse_sources(value: Any, key: str) -> list[Source]:
    """The sources a configuration value names.

    Raises: ConfigError.
    """
    entries = [value] if isinstance(value, str | Mapping) else value
    if not isinstance(entries, Iterable) or not (entries := list(entries)):
        raise ConfigError(f"{key} must be a source or a list of at least one source, got {value!r}")
    sources = [_source(entry, f"{key}[{number}]") for number, entry in enumerate(entries)]
    unweighted = [source.path for source in sources if source.weight is None]
    if 0 < len(unweighted) < len(sources):
        raise ConfigError(f"{key}: every source or none must have a weight; {', '.join(unweighted)} has none")
    return sources


def find_corpus(source: Source, key: str) -> Corpus:
    """The corpus a source names, looked for among embedded ones, files and folders, and then on the Hub.

    Raises: ConfigError.
    """
    corpus = _find(source, Path(source.path).expanduser(), key)
    useful = {Hub: {"name", "split", "revision"}, Saved: {"split"}}.get(type(corpus), set())
    for setting in ("name", "split", "revision"):
        if getattr(source, setting) is not None and setting not in useful:
            raise ConfigError(f"{key}: {setting} has no effect on {source.path}; leave it out")
    return corpus


def _source(entry: Any, key: str) -> Source:
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{key} must be a path or a mapping with a path, got {entry!r}")
    known = [field.name for field in fields(Source)]
    for name in entry:
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it may hold {', '.join(known)}"
            raise ConfigError(f"{key}.{name} is not a setting of a source; {hint}")
    for name, value in entry.items():
        if name != "weight" and not (isinstance(value, str) and value) and (name == "path" or value is not None):
            raise ConfigError(f"{key}.{name} must be text, got {value!r}")
    weight = entry.get("weight")
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if weight is not None and not (is_number and 0 < weight < float("inf")):
        raise ConfigError(f"{key}.weight must be a number above 0, got {weight!r}")
    if "path" not in entry:
        raise ConfigError(f"{key} must have a path, got {dict(entry)!r}")
    return Source(**entry)


def _find(source: Source, path: Path, key: str) -> Corpus:
    if source.path in EMBEDDED:
        return _embedded(source.path, key)
    if path.is_file():
        return Files(path.name, path.parent, [path])
    if path.is_dir():
        return _folder(source, path, key)
    if glob.has_magic(source.path):
        return _pattern(source.path, path, key)
    if source.path.startswith(("/", ".", "~")) or source.path.count("/") > 1 or path.suffix in NAMED_LIKE_FILES:
        raise ConfigError(f"{key}: there is no file or folder {path.absolute()}; give one that exists")
    if close := get_close_matches(source.path, EMBEDDED, n=1, cutoff=0.8):
        raise ConfigError(f"{key}: {source.path} is no embedded corpus; did you mean {close[0]}?")
    label = f"{source.path}:{source.name}" if source.name else source.path
    return Hub(label, source.path, source.name, source.split or "train", source.revision)


def _embedded(name: str, key: str) -> Corpus:
    if name not in EMBEDDED_FILES:
        return Reference(name)
    list_files, base = EMBEDDED_FILES[name]
    if not (paths := list_files()):
        raise ConfigError(
            f"{key}: {name} is not part of this Python ({base()} has no such files); install its development "
            "files (python3-dev on Debian), or choose python_reference"
        )
    return Files(name, base(), sorted(paths))


def _folder(source: Source, folder: Path, key: str) -> Corpus:
    if (splits := folder / "dataset_dict.json").is_file():
        known = json.loads(splits.read_text())["splits"]
        split = source.split or "train"
        if split not in known:
            raise ConfigError(f"{key}: {folder} has no split {split!r}; set split to one of: {', '.join(known)}")
        return Saved(f"{folder.name}:{split}", folder / split)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        if source.split is not None:
            raise ConfigError(f"{key}: {folder} is a single split; leave out split={source.split!r}")
        return Saved(folder.name, folder)
    paths = _files_below(folder)
    paths = [path for path in paths if path.name.endswith(RECORDS_IN_FOLDERS)] or paths
    if not paths:
        raise ConfigError(f"{key}: the folder {folder} has no files")
    return Files(folder.name or str(folder), folder, paths)


def _files_below(folder: Path) -> list[Path]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _pattern(pattern: str, path: Path, key: str) -> Corpus:
    paths = sorted(found for name in glob.glob(str(path), recursive=True) if (found := Path(name)).is_file())
    if not paths:
        raise ConfigError(f"{key}: no file matches {pattern}; give a pattern that matches one")
    base = path
    while glob.has_magic(str(base)):
        base = base.parent
    return Files(pattern, base, paths)
