"""What a run folder tells about its run, finished or not: series of numbers, events, spectra, outcome, settings."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.watching.records import Record, read_records
from relora.errors import ConfigError

Series = tuple[list[int], list[float]]


@dataclass(kw_only=True, slots=True)
class History:
    """One run as its folder tells it."""

    name: str
    """What figures and tables call it."""
    steps: list[Record]
    """Records of logged steps."""
    events: list[Record]
    """Records of events."""
    spectra: list[Record]
    """One record per layer and restart, or sync; empty for a run without them."""
    summary: Record
    """The outcome; empty while the run is not finished."""
    config: dict[str, Any]
    """The settings by dotted key; empty if they cannot be read."""

    def series(self, key: str) -> Series:
        """A value over the steps that have it."""
        points = [(record["step"], record[key]) for record in self.steps if record.get(key) is not None]
        return [step for step, _ in points], [value for _, value in points]

    def validation(self) -> Series:
        """The validation loss over steps, whether it stands in steps or in events."""
        points = {
            record["step"]: record["val_loss"]
            for record in (*self.steps, *self.events)
            if record.get("val_loss") is not None and "step" in record
        }
        return sorted(points), [points[step] for step in sorted(points)]

    def marks(self, event: str) -> list[int]:
        """The steps after which an event came."""
        return [record["step"] for record in self.events if record["event"] == event]

    def syncs(self) -> list[Record]:
        """The syncs of LTE's heads, in order."""
        return [record for record in self.events if record["event"] == "sync"]

    def layers(self) -> dict[str, list[Record]]:
        """The spectra of each module in the order of restarts and syncs."""
        found: dict[str, list[Record]] = {}
        for record in sorted(self.spectra, key=lambda record: record["restart"]):
            found.setdefault(record["module"], []).append(record)
        return found


def read_history(folder: Path) -> History:
    """Read a run folder.

    Raises: ConfigError when there is no such folder, or nothing in it to tell of.
    """
    if not folder.is_dir():
        raise ConfigError(f"run folder {folder} does not exist: name the folder that training wrote (its run.dir)")
    metrics = folder / "metrics.jsonl"
    records = read_records(metrics) if metrics.exists() else []
    if not records:
        lack = "is empty" if metrics.exists() else "is missing"
        raise ConfigError(
            f"run folder {folder} has no metrics: its metrics.jsonl {lack}; "
            "name a run that has logged a step, or wait until it has"
        )
    spectra = folder / "spectra.jsonl"
    return History(
        name=folder.resolve().name,
        steps=[record for record in records if "event" not in record and "step" in record],
        events=[record for record in records if "event" in record],
        spectra=read_records(spectra) if spectra.exists() else [],
        summary=_read_summary(folder / "summary.json"),
        config=_read_config(folder / "config.yaml"),
    )


def read_histories(folders: Sequence[Path]) -> list[History]:
    """Read run folders and give each run a name of its own.

    Raises: ConfigError as read_history does.
    """
    histories = [read_history(folder) for folder in folders]
    names = [history.name for history in histories]
    for number, (history, folder) in enumerate(zip(histories, folders, strict=True), start=1):
        if names.count(history.name) > 1:
            history.name = f"{folder.resolve().parent.name}/{history.name}"
        if [other.name for other in histories].count(history.name) > 1:
            history.name = f"{history.name} ({number})"
    return histories


def differences(histories: Sequence[History]) -> list[list[Any]]:
    """Rows of a key and its value in each run, for the settings in which the runs differ."""
    keys = dict.fromkeys(key for history in histories for key in history.config)
    rows = [[key, *(history.config.get(key) for history in histories)] for key in keys]
    return [row for row in rows if any(value != row[1] for value in row[2:])]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return found


def _read_summary(path: Path) -> Record:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not finished, or just being written
        return {}
    return summary if isinstance(summary, dict) else {}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, yaml.YAMLError):
        return {}
    return flat(config) if isinstance(config, Mapping) else {}
