"""How much arithmetic a step really does, and what share of the device's peak that is.

FLOPs are counted while a microbatch runs, not estimated as 6 per parameter and token: a frozen weight has no
weight gradient, and an activation that is computed twice counts twice. A multiply-add is 2 FLOPs; attention
counts in full, causal or not; what is no matrix product does not count.
"""

import math
import re
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, shape_wrapper

from relora.kernels.fused import factor_gradients, two_products

_aten = torch.ops.aten


def count_step_flops(run_microbatch: Callable[[], None]) -> int:
    """FLOPs of one call, which should run a microbatch forward and backward; it really runs, in this process.

    What runs inside a graph of torch.compile is not seen: count before compiling.
    """
    with FlopCounterMode(display=False, custom_mapping=_FURTHER) as counter:
        run_microbatch()
    return int(counter.get_total_flops())


def operation_flops(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """FLOPs of one call of an operator, as a dispatch mode sees it; by the same counts."""
    count = _BY_OPERATION.get(operation._overloadpacket)
    return 0 if count is None else int(count(*args, **kwargs, out_val=result))


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s of dense matrix products that the device can reach, and where the figure comes from.

    A known GPU's is its data sheet's; another device's is measured once per process, in about half a second.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = data_sheet_flops(name, dtype)
        if known is not None:
            return known, f"data sheet of {name}"
    return _measured_flops(str(device), dtype), "measured matrix product"


def mfu(flops: float, seconds: float, peak: float) -> float:
    """The share of the peak that executed FLOPs in some seconds make, all of one process and its device."""
    return flops / seconds / peak


def data_sheet_flops(name: str, dtype: torch.dtype) -> float | None:
    """Dense FLOP/s by the vendor's data sheet of a GPU with this name, or None if there is no figure."""
    words = set(re.split(r"[^A-Za-z0-9]+", name))
    if words & _OTHER_CHIPS:
        return None
    for needed, half, tf32, fp32 in _DATA_SHEETS:
        if words.issuperset(needed.split()):
            full = fp32 if torch.get_float32_matmul_precision() == "highest" else tf32
            teraflops = {torch.float32: full, torch.bfloat16: half}.get(dtype)
            return None if teraflops is None else teraflops * 1e12
    return None


# Words of the device name, then dense TFLOP/s in bf16 with fp32 accumulation, in TF32 and in fp32.
# Sources: NVIDIA's data sheets of H100 (PCIe, NVL, SXM), H200, HGX B200, A100, A40, L40S, L4, RTX A6000,
# RTX 6000 Ada and V100; its white papers on GA102 (RTX 3090) and Ada (RTX 4090); AMD's data sheet of MI300X.
# The first match counts.
_DATA_SHEETS: tuple[tuple[str, float | None, float, float], ...] = (
    ("B200", 2250.0, 1125.0, 75.0),
    ("H200 NVL", 835.5, 417.7, 60.0),
    ("H200", 989.4, 494.7, 66.9),
    ("H100 PCIe", 756.0, 378.0, 51.2),
    ("H100 NVL", 835.5, 417.7, 60.0),
    ("H100", 989.4, 494.7, 66.9),
    ("A100", 312.0, 156.0, 19.5),
    ("A40", 149.7, 74.8, 37.4),
    ("L40S", 362.0, 183.0, 91.6),
    ("L4", 121.0, 60.0, 30.3),
    ("RTX A6000", 154.8, 77.4, 38.7),
    ("RTX 6000 Ada", 364.2, 182.1, 91.1),
    ("RTX 4090", 165.2, 82.6, 82.6),
    ("RTX 3090", 71.0, 35.6, 35.6),
    ("V100 SXM2", None, 15.7, 15.7),
    ("V100 PCIE", None, 14.0, 14.0),
    ("MI300X", 1307.4, 653.7, 163.4),
)
_OTHER_CHIPS = {"Laptop", "MIG", "D"}  # named like a listed card, but less of it


@cache
def _measured_flops(device: str, dtype: torch.dtype) -> float:
    size = 1024 if device.startswith("cpu") else 8192
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    best, spent, runs = float("inf"), 0.0, 0
    while runs < 4 or (spent < 0.4 and runs < 100):
        began = time.perf_counter()
        left @ right
        if not device.startswith("cpu"):
            torch.accelerator.synchronize()
        elapsed = time.perf_counter() - began
        best, spent, runs = min(best, elapsed), spent + elapsed, runs + 1
    return 2 * size**3 / best


# FlopCounterMode knows no products in place, no kernels of ours, and the fused attention of GPUs only.
# Query (B, heads, T, d), key, value (B, group, S, d).
# The backward pass forms the scores anew, so it has five products where the forward pass has two.


def _attention_forward(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    batch, heads, queries, head_size = query
    return int(2 * batch * heads * queries * key[2] * (head_size + value[3]))


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    batch, heads, queries, head_size = query
    return int(2 * batch * heads * queries * key[2] * (3 * head_size + 2 * value[3]))


def _added_product(total: Any, left: Any, right: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * math.prod(left) * right[-1])


def _two_products(a: Any, b: Any, p: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * (math.prod(a) + math.prod(p)) * b[-1])


def _factor_gradients(outer: Any, up: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(4 * math.prod(outer) * up[-1])


_FURTHER = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten.addmm_: _added_product,
    _aten.baddbmm_: _added_product,
    two_products: _two_products,
    factor_gradients: _factor_gradients,
}
_BY_OPERATION: dict[Any, Callable[..., Any]] = {
    **flop_registry,
    **{operation: shape_wrapper(count) for operation, count in _FURTHER.items()},
}
