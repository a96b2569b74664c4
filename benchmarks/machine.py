"""What a benchmark ran on: the machine without its name, and the versions."""

import os
import platform
from importlib import metadata
from typing import Any

import torch

from launch.environment import processor

_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "numpy")


def device_here() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, memory, and the GPU where one is used."""
    found: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": "cpu",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "device_memory_bytes": properties.total_memory}
    return found


def versions() -> dict[str, str]:
    """Python and the packages that decide speed and numbers."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}}
