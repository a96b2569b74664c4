"""Sweeps: every combination of the values that overrides list with commas, by Hydra's grammar, and their results."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from launch.watching.console import make_console
from parallel.files import write_atomically
from relora.errors import ConfigError

_FILE = "sweep.json"
_OWN = ("run.dir", "run.name")
_SHOWN = ("status", "steps", "train_loss", "val_loss", "tokens_per_second")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One run of a sweep."""

    words: list[str]
    chosen: list[str] = field(default_factory=list)
    """Those of the words that differ between runs."""


def expand(words: Sequence[str]) -> list[Choice]:
    """A run for each combination of values, the last list varying fastest.

    Raises:
        ConfigError: nothing is listed, or what names the folder is.
    """
    try:
        overrides = OverridesParser.create().parse_overrides(list(words))
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    listed: list[list[str]] = []
    swept = [override.is_sweep_override() for override in overrides]
    for override, word, is_swept in zip(overrides, words, swept, strict=True):
        key = word.partition("=")[0]
        if is_swept and key.lstrip("+") in _OWN:
            raise ConfigError(f"{key} must have one value in a sweep, whose runs are numbered in one folder: {word}")
        listed.append([f"{key}={value}" for value in override.sweep_string_iterator()] if is_swept else [word])
    if not any(swept):
        raise ConfigError(
            "--multirun needs a list of values, such as optimizer.lr=1e-3,3e-3: list some, or leave it out"
        )
    return [
        Choice(words=list(one), chosen=[word for word, is_swept in zip(one, swept, strict=True) if is_swept])
        for one in itertools.product(*listed)
    ]


def keep_choices(folder: Path, choices: Sequence[Choice]) -> None:
    """Write down what the numbered runs of a sweep's folder are.

    Raises:
        ConfigError: the folder holds another sweep.
    """
    text = json.dumps([choice.words for choice in choices])
    told = json.dumps([choice.chosen for choice in choices], indent=1)
    path = folder / _FILE
    if path.exists() and _read(folder)["words"] != json.loads(text):
        raise ConfigError(f"run.dir={folder} holds another sweep: give its command again to go on, or another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f'{{"chosen": {told},\n"words": {text}}}\n')


def is_sweep(folder: Path) -> bool:
    """Whether a folder holds the runs of a sweep."""
    return (folder / _FILE).is_file()


def show_sweep(folder: Path) -> None:
    """Print the runs of a sweep and their results, the best validation loss first."""
    rows = []
    for number, chosen in enumerate(_read(folder)["chosen"]):
        summary = _summary(folder / f"{number:03d}")
        rows.append((f"{number:03d}", " ".join(chosen), *(summary.get(key) for key in _SHOWN)))
    place = 2 + _SHOWN.index("val_loss")
    rows.sort(key=lambda row: (row[place] is None, row[place]))
    make_console(enabled=True).table(f"sweep {folder}", ("run", "values", *_SHOWN), rows)


def _summary(run: Path) -> dict[str, Any]:
    path = run / "summary.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {"status": "not ended"}


def _read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / _FILE).read_text(encoding="utf-8")))
