"""What a task may say of a labelled set: a name or a path, or a mapping with more."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from enum import Enum
from typing import Any

from continual.images import ImageForm
from relora.errors import ConfigError


class SetFormat(str, Enum):
    """How a labelled set lies on disk."""

    digits = "digits"
    """The handwritten digits that come with scikit-learn."""
    cifar = "cifar"
    """CIFAR-10 or CIFAR-100: the published archive for Python, unpacked."""
    parquet = "parquet"
    """Parquet files with a column of images, as on the Hugging Face Hub."""
    folders = "folders"
    """A folder of images for each class, maybe below train/ and test/."""
    lists = "lists"
    """Files NAME_train and NAME_test that list images and labels, as DomainNet has; NAME is a domain."""
    text = "text"
    """JSON Lines or Parquet with a text and a label."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SetSpec:
    """A labelled set as a configuration names it."""

    path: str
    """`digits`, or a file or folder."""
    format: SetFormat | None = None
    """null: found out from what is there."""
    image_size: int | None = None
    """Pixels of a side: images are cut to a square about their middle and resized; null: as they are."""
    channels: int | None = None
    """1: grey, 3: colour; null: as they are, or colour for files."""
    mean: float | None = None
    """Taken from pixels, which are in [0, 1]; null: 0."""
    std: float | None = None
    """What pixels are divided by then; null: 1."""
    domain: str | None = None
    """lists: the NAME of the lists to read; null: all."""
    test_fraction: float | None = None
    """Share of each class held out where the set has no test split; null: 0.2."""
    names: list[str] | None = None
    """Names of the classes that whole-number labels stand for."""
    prefix: str | None = None
    """Put before the names of classes, to tell them from those of another set."""
    text_field: str | None = None
    """text: the field with the text; null: text."""
    label_field: str | None = None
    """text and parquet: the field with the class; null: label, or fine_label where there is one."""

    @property
    def form(self) -> ImageForm:
        """How images become tensors."""
        return ImageForm(size=self.image_size, channels=self.channels, mean=self.mean or 0.0, std=self.std or 1.0)


_IMAGE = {"image_size", "channels", "mean", "std"}
USEFUL = {
    SetFormat.digits: {*_IMAGE, "test_fraction"},
    SetFormat.cifar: {*_IMAGE},
    SetFormat.parquet: {*_IMAGE, "test_fraction", "names", "label_field"},
    SetFormat.folders: {*_IMAGE, "test_fraction"},
    SetFormat.lists: {*_IMAGE, "domain", "names"},
    SetFormat.text: {"text_field", "label_field", "test_fraction", "names"},
}
"""Settings that have an effect on a format, beside path, format and prefix."""


def parse_set(value: Any, key: str) -> SetSpec:
    """The labelled set that a configuration value names.

    Raises: ConfigError
    """
    entry = {"path": value} if isinstance(value, str) else value
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str) or not entry["path"]:
        raise ConfigError(f"{key} must be the name or path of a labelled set, or a mapping with a path, got {value!r}")
    known = [field.name for field in fields(SetSpec)]
    for name in entry:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it may hold {', '.join(known)}"
            raise ConfigError(f"{key}.{name} is not a setting of a labelled set: {hint}")
    formats = [one.value for one in SetFormat]
    chosen = entry.get("format")
    if chosen is not None and chosen not in formats:
        raise ConfigError(f"{key}.format must be one of {', '.join(formats)}, got {chosen!r}")
    spec = SetSpec(**{**entry, "format": None if chosen is None else SetFormat(chosen)})
    _check(spec, key)
    return spec


def check_effect(spec: SetSpec, found: SetFormat, key: str) -> None:
    """Refuse settings that mean nothing to a format.

    Raises: ConfigError
    """
    for entry in fields(spec):
        always = entry.name in ("path", "format", "prefix")
        if not always and getattr(spec, entry.name) is not None and entry.name not in USEFUL[found]:
            raise ConfigError(f"{key}.{entry.name} has no effect on a set of format {found.value}: leave it out")


def _check(spec: SetSpec, key: str) -> None:
    size, fraction = spec.image_size, spec.test_fraction
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ConfigError(f"{key}.image_size must be a number of pixels, got {size!r}")
    if spec.channels not in (None, 1, 3):
        raise ConfigError(f"{key}.channels must be 1 (grey) or 3 (colour), got {spec.channels!r}")
    for name, least in (("mean", -math.inf), ("std", 0.0), ("test_fraction", 0.0)):
        number = getattr(spec, name)
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int | float) or not least < number < math.inf:
            raise ConfigError(f"{key}.{name} must be a number{' above 0' if least == 0 else ''}, got {number!r}")
    if fraction is not None and fraction >= 1:
        raise ConfigError(f"{key}.test_fraction must be below 1, got {fraction!r}")
    for name in ("domain", "prefix", "text_field", "label_field"):
        text = getattr(spec, name)
        if text is not None and (not isinstance(text, str) or not text):
            raise ConfigError(f"{key}.{name} must be text, got {text!r}")
    names = spec.names
    if names is not None and (not isinstance(names, list) or not all(isinstance(name, str) for name in names)):
        raise ConfigError(f"{key}.names must be a list of names, got {names!r}")
