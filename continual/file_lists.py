"""Files that list images and labels: lines of text as DomainNet has them, or YAML and JSON as InfLoRA's code has.

A line is a path and a label. YAML and JSON hold `data` (paths) and `targets` (labels). Paths are below the folder of
the set; leading folders that are not there, such as those of another machine, are left out.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from continual.documents import UnreadableError

STRUCTURED = (".yaml", ".yml", ".json")


def find_lists(folder: Path) -> dict[str, dict[str, Path]]:
    """The lists of each NAME by side: NAME_train and NAME_test."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        name, _, side = path.stem.rpartition("_")
        if name and side in ("train", "test") and path.suffix in (".txt", *STRUCTURED):
            found.setdefault(name, {})[side] = path
    return {name: sides for name, sides in found.items() if "train" in sides}


def read_list(path: Path, folder: Path) -> tuple[list[Path], list[int]]:
    """The images and labels of a list.

    Raises: UnreadableError
    """
    names, labels = _structured(path) if path.suffix in STRUCTURED else _lines(path)
    files: list[Path] = []
    dropped: int | None = None
    for name in names:
        parts = Path(name).parts
        if dropped is None:
            dropped = next((cut for cut in range(len(parts)) if folder.joinpath(*parts[cut:]).is_file()), 0)
        files.append(folder.joinpath(*parts[dropped:]))
        if not files[-1].is_file():
            raise UnreadableError(f"{path} lists {name}, which is not below {folder}")
    return files, labels


def _lines(path: Path) -> tuple[list[str], list[int]]:
    names, labels = [], []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.lstrip("-").isdigit():
            raise UnreadableError(f"{path}, line {number}: a line is the path of an image, a space and its label")
        names.append(name)
        labels.append(int(label))
    return names, labels


def _structured(path: Path) -> tuple[list[str], list[int]]:
    text = path.read_text()
    try:
        found: Any = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=_loader())
    except (ValueError, yaml.YAMLError) as error:
        raise UnreadableError(f"{path} is neither JSON nor YAML ({error})") from None
    names, labels = (found.get("data"), found.get("targets")) if isinstance(found, dict) else (None, None)
    if not isinstance(names, list) or not isinstance(labels, list) or len(names) != len(labels):
        raise UnreadableError(f"{path} must hold data and targets, two lists of one length")
    if not all(isinstance(label, int) and not isinstance(label, bool) for label in labels):
        raise UnreadableError(f"{path}: targets must be whole numbers")
    return [str(name) for name in names], labels


def _loader() -> Any:
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)
