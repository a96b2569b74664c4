"""Text that ships with every Python, so that a run needs no download."""

import os
import sysconfig
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

# Tests repeat each other, pydoc_data is a corpus of its own, and build settings differ by machine.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}


def python_library() -> list[Path]:
    """The source of the standard library, without tests and installed packages."""
    found = []
    for folder, folders, names in os.walk(_place("stdlib")):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith("config-")]
        found += [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
    return found


def python_headers() -> list[Path]:
    """The C headers of the interpreter."""
    return [path for path in _place("include").rglob("*.h") if path.name != "pyconfig.h"]


def python_reference() -> list[str]:
    """The language reference, a document for each of its topics."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    return [topics[name] for name in sorted(topics)]


def _place(name: str) -> Path:
    return Path(sysconfig.get_paths()[name])


EMBEDDED_FILES: dict[str, tuple[Callable[[], list[Path]], Callable[[], Path]]] = {
    "python_library": (python_library, lambda: _place("stdlib")),
    "python_headers": (python_headers, lambda: _place("include")),
}
EMBEDDED = [*EMBEDDED_FILES, "python_reference"]
