"""Where kernels can run: whether Triton is there, and what its interpreter cannot do."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ONE_PASS_RANK = 16
"""The largest adapter rank of the one-pass gradients. A block of 64 rows that adds to d_up reads and writes 8 bytes
for each of its entries, to save a second reading of 128 bytes for each column of dY in bfloat16."""


@cache
def has_triton() -> bool:
    """Tell whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def run_on(device: torch.device) -> bool:
    """Tell whether kernels can work on a device."""
    return has_triton() and (device.type == "cuda" or INTERPRETED)


def widened(*factors: Tensor) -> bool:
    """Tell whether a product takes its factors in float32: the interpreter's bfloat16 products are wrong."""
    return INTERPRETED or any(one.dtype == torch.float32 for one in factors)
