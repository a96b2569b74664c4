"""Pickles of plain values and NumPy arrays, as CIFAR is published in. Anything else in them is refused."""

import pickle
from codecs import encode
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from continual.documents import UnreadableError


def load_plain(path: Path) -> Any:
    """What a pickle holds, if that is only plain values and arrays.

    Raises: UnreadableError
    """
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UnreadableError(f"{path}: {error}") from error


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoded in {encoding}")
    return encode(text, encoding)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The few names that arrays and bytes are made of."""
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _reconstruct
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is no plain value")


def _reconstruct(*arguments: Any) -> Any:
    home = "numpy._core.multiarray" if hasattr(np, "_core") else "numpy.core.multiarray"
    return import_module(home)._reconstruct(*arguments)
