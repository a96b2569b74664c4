"""Where kernels can run: whether Triton is there, and what its interpreter cannot do."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@cache
def has_triton() -> bool:
    """Tell whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def runs_on(tensor: Tensor) -> bool:
    """Tell whether kernels can work on a tensor."""
    return has_triton() and (tensor.is_cuda or INTERPRETED)


def widened(*factors: Tensor) -> bool:
    """Tell whether a product takes its factors in float32: the interpreter's bfloat16 products are wrong."""
    return INTERPRETED or any(one.dtype == torch.float32 for one in factors)
