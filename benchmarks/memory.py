"""Peak memory of this process: allocated GPU memory, or resident memory on the CPU."""

import resource
import sys
from pathlib import Path

import torch


def memory_now(device: torch.device) -> int:
    """Bytes in use, or where the system does not tell, the most there were so far."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") or _largest()


def memory_peak(device: torch.device) -> int:
    """The most bytes in use so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") or _largest()


def _status(field: str) -> int | None:
    # On Linux ru_maxrss starts at what the parent process had, so the kernel's own counter goes first.
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")]
    return found[0] if found else None


def _largest() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
